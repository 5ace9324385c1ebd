//! The thread that boots a guest from its own disk: it searches the image, which is hostile, under a
//! filter of its own, and puts what it finds into guest memory.
//!
//! A thread and not a call, for two reasons. It may make fewer system calls than any other thread here
//! (it reads through the disk's thread and opens nothing). And it can be given up: whatever a crafted file
//! system makes of a reader's loops, who waits for it stops waiting, and the process ends.

use std::cell::RefCell;
use std::io::{self, Cursor};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use vm_memory::{Bytes as _, GuestAddress};

use super::disk::{self, Found, FoundFile, Limits, NotBootable, ReadAt, Request};
use super::{BootError, Entry, Initrds, load_parts};
use crate::vmm::config::DiskBoot;
use crate::vmm::device::{ThreadRole, ThreadStart};
use crate::vmm::memory::GuestMemory;

/// Virtual; the search goes as deep as its bounds on nesting let it.
const STACK_BYTES: usize = 4 << 20;
/// Less than what a launcher waits for the launch as a whole, and more than the search gives itself.
const LOAD_TIMEOUT: Duration = Duration::from_secs(50);
const COPY_BYTES: usize = 1 << 20;
/// Where one initrd ends and another begins.
const INITRD_ALIGN: u64 = 4;

struct Job {
    memory: GuestMemory,
    memory_bytes: u64,
    rsdp: u64,
    reply: mpsc::SyncSender<Result<Entry, BootError>>,
}

/// Loads the guest's kernel from one of its disks.
#[derive(Debug)]
pub struct DiskLoader {
    disk: String,
    /// Taken away at the end, which ends the thread.
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl DiskLoader {
    /// Starts the thread, `start` first. It reads `source`: the disk as the guest sees it.
    pub fn spawn(
        boot: &DiskBoot,
        source: impl ReadAt + Clone + Send + 'static,
        start: &ThreadStart,
    ) -> io::Result<Self> {
        let (jobs, received) = mpsc::channel::<Job>();
        let (report, started) = mpsc::sync_channel(1);
        let (disk, start) = (boot.disk.clone(), start.clone());
        let request = Request { entry: boot.entry.clone(), append: boot.append.clone() };
        let thread =
            std::thread::Builder::new().name("boot".into()).stack_size(STACK_BYTES).spawn(move || {
                let prepared = start(ThreadRole::Boot);
                let failed = prepared.is_err();
                // Who started us waits for this.
                let _ = report.send(prepared);
                while !failed && let Ok(job) = received.recv() {
                    let result = boot_from(&disk, source.clone(), &request, &job);
                    // Who has given up needs no answer: its process ends.
                    let _ = job.reply.send(result);
                }
            })?;
        let ended = || io::Error::other("the loader's thread has ended");
        started.recv().map_err(|_| ended())??;
        Ok(Self { disk: boot.disk.clone(), jobs: Some(jobs), thread: Some(thread) })
    }

    /// Searches the disk and loads what it boots. After an error nothing may run on this memory: the
    /// thread may still be writing to it.
    pub fn load(&self, memory: &GuestMemory, memory_bytes: u64, rsdp: u64) -> Result<Entry, BootError> {
        let ended = || BootError::LoaderEnded { disk: self.disk.clone() };
        let (reply, answer) = mpsc::sync_channel(1);
        let job = Job { memory: memory.clone(), memory_bytes, rsdp, reply };
        self.jobs.as_ref().and_then(|jobs| jobs.send(job).ok()).ok_or_else(ended)?;
        answer.recv_timeout(LOAD_TIMEOUT).map_err(|error| match error {
            mpsc::RecvTimeoutError::Disconnected => ended(),
            mpsc::RecvTimeoutError::Timeout => {
                BootError::DiskSlow { disk: self.disk.clone(), seconds: LOAD_TIMEOUT.as_secs() }
            }
        })?
    }
}

impl Drop for DiskLoader {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take().filter(JoinHandle::is_finished) {
            let _ = thread.join();
        }
    }
}

fn boot_from(
    disk: &str,
    source: impl ReadAt + 'static,
    request: &Request,
    job: &Job,
) -> Result<Entry, BootError> {
    let failed = |source: NotBootable| BootError::Disk { disk: disk.to_owned(), source: Box::new(source) };
    let found = disk::find(Box::new(source), request, Limits::default()).map_err(failed)?;
    let Found { mut kernel, initrds, cmdline } = found;
    let content = kernel.read_kernel().map_err(failed)?;
    let initrds = (!initrds.is_empty()).then(|| FoundInitrds { disk, files: RefCell::new(initrds) });
    let initrds = initrds.as_ref().map(|initrds| initrds as &dyn Initrds);
    load_parts(&job.memory, job.memory_bytes, Cursor::new(content), initrds, &cmdline, job.rsdp).map_err(
        |source| match source {
            BootError::Disk { .. } => source,
            source => BootError::DiskKernel {
                disk: disk.to_owned(),
                kernel: kernel.name.clone(),
                source: Box::new(source),
            },
        },
    )
}

struct FoundInitrds<'d> {
    disk: &'d str,
    files: RefCell<Vec<FoundFile>>,
}

impl Initrds for FoundInitrds<'_> {
    fn bytes(&self) -> Result<u64, BootError> {
        let files = self.files.borrow();
        Ok(files
            .iter()
            .fold(0, |bytes, file| bytes.next_multiple_of(INITRD_ALIGN).saturating_add(file.bytes)))
    }

    fn copy_to(&self, memory: &GuestMemory, address: GuestAddress, _bytes: u64) -> Result<(), BootError> {
        let mut at = address.0;
        for file in self.files.borrow_mut().iter_mut() {
            // What is skipped reads as zeroes: the memory is fresh.
            at = at.next_multiple_of(INITRD_ALIGN);
            let copy = |piece: &[u8]| {
                memory.write_slice(piece, GuestAddress(at)).map_err(|error| error.to_string())?;
                at += piece.len() as u64;
                Ok(())
            };
            file.each_piece(COPY_BYTES, copy)
                .map_err(|source| BootError::Disk { disk: self.disk.to_owned(), source: Box::new(source) })?;
        }
        Ok(())
    }
}
