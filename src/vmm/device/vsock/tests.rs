use std::io::{ErrorKind, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use vmm_sys_util::tempdir::TempDir;

use super::connection::BUFFER_BYTES;
use super::packet::*;
use super::table::{CONNECTIONS_MAX, REFUSALS_MAX};
use super::*;
use crate::vmm::device::testing::{Buffer, Driver, WRITE, sandbox_hook};

const CID: u64 = 42;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const RECEIVE_BUFFERS: u64 = 1 << 20;
const RECEIVE_BYTES: u32 = 4096;
const PACKET: u64 = 8 << 20;
const GUEST_PORT: u32 = 1000;
/// What the guest says that it has room for.
const GUEST_ROOM: u32 = 64 << 10;

/// A guest's driver with its receive buffers, and the host's directory.
struct Guest {
    driver: Driver,
    directory: TempDir,
    counters: Arc<VsockCounters>,
    /// The header that its packets carry.
    header: Header,
}

impl Guest {
    fn new() -> Self {
        let mut guest = Self::without_driver();
        guest.driver.start(0);
        guest.give_buffers(32);
        guest
    }

    fn without_driver() -> Self {
        let directory = TempDir::new().unwrap();
        let listener =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
                .unwrap();
        let path = directory.as_path().join("vsock");
        rustix::net::bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY;
        let path = rustix::fs::open(directory.as_path(), flags, rustix::fs::Mode::empty()).unwrap();
        let files = VsockFiles { listener, directory: path };
        let vsock = Vsock::new(VsockConfig { cid: CID as u32 }, files, &sandbox_hook()).unwrap();
        let counters = vsock.counters();
        let header = Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: GUEST_PORT,
            kind: TYPE_STREAM,
            buf_alloc: GUEST_ROOM,
            ..Header::default()
        };
        Self { driver: Driver::new(vsock), directory, counters, header }
    }

    fn give_buffers(&mut self, count: u64) {
        for number in 0..count {
            self.driver.add(RECEIVE, &[(RECEIVE_BUFFERS + number * 4096, RECEIVE_BYTES, WRITE)]);
        }
        self.driver.publish(RECEIVE);
    }

    fn host_connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.directory.as_path().join("vsock")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        stream
    }

    fn host_listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.directory.as_path().join(format!("vsock_{port}"))).unwrap()
    }

    fn send_raw(&mut self, header: Header, data: &[u8], buffers: &[Buffer]) {
        self.driver.put(PACKET, &[&header.to_bytes()[..], data].concat());
        let head = self.driver.add(TRANSMIT, buffers);
        self.driver.publish(TRANSMIT);
        assert_eq!(self.driver.used(TRANSMIT), (head, 0));
    }

    fn send_with(&mut self, header: Header, data: &[u8]) {
        let length = (HEADER_BYTES + data.len()) as u32;
        self.send_raw(Header { len: data.len() as u32, ..header }, data, &[(PACKET, length, 0)]);
    }

    fn send(&mut self, op: u16, data: &[u8]) {
        self.send_with(Header { op, ..self.header }, data);
    }

    fn shut(&mut self, flags: u32) {
        self.send_with(Header { op: OP_SHUTDOWN, flags, ..self.header }, &[]);
    }

    /// The next packet; its buffer is given again.
    fn receive(&mut self) -> (Header, Vec<u8>) {
        self.receive_within(Duration::from_secs(5)).expect("the guest got no packet in time")
    }

    fn receive_within(&mut self, timeout: Duration) -> Option<(Header, Vec<u8>)> {
        let (head, length) = self.driver.used_within(RECEIVE, timeout)?;
        let at = RECEIVE_BUFFERS + u64::from(head) % 32 * 4096;
        let header = Header::parse(self.driver.get(at, HEADER_BYTES).try_into().unwrap());
        assert_eq!(length, HEADER_BYTES as u32 + header.len);
        let data = self.driver.get(at + HEADER_BYTES as u64, header.len as usize);
        self.driver.add_head(RECEIVE, head);
        self.driver.publish(RECEIVE);
        assert_eq!((header.src_cid, header.kind), (HOST_CID, TYPE_STREAM));
        Some((header, data))
    }

    fn expect(&mut self, op: u16) -> Header {
        let (header, _) = self.receive();
        assert_eq!(header.op, op, "{header:?}");
        header
    }

    fn expect_nothing(&mut self) {
        if let Some((header, _)) = self.receive_within(Duration::from_millis(30)) {
            panic!("an unexpected packet: {header:?}");
        }
    }

    /// A connection that the host asked for, ready for data.
    fn accept(&mut self) -> UnixStream {
        let mut host = self.host_connect();
        host.write_all(format!("CONNECT {GUEST_PORT}\n").as_bytes()).unwrap();
        let request = self.expect(OP_REQUEST);
        assert_eq!((request.dst_cid, request.dst_port, request.buf_alloc), (CID, GUEST_PORT, BUFFER_BYTES));
        self.header.dst_port = request.src_port;
        self.send(OP_RESPONSE, &[]);
        assert_eq!(read_line(&mut host), format!("OK {}\n", request.src_port));
        host
    }

    /// A connection that the guest asked for, ready for data.
    fn connect(&mut self, listener: &UnixListener, port: u32) -> UnixStream {
        self.header.dst_port = port;
        self.send(OP_REQUEST, &[]);
        let response = self.expect(OP_RESPONSE);
        assert_eq!((response.src_port, response.dst_port), (port, self.header.src_port));
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        stream
    }
}

