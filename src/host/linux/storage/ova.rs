//! OVAs: a tar archive of an OVF description and the disks that it names. Nothing is unpacked to a name: a
//! disk is read where it lies in the archive, so no name in it can lead anywhere.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;

use super::vmdk::Window;

const BLOCK_BYTES: u64 = 512;
const MEMBERS_MAX: usize = 1000;
const OVF_BYTES_MAX: u64 = 1 << 20;
const XML_NODES_MAX: u32 = 100_000;
const NAME_CHARS_MAX: usize = 200;

/// A disk that the OVF names, and where it lies.
#[derive(Debug)]
pub struct Disk<'a> {
    pub name: String,
    pub window: Window<'a>,
}

struct Member<'a> {
    name: String,
    window: Window<'a>,
}

fn malformed(why: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.into())
}

/// Whether a file begins as a tar archive.
pub fn is_tar(prefix: &[u8]) -> bool {
    prefix.get(257..262) == Some(b"ustar")
}

/// The disks of an archive in a file of `bytes`.
pub fn disks(file: &File, bytes: u64) -> io::Result<Vec<Disk<'_>>> {
    let members = members(Window { file, start: 0, bytes })?;
    let mut descriptions = members.iter().filter(|member| member.name.to_lowercase().ends_with(".ovf"));
    let (Some(ovf), None) = (descriptions.next(), descriptions.next()) else {
        return Err(malformed("it has no OVF description, or several"));
    };
    if ovf.window.bytes > OVF_BYTES_MAX {
        return Err(malformed(format!("its OVF description has {} bytes (at most 1 MiB)", ovf.window.bytes)));
    }
    let mut text = vec![0; ovf.window.bytes as usize];
    ovf.window.read(&mut text, 0)?;
    let text = String::from_utf8(text).map_err(|_| malformed("its OVF description isn't UTF-8"))?;
    let mut disks = Vec::new();
    for name in disk_files(&text)? {
        let Some(member) = members.iter().find(|member| member.name == name) else {
            return Err(malformed(format!("its disk `{name}` is not in it")));
        };
        disks.push(Disk { name, window: member.window });
    }
    Ok(disks)
}

/// The one disk, or the one of this name.
pub fn disk<'a>(file: &'a File, bytes: u64, wanted: Option<&str>) -> io::Result<Disk<'a>> {
    choose(disks(file, bytes)?, |disk| &disk.name, wanted).map_err(malformed)
}

/// The one, or the one of this name; an error says which there are.
pub fn choose<T>(mut disks: Vec<T>, name: impl Fn(&T) -> &str, wanted: Option<&str>) -> Result<T, String> {
    let there = || disks.iter().map(&name).collect::<Vec<_>>().join(", ");
    let index = match wanted {
        Some(wanted) => disks
            .iter()
            .position(|disk| name(disk) == wanted)
            .ok_or_else(|| format!("it has no disk `{wanted}`; its disks are: {}", there()))?,
        None if disks.len() == 1 => 0,
        None if disks.is_empty() => return Err("it has no disk".to_owned()),
        None => return Err(format!("it has several disks ({}); say which by `disk`", there())),
    };
    Ok(disks.swap_remove(index))
}

