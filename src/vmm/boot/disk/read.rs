//! How the search reads an image: through read-ahead windows, within bounds on bytes and time that no
//! content can stretch.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// The bytes of a disk as its guest sees them.
pub trait ReadAt {
    fn size_bytes(&self) -> u64;
    /// Fails where the range is not wholly on the disk.
    fn read_at(&self, offset: u64, data: &mut [u8]) -> io::Result<()>;
}

impl ReadAt for [u8] {
    fn size_bytes(&self) -> u64 {
        self.len() as u64
    }

    fn read_at(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset).ok();
        let range = start.and_then(|start| self.get(start..start.checked_add(data.len())?));
        data.copy_from_slice(range.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

impl ReadAt for Vec<u8> {
    fn size_bytes(&self) -> u64 {
        self.as_slice().size_bytes()
    }

    fn read_at(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.as_slice().read_at(offset, data)
    }
}

const WINDOW_BYTES: u64 = 256 << 10;
const WINDOWS_MAX: usize = 16;

/// What one search may cost.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Read from the image, again and again included.
    pub bytes: u64,
    pub time: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { bytes: 2 << 30, time: Duration::from_secs(40) }
    }
}

#[derive(Debug, thiserror::Error)]
pub(super) enum ReadError {
    #[error("not there")]
    NotFound,
    #[error("{bytes} bytes long, more than {max}")]
    TooLarge { bytes: u64, max: u64 },
    /// What is there makes no sense, or isn't supported.
    #[error("{0}")]
    Invalid(String),
    #[error("cannot read the disk: {0}")]
    Io(io::Error),
    #[error("given up: {0}")]
    Exhausted(&'static str),
}

pub(super) fn invalid<T>(what: impl Into<String>) -> Result<T, ReadError> {
    Err(ReadError::Invalid(what.into()))
}

struct Window {
    start: u64,
    bytes: Vec<u8>,
}

/// An image under search.
pub(super) struct Disk {
    source: Box<dyn ReadAt>,
    /// The last used at the end.
    windows: RefCell<Vec<Window>>,
    bytes_left: Cell<u64>,
    deadline: Instant,
}

impl Disk {
    pub fn new(source: Box<dyn ReadAt>, limits: Limits) -> Rc<Self> {
        Rc::new(Self {
            source,
            windows: RefCell::new(Vec::new()),
            bytes_left: Cell::new(limits.bytes),
            deadline: Instant::now() + limits.time,
        })
    }

    pub fn size_bytes(&self) -> u64 {
        self.source.size_bytes()
    }

    /// Fails for ever once a bound is reached.
    pub fn check(&self) -> Result<(), ReadError> {
        if self.bytes_left.get() == 0 {
            Err(ReadError::Exhausted("too much was read"))
        } else if Instant::now() >= self.deadline {
            Err(ReadError::Exhausted("it took too long"))
        } else {
            Ok(())
        }
    }

    fn read(&self, mut offset: u64, mut data: &mut [u8]) -> Result<(), ReadError> {
        self.check()?;
        let mut windows = self.windows.borrow_mut();
        while !data.is_empty() {
            let start = offset / WINDOW_BYTES * WINDOW_BYTES;
            let window = self.window(&mut windows, start)?;
            let from = (offset - start) as usize;
            let have = window.bytes.get(from..).unwrap_or_default();
            let len = have.len().min(data.len());
            if len == 0 {
                return invalid("its end lies beyond the disk's");
            }
            data[..len].copy_from_slice(&have[..len]);
            data = &mut data[len..];
            offset += len as u64;
        }
        Ok(())
    }

