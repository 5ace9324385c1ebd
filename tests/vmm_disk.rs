//! A VM whose disk's storage is full, with a guest that does nothing but write: on this host's KVM.

mod support;

use std::arch::global_asm;
use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use support::{RunningVm, Session, Vm, guest, memfd};
use vmctl::vmm::client::Watch;
use vmctl::vmm::config::{Bucket, DiskConfig, DiskFormat, Limits, MachineKind};
use vmctl::vmm::protocol::{Condition, ConditionKind, Event, ExitReason, Phase, Response, Verb};

// Sets the disk in the first virtio-mmio slot up, prints `D`, and for each `w` that is typed writes the
// next 64 KiB of it, waits for the answer and prints its status as a digit.
global_asm!(
    ".pushsection .rodata.vmctl_writer, \"a\", @progbits",
    ".code32",
    ".balign 16",
    "vmctl_writer_start:",
    "    mov ebx, 0xd0000000",
    // mov esi, the registers' address
    "    .byte 0xbe",
    "    .long 0x100000 + (vmctl_writer_registers - vmctl_writer_start)",
    // mov ecx, their number
    "    .byte 0xb9",
    "    .long (vmctl_writer_registers_end - vmctl_writer_registers) / 8",
    "2:  mov eax, [esi]",
    "    mov edx, [esi + 4]",
    "    mov [ebx + eax], edx",
    "    add esi, 8",
    "    dec ecx",
    "    jnz 2b",
    "    mov al, 'D'",
    "    mov dx, 0x3f8",
    "    out dx, al",
    // mov edi, the rings' address
    "    .byte 0xbf",
    "    .long 0x100000 + (vmctl_writer_rings - vmctl_writer_start)",
    "3:  mov dx, 0x3fd",
    "    in al, dx",
    "    test al, 1",
    "    jz 3b",
    "    mov dx, 0x3f8",
    "    in al, dx",
    "    cmp al, 'w'",
    "    jne 3b",
    // One more is available, the same chain again.
    "    inc word ptr [edi + 0x82]",
    "    mov dword ptr [ebx + 0x50], 0",
    "4:  mov ax, [edi + 0x82]",
    "    cmp ax, [edi + 0xc2]",
    "    jne 4b",
    // The header's sector, for the next.
    "    add dword ptr [edi + 0x108], 128",
    "    mov al, [edi + 0x110]",
    "    add al, '0'",
    "    mov dx, 0x3f8",
    "    out dx, al",
    "    jmp 3b",
    ".balign 4",
    "vmctl_writer_registers:",
    "    .long 0x70, 0,  0x70, 1,  0x70, 3",
    // VIRTIO_F_VERSION_1 alone.
    "    .long 0x24, 0,  0x20, 0,  0x24, 1,  0x20, 1,  0x70, 11",
    "    .long 0x30, 0,  0x38, 4",
    "    .long 0x80, 0x100000 + (vmctl_writer_rings - vmctl_writer_start),  0x84, 0",
    "    .long 0x90, 0x100080 + (vmctl_writer_rings - vmctl_writer_start),  0x94, 0",
    "    .long 0xa0, 0x1000c0 + (vmctl_writer_rings - vmctl_writer_start),  0xa4, 0",
    "    .long 0x44, 1,  0x70, 15",
    "vmctl_writer_registers_end:",
    ".balign 16",
    // Descriptors at 0, the available ring at 0x80, the used ring at 0xc0, header and status at 0x100.
    "vmctl_writer_rings:",
    "    .long 0x100100 + (vmctl_writer_rings - vmctl_writer_start), 0, 16, 0x00010001",
    "    .long 0x00300000, 0, 0x10000, 0x00020001",
    "    .long 0x100110 + (vmctl_writer_rings - vmctl_writer_start), 0, 1, 2",
    "    .zero 0x100 - 48",
    "    .long 1, 0, 0, 0",
    "    .long 0xff",
    "vmctl_writer_end:",
    ".code64",
    ".popsection",
);

unsafe extern "C" {
    static vmctl_writer_start: u8;
    static vmctl_writer_end: u8;
}

fn kernel() -> File {
    let (start, end) = (&raw const vmctl_writer_start, &raw const vmctl_writer_end);
    // SAFETY: both symbols bound one read-only blob in this binary, the start first.
    let code = unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) };
    memfd(&guest::elf(code, Some(0x10_0000)))
}

