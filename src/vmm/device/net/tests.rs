mod control_side;
mod pairs;

use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::vmm::device::testing::{Driver, EVENT_IDX, NEXT, QUEUE_SIZE, WRITE, sandbox_hook, tool};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const MRG_RXBUF: u64 = 1 << 15;
const OFFLOADS: u64 = 0b11 | 0b111 << 7 | 0b111 << 11;
const STATUS: u64 = 1 << 16;
const BUFFERS: u64 = 0x40_0000;
const FRAME: u64 = 0x30_0000;

/// Gives this test's thread (and the threads that it makes) a network of its own.
fn own_network() {
    // SAFETY: changes nothing but this thread's namespace.
    assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "needs root");
}

fn tap_with(name: &str, flags: u16) -> OwnedFd {
    let file = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    let mut request = [0u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    request[16..18].copy_from_slice(&flags.to_ne_bytes());
    const TUNSETIFF: u64 = 0x4004_54ca;
    // SAFETY: the kernel reads and writes a `struct ifreq`, which is 40 bytes long.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF as _, request.as_mut_ptr()) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    file.into()
}

/// A tap that is up, with IPv6 off so that the kernel says nothing by itself.
fn tap(name: &str) -> OwnedFd {
    let fd = tap_with(name, 0x0002 | 0x1000 | 0x4000);
    bring_up(name);
    fd
}

fn bring_up(name: &str) {
    tool("sysctl", &["-q", "-w", &format!("net.ipv6.conf.{name}.disable_ipv6=1")]).unwrap();
    tool("ip", &["link", "set", name, "up"]).unwrap();
}

fn files(tap: OwnedFd) -> NicFiles {
    NicFiles { taps: vec![tap], vhosts: Vec::new() }
}

/// The network's end: a packet socket on the tap's interface.
struct Peer(OwnedFd);

impl Peer {
    fn on(name: &str) -> Self {
        let protocol = 3u16.to_be();
        // SAFETY: makes a descriptor or fails.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, i32::from(protocol)) };
        assert!(fd >= 0);
        let name = CString::new(name).unwrap();
        // SAFETY: all zeroes is a valid `sockaddr_ll`, and the name ends with a zero.
        let (mut address, index) =
            unsafe { (std::mem::zeroed::<libc::sockaddr_ll>(), libc::if_nametoindex(name.as_ptr())) };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol;
        address.sll_ifindex = index as i32;
        // SAFETY: the address is a whole `sockaddr_ll`.
        let result = unsafe { libc::bind(fd, (&raw const address).cast(), size_of_val(&address) as u32) };
        assert_eq!(result, 0);
        let (big, timeout) = (8 << 20, libc::timeval { tv_sec: 2, tv_usec: 0 });
        // SAFETY: the options are an `int` and a `timeval`.
        unsafe {
            libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, (&raw const big).cast(), 4);
            libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_RCVTIMEO, (&raw const timeout).cast(), 16);
        }
        // SAFETY: the descriptor is ours.
        Self(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    fn send(&self, frame: &[u8]) {
        rustix::net::send(&self.0, frame, rustix::net::SendFlags::empty()).unwrap();
    }

    fn receive(&self) -> Option<Vec<u8>> {
        let mut frame = vec![0; 70000];
        let (len, _) = rustix::net::recv(&self.0, &mut frame[..], rustix::net::RecvFlags::empty()).ok()?;
        frame.truncate(len);
        Some(frame)
    }
}

fn config(name: &str) -> NicConfig {
    NicConfig { mtu: 1450, ..NicConfig::new("lan", name, "52:54:00:12:34:56") }
}

fn frame(len: usize, seed: u8) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([0x52, 0x54, 0, 0, 0, seed, 0x88, 0xb5]);
    frame.extend((14..len).map(|at| (at as u8).wrapping_mul(7).wrapping_add(seed)));
    frame
}

impl Driver {
    fn offer_buffers(&mut self, count: u64, len: u32) {
        for _ in 0..count {
            let at = BUFFERS + u64::from(self.rings[RECEIVE].available % QUEUE_SIZE) * 0x1_0000;
            self.add(RECEIVE, &[(at, len, WRITE)]);
        }
        self.publish(RECEIVE);
    }

