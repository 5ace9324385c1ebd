//! The virtio devices, each behind a transport, driven by [`super::virtio`].

use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, mpsc};

use arbitrary::{Arbitrary as _, Unstructured};
use vmctl::vmm::config::{BalloonConfig, DiskConfig, DiskFormat, NicConfig, PageKind, VsockConfig};
use vmctl::vmm::device::ThreadStart;
use vmctl::vmm::device::balloon::Balloon;
use vmctl::vmm::device::block::Block;
use vmctl::vmm::device::entropy::Entropy;
use vmctl::vmm::device::net::{Net, NicFiles};
use vmctl::vmm::device::vsock::{Vsock, VsockFiles};
use vmctl::vmm::event::EventSender;
use vmctl::vmm::transport::VirtioDevice;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::mmio::Mmio;
use super::pci::Pci;
use super::virtio::{Driver, HIGH_BYTES, LOW_BYTES, Operation, memory};

const DISK_BYTES: u64 = 1 << 20;
/// More than a case can grow a disk to: a grown file is sparse, but a bound shows what runs away.
const GROWTH_BYTES_MAX: u64 = 8 << 20;

/// No filter: the fuzzer itself needs more of the kernel than a worker.
pub fn no_filter() -> ThreadStart {
    Arc::new(|_| Ok(()))
}

/// To an event loop that has gone.
pub fn events() -> EventSender {
    let wake = EventFd::new(EFD_NONBLOCK).expect("an event");
    EventSender { queue: mpsc::channel().0, wake: Arc::new(wake) }
}

pub fn memory_file(content: &[u8]) -> File {
    let fd = rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::CLOEXEC).expect("a memory file");
    let mut file = File::from(fd);
    file.write_all(content).expect("a write to memory");
    file
}

/// The operations that the bytes stand for.
pub fn operations(data: &[u8]) -> Vec<Operation> {
    // Bytes that end early stand for fewer operations, never for none at all.
    Vec::arbitrary_take_rest(Unstructured::new(data)).unwrap_or_default()
}

fn drive(device: impl VirtioDevice + 'static, data: &[u8], host: &mut dyn FnMut(u8, &[u8])) {
    let memory = memory();
    let mut transport = Mmio::new(device, memory.clone());
    Driver::new(&mut transport, memory).run(&operations(data), host);
}

fn block(config: &DiskConfig, image: &File, data: &[u8]) {
    let image = OwnedFd::from(image.try_clone().expect("a descriptor"));
    let block = Block::new(config, image, Vec::new(), &no_filter(), events()).expect("a good image");
    let handle = block.handle();
    drive(block, data, &mut |what, data| {
        let sectors = u64::from(*data.first().unwrap_or(&0)) * 64 + u64::from(what % 2);
        let _ = handle.resize((DISK_BYTES + sectors * 512).min(GROWTH_BYTES_MAX));
    });
    assert!(handle.capacity_bytes() <= GROWTH_BYTES_MAX, "only the host grows a disk");
}

pub fn block_raw(data: &[u8]) {
    let image = memory_file(b"");
    image.set_len(DISK_BYTES).expect("a size");
    block(&DiskConfig::new("raw", "image", DiskFormat::Raw), &image, data);
    let bytes = image.metadata().expect("metadata").len();
    assert!((DISK_BYTES..=GROWTH_BYTES_MAX).contains(&bytes), "the guest changed the image's size");
}

/// A qcow2 image of [`DISK_BYTES`] in 4 KiB clusters with nothing in it.
pub fn empty_qcow2() -> Vec<u8> {
    const CLUSTER: usize = 4096;
    let mut image = vec![0; 4 * CLUSTER];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb");
    put(4, &3u32.to_be_bytes());
    put(20, &12u32.to_be_bytes());
    put(24, &DISK_BYTES.to_be_bytes());
    // One L1 entry is 2 MiB of disk. The L1 table is cluster 3, the refcount table 1, its block 2.
    put(36, &1u32.to_be_bytes());
    put(40, &(3 * CLUSTER as u64).to_be_bytes());
    put(48, &(CLUSTER as u64).to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &104u32.to_be_bytes());
    put(CLUSTER, &(2 * CLUSTER as u64).to_be_bytes());
    for cluster in 0..4 {
        put(2 * CLUSTER + 2 * cluster, &1u16.to_be_bytes());
    }
    image
}

pub fn block_qcow2(data: &[u8]) {
    let image = memory_file(&empty_qcow2());
    block(&DiskConfig::new("qcow2", "image", DiskFormat::Qcow2), &image, data);
}

pub fn block_read_only(data: &[u8]) {
    let content: Vec<u8> = (0..DISK_BYTES / 64).map(|at| (at / 512) as u8).collect();
    let image = memory_file(&content);
    let config = DiskConfig { read_only: true, ..DiskConfig::new("ro", "image", DiskFormat::Raw) };
    let file = OwnedFd::from(image.try_clone().expect("a descriptor"));
    let block = Block::new(&config, file, Vec::new(), &no_filter(), events()).expect("a good image");
    drive(block, data, &mut |_, _| {});
    let mut now = vec![0; content.len() + 1];
    let read = rustix::io::pread(&image, &mut now, 0).expect("a read from memory");
    assert_eq!(&now[..read], content, "the guest changed a read-only disk");
}

pub fn entropy(data: &[u8]) {
    drive(Entropy::new(Default::default(), &no_filter()).expect("a device"), data, &mut |_, _| {});
}

/// The same device over PCI, so that the fuzzer gets at the transport's registers, the configuration space
/// and the MSI-X table with a device behind them.
pub fn virtio_pci(data: &[u8]) {
    let memory = memory();
    let entropy = Entropy::new(Default::default(), &no_filter()).expect("a device");
    let mut transport = Pci::new(entropy, memory.clone());
    Driver::new(&mut transport, memory).run(&operations(data), &mut |_, _| {});
}

