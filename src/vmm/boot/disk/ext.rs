//! ext2, ext3 and ext4, by `ext4-view`, which checks checksums and replays the journal in memory.
//!
//! The crate is careful, but it takes sizes on trust: it allocates what a superblock or a symbolic link
//! claims. So the superblock is looked at before, and links are followed here. What it does in loops that
//! need no reading can't be stopped from here; the search as a whole has a deadline outside its thread.

use ext4_view::{Ext4, Ext4Error, Ext4Read, File, Metadata};

use super::filesystem::{FileReader, NAMES_MAX, Name, append};
use super::read::{ReadError, Volume, invalid, u16_at, u32_at};

const BLOCK_BYTES_EXPONENT_MAX: u32 = 16;
/// 32 TiB in groups of the usual size.
const GROUPS_MAX: u64 = 1 << 18;
const LINKS_MAX: usize = 32;
const LINK_BYTES_MAX: u64 = 1024;

pub(super) struct Ext {
    ext4: Ext4,
}

struct Reader(Volume);

impl Ext4Read for Reader {
    fn read(
        &mut self,
        start: u64,
        data: &mut [u8],
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync + 'static>> {
        Ok(self.0.read(start, data)?)
    }
}

impl Ext {
    pub fn open_volume(volume: &Volume) -> Result<Self, ReadError> {
        check_superblock(volume)?;
        let ext4 = Ext4::load(Box::new(Reader(volume.clone()))).map_err(explain)?;
        Ok(Self { ext4 })
    }

    pub fn uuid(&self) -> String {
        self.ext4.uuid().to_string()
    }

    pub fn label(&self) -> String {
        self.ext4.label().display().to_string()
    }

    pub fn open(&self, components: &[&str]) -> Result<Box<dyn FileReader>, ReadError> {
        let (path, metadata) = self.resolve(components)?;
        if metadata.is_dir() {
            return invalid("a directory");
        }
        let file = self.ext4.open(path.as_str()).map_err(explain)?;
        Ok(Box::new(ExtFile { bytes: metadata.len(), file }))
    }

    pub fn list(&self, components: &[&str]) -> Result<Vec<Name>, ReadError> {
        let (path, metadata) = self.resolve(components)?;
        if !metadata.is_dir() {
            return invalid("no directory");
        }
        let mut names = Vec::new();
        for entry in self.ext4.read_dir(path.as_str()).map_err(explain)?.take(NAMES_MAX) {
            let entry = entry.map_err(explain)?;
            let file_name = entry.file_name();
            let Ok(name) = file_name.as_str() else { continue };
            if !matches!(name, "." | "..") {
                let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
                names.push(Name { name: name.to_owned(), is_directory });
            }
        }
        Ok(names)
    }

    /// The path without symbolic links, and what it leads to.
    fn resolve(&self, components: &[&str]) -> Result<(String, Metadata), ReadError> {
        let mut ahead: Vec<String> = components.iter().rev().map(|&name| name.to_owned()).collect();
        let mut path = String::from("/");
        let mut metadata = self.ext4.symlink_metadata("/").map_err(explain)?;
        let mut links = 0;
        while let Some(name) = ahead.pop() {
            let above = path.len();
            if !path.ends_with('/') {
                path.push('/');
            }
            path.push_str(&name);
            metadata = self.ext4.symlink_metadata(path.as_str()).map_err(explain)?;
            if !metadata.is_symlink() {
                continue;
            }
            links += 1;
            if links > LINKS_MAX || metadata.len() > LINK_BYTES_MAX {
                return invalid("too many symbolic links, or one that is too long");
            }
            let target = self.ext4.read_link(path.as_str()).map_err(explain)?;
            let Ok(target) = target.to_str() else { return invalid("a link to a name that is no text") };
            // From the link's directory, or from the root; then what was still ahead.
            path.truncate(above);
            let mut whole: Vec<&str> = Vec::new();
            if !target.starts_with('/') {
                append(&mut whole, &path)?;
            }
            append(&mut whole, target)?;
            let rest: Vec<String> = std::mem::take(&mut ahead);
            for name in rest.iter().rev() {
                append(&mut whole, name)?;
            }
            ahead = whole.into_iter().rev().map(str::to_owned).collect();
            path = String::from("/");
            metadata = self.ext4.symlink_metadata("/").map_err(explain)?;
        }
        Ok((path, metadata))
    }
}

struct ExtFile {
    bytes: u64,
    file: File,
}

impl FileReader for ExtFile {
    fn size_bytes(&self) -> u64 {
        self.bytes
    }

    fn read(&mut self, data: &mut [u8]) -> Result<usize, ReadError> {
        self.file.read_bytes(data).map_err(explain)
    }

    fn seek(&mut self, offset: u64) -> Result<(), ReadError> {
        // It steps over the blocks, one by one.
        self.file.seek_to(offset.min(self.bytes)).map_err(explain)
    }
}

/// What `ext4-view` would take on trust (offsets in the superblock, which starts at 1024).
fn check_superblock(volume: &Volume) -> Result<(), ReadError> {
    let block: [u8; 1024] = volume.array(1024)?;
    let exponent = u32_at(&block, 0x18).saturating_add(10);
    if exponent > BLOCK_BYTES_EXPONENT_MAX {
        return invalid("blocks of an absurd size");
    }
    let has_64_bits = u32_at(&block, 0x60) & 0x80 != 0;
    let high = if has_64_bits { u32_at(&block, 0x150) } else { 0 };
    let blocks = u64::from(high) << 32 | u64::from(u32_at(&block, 0x4));
    if blocks
        .checked_shl(exponent)
        .is_none_or(|bytes| bytes >> exponent != blocks || bytes > volume.size_bytes())
    {
        return invalid("a file system that is larger than its partition");
    }
    if blocks.div_ceil(u64::from(u32_at(&block, 0x20)).max(1)) > GROUPS_MAX {
        return invalid("more block groups than are read");
    }
    if u16_at(&block, 0x58) < 128 {
        return invalid("inodes of an absurd size");
    }
    Ok(())
}

fn explain(error: Ext4Error) -> ReadError {
    match error {
        Ext4Error::NotFound | Ext4Error::NotADirectory => ReadError::NotFound,
        Ext4Error::Io(error) => match error.downcast::<ReadError>() {
            Ok(error) => *error,
            Err(error) => ReadError::Invalid(error.to_string()),
        },
        error => ReadError::Invalid(error.to_string()),
    }
}