    fn window<'w>(&self, windows: &'w mut Vec<Window>, start: u64) -> Result<&'w Window, ReadError> {
        let window = match windows.iter().position(|window| window.start == start) {
            Some(index) => windows.remove(index),
            None => {
                let len = self.size_bytes().saturating_sub(start).min(WINDOW_BYTES);
                self.bytes_left.set(self.bytes_left.get().saturating_sub(len));
                // The one that was used longest ago lends its buffer.
                let mut bytes = match windows.len() {
                    WINDOWS_MAX => windows.remove(0).bytes,
                    _ => Vec::new(),
                };
                bytes.resize(len as usize, 0);
                self.source.read_at(start, &mut bytes).map_err(ReadError::Io)?;
                Window { start, bytes }
            }
        };
        let last = windows.len();
        windows.push(window);
        Ok(&windows[last])
    }
}

/// A range of a disk: a partition, or all of it.
#[derive(Clone)]
pub(super) struct Volume {
    disk: Rc<Disk>,
    start: u64,
    bytes: u64,
}

impl Volume {
    pub fn whole(disk: &Rc<Disk>) -> Self {
        Self { disk: disk.clone(), start: 0, bytes: disk.size_bytes() }
    }

    /// What of the range is on the disk.
    pub fn part(disk: &Rc<Disk>, start: u64, bytes: u64) -> Self {
        let start = start.min(disk.size_bytes());
        Self { disk: disk.clone(), start, bytes: bytes.min(disk.size_bytes() - start) }
    }

    pub fn size_bytes(&self) -> u64 {
        self.bytes
    }

    pub fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), ReadError> {
        match offset.checked_add(data.len() as u64) {
            Some(end) if end <= self.bytes => self.disk.read(self.start + offset, data),
            _ => invalid("its end lies beyond the partition's"),
        }
    }

    pub fn array<const N: usize>(&self, offset: u64) -> Result<[u8; N], ReadError> {
        let mut data = [0; N];
        self.read(offset, &mut data)?;
        Ok(data)
    }

    /// Whether these bytes stand there. What can't be read is not there.
    pub fn has(&self, offset: u64, wanted: &[u8]) -> bool {
        let mut data = [0; 16];
        let data = &mut data[..wanted.len()];
        self.read(offset, data).is_ok() && data == wanted
    }
}

pub(super) fn u16_at(data: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(part(data, at))
}

pub(super) fn u32_at(data: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(part(data, at))
}

pub(super) fn u64_at(data: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(part(data, at))
}

/// Beyond the end everything is zero.
fn part<const N: usize>(data: &[u8], at: usize) -> [u8; N] {
    let mut part = [0; N];
    if let Some(found) = data.get(at..).and_then(|rest| rest.get(..N)) {
        part.copy_from_slice(found);
    }
    part
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_is_bounded() {
        let limits = Limits { bytes: 3 * WINDOW_BYTES, time: Duration::from_secs(60) };
        let image: Vec<u8> = (0..8 * WINDOW_BYTES).map(|at| (at / 7) as u8).collect();
        let disk = Disk::new(Box::new(image.clone()), limits);
        let volume = Volume::part(&disk, 512, 1 << 40);
        assert_eq!(volume.size_bytes(), 8 * WINDOW_BYTES - 512);
        let mut data = vec![0; 1000];
        // Over the edge of a window, and a second time without reading.
        for _ in 0..100 {
            volume.read(WINDOW_BYTES - 1000, &mut data).unwrap();
        }
        assert_eq!(data, image[WINDOW_BYTES as usize - 488..][..1000]);
        assert!(matches!(volume.read(8 * WINDOW_BYTES - 1000, &mut data), Err(ReadError::Invalid(_))));
        assert!(matches!(volume.read(u64::MAX, &mut data), Err(ReadError::Invalid(_))));
        assert!(volume.read(5 * WINDOW_BYTES, &mut data).is_ok());
        assert!(matches!(volume.read(0, &mut data), Err(ReadError::Exhausted(_))), "for ever");
    }

    #[test]
    fn time_is_bounded() {
        let disk = Disk::new(Box::new(vec![0; 512]), Limits { bytes: 1 << 20, time: Duration::ZERO });
        assert!(matches!(Volume::whole(&disk).array::<4>(0), Err(ReadError::Exhausted(_))));
    }
}
