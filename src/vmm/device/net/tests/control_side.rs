//! What may be changed while the guest runs: limits, the cable; and what is counted.

use super::*;
use crate::vmm::config::Bucket;

fn bandwidth(per_second: u64, burst: u64) -> Limits {
    Limits { bandwidth: Some(Bucket { per_second, burst }), operations: None }
}

fn frames_per_second(per_second: u64) -> Limits {
    Limits { bandwidth: None, operations: Some(Bucket { per_second, burst: 1 }) }
}

#[test]
fn limits_hold_in_each_direction_and_change_at_once() {
    own_network();
    // 20 frames of 1000 bytes at 100 kB/s, with 10 at once: 100 ms at least. However slow the machine is, it
    // makes a frame in less than the 10 ms that one of them takes.
    let limits = bandwidth(100_000, 10_000);
    let config = NicConfig { receive_limits: limits, transmit_limits: limits, ..config("tap0") };
    let net = Net::new(&config, files(tap("tap0")), &sandbox_hook()).unwrap();
    let handle = net.handle();
    let mut driver = Driver::new(net);
    driver.start(EVENT_IDX | MRG_RXBUF);
    let peer = Peer::on("tap0");
    driver.offer_buffers(40, 2048);
    let start = Instant::now();
    (0..20).for_each(|seed| peer.send(&frame(1000, seed)));
    (0..20).for_each(|seed| assert_eq!(driver.received()[12..], frame(1000, seed)));
    assert!(start.elapsed() >= Duration::from_millis(99), "{:?}", start.elapsed());
    let start = Instant::now();
    (0..20).for_each(|seed| driver.transmit(&frame(1000, seed)));
    assert!(start.elapsed() >= Duration::from_millis(99), "{:?}", start.elapsed());
    (0..20).for_each(|seed| assert_eq!(peer.receive().unwrap(), frame(1000, seed)));
    let metrics = handle.metrics();
    assert!(metrics.receive_throttled > 0 && metrics.transmit_throttled > 0);
    // A frame that would wait for ten minutes passes as soon as nothing limits it.
    handle.set_limits(frames_per_second(1), Limits::default());
    (0..3).for_each(|seed| peer.send(&frame(500, seed)));
    assert_eq!(driver.received()[12..], frame(500, 0));
    handle.set_limits(Limits::default(), Limits::default());
    assert_eq!(driver.received()[12..], frame(500, 1));
    assert_eq!(driver.received()[12..], frame(500, 2));
}

#[test]
fn a_limited_frame_does_not_outlive_a_reset() {
    own_network();
    let config = NicConfig { receive_limits: frames_per_second(1), ..config("tap0") };
    let mut driver = Driver::new(Net::new(&config, files(tap("tap0")), &sandbox_hook()).unwrap());
    let peer = Peer::on("tap0");
    for _ in 0..3 {
        driver.start(MRG_RXBUF);
        driver.offer_buffers(8, 2048);
        (0..4).for_each(|seed| peer.send(&frame(500, seed)));
        std::thread::sleep(Duration::from_millis(5));
        driver.write(0x70, 0);
        let used = driver.used_index(RECEIVE);
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(driver.used_index(RECEIVE), used);
    }
}

fn carrier(name: &str) -> bool {
    let links = tool("ip", &["-o", "link", "show", name]).unwrap();
    assert!(links.contains("UP"));
    !links.contains("NO-CARRIER")
}

#[test]
fn a_pulled_cable_carries_nothing_and_both_ends_see_it() {
    own_network();
    let net = net("tap0");
    let handle = net.handle();
    let mut driver = Driver::new(net);
    driver.start(EVENT_IDX | MRG_RXBUF | STATUS);
    driver.offer_buffers(32, 2048);
    let peer = Peer::on("tap0");
    assert!(driver.link_up() && carrier("tap0"));
    handle.set_link(false).unwrap();
    assert!(!driver.link_up() && !carrier("tap0"));
    assert_eq!(driver.read(0x60) & 2, 2, "the guest is told");
    driver.transmit(&frame(100, 1));
    let _ = rustix::net::send(&peer.0, &frame(100, 2), rustix::net::SendFlags::empty());
    assert!(driver.used_within(RECEIVE, Duration::from_millis(20)).is_none());
    // Neither another tap nor a new driver mends it.
    handle.replace_tap(vec![tap("tap1")]).unwrap();
    assert!(!driver.link_up() && !carrier("tap1"));
    driver.start(EVENT_IDX | MRG_RXBUF | STATUS);
    driver.offer_buffers(32, 2048);
    assert!(!driver.link_up());
    handle.set_link(true).unwrap();
    assert!(driver.link_up() && carrier("tap1"));
    let peer = Peer::on("tap1");
    driver.transmit(&frame(200, 3));
    assert_eq!(peer.receive().unwrap(), frame(200, 3), "and not what was sent before");
    peer.send(&frame(300, 4));
    assert_eq!(driver.received()[12..], frame(300, 4));
    let metrics = handle.metrics();
    assert_eq!((metrics.sent_packets, metrics.sent_bytes, metrics.sent_dropped), (1, 200, 1));
    assert_eq!((metrics.received_packets, metrics.received_bytes), (1, 300));
}

