//! io_uring for raw images: many requests on their way to one file at once, without a thread for each.
//!
//! The ring is made, restricted and enabled before its thread's seccomp filter is closed. From then on
//! it takes three operations (readv, writev, fsync) on one file, the image, and nothing can be
//! registered with it any more: a thread that has been taken over and may call `io_uring_enter` can do
//! no more with the ring than with the file itself.
//!
//! The kernel reads and writes guest memory while a request is in flight. The ring therefore owns a
//! handle of the memory, and gives it away only when nothing is in flight any more.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use io_uring::register::Restriction;
use io_uring::squeue::Flags;
use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{EnterFlags, IoUring, opcode, squeue};

use super::disk::{Accepted, Disk};
use super::request::{Done, Failure, Operation};
use super::service::Task;
use crate::vmm::config::CacheMode;
use crate::vmm::memory::GuestMemory;

/// Most requests of one queue in flight. The completion queue holds twice as many.
const ENTRIES: u32 = 128;
/// The image's place among the ring's registered files.
const FILE: Fixed = Fixed(0);
/// Most threads that the kernel makes for one ring's requests that have to wait (its syncs, above all),
/// of each of its two kinds. They count among the process's own; where it can have no more, the request
/// comes back and the queue's thread does it.
const KERNEL_THREADS: [u32; 2] = [4, 1];
/// How long and how often a kernel that is short of memory is given time.
const BUSY_WAIT: Duration = Duration::from_millis(1);
const BUSY_TRIES: u32 = 1000;

pub(super) struct Ring {
    ring: IoUring,
    /// By the request's `user_data`.
    slots: Vec<Slot>,
    free: Vec<usize>,
    /// Of the present activation.
    memory: Option<GuestMemory>,
}

#[derive(Default)]
struct Slot {
    task: Option<Task>,
    /// What the kernel is given; it copies them when the request is submitted.
    vectors: Vec<libc::iovec>,
}

// SAFETY: the pointers of the slots' vectors point into guest memory, which belongs to no thread and
// which the ring itself never looks at.
unsafe impl Send for Ring {}

/// How a request ended.
pub(super) enum Ended {
    As(Result<Done, Failure>),
    /// Not at all, or half: it must be done again, by other means.
    Half,
}

impl Ring {
    /// Fails where the kernel has no io_uring, or forbids it.
    pub fn new(file: BorrowedFd<'_>) -> io::Result<Self> {
        let mut builder = IoUring::builder();
        builder.setup_r_disabled();
        // Completions wait until the thread comes by: it needs no interrupting for them. Since 5.19.
        let ring = builder.clone().setup_coop_taskrun().build(ENTRIES).or_else(|_| builder.build(ENTRIES))?;
        if !ring.params().is_feature_submit_stable() || !ring.params().is_feature_nodrop() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let submitter = ring.submitter();
        submitter.register_files(&[file.as_raw_fd()])?;
        // Since 5.15; what the kernel chooses itself is only more.
        let mut threads = KERNEL_THREADS;
        let _ = submitter.register_iowq_max_workers(&mut threads);
        submitter.register_restrictions(&mut [
            Restriction::sqe_op(opcode::Readv::CODE),
            Restriction::sqe_op(opcode::Writev::CODE),
            Restriction::sqe_op(opcode::Fsync::CODE),
            Restriction::sqe_flags_allowed(Flags::FIXED_FILE.bits()),
            Restriction::sqe_flags_required(Flags::FIXED_FILE.bits()),
        ])?;
        submitter.register_enable_rings()?;
        let slots = std::iter::repeat_with(Slot::default).take(ENTRIES as usize).collect();
        Ok(Self { ring, slots, free: (0..ENTRIES as usize).rev().collect(), memory: None })
    }

