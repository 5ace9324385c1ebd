//! What the search needs of a file system, whichever it is.

use super::ext::Ext;
use super::fat::Fat;
use super::read::{ReadError, invalid};

/// A path may be so deep and so long: far more than any boot loader's files lie.
const COMPONENTS_MAX: usize = 32;
const PATH_BYTES_MAX: usize = 1024;
/// Most names of a directory that are looked at.
pub(super) const NAMES_MAX: usize = 4096;

pub(super) struct Name {
    pub name: String,
    pub is_directory: bool,
}

/// An open file.
pub(super) trait FileReader {
    fn size_bytes(&self) -> u64;
    /// The next bytes, as many as are handy; 0 at the end.
    fn read(&mut self, data: &mut [u8]) -> Result<usize, ReadError>;
    fn seek(&mut self, offset: u64) -> Result<(), ReadError>;
}

pub(super) enum FileSystem {
    Ext(Ext),
    Fat(Fat),
}

impl FileSystem {
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Ext(_) => "ext4",
            Self::Fat(_) => "vfat",
        }
    }

    /// As `blkid` and GRUB write it.
    pub fn uuid(&self) -> String {
        match self {
            Self::Ext(ext) => ext.uuid(),
            Self::Fat(fat) => fat.uuid(),
        }
    }

    pub fn label(&self) -> String {
        match self {
            Self::Ext(ext) => ext.label(),
            Self::Fat(fat) => fat.label(),
        }
    }

    pub fn open(&self, path: &str) -> Result<Box<dyn FileReader>, ReadError> {
        let components = components(path)?;
        match self {
            Self::Ext(ext) => ext.open(&components),
            Self::Fat(fat) => fat.open(&components),
        }
    }

    /// The names in a directory, sorted, without those that are no text.
    pub fn list(&self, path: &str) -> Result<Vec<Name>, ReadError> {
        let components = components(path)?;
        let mut names = match self {
            Self::Ext(ext) => ext.list(&components)?,
            Self::Fat(fat) => fat.list(&components)?,
        };
        names.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(names)
    }

    /// A whole file of at most `max` bytes.
    pub fn read(&self, path: &str, max: u64) -> Result<Vec<u8>, ReadError> {
        read_all(self.open(path)?.as_mut(), max)
    }

    /// A configuration file. Bytes that are no UTF-8 can stand in comments and titles alone.
    pub fn read_text(&self, path: &str, max: u64) -> Result<String, ReadError> {
        Ok(String::from_utf8_lossy(&self.read(path, max)?).into_owned())
    }

    pub fn has_file(&self, path: &str) -> bool {
        self.open(path).is_ok()
    }

    pub fn has_directory(&self, path: &str) -> bool {
        self.list(path).is_ok()
    }
}

pub(super) fn read_all(file: &mut dyn FileReader, max: u64) -> Result<Vec<u8>, ReadError> {
    let bytes = file.size_bytes();
    if bytes > max {
        return Err(ReadError::TooLarge { bytes, max });
    }
    let mut data = vec![0; bytes as usize];
    read_exact(file, &mut data)?;
    Ok(data)
}

pub(super) fn read_exact(file: &mut dyn FileReader, data: &mut [u8]) -> Result<(), ReadError> {
    let mut filled = 0;
    while filled < data.len() {
        match file.read(&mut data[filled..])? {
            0 => return invalid("shorter than its directory says"),
            len => filled += len,
        }
    }
    Ok(())
}

/// The components of a path from the root, without `.` and with `..` gone one up.
pub(super) fn components(path: &str) -> Result<Vec<&str>, ReadError> {
    let mut components = Vec::new();
    append(&mut components, path)?;
    Ok(components)
}

pub(super) fn append<'p>(components: &mut Vec<&'p str>, path: &'p str) -> Result<(), ReadError> {
    if path.len() > PATH_BYTES_MAX || path.contains('\0') {
        return invalid("a path that is too long, or holds a zero byte");
    }
    for component in path.split('/') {
        match component {
            "" | "." => {}
            ".." => drop(components.pop()),
            name if components.len() == COMPONENTS_MAX || name.len() > 255 => {
                return invalid("a path that is too deep");
            }
            name => components.push(name),
        }
    }
    Ok(())
}