/// A sparse image of 64 MiB and a file beside it, on a small tmpfs that nothing else sees.
struct Storage {
    image: File,
    filler: File,
}

impl Storage {
    /// `None` where this user may not mount.
    fn new() -> Option<Self> {
        // In a thread of its own, whose mounts are gone with it; what is open stays.
        std::thread::spawn(|| {
            // SAFETY: only this thread, which does nothing else, gets another view of the file system.
            if unsafe { libc::unshare(libc::CLONE_NEWNS | libc::CLONE_FS) } != 0 {
                println!("skipped: this user may not mount");
                return None;
            }
            let (none, target) = (std::ptr::null(), c"/mnt".as_ptr());
            // SAFETY: all strings end with a zero and live longer than the calls.
            let mounted = unsafe {
                libc::mount(none, c"/".as_ptr(), none, libc::MS_REC | libc::MS_PRIVATE, none.cast()) == 0
                    && libc::mount(
                        c"tmpfs".as_ptr(),
                        target,
                        c"tmpfs".as_ptr(),
                        0,
                        c"size=2M".as_ptr().cast(),
                    ) == 0
            };
            assert!(mounted, "{}", std::io::Error::last_os_error());
            let open = |name: &str| {
                let path = Path::new("/mnt").join(name);
                File::options().read(true).write(true).create_new(true).open(path).unwrap()
            };
            let (image, filler) = (open("image"), open("filler"));
            image.set_len(64 << 20).unwrap();
            Some(Self { image, filler })
        })
        .join()
        .unwrap()
    }

    fn fill(&self) {
        let mut at = self.filler.metadata().unwrap().len();
        while self.filler.write_at(&[1; 4096], at).is_ok() {
            at += 4096;
        }
    }

    fn make_room(&self) {
        self.filler.set_len(0).unwrap();
    }
}

fn next(watch: &Watch) -> Event {
    watch.next(Duration::from_secs(10)).unwrap().expect("an event")
}

fn cleared() -> Event {
    Event::Cleared { kind: ConditionKind::DiskFull, device: Some("root".into()) }
}

/// Has the guest write where there is no room, and waits until it stands still.
fn run_out(vm: &RunningVm, storage: &Storage, console: &Session, watch: &Watch) {
    storage.fill();
    console.type_in("w");
    let Event::Condition(Condition { kind, device, message, .. }) = next(watch) else { panic!() };
    assert_eq!((kind, device.as_deref()), (ConditionKind::DiskFull, Some("root")));
    assert!(message.contains("root") && message.contains("full"), "{message}");
    assert_eq!(next(watch), Event::Phase(Phase::Paused));
    let state = vm.control().state().unwrap();
    assert_eq!((state.phase, state.conditions.len()), (Phase::Paused, 1));
}

#[test]
fn a_vm_stands_still_while_its_disks_storage_is_full() {
    let Some(storage) = Storage::new() else { return };
    let config = DiskConfig::new("root", "image", DiskFormat::Raw);
    let mut vm = Vm::new(kernel(), "").disk(config, storage.image.try_clone().unwrap());
    vm.launch.config.machine = MachineKind::Micro;
    let vm = vm.launch(Path::new(env!("CARGO_BIN_EXE_vmctl-vmm"))).unwrap();
    let (mut console, control) = (vm.console(), vm.control());
    let watch = vm.control().watch().unwrap();
    console.expect("D");
    console.type_in("w");
    console.expect("0");

    // Room comes, and the guest goes on as if nothing had been.
    run_out(&vm, &storage, &console, &watch);
    storage.make_room();
    assert_eq!([next(&watch), next(&watch)], [cleared(), Event::Phase(Phase::Running)]);
    console.expect("0");

    // Somebody pauses the VM meanwhile: room alone doesn't let it run. To resume is to look for room.
    run_out(&vm, &storage, &console, &watch);
    control.command(&Verb::Resume).unwrap();
    assert_eq!(control.state().unwrap().phase, Phase::Paused);
    control.command(&Verb::Pause).unwrap();
    storage.make_room();
    assert_eq!(next(&watch), cleared());
    assert_eq!(watch.next(Duration::from_millis(200)).unwrap(), None);
    assert_eq!(control.state().unwrap().phase, Phase::Paused);
    control.command(&Verb::Resume).unwrap();
    assert_eq!(next(&watch), Event::Phase(Phase::Running));
    console.expect("0");

    // A reboot gives the write up.
    run_out(&vm, &storage, &console, &watch);
    control.command(&Verb::Reboot).unwrap();
    let events = [next(&watch), next(&watch), next(&watch)];
    assert_eq!(events, [cleared(), Event::Rebooted, Event::Phase(Phase::Running)]);
    console.expect("D");

    // And so does the end.
    storage.make_room();
    console.type_in("w");
    console.expect("0");
    // The first 64 KiB are there: a write past what the guest of before wrote finds no room.
    for _ in 0..3 {
        console.type_in("w");
        console.expect("0");
    }
    run_out(&vm, &storage, &console, &watch);
    let stopped_at = Instant::now();
    control.command(&Verb::Stop).unwrap();
    assert_eq!(vm.wait().expect("an exit record").reason, ExitReason::Stopped);
    assert!(stopped_at.elapsed() < Duration::from_secs(5));
}