pub fn vsock(data: &[u8]) {
    // The sockets of the host's side, one that a guest may connect to among them.
    static DIRECTORY: OnceLock<(std::path::PathBuf, UnixListener)> = OnceLock::new();
    let (directory, _listening) = DIRECTORY.get_or_init(|| {
        let path = std::env::temp_dir().join(format!("vmctl-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a directory");
        let listener = UnixListener::bind(path.join("vsock_1024")).expect("a socket");
        (path, listener)
    });
    let own = directory.join("vsock");
    let _ = std::fs::remove_file(&own);
    let listener = UnixListener::bind(&own).expect("a socket");
    let files = VsockFiles {
        listener: listener.into(),
        directory: File::open(directory).expect("a directory").into(),
    };
    let vsock = Vsock::new(VsockConfig { cid: 3 }, files, &no_filter()).expect("a device");
    // Clients of the host, who say what the fuzzer says.
    let mut clients = Vec::new();
    drive(vsock, data, &mut |what, text| {
        if what < 64 {
            clients.extend(UnixStream::connect(&own));
        }
        if let Some(client) = clients.last_mut() {
            let _ = client.set_nonblocking(true);
            let _ = client.write_all(text);
        }
        if what > 240 {
            clients.pop();
        }
    });
}

pub fn balloon(data: &[u8]) {
    let config = BalloonConfig { target_bytes: 1 << 16, free_page_reporting: true, deflate_on_oom: true };
    let balloon =
        Balloon::new(config, LOW_BYTES + HIGH_BYTES, PageKind::Small, &no_filter()).expect("a device");
    let handle = balloon.handle();
    drive(balloon, data, &mut |pages, _| {
        let _ = handle.set_target_bytes(4096 * u64::from(pages));
    });
}

pub fn net(data: &[u8]) {
    // One case at a time: they share the tap and its network.
    static NETWORK: OnceLock<Mutex<Network>> = OnceLock::new();
    let network = NETWORK.get_or_init(|| Mutex::new(Network::new()));
    let network = network.lock().unwrap_or_else(PoisonError::into_inner);
    let tap = OwnedFd::from(network.tap.try_clone().expect("a descriptor"));
    let config = NicConfig::new("lan", "fuzz0", "52:54:00:12:34:56");
    let files = NicFiles { taps: vec![tap], vhosts: Vec::new() };
    let net = Net::new(&config, files, &no_filter()).expect("a device");
    let handle = net.handle();
    drive(net, data, &mut |what, frame| {
        // The cable is pulled now and then.
        let _ = handle.set_link(what != 255);
        network.send(frame);
    });
}

/// A network namespace with nothing in it but a tap and a packet socket at the tap's other side.
struct Network {
    tap: File,
    peer: OwnedFd,
}

impl Network {
    /// The namespace is that of a thread which ends; the descriptors keep it.
    fn new() -> Self {
        std::thread::spawn(|| {
            // SAFETY: changes nothing but this thread's namespace.
            assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "a network of its own needs root");
            let tap = open_tap();
            let peer = packet_socket();
            Self { tap, peer }
        })
        .join()
        .expect("a network")
    }

    fn send(&self, frame: &[u8]) {
        // SAFETY: sends what `frame` holds; a full queue or an odd frame is an error and no harm.
        unsafe {
            libc::send(self.peer.as_raw_fd(), frame.as_ptr().cast(), frame.len(), libc::MSG_DONTWAIT);
        }
    }
}

fn open_tap() -> File {
    const TUNSETIFF: u64 = 0x4004_54ca;
    const FLAGS: u16 = 0x0002 | 0x1000 | 0x4000;
    let tap = File::options().read(true).write(true).open("/dev/net/tun").expect("/dev/net/tun");
    let mut request = [0u8; 40];
    request[..5].copy_from_slice(b"fuzz0");
    request[16..18].copy_from_slice(&FLAGS.to_ne_bytes());
    // SAFETY: the kernel reads and writes a `struct ifreq`, which is 40 bytes long.
    let made = unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETIFF as _, request.as_mut_ptr()) };
    assert_eq!(made, 0, "a tap: {}", std::io::Error::last_os_error());
    tap
}

/// Brings the tap up and binds a socket to it.
fn packet_socket() -> OwnedFd {
    use std::os::fd::FromRawFd as _;
    // SAFETY: makes a descriptor or fails.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, i32::from(3u16.to_be())) };
    assert!(fd >= 0, "a packet socket");
    let mut request = [0u8; 40];
    request[..5].copy_from_slice(b"fuzz0");
    request[16..18].copy_from_slice(&(libc::IFF_UP as u16).to_ne_bytes());
    // SAFETY: the kernel reads a `struct ifreq`, which is 40 bytes long.
    let up = unsafe { libc::ioctl(fd, libc::SIOCSIFFLAGS, request.as_mut_ptr()) };
    assert_eq!(up, 0, "the tap is up");
    // SAFETY: all zeroes is a valid `sockaddr_ll`, and the name ends with a zero.
    let (mut address, index) =
        unsafe { (std::mem::zeroed::<libc::sockaddr_ll>(), libc::if_nametoindex(c"fuzz0".as_ptr())) };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = 3u16.to_be();
    address.sll_ifindex = index as i32;
    // SAFETY: the address is a whole `sockaddr_ll`.
    let bound = unsafe { libc::bind(fd, (&raw const address).cast(), size_of_val(&address) as u32) };
    assert_eq!(bound, 0, "a bound socket");
    // SAFETY: the descriptor is ours.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