fn read_line(stream: &mut UnixStream) -> String {
    let mut line = Vec::new();
    let mut byte = [0];
    while line.last() != Some(&b'\n') {
        stream.read_exact(&mut byte).unwrap();
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}

fn read(stream: &mut UnixStream, length: usize) -> Vec<u8> {
    let mut data = vec![0; length];
    stream.read_exact(&mut data).unwrap();
    data
}

fn is_closed(mut stream: UnixStream) -> bool {
    match stream.read(&mut [0]) {
        Ok(length) => length == 0,
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    }
}

#[test]
fn the_host_connects_to_a_port_of_the_guest() {
    let mut guest = Guest::new();
    let mut host = guest.host_connect();
    // What follows the line is data already.
    host.write_all(b"CONNECT 1000\nhello").unwrap();
    let request = guest.expect(OP_REQUEST);
    guest.expect_nothing();
    guest.header.dst_port = request.src_port;
    guest.send(OP_RESPONSE, &[]);
    let (header, data) = guest.receive();
    assert_eq!((header.op, &data[..]), (OP_RW, &b"hello"[..]));
    guest.send(OP_RW, b"world");
    assert_eq!(read_line(&mut host), format!("OK {}\n", request.src_port));
    assert_eq!(read(&mut host, 5), b"world");
    let counters = guest.counters.snapshot();
    assert_eq!((counters.connections, counters.opened), (1, 1));
    assert_eq!((counters.received_bytes, counters.sent_bytes, counters.bad_packets), (5, 5, 0));
}

#[test]
fn the_guest_connects_to_sockets_of_the_directory() {
    let mut guest = Guest::new();
    let listener = guest.host_listen(5000);
    let mut host = guest.connect(&listener, 5000);
    guest.send(OP_RW, b"ping");
    assert_eq!(read(&mut host, 4), b"ping");
    host.write_all(b"pong").unwrap();
    assert_eq!(guest.receive().1, b"pong");
    // Nobody listens there, and a file is no socket.
    std::fs::write(guest.directory.as_path().join("vsock_7"), b"").unwrap();
    for port in [6, 7, u32::MAX - 1] {
        guest.send_with(Header { op: OP_REQUEST, dst_port: port, ..guest.header }, &[]);
        let refusal = guest.expect(OP_RST);
        assert_eq!((refusal.src_port, refusal.dst_port, refusal.dst_cid), (port, GUEST_PORT, CID));
    }
    assert_eq!(guest.counters.refused.get(), 3);
}

#[test]
fn the_threads_directory_is_its_own() {
    let before = std::env::current_dir().unwrap();
    let guest = Guest::new();
    assert_eq!(std::env::current_dir().unwrap(), before);
    assert_ne!(before, guest.directory.as_path());
}

#[test]
fn data_in_many_pieces_arrive_as_one() {
    let mut guest = Guest::new();
    let listener = guest.host_listen(1);
    let mut host = guest.connect(&listener, 1);
    let header = Header { op: OP_RW, len: 9, ..guest.header };
    // The header in two pieces, the data in three, one of them shared with the header.
    let at = |offset| PACKET + offset;
    let buffers = [(at(0), 20, 0), (at(20), 26, 0), (at(46), 0, 0), (at(46), 3, 0), (at(49), 4, 0)];
    guest.send_raw(header, b"scattered", &buffers);
    assert_eq!(read(&mut host, 9), b"scattered");
}

#[test]
fn the_guest_gets_no_more_than_it_has_room_for() {
    let mut guest = Guest::new();
    guest.header.buf_alloc = 10;
    let listener = guest.host_listen(1);
    let mut host = guest.connect(&listener, 1);
    host.write_all(b"0123456789abcdefghij").unwrap();
    assert_eq!(guest.receive().1, b"0123456789");
    guest.expect(OP_CREDIT_REQUEST);
    // Still no room: it isn't asked again.
    guest.send(OP_CREDIT_UPDATE, &[]);
    guest.expect_nothing();
    guest.send_with(Header { op: OP_CREDIT_UPDATE, fwd_cnt: 4, ..guest.header }, &[]);
    assert_eq!(guest.receive().1, b"abcd");
    guest.expect(OP_CREDIT_REQUEST);
    // More taken than was ever sent, and a buffer that shrinks: nonsense stops the guest's own data.
    guest.send_with(Header { op: OP_CREDIT_UPDATE, fwd_cnt: 5000, ..guest.header }, &[]);
    guest.send_with(Header { op: OP_CREDIT_UPDATE, buf_alloc: 0, fwd_cnt: 14, ..guest.header }, &[]);
    guest.expect_nothing();
    guest.send_with(Header { op: OP_CREDIT_UPDATE, buf_alloc: u32::MAX, fwd_cnt: 14, ..guest.header }, &[]);
    assert_eq!(guest.receive().1, b"efghij");
}

#[test]
fn the_guest_may_send_as_much_as_it_is_told() {
    let mut guest = Guest::new();
    let listener = guest.host_listen(1);
    let mut host = guest.connect(&listener, 1);
    let total = 2 << 20;
    let reader = std::thread::spawn(move || {
        let mut received: Vec<u8> = Vec::new();
        let mut chunk = [0; 1000];
        // Slowly, so that the buffer is of use.
        while received.len() < total {
            let length = host.read(&mut chunk).unwrap();
            assert_ne!(length, 0);
            received.extend(&chunk[..length]);
        }
        received
    });
    let data: Vec<u8> = (0..total).map(|index| (index / 7) as u8).collect();
    let (mut sent, mut taken) = (0, 0);
    while sent < total {
        let room = BUFFER_BYTES as usize - (sent - taken);
        let length = room.min(30_000).min(total - sent);
        if length > 0 {
            guest.send(OP_RW, &data[sent..sent + length]);
            sent += length;
        } else {
            taken = guest.expect(OP_CREDIT_UPDATE).fwd_cnt as usize;
        }
    }
    assert!(reader.join().unwrap() == data);
    assert_eq!(guest.counters.bad_packets.get(), 0);
}

#[test]
fn who_sends_more_than_told_loses_the_connection() {
    let mut guest = Guest::new();
    let listener = guest.host_listen(1);
    let host = guest.connect(&listener, 1);
    // Nobody reads: the socket and then the buffer fill up, and no more is kept.
    let mut refused = false;
    for _ in 0..100 {
        guest.send(OP_RW, &[7; 32 << 10]);
        while let Some((header, _)) = guest.receive_within(Duration::from_millis(2)) {
            refused |= header.op == OP_RST;
        }
        if refused {
            break;
        }
    }
    assert!(refused);
    assert_eq!(guest.counters.connections.get(), 0);
    drop(host);
}

#[test]
fn a_guest_that_has_sent_all_still_receives() {
    let mut guest = Guest::new();
    let listener = guest.host_listen(1);
    let mut host = guest.connect(&listener, 1);
    guest.send(OP_RW, b"last");
    guest.shut(SHUTDOWN_SEND);
    let mut all = Vec::new();
    host.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"last");
    host.write_all(b"answer").unwrap();
    assert_eq!(guest.receive().1, b"answer");
    drop(host);
    assert_eq!(guest.expect(OP_SHUTDOWN).flags, SHUTDOWN_BOTH);
    guest.send(OP_RST, &[]);
    guest.expect_nothing();
    assert_eq!(guest.counters.connections.get(), 0);
}

