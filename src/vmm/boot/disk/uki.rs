//! Unified kernel images: a PE file with kernel, initrd and command line as sections.

use super::filesystem::{FileReader, FileSystem, read_exact};
use super::menu::{Boot, Piece};
use super::read::{ReadError, invalid, u16_at, u32_at};

/// The headers lie at the start; linkers put them within the first page or two.
const HEADERS_BYTES_MAX: u64 = 64 << 10;
const TEXT_BYTES_MAX: u64 = 64 << 10;
const SECTION_BYTES: usize = 40;
const SECTIONS_MAX: usize = 96;

pub(super) struct Image {
    pub boot: Boot,
    pub title: Option<String>,
    pub version: String,
    pub sort_key: Option<String>,
}

pub(super) fn read(place: usize, file_system: &FileSystem, path: &str) -> Result<Image, ReadError> {
    let mut file = file_system.open(path)?;
    let file = file.as_mut();
    let bytes = file.size_bytes();
    let mut headers = vec![0; bytes.min(HEADERS_BYTES_MAX) as usize];
    read_exact(file, &mut headers)?;
    let sections = sections(&headers, bytes)?;
    // The first of a name counts: later ones belong to other profiles.
    let find = |name: &[u8]| sections.iter().find(|section| section.name == name);
    let Some(kernel) = find(b".linux") else {
        return invalid("no unified kernel image: it has no .linux section");
    };
    let piece = |section: &Section| Piece {
        place,
        path: path.to_owned(),
        part: Some((section.offset, section.bytes)),
    };
    let initrds =
        [b".ucode".as_slice(), b".initrd"].iter().filter_map(|name| find(name)).map(piece).collect();
    let kernel = piece(kernel);
    let text = |file: &mut dyn FileReader, name: &[u8]| match find(name) {
        Some(section) => section.text(file),
        None => Ok(String::new()),
    };
    let cmdline = text(file, b".cmdline")?.trim().to_owned();
    let release = text(file, b".osrel")?;
    let field = |name: &str| {
        let value = release.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        value.map(|value| value.trim_matches(['"', '\'']).to_owned())
    };
    let uname = Some(text(file, b".uname")?.trim().to_owned()).filter(|uname| !uname.is_empty());
    Ok(Image {
        boot: Boot { kernel, initrds, cmdline },
        title: field("PRETTY_NAME"),
        version: field("IMAGE_VERSION").or(uname).or_else(|| field("VERSION_ID")).unwrap_or_default(),
        sort_key: field("IMAGE_ID").or_else(|| field("ID")),
    })
}

struct Section {
    name: Vec<u8>,
    offset: u64,
    bytes: u64,
}

impl Section {
    fn text(&self, file: &mut dyn FileReader) -> Result<String, ReadError> {
        if self.bytes > TEXT_BYTES_MAX {
            return Err(ReadError::TooLarge { bytes: self.bytes, max: TEXT_BYTES_MAX });
        }
        let mut data = vec![0; self.bytes as usize];
        file.seek(self.offset)?;
        read_exact(file, &mut data)?;
        Ok(String::from_utf8_lossy(&data).trim_end_matches('\0').to_owned())
    }
}

fn sections(headers: &[u8], file_bytes: u64) -> Result<Vec<Section>, ReadError> {
    let pe = u32_at(headers, 0x3c) as usize;
    if !headers.starts_with(b"MZ") || headers.get(pe..).is_none_or(|rest| !rest.starts_with(b"PE\0\0")) {
        return invalid("no PE file");
    }
    let count = usize::from(u16_at(headers, pe + 6)).min(SECTIONS_MAX);
    let table = pe + 24 + usize::from(u16_at(headers, pe + 20));
    let mut found = Vec::new();
    for index in 0..count {
        let at = table + index * SECTION_BYTES;
        let Some(header) = headers.get(at..at + SECTION_BYTES) else { break };
        // What the file holds of a section is rounded up, and the rest of it is not its content.
        let bytes = u64::from(u32_at(header, 8).min(u32_at(header, 16)));
        let offset = u64::from(u32_at(header, 20));
        if offset + bytes > file_bytes {
            return invalid("a section that lies beyond the file's end");
        }
        let name = header[..8].split(|&byte| byte == 0).next().unwrap_or_default().to_vec();
        found.push(Section { name, offset, bytes });
    }
    Ok(found)
}
