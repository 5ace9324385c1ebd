//! What the guest has printed: a ring of the last output, from which the log file and every attached
//! client read at their own pace. The guest never waits for any of them: whoever falls behind by more
//! than the ring loses the oldest bytes.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

/// How much output is kept to be replayed, in bytes.
pub const RING_BYTES: usize = 256 * 1024;
/// The log file never grows beyond this, in bytes.
pub const LOG_BYTES_MAX: u64 = 1024 * 1024;

/// Positions count the bytes ever printed, so that readers need no more than a number.
struct Ring {
    bytes: Box<[u8]>,
    /// The position behind the last byte.
    end: u64,
}

impl Ring {
    fn new(capacity: usize) -> Self {
        // Zeroed memory comes untouched from the kernel: what is never printed is never resident.
        Self { bytes: vec![0; capacity].into_boxed_slice(), end: 0 }
    }

    fn append(&mut self, output: &[u8]) {
        for &byte in output {
            let index = (self.end % self.bytes.len() as u64) as usize;
            self.bytes[index] = byte;
            self.end += 1;
        }
    }

    fn start(&self) -> u64 {
        self.end.saturating_sub(self.bytes.len() as u64)
    }

    /// Copies what follows `position` (or the oldest kept) into `output`; gives the position behind it
    /// and how much was copied.
    fn copy(&self, position: u64, output: &mut [u8]) -> (u64, usize) {
        let from = position.clamp(self.start(), self.end);
        let length = (self.end - from).min(output.len() as u64) as usize;
        let index = (from % self.bytes.len() as u64) as usize;
        let first = length.min(self.bytes.len() - index);
        output[..first].copy_from_slice(&self.bytes[index..index + first]);
        output[first..length].copy_from_slice(&self.bytes[..length - first]);
        (from + length as u64, length)
    }
}

/// Written by the vCPUs, read by the event loop.
pub struct Output {
    ring: Mutex<Ring>,
    /// Something was printed that the event loop hasn't been told of.
    announced: AtomicBool,
    wake: EventFd,
}

impl Output {
    pub fn new(wake: EventFd) -> Arc<Self> {
        Arc::new(Self { ring: Mutex::new(Ring::new(RING_BYTES)), announced: AtomicBool::new(false), wake })
    }

    fn lock(&self) -> MutexGuard<'_, Ring> {
        // Nothing panics while it holds the lock, and a panic ends the process.
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Called by a vCPU: appends and, if the event loop doesn't know yet, wakes it.
    pub fn append(&self, output: &[u8]) {
        self.lock().append(output);
        self.announce();
    }

    /// Has the event loop look, if it isn't about to.
    pub fn announce(&self) {
        if !self.announced.swap(true, Ordering::AcqRel) {
            // The counter of an eventfd can't overflow by one write per announcement.
            let _ = self.wake.write(1);
        }
    }

    pub fn wake(&self) -> &EventFd {
        &self.wake
    }

    /// The event loop is about to read: what is printed from now on is announced again.
    pub fn acknowledge(&self) {
        let _ = self.wake.read();
        self.announced.store(false, Ordering::Release);
    }

    pub fn copy(&self, position: u64, output: &mut [u8]) -> (u64, usize) {
        self.lock().copy(position, output)
    }

    pub fn end(&self) -> u64 {
        self.lock().end
    }
}

/// For vm-superio.
#[derive(Clone)]
pub struct Printer(pub Arc<Output>);

impl io::Write for Printer {
    fn write(&mut self, output: &[u8]) -> io::Result<usize> {
        self.0.append(output);
        Ok(output.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The log file. It is a convenience: a full disk costs log lines, not the VM.
pub struct Log {
    file: File,
    bytes: u64,
    bytes_max: u64,
    position: u64,
}

impl Log {
    /// `file` must be open for append.
    pub fn new(file: OwnedFd, bytes_max: u64) -> io::Result<Self> {
        let file = File::from(file);
        let bytes = file.metadata()?.len();
        Ok(Self { file, bytes, bytes_max, position: 0 })
    }

    /// Writes what was printed since the last call. When the file would grow beyond its bound it is
    /// emptied, and starts again with the last output, up to half of the bound.
    pub fn write_from(&mut self, output: &Output, buffer: &mut [u8]) {
        loop {
            let (next, length) = output.copy(self.position, buffer);
            if length == 0 {
                return;
            }
            if self.bytes + length as u64 > self.bytes_max && self.bytes > 0 {
                if self.file.set_len(0).is_err() {
                    self.position = next;
                    return;
                }
                self.bytes = 0;
                self.position = output.end().saturating_sub(self.bytes_max / 2);
                continue;
            }
            self.position = next;
            if self.file.write_all(&buffer[..length]).is_ok() {
                self.bytes += length as u64;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Seek as _};

    #[test]
    fn the_ring_keeps_the_last_bytes_in_order() {
        let mut ring = Ring::new(8);
        ring.append(b"abcdef");
        let mut out = [0; 16];
        assert_eq!(ring.copy(0, &mut out), (6, 6));
        ring.append(b"ghijk");
        assert_eq!(ring.copy(6, &mut out), (11, 5));
        assert_eq!(&out[..5], b"ghijk");
        assert_eq!(ring.copy(0, &mut out), (11, 8), "the oldest three are lost");
        assert_eq!(&out[..8], b"defghijk");
        assert_eq!(ring.copy(4, &mut out[..3]), (7, 3));
        assert_eq!(&out[..3], b"efg");
        assert_eq!(ring.copy(99, &mut out), (11, 0));
    }

    #[test]
    fn the_event_loop_is_woken_once_until_it_looks() {
        let output = Output::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        for _ in 0..3 {
            output.append(b"x");
        }
        assert_eq!(output.wake().read().unwrap(), 1);
        output.acknowledge();
        output.append(b"x");
        assert_eq!(output.wake().read().unwrap(), 1);
    }

    #[test]
    fn the_log_is_bounded_and_keeps_the_end() {
        let path = std::env::temp_dir().join(format!("vmctl-log-{}", std::process::id()));
        let file = File::options().append(true).create(true).open(&path).unwrap();
        let mut reader = File::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let mut log = Log::new(file.into(), 1000).unwrap();
        let output = Output::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let mut buffer = [0; 64];
        let mut written = String::new();
        for line in 0..300 {
            let text = format!("line {line}\n");
            output.append(text.as_bytes());
            written += &text;
            log.write_from(&output, &mut buffer);
            let mut content = String::new();
            reader.rewind().unwrap();
            reader.read_to_string(&mut content).unwrap();
            assert!(content.len() <= 1000);
            assert!(written.ends_with(&content), "{content}");
            assert!(content.ends_with(&text) && content.len() >= written.len().min(500));
        }
    }
}
