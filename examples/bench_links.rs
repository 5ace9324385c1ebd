//! How long the Linux host takes to create bridges and to look at them, beside `ip -batch` making the
//! same: in network namespaces of its own, interleaved, several rounds. As root:
//!
//! ```text
//! cargo run --release --example bench_links -- [BRIDGES] [ROUNDS]
//! ```

use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use vmctl::host::linux::{link_steps, links};
use vmctl::host::snapshot::BridgeFacts;
use vmctl::host::step::{NewLink, NewLinkKind, Step};
use vmctl::name::{Kind, LinkName, Mark, ObjectId};

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1).map(|text| text.parse::<usize>());
    let bridges = arguments.next().unwrap_or(Ok(1000))?;
    let rounds = arguments.next().unwrap_or(Ok(10))?;
    let steps = (0..bridges).map(step).collect::<Result<Vec<Step>, Failure>>()?;
    let steps: Vec<&Step> = steps.iter().collect();
    let script = batch(bridges)?;

    let (mut ours, mut theirs, mut looks) = (Vec::new(), Vec::new(), Vec::new());
    // The kernel clears a network away in the background, and holds up all others while it does: so
    // each lives to the end.
    let mut networks = Vec::new();
    for _ in 0..rounds {
        networks.push(new_network()?);
        let begin = Instant::now();
        link_steps::run(&steps).into_iter().collect::<Result<(), _>>()?;
        ours.push(begin.elapsed());

        let begin = Instant::now();
        let seen = links::observe()?;
        looks.push(begin.elapsed());
        let marked = seen.values().filter(|link| link.mark().is_some() && link.up).count();
        assert_eq!(marked, bridges, "ours");

        networks.push(new_network()?);
        let begin = Instant::now();
        run_ip(&script)?;
        theirs.push(begin.elapsed());
        let marked = links::observe()?.values().filter(|link| link.mark().is_some() && link.up).count();
        assert_eq!(marked, bridges, "theirs");
    }
    println!("{bridges} bridges, {rounds} rounds, in ms:   min  median     max");
    let ours = report("create, vmctl", ours);
    let theirs = report("create, ip -batch", theirs);
    report("look at all of them", looks);
    println!("vmctl / ip -batch: {:.2} (medians)", ours.as_secs_f64() / theirs.as_secs_f64());
    Ok(())
}

fn report(what: &str, mut times: Vec<Duration>) -> Duration {
    times.sort();
    let median = times[times.len() / 2];
    let ms = |time: Duration| time.as_secs_f64() * 1000.0;
    println!("{what:32} {:7.1} {:7.1} {:7.1}", ms(times[0]), ms(median), ms(times[times.len() - 1]));
    median
}

/// This thread's network is one of its own from here on; it lives as long as the file.
fn new_network() -> Result<File, Failure> {
    // SAFETY: the program has one thread, and unshares nothing but its network.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }?;
    Ok(File::open("/proc/thread-self/ns/net")?)
}

fn step(number: usize) -> Result<Step, Failure> {
    let name = format!("br{number}");
    let owner = ObjectId::new(Kind::Bridge, name.parse()?);
    Ok(Step::CreateLink(NewLink {
        name: LinkName::parse(&name)?,
        mark: Mark::new("default".parse()?, owner),
        kind: NewLinkKind::Bridge(BridgeFacts {
            stp: false,
            forward_delay_seconds: 15,
            ageing_seconds: 300,
            vlan_filtering: false,
            default_pvid: 0,
            multicast_snooping: true,
        }),
        mtu: None,
        mac_address: None,
        master: None,
        port: None,
        up: true,
    }))
}

/// The same for `ip`.
fn batch(bridges: usize) -> Result<String, Failure> {
    let mut script = String::new();
    for number in 0..bridges {
        writeln!(
            script,
            "link add br{number} type bridge stp_state 0 forward_delay 1500 ageing_time 30000 \
             vlan_default_pvid 0 mcast_snooping 1 nf_call_iptables 0 nf_call_ip6tables 0 nf_call_arptables 0"
        )?;
        writeln!(script, "link set br{number} alias vmctl:default:Bridge/br{number} up")?;
    }
    Ok(script)
}

fn run_ip(script: &str) -> Result<(), Failure> {
    let mut ip = Command::new("ip").args(["-batch", "-"]).stdin(Stdio::piped()).spawn()?;
    ip.stdin.take().ok_or("ip has no input")?.write_all(script.as_bytes())?;
    if !ip.wait()?.success() {
        return Err("ip -batch failed".into());
    }
    Ok(())
}
