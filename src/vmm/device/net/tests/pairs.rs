//! Several queue pairs, and the control queue by which the driver says how many it uses.

use super::*;
use crate::vmm::device::testing::Buffer;

const MQ: u64 = 1 << 22;
const CTRL_VQ: u64 = 1 << 17;
const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
const GUEST_ANNOUNCE: u64 = 1 << 21;
const MULTI_QUEUE: u16 = 0x0100;
const COMMAND: u64 = 0x20_0000;
const ACK: u64 = 0x20_1000;

fn multi_queue_taps(name: &str, pairs: u16) -> Vec<OwnedFd> {
    let taps = (0..pairs).map(|_| tap_with(name, 0x0002 | 0x1000 | 0x4000 | MULTI_QUEUE)).collect();
    bring_up(name);
    taps
}

fn net(name: &str, pairs: u16) -> Net {
    let config = NicConfig { queue_pairs: pairs, ..config(name) };
    let files = NicFiles { taps: multi_queue_taps(name, pairs), vhosts: Vec::new() };
    Net::new(&config, files, &sandbox_hook()).unwrap()
}

impl Driver {
    /// Sends a command to the control queue; gives the answer.
    fn command(&mut self, queue: usize, command: &[u8]) -> u8 {
        self.put(COMMAND, command);
        self.put(ACK, &[0xaa]);
        self.add(queue, &[(COMMAND, command.len() as u32, 0), (ACK, 1, WRITE)]);
        self.publish(queue);
        assert_eq!(self.used(queue).1, 1);
        self.get(ACK, 1)[0]
    }

    fn set_pairs(&mut self, control: usize, pairs: u16) -> u8 {
        self.command(control, &[&[4, 0], &pairs.to_le_bytes()[..]].concat())
    }

    /// Frames that came in this receive queue within a moment, by their 14th byte.
    fn seeds(&mut self, queue: usize) -> Vec<u8> {
        let mut seeds = Vec::new();
        while let Some((head, len)) = self.used_within(queue, Duration::from_millis(30)) {
            let at = buffer_of(queue, head);
            seeds.push(self.get(at, len as usize)[12 + 11]);
        }
        seeds
    }

    fn offer(&mut self, queue: usize, count: u16) {
        for _ in 0..count {
            let head = self.rings[queue].available % QUEUE_SIZE;
            self.add(queue, &[(buffer_of(queue, head), 2048, WRITE)]);
        }
        self.publish(queue);
    }

    fn transmit_on(&mut self, queue: usize, frame: &[u8]) {
        self.put(FRAME, &[0; 12]);
        self.put(FRAME + 0x1000, frame);
        self.add(queue, &[(FRAME, 12, 0), (FRAME + 0x1000, frame.len() as u32, 0)]);
        self.publish(queue);
        assert_eq!(self.used(queue).1, 0);
    }
}

fn buffer_of(queue: usize, head: u16) -> u64 {
    BUFFERS + queue as u64 * 0x10_0000 + u64::from(head) * 0x1000
}

