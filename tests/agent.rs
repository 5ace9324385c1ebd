//! `vmctl agent`, as a service manager runs it, on bridges, pools and volumes that are real, in a network
//! namespace and folders of each test's own. The resync is an hour away: what heals is healed by events.

#[path = "support/cli.rs"]
mod support;

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use support::*;

const HEAD: &str = "apiVersion: vmctl.dev/v1alpha1";
/// Generous, for the machine may be busy; an hour too short for the resync.
const SOON: Duration = Duration::from_secs(5);

fn bridge(name: &str, mtu: u32) -> String {
    format!("---\n{{{HEAD}, kind: Bridge, metadata: {{name: {name}}}, spec: {{mtu: {mtu}}}}}\n")
}

fn storage() -> String {
    format!(
        "---\n{{{HEAD}, kind: StoragePool, metadata: {{name: default}}, spec: {{directory: {{path: @/pool}}}}}}\n\
         ---\n{{{HEAD}, kind: Volume, metadata: {{name: data}}, spec: {{pool: default, format: raw, capacity: 1Mi}}}}\n"
    )
}

/// An agent that runs.
struct Agent<'a> {
    ground: &'a Ground,
    child: Child,
    log: PathBuf,
}

impl<'a> Agent<'a> {
    fn start(ground: &'a Ground, source: &str) -> Self {
        Self::start_named(ground, source, "agent.log")
    }

    fn start_named(ground: &'a Ground, source: &str, log: &str) -> Self {
        let log = ground.path(log);
        let file = File::options().create(true).append(true).open(&log).unwrap();
        let mut command: Command = ground.command(&format!("agent --source {source} --resync 1h"));
        let child = command.stdout(Stdio::null()).stderr(file).spawn().unwrap();
        Self { ground, child, log }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    #[track_caller]
    fn soon(&mut self, what: &str, mut look: impl FnMut() -> bool) -> Duration {
        let begin = Instant::now();
        loop {
            if look() {
                return begin.elapsed();
            }
            let ended = self.child.try_wait().unwrap();
            assert!(
                begin.elapsed() < SOON && ended.is_none(),
                "{what}: not so (agent ended: {ended:?})\n{}\n{}",
                self.log(),
                shell("ip -d link")
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[track_caller]
    fn says(&mut self, text: &str) {
        let log = self.log.clone();
        self.soon(&format!("it says `{text}`"), || std::fs::read_to_string(&log).unwrap().contains(text));
    }

    #[track_caller]
    fn converged(&mut self) {
        self.says("in sync");
    }

    /// Waits until the agent sleeps, and has done so for a while.
    #[track_caller]
    fn rests(&mut self) {
        let begin = Instant::now();
        let mut before = self.wakes();
        loop {
            std::thread::sleep(Duration::from_millis(700));
            let now = self.wakes();
            if now == before {
                return;
            }
            before = now;
            assert!(begin.elapsed() < SOON * 4, "it never rests:\n{}", self.log());
        }
    }

    /// How often it has gone to sleep, which it does after each waking.
    fn wakes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        line.unwrap().trim().parse().unwrap()
    }

    /// Processor time used so far, in ticks of 10 ms.
    fn ticks(&self) -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    }

    fn signal(&self, signal: &str) {
        shell(&format!("kill -{signal} {}", self.child.id()));
    }

    #[track_caller]
    fn ends_cleanly(&mut self) {
        let begin = Instant::now();
        self.signal("TERM");
        let status = self.child.wait().unwrap();
        assert!(begin.elapsed() < Duration::from_secs(10), "it took {:?}", begin.elapsed());
        assert_eq!(status.code(), Some(0), "{}", self.log());
        assert!(self.log().contains("ends; the VMs run on"), "{}", self.log());
    }

    /// The bad source changes nothing, is said once, and drift is healed from what was declared last.
    #[track_caller]
    fn bears(&mut self, complaint: &str) {
        self.says(complaint);
        self.says("what it declared last stays in force, and nothing is removed");
        shell("ip link set br0 mtu 1280");
        self.soon("br0 is healed", || mtu("br0") == Some(1400));
        assert_eq!(mtu("br1"), Some(1500), "nothing is removed");
        assert_eq!(self.log().matches(complaint).count(), 1, "it is said once:\n{}", self.log());
    }
}

impl Drop for Agent<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("{}: the agent said:\n{}", self.ground.directory.display(), self.log());
        }
    }
}