    /// A received frame, with its header, put together from its buffers.
    fn received(&mut self) -> Vec<u8> {
        let (head, len) = self.used(RECEIVE);
        let mut frame = self.buffer(head, len);
        let mut taken = 1;
        while frame.len() < 12 || taken < u16::from_le_bytes([frame[10], frame[11]]) {
            let (head, len) = self.used_within(RECEIVE, Duration::ZERO).expect("buffers come at once");
            frame.extend(self.buffer(head, len));
            taken += 1;
        }
        frame
    }

    fn buffer(&self, head: u16, len: u32) -> Vec<u8> {
        self.get(BUFFERS + u64::from(head) * 0x1_0000, len as usize)
    }

    fn transmit(&mut self, frame: &[u8]) {
        self.put(FRAME, &[0; 12]);
        self.put(FRAME + 0x1000, frame);
        self.add(TRANSMIT, &[(FRAME, 12, 0), (FRAME + 0x1000, frame.len() as u32, 0)]);
        self.publish(TRANSMIT);
        assert_eq!(self.used(TRANSMIT).1, 0);
    }

    fn net_status(&mut self) -> u16 {
        let mut status = [0; 2];
        crate::vmm::bus::BusDevice::read(&mut self.transport, 0x106, &mut status);
        u16::from_le_bytes(status)
    }

    fn link_up(&mut self) -> bool {
        self.net_status() & 1 == 1
    }
}

fn net(name: &str) -> Net {
    Net::new(&config(name), files(tap(name)), &sandbox_hook()).unwrap()
}

#[test]
fn frames_pass_both_ways() {
    own_network();
    for features in [0, MRG_RXBUF, EVENT_IDX | MRG_RXBUF | OFFLOADS | STATUS] {
        let mut driver = Driver::new(net("tap0"));
        driver.start(features);
        driver.offer_buffers(64, 2048);
        let peer = Peer::on("tap0");
        for seed in 0..100 {
            let sent = frame(60 + 14 * usize::from(seed), seed);
            driver.transmit(&sent);
            assert_eq!(peer.receive().unwrap(), sent);
            peer.send(&sent);
            let received = driver.received();
            assert_eq!(received[12..], sent, "features {features:#x}");
            assert_eq!(received[10..12], [1, 0]);
            driver.offer_buffers(1, 2048);
        }
    }
}

#[test]
fn configuration_space_says_what_was_declared() {
    own_network();
    let mut driver = Driver::new(net("tap0"));
    let mut space = [0; 16];
    crate::vmm::bus::BusDevice::read(&mut driver.transport, 0x100, &mut space);
    assert_eq!(space[..8], [0x52, 0x54, 0, 0x12, 0x34, 0x56, 1, 0]);
    assert_eq!(space[10..], [0xaa, 0x05, 0, 0, 0, 0]);
}

#[test]
fn a_large_frame_fills_several_buffers_at_once() {
    own_network();
    let mut driver = Driver::new(net("tap0"));
    tool("ip", &["link", "set", "tap0", "mtu", "9000"]).unwrap();
    driver.start(MRG_RXBUF);
    let peer = Peer::on("tap0");
    // Room for half of it: it must wait, and then come whole.
    driver.offer_buffers(4, 1000);
    let sent = frame(9000, 1);
    peer.send(&sent);
    assert!(driver.used_within(RECEIVE, Duration::from_millis(50)).is_none());
    driver.offer_buffers(16, 1000);
    let received = driver.received();
    assert_eq!(received[10..12], [10, 0]);
    assert_eq!(received[12..], sent);
    let small = frame(100, 2);
    peer.send(&small);
    assert_eq!(driver.received()[12..], small);
}

#[test]
fn frames_that_fit_nowhere_are_dropped_and_the_rest_goes_on() {
    own_network();
    let mut driver = Driver::new(net("tap0"));
    driver.start(0);
    let peer = Peer::on("tap0");
    driver.offer_buffers(4, 500);
    peer.send(&frame(1000, 1));
    peer.send(&frame(300, 2));
    assert_eq!(driver.received()[12..], frame(300, 2));
    // A whole ring of buffers that is still too small.
    driver.start(MRG_RXBUF);
    driver.offer_buffers(u64::from(QUEUE_SIZE), 4);
    peer.send(&frame(1400, 3));
    peer.send(&frame(300, 4));
    assert_eq!(driver.received()[12..], frame(300, 4));
}