fn members(archive: Window<'_>) -> io::Result<Vec<Member<'_>>> {
    let mut members: Vec<Member<'_>> = Vec::new();
    let mut at = 0;
    // Two blocks of zeroes end it; many writers leave them out at the file's end.
    while at + BLOCK_BYTES <= archive.bytes {
        let mut header = [0; BLOCK_BYTES as usize];
        archive.read(&mut header, at)?;
        if header.iter().all(|byte| *byte == 0) {
            break;
        }
        check_sum(&header)?;
        let bytes = number(&header[124..136])?;
        let start = at + BLOCK_BYTES;
        let end = start.checked_add(bytes).filter(|end| *end <= archive.bytes);
        let end = end.ok_or_else(|| malformed("a file in it goes on beyond its end (it is cut off)"))?;
        if members.len() == MEMBERS_MAX {
            return Err(malformed(format!("it has more than {MEMBERS_MAX} files")));
        }
        // '0' and NUL: a file. All else (links, directories, devices) is nothing that an OVA has.
        if !matches!(header[156], b'0' | 0) {
            return Err(malformed("it holds something else than files"));
        }
        let name = name_of(&header)?;
        if members.iter().any(|member| member.name == name) {
            return Err(malformed(format!("it holds `{name}` twice")));
        }
        members.push(Member { name, window: Window { file: archive.file, start, bytes } });
        at = end.next_multiple_of(BLOCK_BYTES);
    }
    Ok(members)
}

fn check_sum(header: &[u8; 512]) -> io::Result<()> {
    let sum: u64 = header
        .iter()
        .enumerate()
        .fold(0, |sum, (at, byte)| sum + u64::from(if (148..156).contains(&at) { b' ' } else { *byte }));
    match number(&header[148..156])? == sum {
        true => Ok(()),
        false => Err(malformed("it is damaged: a header's sum is wrong")),
    }
}

/// Octal digits, or after a first bit that is set 8 big-endian bytes at the end (for what octal can't hold).
fn number(field: &[u8]) -> io::Result<u64> {
    if field[0] & 0x80 != 0 {
        let (head, tail) = field.split_at(field.len() - 8);
        let mut rest = head.iter().enumerate();
        if !rest.all(|(at, byte)| *byte == if at == 0 { 0x80 } else { 0 }) {
            return Err(malformed("a number in it is beyond all bounds"));
        }
        return Ok(tail.iter().fold(0, |all, byte| all << 8 | u64::from(*byte)));
    }
    let text = std::str::from_utf8(field).unwrap_or("?").trim_matches(['\0', ' ']);
    u64::from_str_radix(text, 8).map_err(|_| malformed("a number in it is damaged"))
}

/// A plain name. A prefix would make a path of it.
fn name_of(header: &[u8; 512]) -> io::Result<String> {
    let text = |field: &[u8]| {
        let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
        String::from_utf8(field[..end].to_vec()).unwrap_or_default()
    };
    let (name, prefix) = (text(&header[..100]), text(&header[345..500]));
    // GNU's magic has other things where the prefix is.
    let has_prefix = &header[257..263] == b"ustar\0" && !prefix.is_empty();
    if has_prefix || !is_plain(&name) {
        return Err(malformed("a file in it has a path, or no plain name"));
    }
    Ok(name)
}

fn is_plain(name: &str) -> bool {
    super::directory::is_plain(name) && !name.contains('\\')
}

/// The files of the OVF's disks, each once.
fn disk_files(text: &str) -> io::Result<Vec<String>> {
    let options =
        roxmltree::ParsingOptions { allow_dtd: false, nodes_limit: XML_NODES_MAX, ..Default::default() };
    let document = roxmltree::Document::parse_with_options(text, options)
        .map_err(|error| malformed(format!("its OVF description is no good XML: {error}")))?;
    let attribute = |node: &roxmltree::Node<'_, '_>, name: &str| {
        node.attributes()
            .find(|attribute| attribute.name() == name)
            .map(|attribute| attribute.value().to_owned())
    };
    let elements = |name: &'static str| {
        document.descendants().filter(move |node| node.is_element() && node.tag_name().name() == name)
    };
    // Looked up, not searched for: a hostile description may have ten thousands of either.
    let files: BTreeMap<String, roxmltree::Node<'_, '_>> =
        elements("File").filter_map(|file| Some((attribute(&file, "id")?, file))).collect();
    let mut names = Vec::new();
    // Disks without a file are blank ones, which an Image isn't made of.
    let references: BTreeSet<String> =
        elements("Disk").filter_map(|disk| attribute(&disk, "fileRef")).collect();
    if references.len() > MEMBERS_MAX {
        return Err(malformed(format!("its OVF description names more than {MEMBERS_MAX} disks")));
    }
    for reference in references {
        let file = files
            .get(&reference)
            .ok_or_else(|| malformed("its OVF description refers to a file that it doesn't list"))?;
        let name = attribute(file, "href").unwrap_or_default();
        if !is_plain(&name) || name.chars().count() > NAME_CHARS_MAX {
            return Err(malformed("its OVF description names a file elsewhere"));
        }
        let packed =
            attribute(file, "compression").is_some_and(|method| method != "identity" && !method.is_empty());
        if packed || attribute(file, "chunkSize").is_some() {
            return Err(malformed(format!("its disk `{name}` is compressed as a whole, or in chunks")));
        }
        if !names.contains(&name) {
            names.push(name);
        }
    }
    Ok(names)
}