/// UDP of a flow: what the tap spreads by.
fn datagram(flow: u8, seed: u8) -> Vec<u8> {
    let mut frame = frame(60, seed);
    frame[12..14].copy_from_slice(&[8, 0]);
    frame[14..34].copy_from_slice(&[0x45, 0, 0, 46, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame[34..42].copy_from_slice(&[0x10, flow, 0x20, 0, 0, 26, 0, 0]);
    frame
}

/// The flow as the guest answers it.
fn answer(flow: u8, seed: u8) -> Vec<u8> {
    let mut frame = datagram(flow, seed);
    frame[26..34].copy_from_slice(&[10, 0, 0, 2, 10, 0, 0, 1]);
    frame[34..38].copy_from_slice(&[0x20, 0, 0x10, flow]);
    frame
}

#[test]
fn frames_go_to_the_pairs_in_use_and_to_no_others() {
    own_network();
    let mut driver = Driver::new(net("tap0", 3));
    let mut pairs = [0; 2];
    crate::vmm::bus::BusDevice::read(&mut driver.transport, 0x108, &mut pairs);
    assert_eq!(pairs, [3, 0]);
    driver.start(MQ | CTRL_VQ | MRG_RXBUF);
    let control = 6;
    for queue in [0, 2, 4] {
        driver.offer(queue, 128);
    }
    let peer = Peer::on("tap0");
    let send = |flows: std::ops::Range<u8>| flows.for_each(|flow| peer.send(&datagram(flow, flow)));
    // Before the driver has said anything: the first pair.
    send(0..30);
    assert_eq!(driver.seeds(0), (0..30).collect::<Vec<_>>());
    assert_eq!(driver.set_pairs(control, 2), 0);
    // The tap learns by which queue a flow goes out, and uses that for its answers.
    wait_for(|| spread(&mut driver, &peer, &[1, 3], 40).iter().all(|count| *count > 0));
    assert!(driver.seeds(4).is_empty(), "the third pair is not in use");
    for refused in [0, 4, u16::MAX] {
        assert_eq!(driver.set_pairs(control, refused), 1);
    }
    assert_eq!(driver.set_pairs(control, 1), 0);
    assert_eq!(spread(&mut driver, &peer, &[1], 20), [20, 0]);
}

/// Sends flows out by these transmit queues in turn, has each answered, and counts what came to the
/// receive queues of their pairs. Each flow's frames come to one queue, once, in their order.
fn spread(driver: &mut Driver, peer: &Peer, transmit: &[usize], flows: u8) -> Vec<usize> {
    for flow in 0..flows {
        driver.transmit_on(transmit[usize::from(flow) % transmit.len()], &answer(flow, flow));
        peer.receive().unwrap();
    }
    for flow in 0..flows {
        peer.send(&datagram(flow, flow));
    }
    let of_queues: Vec<Vec<u8>> = [0, 2].iter().map(|queue| driver.seeds(*queue)).collect();
    for (queue, seeds) in of_queues.iter().enumerate() {
        assert!(seeds.is_sorted(), "out of order: {seeds:?}");
        driver.offer(2 * queue, seeds.len() as u16);
    }
    let mut all = of_queues.concat();
    all.sort_unstable();
    assert_eq!(all, (0..flows).collect::<Vec<_>>(), "each once");
    of_queues.iter().map(Vec::len).collect()
}

fn wait_for(mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < deadline);
    }
}

#[test]
fn a_driver_without_multi_queue_finds_the_control_queue_after_the_first_pair() {
    own_network();
    let mut driver = Driver::new(net("tap0", 2));
    driver.start(CTRL_VQ | CTRL_GUEST_OFFLOADS | OFFLOADS | MRG_RXBUF);
    assert_eq!(driver.command(2, &[5, 0, 2, 0, 0, 0, 0, 0, 0, 0]), 0);
    assert_eq!(driver.set_pairs(2, 1), 1, "not negotiated");
    driver.offer(0, 64);
    let peer = Peer::on("tap0");
    (0..30).for_each(|flow| peer.send(&datagram(flow, flow)));
    assert_eq!(driver.seeds(0), (0..30).collect::<Vec<_>>());
    // With the next driver it is another queue again.
    driver.start(CTRL_VQ | MQ | MRG_RXBUF);
    assert_eq!(driver.set_pairs(4, 2), 0);
}

#[test]
fn hostile_commands_are_refused_and_the_next_one_is_served() {
    own_network();
    let mut driver = Driver::new(net("tap0", 2));
    driver.start(MQ | CTRL_VQ | GUEST_ANNOUNCE);
    let control = 4;
    driver.put(COMMAND, &[4, 0, 2, 0]);
    let chains: &[(&[Buffer], u32)] = &[
        (&[(COMMAND, 4, 0)], 0),
        (&[(ACK, 1, WRITE)], 1),
        (&[(COMMAND, 4, 0), (u64::MAX - 1, 8, WRITE)], 0),
        (&[(u64::MAX - 1, 8, 0), (ACK, 1, WRITE)], 1),
        (&[(COMMAND, 1 << 31, 0), (ACK, 1, WRITE)], 1),
        // The length of a whole chain is bounded, too: its end is not even looked at.
        (&[(COMMAND, u32::MAX, 0), (ACK, 1, WRITE)], 0),
        (&[(COMMAND, 4, 0), (ACK, 0, WRITE)], 0),
    ];
    for (chain, written) in chains {
        driver.put(ACK, &[0xaa]);
        let head = driver.add(control, chain);
        driver.publish(control);
        assert_eq!(driver.used(control), (head, *written));
        assert_eq!(driver.get(ACK, 1), [if *written == 0 { 0xaa } else { 1 }]);
    }
    for command in [&[][..], &[4], &[0, 0, 1], &[1, 1, 1, 2, 3, 4, 5, 6], &[9, 9, 9, 9]] {
        assert_eq!(driver.command(control, command), 1, "{command:?}");
    }
    assert_eq!(driver.set_pairs(control, 2), 0);
}