#[test]
fn frames_wait_in_the_kernel_while_the_guest_has_no_room() {
    own_network();
    let mut driver = Driver::new(net("tap0"));
    driver.start(EVENT_IDX | MRG_RXBUF);
    let peer = Peer::on("tap0");
    (0..50).for_each(|seed| peer.send(&frame(200, seed)));
    for seed in 0..50 {
        driver.offer_buffers(1, 2048);
        assert_eq!(driver.received()[12..], frame(200, seed));
    }
}

#[test]
fn hostile_transmissions_are_dropped() {
    own_network();
    let mut driver = Driver::new(net("tap0"));
    driver.start(OFFLOADS);
    let peer = Peer::on("tap0");
    driver.put(FRAME, &[0xff; 12]);
    let chains: &[&[(u64, u32, u16)]] = &[
        &[(FRAME, 12, 0)],
        &[(FRAME, 5, 0)],
        &[(FRAME, 12, 0), (FRAME, 500, 0)],
        &[(u64::MAX - 3, 12, 0), (FRAME, 500, 0)],
        &[(FRAME, u32::MAX, 0)],
        &[(FRAME, 12, WRITE), (FRAME, 500, 0)],
        &[(FRAME, 100_000, 0)],
    ];
    for chain in chains {
        let head = driver.add(TRANSMIT, chain);
        driver.publish(TRANSMIT);
        assert_eq!(driver.used(TRANSMIT), (head, 0));
    }
    driver.transmit(&frame(100, 9));
    assert_eq!(peer.receive().unwrap(), frame(100, 9));
}