fn mtu(link: &str) -> Option<u32> {
    let output = Command::new("ip").args(["-o", "link", "show", link]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.split_once("mtu ")?.1.split_whitespace().next()?.parse().ok()
}

fn has_port(bridge: &str, port: &str) -> bool {
    shell(&format!("ip -o link show {port} || true")).contains(&format!("master {bridge}"))
}

/// Replaces a link in one instant, as git-sync does.
fn swap(ground: &Ground, target: &str, link: &str) {
    let temporary = ground.path("swap.tmp");
    symlink(target, &temporary).unwrap();
    std::fs::rename(temporary, ground.path(link)).unwrap();
}

fn with_port(bridge: &str, port: &str) -> String {
    format!(
        "---\n{{{HEAD}, kind: Bridge, metadata: {{name: {bridge}}}, spec: {{mtu: 1400, ports: [{{interface: {port}}}]}}}}\n"
    )
}

#[test]
fn drift_is_healed_by_events() {
    let ground = Ground::new();
    shell("ip tuntap add d0 mode tap && ip link set d0 mtu 1400 up");
    ground.write("source/net.yaml", &with_port("br0", "d0"));
    ground.write("source/disk.yaml", &storage());
    let mut agent = Agent::start(&ground, "source");
    agent.converged();
    assert!(has_port("br0", "d0") && ground.path("pool/data.raw").exists(), "{}", agent.log());
    agent.rests();
    for round in 0..3 {
        shell("ip link set br0 mtu 1300");
        let mut took = vec![agent.soon("the MTU", || mtu("br0") == Some(1400))];
        shell("ip link set d0 nomaster");
        took.push(agent.soon("the port", || has_port("br0", "d0")));
        shell("ip link del br0");
        took.push(
            agent.soon("the bridge and its port", || has_port("br0", "d0") && mtu("br0") == Some(1400)),
        );
        std::fs::remove_file(ground.path("pool/data.raw")).unwrap();
        took.push(agent.soon("the volume", || ground.path("pool/data.raw").exists()));
        println!("round {round}: healed after {took:?}");
    }
    std::fs::remove_dir_all(ground.path("pool")).unwrap();
    agent.soon("the pool", || ground.path("pool/data.raw").exists());
    agent.rests();
    ground.expect(0, "diff --prune -f source");
    agent.ends_cleanly();
}

#[test]
fn a_changed_source_is_applied() {
    let ground = Ground::new();
    ground.write("source/a.yaml", &bridge("br0", 1400));
    ground.write("source/b.yaml", &bridge("br1", 1500));
    let mut agent = Agent::start(&ground, "source");
    agent.converged();
    ground.write("source/a.yaml", &bridge("br0", 1450));
    agent.soon("an edited file", || mtu("br0") == Some(1450));
    ground.write("source/new/deep/c.yaml", &bridge("br2", 1500));
    agent.soon("a file in new directories", || mtu("br2").is_some());
    ground.write("source/new/deep/c.yaml", &bridge("br2", 1460));
    agent.soon("an edit of it", || mtu("br2") == Some(1460));
    ground.write("source/new/.a.tmp", &bridge("br0", 1470));
    std::fs::rename(ground.path("source/new/.a.tmp"), ground.path("source/a.yaml")).unwrap();
    agent.soon("a file that is moved into place", || mtu("br0") == Some(1470));
    std::fs::remove_file(ground.path("source/b.yaml")).unwrap();
    agent.soon("a removed manifest", || mtu("br1").is_none());
    assert_eq!((mtu("br0"), mtu("br2")), (Some(1470), Some(1460)));
    agent.ends_cleanly();
}

#[test]
fn a_link_that_is_swapped_is_followed() {
    let ground = Ground::new();
    for (revision, mtu) in [("r1", 1401), ("r2", 1402), ("r3", 1403)] {
        ground.write(&format!("sync/{revision}/host/a.yaml"), &bridge("br0", mtu));
    }
    symlink("r1", ground.path("sync/current")).unwrap();
    // A directory below the link, as a repository's.
    let mut agent = Agent::start(&ground, "sync/current/host");
    agent.soon("the first revision", || mtu("br0") == Some(1401));
    for (revision, wanted) in [("r2", 1402), ("r3", 1403), ("r1", 1401)] {
        swap(&ground, revision, "sync/current");
        agent.soon(revision, || mtu("br0") == Some(wanted));
    }
    std::fs::remove_file(ground.path("sync/current")).unwrap();
    agent.says("nothing is removed");
    shell("ip link del br0");
    agent.soon("healed without a source", || mtu("br0") == Some(1401));
    swap(&ground, "r2", "sync/current");
    agent.soon("found again", || mtu("br0") == Some(1402));
    agent.ends_cleanly();
}

#[test]
fn a_source_that_is_not_there_is_awaited() {
    let ground = Ground::new();
    let mut agent = Agent::start(&ground, "later/source");
    agent.says("is not there; nothing is changed");
    agent.rests();
    ground.write("later/source/a.yaml", &bridge("br0", 1400));
    agent.soon("it comes", || mtu("br0") == Some(1400));
    agent.ends_cleanly();
}

#[test]
fn a_bad_source_changes_nothing() {
    let ground = Ground::new();
    let good = format!("{}{}", bridge("br0", 1400), bridge("br1", 1500));
    let good = good.as_str();
    let file = ground.write("source/a.yaml", good);
    let mut agent = Agent::start(&ground, "source");
    agent.converged();

    ground.write("source/a.yaml", "kind: [");
    agent.bears("the manifests have");
    assert!(agent.log().contains("a.yaml:1:"), "it says where:\n{}", agent.log());
    ground.write("source/a.yaml", good);
    agent.says("as it was before");

    // An object in it that can't be understood: nothing of the rest is applied, nothing removed.
    ground.write("source/a.yaml", &format!("{}{}", bridge("br0", 1333), bridge("br9", 7)));
    agent.says("a.yaml:");
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!((mtu("br0"), mtu("br9")), (Some(1400), None), "{}", agent.log());

    std::fs::rename(ground.path("source"), ground.path("away")).unwrap();
    agent.bears("is not there");
    std::fs::create_dir(ground.path("source")).unwrap();
    agent.soon("an empty directory is said", || {
        last_word_on_source(&ground).contains("no manifests in source")
    });
    shell("ip link del br1");
    agent.soon("healed while it is empty", || mtu("br1") == Some(1500));
    ground.write("source/a.yaml", &format!("{}{}", bridge("br0", 1444), bridge("br1", 1500)));
    agent.soon("it goes on", || mtu("br0") == Some(1444));

    // Half-written: what is there is valid, and would remove br1 and change br0.
    let mut writer = File::create(&file).unwrap();
    writer.write_all(bridge("br0", 1410).as_bytes()).unwrap();
    // (That alone is no event; but something else makes it read the source.)
    ground.write("source/README", "");
    agent.says("a.yaml is being written");
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!((mtu("br0"), mtu("br1")), (Some(1444), Some(1500)), "{}", agent.log());
    agent.rests();
    writer.write_all(bridge("br1", 1510).as_bytes()).unwrap();
    drop(writer);
    agent.soon("it is finished", || (mtu("br0"), mtu("br1")) == (Some(1410), Some(1510)));
    agent.ends_cleanly();
}

fn last_word_on_source(ground: &Ground) -> String {
    let log = std::fs::read_to_string(ground.path("agent.log")).unwrap();
    log.lines().rfind(|line| line.contains(" source ")).unwrap_or_default().to_owned()
}

#[test]
fn mass_removal_waits_for_consent() {
    let ground = Ground::new();
    let all: Vec<String> = (0..8).map(|number| bridge(&format!("br{number}"), 1400)).collect();
    ground.write("source/a.yaml", &all.concat());
    let mut agent = Agent::start(&ground, "source");
    agent.converged();
    ground.write("source/a.yaml", &bridge("br0", 1450));
    agent.says("refused:");
    agent.says("--approve ");
    std::thread::sleep(Duration::from_millis(300));
    let left = (0..8).filter(|number| mtu(&format!("br{number}")).is_some()).count();
    assert_eq!(left, 8, "{}", agent.log());
    agent.rests();
    let log = agent.log();
    let hash = log.rsplit_once("--approve ").unwrap().1.split_whitespace().next().unwrap();
    ground.expect(0, &format!("apply -f source --prune --approve {hash}"));
    agent.soon("what was approved is so", || mtu("br1").is_none() && mtu("br0") == Some(1450));
    agent.ends_cleanly();
}

#[test]
fn at_rest_it_costs_nothing() {
    let ground = Ground::new();
    // Or the kernel announces a new bridge's own address, some seconds after it.
    shell("echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6");
    ground.write("source/a.yaml", &format!("{}{}", bridge("br0", 1400), storage()));
    let mut agent = Agent::start(&ground, "source");
    agent.converged();
    agent.rests();
    let (ticks, wakes) = (agent.ticks(), agent.wakes());
    std::thread::sleep(Duration::from_secs(2));
    assert!(agent.ticks() - ticks < 5, "it used {} ms", (agent.ticks() - ticks) * 10);
    assert_eq!(agent.wakes() - wakes, 0, "nothing woke it:\n{}", agent.log());
    // Its own repair wakes it, and then no more.
    shell("ip link del br0");
    agent.soon("healed", || mtu("br0") == Some(1400));
    agent.rests();
    agent.ends_cleanly();
}

#[test]
fn two_agents_and_an_apply_get_along() {
    let ground = Ground::new();
    ground.write("source/a.yaml", &format!("{}{}", bridge("br0", 1400), bridge("br1", 1500)));
    let mut first = Agent::start(&ground, "source");
    let mut second = Agent::start_named(&ground, "source", "second.log");
    first.converged();
    second.converged();
    for _ in 0..10 {
        shell("ip link del br0; ip link set br1 mtu 1300");
        let applied = ground.vmctl("apply -f source --prune --timeout 20s");
        assert!(matches!(applied.code, Some(0)), "{applied:?}\n{}{}", first.log(), second.log());
        first.soon("healed", || (mtu("br0"), mtu("br1")) == (Some(1400), Some(1500)));
    }
    first.rests();
    second.rests();
    first.ends_cleanly();
    second.ends_cleanly();
}

#[test]
fn a_fight_is_slow() {
    let ground = Ground::new();
    ground.write("one/a.yaml", &bridge("br0", 1400));
    ground.write("two/a.yaml", &bridge("br0", 1300));
    let mut first = Agent::start(&ground, "one");
    let mut second = Agent::start_named(&ground, "two", "second.log");
    // (Sixty repairs are free; they take a while on a busy machine.)
    let begin = Instant::now();
    while !(first.log() + &second.log()).contains("is changed back all the time") {
        assert!(begin.elapsed() < SOON * 6, "{}{}", first.log(), second.log());
        std::thread::sleep(Duration::from_millis(50));
    }
    std::thread::sleep(Duration::from_secs(2));
    let repairs = || first.log().matches("updated").count() + second.log().matches("updated").count();
    let (before, ticks) = (repairs(), first.ticks() + second.ticks());
    std::thread::sleep(Duration::from_secs(4));
    let (repairs, ticks) = (repairs() - before, first.ticks() + second.ticks() - ticks);
    assert!(repairs < 40 && ticks < 100, "{repairs} repairs in 4 s, at {} ms", ticks * 10);
    first.ends_cleanly();
    second.ends_cleanly();
}

#[test]
fn killed_at_work_the_next_goes_on() {
    let ground = Ground::new();
    let all: Vec<String> = (0..30).map(|number| bridge(&format!("br{number}"), 1400)).collect();
    ground.write("source/a.yaml", &format!("{}{}", all.concat(), storage()));
    for pause_ms in [30, 60, 90, 120] {
        let mut agent = Agent::start(&ground, "source");
        std::thread::sleep(Duration::from_millis(pause_ms));
        agent.child.kill().unwrap();
        agent.child.wait().unwrap();
    }
    let mut agent = Agent::start_named(&ground, "source", "last.log");
    agent.converged();
    ground.expect(0, "diff --prune -f source");
    agent.ends_cleanly();
    // A manifest that went while nobody looked.
    ground.write("source/a.yaml", &format!("{}{}", all[..29].concat(), storage()));
    let mut agent = Agent::start(&ground, "source");
    agent.soon("pruned at the start", || mtu("br29").is_none());
    agent.ends_cleanly();
}