#[test]
fn a_nic_may_start_with_its_cable_pulled() {
    own_network();
    let config = NicConfig { link_up: false, ..config("tap0") };
    let net = Net::new(&config, files(tap("tap0")), &sandbox_hook()).unwrap();
    let handle = net.handle();
    let mut driver = Driver::new(net);
    driver.start(STATUS);
    assert!(!driver.link_up() && !carrier("tap0"));
    handle.set_link(true).unwrap();
    assert!(driver.link_up() && carrier("tap0"));
}

/// Where there is no vhost, a descriptor that is none is the nearest thing to one that refuses.
#[test]
fn a_host_that_refuses_vhost_costs_nothing_but_speed() {
    own_network();
    let null = File::options().read(true).write(true).open("/dev/null").unwrap();
    let files = NicFiles { taps: vec![tap("tap0")], vhosts: vec![null.into()] };
    let net = Net::new(&config("tap0"), files, &sandbox_hook()).unwrap();
    let handle = net.handle();
    let mut driver = Driver::new(net);
    driver.start(EVENT_IDX | MRG_RXBUF);
    driver.offer_buffers(32, 2048);
    assert_eq!(handle.metrics().kernel_pairs, 0);
    let peer = Peer::on("tap0");
    driver.transmit(&frame(100, 1));
    assert_eq!(peer.receive().unwrap(), frame(100, 1));
    peer.send(&frame(100, 2));
    assert_eq!(driver.received()[12..], frame(100, 2));
}

/// Short after long after short: buffers are taken for one and given back for the other.
#[test]
fn frames_of_all_lengths_fill_just_the_buffers_they_need() {
    own_network();
    let mut driver = Driver::new(net("tap0"));
    tool("ip", &["link", "set", "tap0", "mtu", "9000"]).unwrap();
    driver.start(EVENT_IDX | MRG_RXBUF);
    let peer = Peer::on("tap0");
    driver.offer_buffers(64, 700);
    for (seed, len) in [60, 9000, 60, 60, 5000, 688, 689, 1388, 9000, 9000, 100].into_iter().enumerate() {
        let sent = frame(len, seed as u8);
        peer.send(&sent);
        let received = driver.received();
        let buffers = (12 + len).div_ceil(700) as u64;
        assert_eq!(received[10..12], (buffers as u16).to_le_bytes());
        assert_eq!(received[12..], sent, "{len} bytes");
        driver.offer_buffers(buffers, 700);
    }
}

#[test]
fn bad_receive_buffers_come_back_empty_and_good_ones_are_used() {
    own_network();
    let mut driver = Driver::new(net("tap0"));
    driver.start(MRG_RXBUF);
    let peer = Peer::on("tap0");
    let bad: &[&[(u64, u32, u16)]] =
        &[&[(BUFFERS, 100, 0)], &[(u64::MAX - 5, 2048, WRITE)], &[(BUFFERS, u32::MAX, WRITE)]];
    for chain in bad {
        let head = driver.add(RECEIVE, chain);
        driver.publish(RECEIVE);
        assert_eq!(driver.used(RECEIVE), (head, 0));
    }
    let head = driver.add(RECEIVE, &[(BUFFERS, 5, WRITE), (BUFFERS + 0x1000, 2000, WRITE)]);
    driver.publish(RECEIVE);
    peer.send(&frame(300, 1));
    assert_eq!(driver.used(RECEIVE), (head, 312));
    // The count of buffers lies in the second descriptor.
    assert_eq!(driver.get(BUFFERS + 0x1000 + 5, 2), [1, 0]);
    assert_eq!(driver.get(BUFFERS + 0x1000 + 7, 300), frame(300, 1));
}