/// Whether the whole file can be locked for writing by this open file, as a launcher of VMs does it. The
/// lock is kept.
fn lock(file: &File) -> bool {
    // SAFETY: `flock` is a plain structure of integers, for which all zeroes is a value.
    let mut record: libc::flock = unsafe { std::mem::zeroed() };
    (record.l_type, record.l_whence) = (libc::F_WRLCK as i16, libc::SEEK_SET as i16);
    // SAFETY: the descriptor is open and the record valid for the length of the call.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw mut record) == 0 }
}

/// The lock belongs to the open file. The VM process has that from a descriptor, and so may the kernel's
/// ring, which goes a moment after the process.
#[test]
fn a_disks_lock_is_the_vms_from_its_launch_to_its_end() {
    let image = memfd(b"");
    image.set_len(1 << 20).unwrap();
    let path = format!("/proc/self/fd/{}", image.as_raw_fd());
    let open = || File::options().read(true).write(true).open(&path).unwrap();
    let (first, second) = (open(), open());
    assert!(lock(&first) && !lock(&second));
    let config = DiskConfig { queues: 2, ..DiskConfig::new("root", "image", DiskFormat::Raw) };
    let mut vm = Vm::new(kernel(), "").disk(config, first);
    vm.launch.config.machine = MachineKind::Micro;
    let vm = vm.launch(Path::new(env!("CARGO_BIN_EXE_vmctl-vmm"))).unwrap();
    vm.console().expect("D");
    assert!(!lock(&second), "the VM's disk could be locked by another");
    vm.control().command(&Verb::Reboot).unwrap();
    assert!(!lock(&second), "a reset gave the lock away");
    vm.kill();
    vm.wait();
    // Who starts VMs waits two seconds for a lock.
    let deadline = Instant::now() + Duration::from_secs(2);
    while !lock(&second) {
        assert!(Instant::now() < deadline, "the lock outlives the VM");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_disks_limits_change_while_it_runs() {
    let image = memfd(b"");
    image.set_len(64 << 20).unwrap();
    let mut config = DiskConfig::new("root", "image", DiskFormat::Raw);
    config.limits.bandwidth = Some(Bucket { per_second: 1, burst: 1 });
    let mut vm = Vm::new(kernel(), "").disk(config, image);
    vm.launch.config.machine = MachineKind::Micro;
    let vm = vm.launch(Path::new(env!("CARGO_BIN_EXE_vmctl-vmm"))).unwrap();
    let (mut console, control) = (vm.console(), vm.control());
    console.expect("D");
    // The first is larger than the burst, and passes; the second pays for it.
    console.type_in("ww");
    console.expect("0");
    std::thread::sleep(Duration::from_millis(100));
    let set = |disk: &str, limits| Verb::SetDiskLimits { disk: disk.into(), limits };
    let refused = control.request(&set("nope", Limits::default())).unwrap();
    assert!(matches!(refused, Response::Error { .. }));
    let Ok(None) = console.console.read(&mut [0; 16], Duration::from_millis(50)) else {
        panic!("a write passed")
    };
    let limits = Limits { operations: Some(Bucket { per_second: 1000, burst: 1000 }), bandwidth: None };
    control.command(&set("root", limits)).unwrap();
    console.expect("0");
    assert_eq!(control.state().unwrap().config.disks[0].limits, limits);
}