#[test]
fn offloads_change_as_the_driver_says() {
    own_network();
    let mut driver = Driver::new(net("tap0", 1));
    driver.start(CTRL_VQ | CTRL_GUEST_OFFLOADS | OFFLOADS | MRG_RXBUF);
    driver.offer_buffers(64, 2048);
    assert_eq!(driver.command(2, &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0]), 0);
    send_large_segment("tap0");
    for _ in 0..13 {
        assert_eq!(driver.received()[..2], [0, 0], "in pieces");
    }
    assert_eq!(driver.command(2, &[5, 0, 0x82, 0, 0, 0, 0, 0, 0, 0]), 0);
    send_large_segment("tap0");
    // What is still on its way of the first comes before.
    wait_for(|| driver.received()[1] == 1);
}

#[test]
fn another_tap_is_announced() {
    own_network();
    let net = net("tap0", 2);
    let handle = net.handle();
    let mut driver = Driver::new(net);
    driver.start(MQ | CTRL_VQ | STATUS | GUEST_ANNOUNCE | MRG_RXBUF);
    assert_eq!(driver.set_pairs(4, 2), 0);
    assert_eq!(driver.net_status(), 1);
    assert!(handle.replace_tap(multi_queue_taps("tap1", 1)).is_err(), "one queue for two pairs");
    handle.replace_tap(multi_queue_taps("tap2", 2)).unwrap();
    wait_for(|| driver.net_status() == 3);
    assert_eq!(driver.command(4, &[3, 0]), 0);
    assert_eq!(driver.net_status(), 1);
    for queue in [0, 2] {
        driver.offer(queue, 128);
    }
    let peer = Peer::on("tap2");
    wait_for(|| spread(&mut driver, &peer, &[1, 3], 40).iter().all(|count| *count > 0));
}

#[test]
fn a_tap_of_one_queue_is_refused_for_several_pairs() {
    own_network();
    let config = NicConfig { queue_pairs: 2, ..config("tap0") };
    let new = |taps| Net::new(&config, NicFiles { taps, vhosts: Vec::new() }, &sandbox_hook());
    assert!(matches!(new(vec![tap("tap0")]), Err(NetError::Descriptors { passed: 1, .. })));
    assert!(matches!(new(vec![tap("tap1"), tap("tap2")]), Err(NetError::Tap { .. })));
    let taps = multi_queue_taps("tap3", 2);
    let vhosts = vec![File::open("/dev/null").unwrap().into()];
    let files = NicFiles { taps, vhosts };
    assert!(matches!(Net::new(&config, files, &sandbox_hook()), Err(NetError::Descriptors { .. })));
}

/// Frames of both directions while taps come and go under several pairs: none comes twice or out of order.
#[test]
fn taps_are_replaced_under_load() {
    own_network();
    let net = net("tap0", 2);
    let handle = net.handle();
    let mut driver = Driver::new(net);
    driver.start(MQ | CTRL_VQ | MRG_RXBUF | EVENT_IDX);
    assert_eq!(driver.set_pairs(4, 2), 0);
    for queue in [0, 2] {
        driver.offer(queue, 200);
    }
    for round in 1..20 {
        let name = format!("tap{round}");
        let taps = multi_queue_taps(&name, 2);
        let peer = Peer::on(&name);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_micros(50 * round));
                handle.replace_tap(taps).unwrap();
            });
            for seed in 0..100 {
                peer.send(&datagram(7, seed));
                driver.transmit_on(1 + 2 * usize::from(seed % 2), &answer(7, seed));
            }
        });
        for queue in [0, 2] {
            let seeds = driver.seeds(queue);
            assert!(seeds.windows(2).all(|pair| pair[0] < pair[1]), "round {round}: {seeds:?}");
            driver.offer(queue, seeds.len() as u16);
        }
    }
}