    /// Readable when something has ended.
    pub fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor stays open as long as the ring is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }

    pub fn start(&mut self, memory: GuestMemory) {
        self.memory = Some(memory);
    }

    pub fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Takes a request, to be begun by the next [`Self::submit`]. Gives it back if it isn't one for the
    /// ring.
    pub fn push(&mut self, mut task: Task, disk: &Disk, accepted: Accepted) -> Result<(), Task> {
        let (Some(memory), Some(&index)) = (&self.memory, self.free.last()) else { return Err(task) };
        let slot = &mut self.slots[index];
        let Some(entry) = entry(&mut task, slot, memory, disk, accepted) else { return Err(task) };
        // SAFETY: the vectors live in the slot, which is left alone until the request has ended, and
        // point into guest memory, which `self.memory` keeps until nothing is in flight. The file is
        // registered with the ring.
        if unsafe { self.ring.submission().push(&entry.user_data(index as u64)) }.is_err() {
            return Err(task);
        }
        slot.task = Some(task);
        self.free.pop();
        Ok(())
    }

    /// Begins what was pushed. False: not all of it; try again in a while.
    pub fn submit(&mut self) -> bool {
        while !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Ok(0) => return false,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The kernel is short of memory, or has completions that it wants fetched first.
                Err(_) => return false,
            }
        }
        true
    }

    /// A request that has ended.
    pub fn reap(&mut self) -> Option<(Task, Ended)> {
        let completion = self.ring.completion().next()?;
        // The kernel hands back what it was given.
        let index = completion.user_data() as usize;
        let task = self.slots.get_mut(index)?.task.take()?;
        self.free.push(index);
        let ended = ended(task.operation, completion.result());
        Some((task, ended))
    }

    /// Waits until nothing is in flight, forgets what it was, and gives how much that was. `Err`: the
    /// kernel took no more requests, so that the ring is of no use any more.
    pub fn stop(&mut self) -> Result<usize, usize> {
        let before = self.in_flight();
        let mut tries = 0;
        while self.in_flight() > 0 {
            while self.reap().is_some() {}
            let queued = self.ring.submission().len();
            if queued > 0 && !self.submit() {
                tries += 1;
                if tries > BUSY_TRIES {
                    self.wait_for(queued);
                    self.memory = None;
                    return Err(before);
                }
                std::thread::sleep(BUSY_WAIT);
            } else if self.in_flight() > 0 {
                self.wait_one();
            }
        }
        self.memory = None;
        Ok(before)
    }

    /// Waits until only so many are left that the kernel has never seen.
    fn wait_for(&mut self, left: usize) {
        while self.in_flight() > left {
            self.wait_one();
            while self.reap().is_some() {}
        }
    }

    fn wait_one(&self) {
        // SAFETY: no argument is passed; nothing new is submitted.
        let waited = unsafe { self.ring.submitter().enter::<()>(0, 1, EnterFlags::GETEVENTS.bits(), None) };
        match waited {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => std::thread::sleep(BUSY_WAIT),
            _ => {}
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // What the kernel has never seen it never will: the ring goes.
        let _ = self.stop();
    }
}

/// What the kernel is asked for; `None` where the request is none for the ring.
fn entry(
    task: &mut Task,
    slot: &mut Slot,
    memory: &GuestMemory,
    disk: &Disk,
    accepted: Accepted,
) -> Option<squeue::Entry> {
    let file = disk.image.plain_file()?;
    let (vectors, offset, len) = match task.operation {
        Operation::Flush if disk.cache != CacheMode::Unsafe => {
            return Some(opcode::Fsync::new(FILE).flags(FsyncFlags::DATASYNC).build());
        }
        Operation::Read { offset, len } => (task.request.target(memory).io_vectors().ok()?, offset, len),
        // Into the page cache it is but a copy, which the kernel would leave to a thread of its own.
        Operation::Write { .. } if disk.cache == CacheMode::Unsafe => return None,
        Operation::Write { .. } if disk.cache == CacheMode::Writeback && accepted.flush => return None,
        Operation::Write { offset, len } => (task.request.source(memory).io_vectors().ok()?, offset, len),
        _ => return None,
    };
    if len == 0 || vectors.len_bytes() != len || !file.takes(&vectors, offset) {
        return None;
    }
    slot.vectors.clear();
    slot.vectors.extend_from_slice(vectors.as_slice());
    let (pointer, count) = (slot.vectors.as_ptr(), slot.vectors.len() as u32);
    Some(match task.operation {
        Operation::Read { .. } => opcode::Readv::new(FILE, pointer, count).offset(offset).build(),
        _ => {
            disk.note_write();
            let flags = if disk.is_durable(accepted) { libc::RWF_DSYNC } else { 0 };
            opcode::Writev::new(FILE, pointer, count).offset(offset).rw_flags(flags).build()
        }
    })
}

