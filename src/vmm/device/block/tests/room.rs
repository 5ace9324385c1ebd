//! Storage that is full, in a file system of its own for each test.

use std::os::fd::AsFd;
use std::sync::mpsc::{Receiver, channel};

use super::*;
use crate::vmm::event::MachineEvent;

/// A disk's image and a file beside it, on a tmpfs that nothing else sees.
struct Small {
    image: OwnedFd,
    filler: File,
}

const STORAGE_BYTES: u64 = 2 * MIB;

impl Small {
    /// An empty image is a raw disk of 8 MiB, all of it a hole. `None` where this user may not mount.
    fn new(scratch: &Scratch, image: &[u8]) -> Option<Self> {
        let directory = scratch.0.clone();
        let image = image.to_vec();
        // In a thread of its own, whose mounts are gone with it; what is open stays.
        std::thread::spawn(move || {
            // SAFETY: only this thread, which has nothing to do with the file system otherwise, gets
            // another view of it.
            if unsafe { libc::unshare(libc::CLONE_NEWNS | libc::CLONE_FS) } != 0 {
                return None;
            }
            let target = std::ffi::CString::new(directory.to_str().unwrap()).unwrap();
            let options = std::ffi::CString::new(format!("size={STORAGE_BYTES}")).unwrap();
            let (root, none) = (c"/".as_ptr(), std::ptr::null());
            // SAFETY: all strings end with a zero and live longer than the calls.
            let mounted = unsafe {
                libc::mount(none, root, none, libc::MS_REC | libc::MS_PRIVATE, none.cast()) == 0
                    && libc::mount(
                        c"tmpfs".as_ptr(),
                        target.as_ptr(),
                        c"tmpfs".as_ptr(),
                        0,
                        options.as_ptr().cast(),
                    ) == 0
            };
            assert!(mounted, "{}", io::Error::last_os_error());
            std::fs::write(directory.join("image"), &image).unwrap();
            if image.is_empty() {
                File::create(directory.join("image")).unwrap().set_len(8 * MIB).unwrap();
            }
            let image = open_rw(directory.join("image").to_str().unwrap());
            let filler = File::create(directory.join("filler")).unwrap();
            Some(Self { image, filler })
        })
        .join()
        .unwrap()
    }

    fn fill(&self) {
        let chunk = [1; 4096];
        let mut at = self.filler.metadata().unwrap().len();
        while self.filler.write_at(&chunk, at).is_ok() {
            at += 4096;
        }
    }

    fn make_room(&self) {
        self.filler.set_len(0).unwrap();
    }
}

fn listening() -> (EventSender, Receiver<MachineEvent>) {
    let (queue, receiver) = channel();
    (EventSender { queue, wake: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()) }, receiver)
}

fn next(events: &Receiver<MachineEvent>) -> MachineEvent {
    events.recv_timeout(Duration::from_secs(5)).unwrap()
}

fn name() -> String {
    config("", DiskFormat::Raw).name
}

fn full() -> MachineEvent {
    MachineEvent::DiskFull { disk: name() }
}

fn has_room() -> MachineEvent {
    MachineEvent::DiskHasRoom { disk: name() }
}

/// Puts a write of 64 KiB onto a queue, with its own header and data.
fn put_write(driver: &mut Driver, queue: usize, sector: u64, byte: u8) {
    let header = HEADER + 32 * queue as u64;
    let mut words = [0; 16];
    words[0] = OUT as u8;
    words[8..].copy_from_slice(&sector.to_le_bytes());
    driver.put(header, &words);
    let data = DATA + 0x10000 * queue as u64;
    driver.put(data, &[byte; 0x10000]);
    driver.put(STATUS + queue as u64, &[0xff]);
    driver.add(queue, &[(header, 16, 0), (data, 0x10000, 0), (STATUS + queue as u64, 1, WRITE)]);
    driver.publish(queue);
}

fn check_waiting(image: &[u8], format: DiskFormat, queues: u16) {
    let scratch = Scratch::new(&format!("room-{format:?}-{queues}"));
    let Some(small) = Small::new(&scratch, image) else {
        println!("skipped: this user may not mount");
        return;
    };
    let mut config = config("", format);
    config.queues = queues;
    let (sender, events) = listening();
    let copy = small.image.as_fd().try_clone_to_owned().unwrap();
    let block = Block::new(&config, copy, Vec::new(), &sandbox_hook(), sender).unwrap();
    let handle = block.handle();
    let mut driver = started(block);
    assert_eq!(driver.write_disk(0, &[7; 4096]), OK);
    small.fill();
    // Several queues run out of room: that is said once, and what is there can still be read.
    for queue in 0..usize::from(queues) {
        put_write(&mut driver, queue, 512 + 256 * queue as u64, 8);
    }
    assert_eq!(next(&events), full());
    std::thread::sleep(Duration::from_millis(100));
    for queue in 0..usize::from(queues) {
        assert_eq!(driver.used_within(queue, Duration::ZERO), None, "a write was answered");
    }
    assert_eq!(handle.metrics().in_flight, u64::from(queues));
    small.make_room();
    for queue in 0..usize::from(queues) {
        assert_eq!(driver.used(queue).1, 1);
        assert_eq!(driver.get(STATUS + queue as u64, 1), [OK]);
    }
    assert_eq!(next(&events), has_room());
    for queue in 0..u64::from(queues) {
        assert_eq!(driver.read_disk(512 + 256 * queue, 0x10000), [8; 0x10000]);
    }
    // Full again, and the driver resets the device: nothing waits any more, and all goes on.
    small.fill();
    put_write(&mut driver, 0, 4096, 9);
    assert_eq!(next(&events), full());
    let reset_at = Instant::now();
    driver.write(0x70, 0);
    assert!(reset_at.elapsed() < Duration::from_secs(5));
    assert_eq!(next(&events), has_room());
    assert_eq!(handle.metrics().in_flight, 0);
    let features = driver.offered();
    driver.start(features);
    assert_eq!(driver.read_disk(0, 4096), [7; 4096]);
    assert_eq!(handle.metrics().errors, 0);
    // The end of the device in that state doesn't wait either.
    put_write(&mut driver, 0, 4096, 9);
    assert_eq!(next(&events), full());
    drop(driver);
    assert_eq!(next(&events), has_room());
    small.make_room();
    if format == DiskFormat::Qcow2 {
        let path = scratch.path("copy");
        let mut bytes = vec![0; rustix::fs::fstat(&small.image).unwrap().st_size as usize];
        rustix::io::pread(&small.image, &mut bytes, 0).unwrap();
        std::fs::write(&path, bytes).unwrap();
        // What a lost write left behind is space, never another's data.
        let output = std::process::Command::new("qemu-img").args(["check", &path]).output().unwrap();
        assert!(matches!(output.status.code(), Some(0 | 3)), "{output:?}");
    }
}

#[test]
fn a_raw_disk_waits_for_room() {
    for queues in [1, 3] {
        check_waiting(&[], DiskFormat::Raw, queues);
    }
}

#[test]
fn a_qcow2_disk_waits_for_room() {
    let scratch = Scratch::new("room-qcow2-image");
    let path = scratch.path("image");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", &path, "8M"]).unwrap();
    for queues in [1, 3] {
        check_waiting(&std::fs::read(&path).unwrap(), DiskFormat::Qcow2, queues);
    }
}