#[test]
fn a_host_that_has_sent_all_still_receives() {
    let mut guest = Guest::new();
    let mut host = guest.accept();
    host.write_all(b"question").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.receive().1, b"question");
    assert_eq!(guest.expect(OP_SHUTDOWN).flags, SHUTDOWN_SEND);
    guest.send(OP_RW, b"answer");
    guest.shut(SHUTDOWN_BOTH);
    guest.expect(OP_RST);
    let mut all = Vec::new();
    host.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"answer");
    assert_eq!(guest.counters.connections.get(), 0);
}

#[test]
fn what_the_host_sent_before_its_end_still_arrives() {
    let mut guest = Guest::new();
    let listener = guest.host_listen(1);
    let mut host = guest.connect(&listener, 1);
    host.write_all(b"bye").unwrap();
    drop(host);
    // The guest doesn't know yet.
    guest.send(OP_RW, b"too late");
    assert_eq!(guest.receive().1, b"bye");
    assert_eq!(guest.expect(OP_SHUTDOWN).flags, SHUTDOWN_BOTH);
    guest.send(OP_RST, &[]);
    guest.expect_nothing();
}

#[test]
fn nonsense_is_refused() {
    let mut guest = Guest::new();
    let listener = guest.host_listen(1);
    let _host = guest.connect(&listener, 1);
    let other = Header { dst_port: 99, ..guest.header };
    for header in [
        Header { op: OP_RW, ..other },
        Header { op: OP_RESPONSE, ..other },
        Header { op: OP_CREDIT_UPDATE, ..other },
        Header { op: OP_SHUTDOWN, flags: 3, ..other },
        Header { op: 0, ..other },
        Header { op: 77, ..other },
        Header { op: OP_REQUEST, dst_port: PORT_ANY, ..other },
        Header { op: OP_REQUEST, src_port: PORT_ANY, ..other },
    ] {
        guest.send_with(header, &[]);
        let refusal = guest.expect(OP_RST);
        assert_eq!((refusal.src_port, refusal.dst_port), (header.dst_port, header.src_port));
    }
    for header in [
        // Another kind of socket, and another machine: refused as they came.
        Header { op: OP_REQUEST, kind: 2, ..guest.header },
        Header { op: OP_REQUEST, dst_cid: 43, ..guest.header },
    ] {
        guest.send_with(header, &[]);
        let (head, _) = guest.driver.used(RECEIVE);
        let at = RECEIVE_BUFFERS + u64::from(head) % 32 * 4096;
        let refusal = Header::parse(guest.driver.get(at, HEADER_BYTES).try_into().unwrap());
        assert_eq!((refusal.op, refusal.kind, refusal.src_cid), (OP_RST, header.kind, header.dst_cid));
        guest.driver.add_head(RECEIVE, head);
        guest.driver.publish(RECEIVE);
    }
    // These are nobody's, or answers to answers.
    guest.send_with(Header { op: OP_REQUEST, src_cid: 7, ..guest.header }, &[]);
    guest.send_with(Header { op: OP_RST, ..other }, &[]);
    guest.send_raw(guest.header, &[], &[(PACKET, 43, 0)]);
    guest.send_raw(guest.header, &[], &[(PACKET, 44, WRITE)]);
    guest.send_raw(guest.header, &[], &[(u64::MAX - 10, 44, 0)]);
    guest.expect_nothing();
    assert_eq!((guest.counters.connections.get(), guest.counters.opened.get()), (1, 1));
}