/// An IPv4 TCP segment of this payload, with its checksum left to be done, and the header for that.
fn large_segment(payload: usize) -> ([u8; 12], Vec<u8>) {
    let mut packet = frame(54 + payload, 1);
    packet[12..14].copy_from_slice(&[8, 0]);
    let mut ip = [0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
    ip[2..4].copy_from_slice(&(40 + payload as u16).to_be_bytes());
    let sum = ip.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1])).sum::<u32>();
    ip[10..12].copy_from_slice(&(!((sum & 0xffff) + (sum >> 16)) as u16).to_be_bytes());
    packet[14..34].copy_from_slice(&ip);
    packet[34..54].copy_from_slice(&[0, 80, 0, 81, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
    // NEEDS_CSUM, TCPV4, header of 54 bytes, segments of 1448, checksum from 34 into 34 + 16.
    ([1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0], packet)
}

#[test]
fn the_guest_may_send_large_segments() {
    own_network();
    let mut driver = Driver::new(net("tap0"));
    driver.start(OFFLOADS | MRG_RXBUF);
    let peer = Peer::on("tap0");
    let (header, packet) = large_segment(20000);
    driver.put(FRAME, &header);
    driver.put(FRAME + 0x1000, &packet);
    driver.add(TRANSMIT, &[(FRAME, 12, 0), (FRAME + 0x1000, packet.len() as u32, 0)]);
    driver.publish(TRANSMIT);
    assert_eq!(peer.receive().unwrap(), packet, "one segment, whole");
}

/// Sends one of 20000 bytes from the network's end.
fn send_large_segment(name: &str) {
    let (header, packet) = large_segment(20000);
    let (peer, on) = (Peer::on(name), 1);
    // SAFETY: PACKET_VNET_HDR takes an `int`.
    unsafe { libc::setsockopt(peer.0.as_raw_fd(), libc::SOL_PACKET, 15, (&raw const on).cast(), 4) };
    peer.send(&[&header[..10], &packet].concat());
}

#[test]
fn the_guest_receives_large_segments_only_if_it_asked_for_them() {
    own_network();
    let net = net("tap0");
    let handle = net.handle();
    let mut driver = Driver::new(net);
    let packet = large_segment(20000).1;
    driver.start(OFFLOADS | MRG_RXBUF);
    driver.offer_buffers(64, 2048);
    send_large_segment("tap0");
    let received = driver.received();
    assert_eq!(received[1], 1, "TCPV4");
    assert_eq!(received[12..], packet);
    // A new tap gets the same offloads.
    handle.replace_tap(vec![tap("tap1")]).unwrap();
    send_large_segment("tap1");
    assert_eq!(driver.received()[12..], packet);
    driver.start(MRG_RXBUF);
    driver.offer_buffers(64, 2048);
    send_large_segment("tap1");
    for _ in 0..13 {
        let received = driver.received();
        assert_eq!(received[..2], [0, 0]);
        assert_eq!(received.len(), 12 + 54 + 1448);
    }
}

fn cpu_time() -> Duration {
    let mut usage = unsafe_zeroed();
    // SAFETY: the kernel writes one `rusage`.
    unsafe { libc::getrusage(libc::RUSAGE_SELF, &mut usage) };
    let of = |time: libc::timeval| Duration::new(time.tv_sec as u64, time.tv_usec as u32 * 1000);
    of(usage.ru_utime) + of(usage.ru_stime)
}

fn unsafe_zeroed() -> libc::rusage {
    // SAFETY: all zeroes is a valid `rusage`.
    unsafe { std::mem::zeroed() }
}

/// The worker's own CPU time, by its thread's name.
fn worker_ticks() -> u64 {
    let own = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    own.filter_map(|task| {
        let name = std::fs::read_to_string(task.path().join("comm")).ok()?;
        let stat = std::fs::read_to_string(task.path().join("stat")).ok()?;
        let fields: Vec<_> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        (name.trim() == "nic-spin")
            .then(|| fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap())
    })
    .sum()
}

#[test]
fn a_deleted_tap_is_a_pulled_cable_until_another_comes() {
    own_network();
    let mut config = config("tap0");
    config.name = "spin".into();
    let net = Net::new(&config, files(tap("tap0")), &sandbox_hook()).unwrap();
    let handle = net.handle();
    let mut driver = Driver::new(net);
    driver.start(EVENT_IDX | MRG_RXBUF | OFFLOADS | STATUS);
    driver.offer_buffers(32, 2048);
    driver.transmit(&frame(100, 1));
    assert!(driver.link_up());
    tool("ip", &["link", "del", "tap0"]).unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    while driver.link_up() {
        assert!(Instant::now() < deadline, "the guest was not told that the link is down");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(driver.read(0x60) & 2, 2);
    let (ticks, began) = (worker_ticks(), cpu_time());
    for seed in 0..10 {
        driver.transmit(&frame(100, seed));
        std::thread::sleep(Duration::from_millis(50));
    }
    // A thread that spins would use 50 ticks of 10 ms.
    assert!(worker_ticks() - ticks < 10, "the worker spins ({:?})", cpu_time() - began);
    handle.replace_tap(vec![tap("tap1")]).unwrap();
    assert!(driver.link_up());
    let peer = Peer::on("tap1");
    driver.transmit(&frame(200, 7));
    assert_eq!(peer.receive().unwrap(), frame(200, 7));
    peer.send(&frame(300, 8));
    assert_eq!(driver.received()[12..], frame(300, 8));
}

#[test]
fn a_tap_that_is_down_drops_and_recovers() {
    own_network();
    let mut driver = Driver::new(net("tap0"));
    driver.start(EVENT_IDX | MRG_RXBUF);
    driver.offer_buffers(32, 2048);
    tool("ip", &["link", "set", "tap0", "down"]).unwrap();
    (0..5).for_each(|seed| driver.transmit(&frame(100, seed)));
    tool("ip", &["link", "set", "tap0", "up"]).unwrap();
    let peer = Peer::on("tap0");
    driver.transmit(&frame(100, 6));
    assert_eq!(peer.receive().unwrap(), frame(100, 6));
    peer.send(&frame(100, 7));
    assert_eq!(driver.received()[12..], frame(100, 7));
}

#[test]
fn a_live_tap_can_be_replaced_and_a_bad_one_is_refused() {
    own_network();
    let net = net("tap0");
    let handle = net.handle();
    let mut driver = Driver::new(net);
    // Before the driver is there, too.
    handle.replace_tap(vec![tap("tap1")]).unwrap();
    driver.start(MRG_RXBUF);
    driver.offer_buffers(32, 2048);
    let error = handle.replace_tap(vec![tap_with("bad0", 0x0002 | 0x1000)]).unwrap_err();
    assert!(std::error::Error::source(&error).unwrap().to_string().contains("IFF_VNET_HDR"));
    assert!(handle.replace_tap(vec![File::open("/dev/null").unwrap().into()]).is_err());
    driver.transmit(&frame(100, 1));
    handle.replace_tap(vec![tap("tap2")]).unwrap();
    let peer = Peer::on("tap2");
    driver.transmit(&frame(100, 2));
    assert_eq!(peer.receive().unwrap(), frame(100, 2));
    peer.send(&frame(100, 3));
    assert_eq!(driver.received()[12..], frame(100, 3));
    // The old one is closed, so it is gone.
    assert!(!tool("ip", &["-br", "link"]).unwrap().contains("tap1"));
}

#[test]
fn a_reset_in_the_middle_of_traffic() {
    own_network();
    let mut driver = Driver::new(net("tap0"));
    let peer = Peer::on("tap0");
    for round in 0..30 {
        driver.start(EVENT_IDX | MRG_RXBUF | OFFLOADS);
        driver.offer_buffers(64, 2048);
        for seed in 0..40 {
            peer.send(&frame(500, seed));
            driver.put(FRAME + 0x1000, &frame(500, seed));
            driver.add(TRANSMIT, &[(FRAME, 12, 0), (FRAME + 0x1000, 500, 0)]);
            driver.publish(TRANSMIT);
        }
        std::thread::sleep(Duration::from_micros(round * 53));
        driver.write(0x70, 0);
        let used = (driver.used_index(RECEIVE), driver.used_index(TRANSMIT));
        std::thread::sleep(Duration::from_millis(1));
        assert_eq!((driver.used_index(RECEIVE), driver.used_index(TRANSMIT)), used);
    }
}

#[test]
fn one_interrupt_for_a_batch() {
    own_network();
    let mut driver = Driver::new(net("tap0"));
    driver.start(EVENT_IDX | MRG_RXBUF);
    let peer = Peer::on("tap0");
    (0..50).for_each(|seed| peer.send(&frame(500, seed)));
    driver.want_interrupt_after(TRANSMIT, 1000);
    driver.offer_buffers(64, 2048);
    (0..50).for_each(|seed| assert_eq!(driver.received()[12..], frame(500, seed)));
    driver.wait_interrupt(Duration::from_millis(20));
    assert_eq!(driver.interrupts, 1, "50 frames in one batch");
}

#[test]
fn addresses_are_checked() {
    for bad in [
        "",
        "52:54:00:12:34",
        "52:54:00:12:34:56:78",
        "53:54:00:12:34:56",
        "00:00:00:00:00:00",
        "+2:54:00:12:34:56",
        "5254.0012.3456",
    ] {
        assert_eq!(parse_mac_address(bad), None, "{bad}");
    }
    assert_eq!(parse_mac_address("52:54:00:ab:cd:ef"), Some([0x52, 0x54, 0, 0xab, 0xcd, 0xef]));
}

fn hostile_descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let address = prop_oneof![5 => FRAME..FRAME + 4096, 1 => any::<u64>()];
    let len = prop_oneof![3 => Just(12u32), 3 => 0u32..2000, 1 => any::<u32>()];
    (address, len, 0u16..8, 0u16..300)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, max_shrink_iters: 50, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn hostile_rings_never_panic(
        descriptors in prop::collection::vec(hostile_descriptor(), 1..32),
        heads in prop::collection::vec(0u16..40, 1..30),
        header in any::<[u8; 12]>(),
        features in any::<u64>(),
    ) {
        own_network();
        let mut driver = Driver::new(net("tap0"));
        let offered = driver.offered();
        driver.start(offered & features);
        driver.put(FRAME, &header);
        let peer = Peer::on("tap0");
        for queue in [RECEIVE, TRANSMIT] {
            for (at, (address, len, flags, next)) in descriptors.iter().enumerate() {
                let flags = if at % 3 == 0 { *flags | NEXT } else { *flags };
                driver.write_descriptor(queue, at as u16, *address, *len, flags, *next);
            }
            heads.iter().for_each(|head| driver.add_head(queue, *head));
            driver.publish(queue);
        }
        for seed in 0..20 {
            peer.send(&frame(700, seed));
        }
        let deadline = Instant::now() + Duration::from_secs(10);
        while usize::from(driver.used_index(TRANSMIT)) < heads.len() && driver.status() & 64 == 0 {
            prop_assert!(Instant::now() < deadline, "the device hangs");
            std::thread::yield_now();
        }
        driver.start(offered);
        driver.transmit(&frame(100, 1));
    }
}
