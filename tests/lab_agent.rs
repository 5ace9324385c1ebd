//! The tutorial's host under the agent: what a drift costs until it is healed, and VMs that outlive it. Runs in
//! the lab (`tests/lab/`), where VLANs and guests are real.

#[path = "support/in_lab.rs"]
mod in_lab;
#[path = "support/tutorial.rs"]
mod tutorial;

use std::fs::File;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use in_lab::ran_in_lab;
use tutorial::*;
use vmctl::host::linux::links;
use vmctl::name::LinkName;

const ALL_VMS: [&str; 3] = ["vm1", "vm2", "vm3"];
const LOG: &str = "/tmp/agent.log";
/// For one repair on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);
const ROUNDS: usize = 50;

/// Resyncs an hour from now: what is healed is healed by events.
fn start_agent(tutorial: &Tutorial) -> Child {
    let log = File::create(LOG).unwrap();
    Command::new("vmctl")
        .args(["agent", "--resync", "1h", "--source"])
        .arg(&tutorial.source)
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap()
}

#[track_caller]
fn heals<T>(what: &str, look: impl FnMut() -> Option<T>) -> T {
    let mut look = look;
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        let log = || std::fs::read_to_string(LOG).unwrap();
        assert!(Instant::now() < deadline, "{what}: not healed\n{}\n{}", log(), run("ip -d link"));
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[track_caller]
fn rests() {
    // The agent has looked at its own repairs by then.
    std::thread::sleep(Duration::from_millis(150));
}

/// The bridge is there with these ports and this MTU.
fn bridge_is(bridge: &str, ports: &[&str], mtu: u32) -> bool {
    let Ok(links) = links::observe() else { return false };
    let name = |text: &str| LinkName::parse(text).unwrap();
    let bridge = name(bridge);
    links.get(&bridge).is_some_and(|link| link.mtu == mtu)
        && ports
            .iter()
            .all(|port| links.get(&name(port)).is_some_and(|link| link.master.as_ref() == Some(&bridge)))
}

const PORTS_10: [&str; 3] = ["eth0.10", "vm1.net0", "vm2.net0"];

fn bridge_10_is_whole() -> Option<()> {
    bridge_is("brvlan10", &PORTS_10, 1500).then_some(())
}

fn pids(tutorial: &Tutorial) -> Vec<Option<i32>> {
    ALL_VMS.iter().map(|vm| tutorial.pid(vm)).collect()
}

#[test]
fn vms_outlive_the_agent_and_are_found_again() {
    if ran_in_lab() {
        return;
    }
    let tutorial = Tutorial::new();
    let mut agent = start_agent(&tutorial);
    until("the tutorial runs", Duration::from_secs(60), || {
        (pids(&tutorial).iter().all(Option::is_some) && bridge_10_is_whole().is_some()).then_some(())
    });
    let mut vm1 = tutorial.guest("vm1");
    let before = pids(&tutorial);

    let pid2 = tutorial.pid("vm2").unwrap();
    run(&format!("kill -9 {pid2}"));
    let new_pid2 = heals("vm2", || tutorial.pid("vm2").filter(|pid| *pid != pid2));
    run("ip link del brvlan10");
    heals("brvlan10", bridge_10_is_whole);
    tutorial.guest("vm2");
    vm1.succeeds("ping -c 2 -W 10 192.168.10.12");

    let running = vec![before[0], Some(new_pid2), before[2]];
    assert_eq!(pids(&tutorial), running);
    let begin = Instant::now();
    run(&format!("kill -TERM {}", agent.id()));
    let status = agent.wait().unwrap();
    assert_eq!(status.code(), Some(0), "{}", std::fs::read_to_string(LOG).unwrap());
    assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
    assert_eq!(pids(&tutorial), running, "the VMs outlive SIGTERM");

    let mut agent = start_agent(&tutorial);
    let said = |text: &str| std::fs::read_to_string(LOG).unwrap().contains(text).then_some(());
    heals("it finds them", || said("in sync"));
    agent.kill().unwrap();
    agent.wait().unwrap();
    assert_eq!(pids(&tutorial), running, "the VMs outlive SIGKILL");

    // What died meanwhile is started, what lived is left alone, and watched.
    run(&format!("kill -9 {new_pid2}"));
    let mut agent = start_agent(&tutorial);
    heals("vm2, dead before the start", || tutorial.pid("vm2").filter(|pid| *pid != new_pid2));
    heals("it is content", || said("in sync"));
    assert_eq!((tutorial.pid("vm1"), tutorial.pid("vm3")), (before[0], before[2]));
    let pid3 = before[2].unwrap();
    run(&format!("kill -9 {pid3}"));
    heals("vm3, which an earlier agent started", || tutorial.pid("vm3").filter(|pid| *pid != pid3));
    vm1.succeeds("ping -c 2 -W 10 192.168.10.1");
    assert_eq!(tutorial.pid("vm1"), before[0]);
    agent.kill().unwrap();
    agent.wait().unwrap();
}

/// One line of figures. No bar: the lab is an emulator.
fn report(what: &str, mut took: Vec<Duration>) {
    took.sort();
    let ms = |duration: Duration| duration.as_secs_f64() * 1000.0;
    println!(
        "latency: {what}: median {:.1} ms, max {:.1} ms ({} rounds)",
        ms(took[took.len() / 2]),
        ms(took[took.len() - 1]),
        took.len()
    );
}

#[test]
fn drift_is_healed_within_moments() {
    if ran_in_lab() {
        return;
    }
    let tutorial = Tutorial::new();
    let mut agent = start_agent(&tutorial);
    until("the tutorial runs", Duration::from_secs(60), || {
        (pids(&tutorial).iter().all(Option::is_some) && bridge_10_is_whole().is_some()).then_some(())
    });
    ALL_VMS.iter().for_each(|vm| drop(tutorial.guest(vm)));

    let deleted = (0..ROUNDS).map(|_| {
        rests();
        // (From before `ip` starts: it is a part of what is measured.)
        let begin = Instant::now();
        run("ip link del brvlan10");
        heals("brvlan10", bridge_10_is_whole);
        begin.elapsed()
    });
    report("deleted bridge -> there again with its 3 ports", deleted.collect());

    let killed = (0..ROUNDS).map(|_| {
        // A VM that dies again and again is left alone for a while, unless a person asks.
        run(&format!("kill -HUP {}", agent.id()));
        rests();
        let pid = tutorial.pid("vm2").unwrap();
        let begin = Instant::now();
        run(&format!("kill -9 {pid}"));
        heals("vm2", || tutorial.pid("vm2").filter(|new| *new != pid));
        begin.elapsed()
    });
    report("killed VM -> new process answers", killed.collect());

    // Its last start is over before the next is measured.
    drop(tutorial.guest("vm2"));
    let path = tutorial.source.join("network.yaml");
    let text = std::fs::read_to_string(&path).unwrap();
    let (head, tail) = text.split_once("name: brvlan20").unwrap();
    let changed = (0..ROUNDS).map(|round| {
        rests();
        let mtu = 1400 + (round as u32 % 2) * 50;
        let edited = format!("{head}name: brvlan20{}", tail.replacen("mtu: 1500", &format!("mtu: {mtu}"), 1));
        let begin = Instant::now();
        std::fs::write(&path, edited).unwrap();
        heals("brvlan20", || bridge_is("brvlan20", &["eth0.20", "vm3.net0"], mtu).then_some(()));
        begin.elapsed()
    });
    report("changed file -> the bridge has it", changed.collect());
    agent.kill().unwrap();
    agent.wait().unwrap();
}