#[test]
fn a_connection_ends_when_the_guest_breaks_the_rules() {
    let breaches: [fn(&mut Guest); 6] = [
        |guest| guest.send(OP_REQUEST, &[]),
        |guest| guest.send(OP_RESPONSE, &[]),
        |guest| guest.send(55, &[]),
        // A packet that is shorter than it says.
        |guest| {
            guest.send_raw(Header { op: OP_RW, len: 100, ..guest.header }, &[0; 50], &[(PACKET, 94, 0)]);
        },
        |guest| guest.send_raw(Header { op: OP_RW, len: u32::MAX, ..guest.header }, &[], &[(PACKET, 44, 0)]),
        |guest| {
            guest.shut(SHUTDOWN_SEND);
            guest.send(OP_RW, b"after the end");
        },
    ];
    for breach in breaches {
        let mut guest = Guest::new();
        let listener = guest.host_listen(1);
        let host = guest.connect(&listener, 1);
        breach(&mut guest);
        guest.expect(OP_RST);
        assert!(is_closed(host));
        assert_eq!(guest.counters.connections.get(), 0);
        // The port can be used again.
        guest.connect(&listener, 1);
    }
}

#[test]
fn refusals_wait_for_room_and_hold_the_guest_up() {
    let mut guest = Guest::without_driver();
    guest.driver.start(0);
    // A full ring.
    let packets = 2 * REFUSALS_MAX as u16;
    guest.driver.put(PACKET, &Header { op: OP_RW, dst_port: 9, ..guest.header }.to_bytes());
    for _ in 0..packets {
        guest.driver.add(TRANSMIT, &[(PACKET, HEADER_BYTES as u32, 0)]);
    }
    guest.driver.publish(TRANSMIT);
    for _ in 0..REFUSALS_MAX {
        guest.driver.used(TRANSMIT);
    }
    assert_eq!(guest.driver.used_within(TRANSMIT, Duration::from_millis(30)), None);
    guest.give_buffers(32);
    for _ in 0..packets {
        guest.expect(OP_RST);
    }
    for _ in REFUSALS_MAX as u16..packets {
        guest.driver.used(TRANSMIT);
    }
    guest.expect_nothing();
}