fn ended(operation: Operation, result: i32) -> Ended {
    let len = match operation {
        Operation::Read { len, .. } | Operation::Write { len, .. } => len,
        _ => 0,
    };
    let written = if matches!(operation, Operation::Read { .. }) { len } else { 0 };
    match u64::try_from(result) {
        Ok(done) if done == len => Ended::As(Ok(Done { written, ..Done::default() })),
        Ok(_) => Ended::Half,
        Err(_) => match -result {
            // The kernel has no thread for it, or its thread was told to go.
            libc::EAGAIN | libc::ECANCELED | libc::EINTR => Ended::Half,
            errno => {
                let error = io::Error::from_raw_os_error(errno);
                Ended::As(Err(match operation {
                    Operation::Write { .. } => Failure::of_write(error),
                    _ => error.into(),
                }))
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use super::*;

    fn ring_over(file: &File) -> Option<Ring> {
        let ring = Ring::new(file.as_fd());
        if ring.is_err() && std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").is_ok() {
            println!("skipped: no io_uring for this user: {:?}", ring.err());
            return None;
        }
        ring.ok()
    }

    /// What a submission comes to.
    fn result_of(ring: &mut Ring, entry: &squeue::Entry) -> i32 {
        // SAFETY: none of the tests' entries points to memory.
        unsafe { ring.ring.submission().push(entry) }.unwrap();
        ring.ring.submit_and_wait(1).unwrap();
        ring.ring.completion().next().unwrap().result()
    }

    #[test]
    fn the_ring_is_no_way_out_of_the_sandbox() {
        let file = File::open("/dev/null").unwrap();
        let Some(mut ring) = ring_over(&file) else { return };
        let path = c"/etc/hostname".as_ptr();
        let other = io_uring::types::Fd(file.as_raw_fd());
        let refused = [
            // Other operations, with and without a file.
            opcode::Nop::new().build(),
            opcode::OpenAt::new(io_uring::types::Fd(libc::AT_FDCWD), path).build(),
            opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build(),
            opcode::Close::new(FILE).build(),
            opcode::Fallocate::new(FILE, 1).build(),
            // A file that isn't the image.
            opcode::Fsync::new(other).build(),
            opcode::Readv::new(other, std::ptr::null(), 0).build(),
            // Flags that change what an operation does.
            opcode::Fsync::new(FILE).build().flags(Flags::FIXED_FILE | Flags::IO_LINK),
            opcode::Fsync::new(FILE).build().flags(Flags::FIXED_FILE | Flags::ASYNC),
        ];
        for entry in refused {
            assert_eq!(result_of(&mut ring, &entry), -libc::EACCES, "{entry:?}");
        }
        // There is no second file, and none can be added.
        assert_eq!(
            result_of(&mut ring, &opcode::Readv::new(Fixed(1), std::ptr::null(), 0).build()),
            -libc::EBADF
        );
        let submitter = ring.ring.submitter();
        assert_eq!(submitter.register_files_update(0, &[0]).unwrap_err().raw_os_error(), Some(libc::EACCES));
        assert_eq!(submitter.unregister_files().unwrap_err().raw_os_error(), Some(libc::EACCES));
        assert_eq!(submitter.register_personality().unwrap_err().raw_os_error(), Some(libc::EACCES));
    }

    #[test]
    fn results_are_told_apart() {
        let read = Operation::Read { offset: 0, len: 512 };
        let write = Operation::Write { offset: 0, len: 512 };
        let is_half = |operation, result| matches!(ended(operation, result), Ended::Half);
        for operation in [read, write] {
            assert!(is_half(operation, 0) && is_half(operation, 511) && is_half(operation, -libc::EAGAIN));
        }
        let failure = |operation, errno: i32| match ended(operation, -errno) {
            Ended::As(Err(failure)) => failure,
            _ => panic!("no failure"),
        };
        assert_eq!(failure(write, libc::ENOSPC), Failure::NoRoom);
        assert_eq!(failure(write, libc::EDQUOT), Failure::NoRoom);
        assert_eq!(failure(write, libc::EIO), Failure::Io);
        // A read never waits for room, nor does a flush: what it couldn't keep is lost.
        assert_eq!(failure(read, libc::ENOSPC), Failure::Io);
        assert_eq!(failure(Operation::Flush, libc::ENOSPC), Failure::Io);
        let Ended::As(Ok(done)) = ended(read, 512) else { panic!("not done") };
        assert_eq!(done.written, 512);
    }
}