#[test]
fn connections_are_bounded() {
    let mut guest = Guest::new();
    let listener = guest.host_listen(1);
    let mut streams = Vec::new();
    for port in 0..CONNECTIONS_MAX as u32 {
        guest.header.src_port = port;
        streams.push(guest.connect(&listener, 1));
    }
    guest.header.src_port = 5000;
    guest.send(OP_REQUEST, &[]);
    guest.expect(OP_RST);
    let mut host = guest.host_connect();
    host.write_all(b"CONNECT 1\n").unwrap();
    assert!(is_closed(host));
    assert_eq!(guest.counters.refused.get(), 2);
    // All of them work, and each gets its turn.
    for stream in &mut streams {
        stream.write_all(b"x").unwrap();
    }
    let mut ports: Vec<u32> = (0..CONNECTIONS_MAX).map(|_| guest.receive().0.dst_port).collect();
    ports.sort_unstable();
    assert_eq!(ports, (0..CONNECTIONS_MAX as u32).collect::<Vec<_>>());
}

#[test]
fn buffers_without_room_are_passed_over() {
    let mut guest = Guest::without_driver();
    guest.driver.start(0);
    for (address, length, flags) in
        [(RECEIVE_BUFFERS, 44, WRITE), (RECEIVE_BUFFERS, 0, WRITE), (PACKET, 500, 0)]
    {
        let head = guest.driver.add(RECEIVE, &[(address, length, flags)]);
        guest.driver.publish(RECEIVE);
        guest.send_with(Header { op: OP_RW, dst_port: 9, ..guest.header }, &[]);
        assert_eq!(guest.driver.used(RECEIVE), (head, 0));
    }
    guest.driver.add(RECEIVE, &[(RECEIVE_BUFFERS, 50, WRITE)]);
    guest.driver.publish(RECEIVE);
    assert_eq!(guest.driver.used(RECEIVE).1, HEADER_BYTES as u32);
}

#[test]
fn a_broken_ring_asks_for_a_reset_and_costs_the_connections() {
    let mut guest = Guest::new();
    let host = guest.accept();
    guest.driver.add_head(TRANSMIT, 4000);
    guest.driver.publish(TRANSMIT);
    guest.driver.wait_needs_reset();
    assert!(is_closed(host));
    guest.driver.start(0);
    guest.give_buffers(32);
    guest.accept();
}

#[test]
fn a_reset_closes_all_and_the_next_driver_starts_anew() {
    let mut guest = Guest::new();
    let host = guest.accept();
    let waiting = guest.host_connect();
    guest.driver.write(0x70, 0);
    assert!(is_closed(host));
    assert!(is_closed(waiting));
    // Nobody serves the guest's side: who connects hears so at once.
    let mut refused = guest.host_connect();
    let _ = refused.write_all(b"CONNECT 1\n");
    assert!(is_closed(refused));
    assert_eq!(guest.counters.connections.get(), 0);
    guest.driver.start(0);
    guest.give_buffers(32);
    guest.accept();
}

#[test]
fn clients_that_say_nonsense_are_turned_away() {
    let guest = Guest::new();
    for line in ["GET / HTTP/1.1\r\n", "CONNECT\n", "CONNECT 4294967295\n", "CONNECT 00000000000000000000000"]
    {
        let mut host = guest.host_connect();
        host.write_all(line.as_bytes()).unwrap();
        assert!(is_closed(host), "{line:?}");
    }
}

#[test]
fn a_guest_that_refuses_closes_the_hosts_end() {
    let mut guest = Guest::new();
    let mut host = guest.host_connect();
    // In pieces, as slow programs write.
    for piece in ["CONN", "ECT 77", "\n"] {
        host.write_all(piece.as_bytes()).unwrap();
        std::thread::sleep(Duration::from_millis(2));
    }
    let request = guest.expect(OP_REQUEST);
    guest.send_with(Header { op: OP_RST, src_port: 77, dst_port: request.src_port, ..guest.header }, &[]);
    assert!(is_closed(host));
    guest.expect_nothing();
}

#[test]
fn the_configuration_names_the_guest() {
    let mut guest = Guest::without_driver();
    assert_eq!((guest.driver.read(0x100), guest.driver.read(0x104)), (CID as u32, 0));
}
