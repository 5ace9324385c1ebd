//! The tutorial's picture, for real: guests on VLANs, drifts, edits, and death at any instant. Every test
//! here runs in the lab (`tests/lab/`), where VLANs and guests are real.

#[path = "support/in_lab.rs"]
mod in_lab;
#[path = "support/tutorial.rs"]
mod tutorial;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use in_lab::ran_in_lab;
use tutorial::*;

const ALL_VMS: [&str; 3] = ["vm1", "vm2", "vm3"];

/// Captures on an interface while `act` runs.
fn capture(place: &str, filter: &str, act: impl FnOnce()) -> String {
    // What an earlier capture said must not be taken for this one's.
    run("rm -f /tmp/capture /tmp/capture.err");
    let mut tcpdump = std::process::Command::new("sh")
        .args(["-c", &format!("exec {place} tcpdump -U -nnel {filter} >/tmp/capture 2>/tmp/capture.err")])
        .spawn()
        .unwrap();
    until("tcpdump listens", Duration::from_secs(20), || {
        std::fs::read_to_string("/tmp/capture.err").unwrap_or_default().contains("listening on").then_some(())
    });
    act();
    std::thread::sleep(Duration::from_millis(500));
    run(&format!("kill -INT {}", tcpdump.id()));
    tcpdump.wait().unwrap();
    std::fs::read_to_string("/tmp/capture").unwrap()
}

#[test]
fn guests_reach_their_vlan_and_nothing_else() {
    if ran_in_lab() {
        return;
    }
    let tutorial = Tutorial::new();
    tutorial.apply();
    let mut guests: Vec<Guest> = ALL_VMS.iter().map(|vm| tutorial.guest(vm)).collect();

    // Same VLAN: yes. And the switch, over the trunk.
    guests[0].succeeds("ping -c 2 -W 5 192.168.10.12");
    guests[1].succeeds("ping -c 2 -W 5 192.168.10.11");
    guests[0].succeeds("ping -c 2 -W 5 192.168.10.1");
    guests[2].succeeds("ping -c 2 -W 5 192.168.20.1");

    // Another VLAN: not even by ARP, with an address of the same subnet.
    guests[0].succeeds("ip addr add 192.168.20.99/24 dev eth0");
    let seen = capture("", "-i vm3.net0 arp", || {
        let (status, output) = guests[0].run("arping -c 3 -w 4 -I eth0 192.168.20.13");
        assert_ne!(status, 0, "vm3 answered: {output}");
    });
    assert!(!seen.contains("192.168.20.99"), "ARP crossed the VLANs: {seen}");

    // On the trunk the frames carry their tags; what the guests get has none.
    for (guest, vlan, peer) in [(0, 10, "192.168.10.1"), (2, 20, "192.168.20.1")] {
        let vm = ALL_VMS[guest];
        let seen = capture("ip netns exec switch", "-i trunk icmp or vlan", || {
            guests[guest].succeeds(&format!("ping -c 1 -W 5 {peer}"));
        });
        let frames: Vec<&str> = seen.lines().filter(|line| line.contains("ICMP echo")).collect();
        assert!(frames.len() >= 2, "{seen}");
        assert!(frames.iter().all(|frame| frame.contains(&format!("vlan {vlan},"))), "{seen}");
        let seen = capture("", &format!("-i {vm}.net0"), || {
            guests[guest].succeeds(&format!("ping -c 1 -W 5 {peer}"));
        });
        assert!(seen.contains("ICMP echo") && !seen.contains("802.1Q"), "{seen}");
    }

    the_host_agrees_with_the_manifests();
    a_second_apply_does_nothing(&tutorial);
}

fn the_host_agrees_with_the_manifests() {
    for (link, id, bridge) in [("eth0.10", 10, "brvlan10"), ("eth0.20", 20, "brvlan20")] {
        let text = run(&format!("ip -d link show {link}"));
        for expected in
            [format!("vlan protocol 802.1Q id {id} "), format!("master {bridge} "), "mtu 1500".into()]
        {
            assert!(text.contains(&expected), "{link}: no `{expected}` in {text}");
        }
        assert!(text.contains(&format!("alias vmctl:default:Vlan/eth0-{id}")), "{text}");
    }
    let ports = run("bridge link show");
    for (tap, bridge) in [("vm1.net0", "brvlan10"), ("vm2.net0", "brvlan10"), ("vm3.net0", "brvlan20")] {
        let line = ports.lines().find(|line| line.contains(tap)).unwrap_or_else(|| panic!("{tap}: {ports}"));
        assert!(line.contains(&format!("master {bridge} state forwarding")), "{line}");
    }
    for vm in ALL_VMS {
        let pool = "/var/lib/vmctl/images";
        // -U: the running VM holds the lock, as it should.
        let info = run(&format!("qemu-img info -U --output=json {pool}/{vm}-root.qcow2"));
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        assert_eq!((info["format"].as_str(), info["virtual-size"].as_u64()), (Some("qcow2"), Some(2 << 30)));
        // A check would take locks of its own, which the VM's keep out: it gets a copy.
        run(&format!("cp {pool}/{vm}-root.qcow2 /tmp/copy.qcow2 && qemu-img check /tmp/copy.qcow2"));
        assert_eq!(std::fs::metadata(format!("{pool}/{vm}-data.raw")).unwrap().len(), 256 << 20);
    }
}

/// Observed system call by system call: nothing is written to the kernel's network, to a file, and no
/// process is made.
fn a_second_apply_does_nothing(tutorial: &Tutorial) {
    assert_eq!(tutorial.diff(0).lines().last(), Some("No differences (14 objects)."));
    let source = tutorial.source.display();
    run(&format!("strace -f -o /tmp/trace -s 64 vmctl apply --prune -f {source}"));
    let trace = std::fs::read_to_string("/tmp/trace").unwrap();
    let mut offences = Vec::new();
    for (index, line) in trace.lines().enumerate() {
        let made_process = line.contains("execve(") && index > 0 || line.contains("fork(");
        let network_write =
            ["RTM_NEW", "RTM_DEL", "RTM_SET"].iter().any(|verb| line.contains("send") && line.contains(verb));
        let opened_to_write = line.contains("open")
            && ["O_WRONLY", "O_RDWR", "O_CREAT"].iter().any(|mode| line.contains(mode))
            && !["/dev/kvm", "/dev/net/tun", "/dev/null", "/dev/tty"]
                .iter()
                .any(|device| line.contains(device));
        let changed_file =
            ["rename", "unlink", "mkdir", "ftruncate", "fallocate", "setxattr", "symlink", "chmod", "chown"]
                .iter()
                .any(|call| line.contains(&format!("{call}(")) || line.contains(&format!("{call}at(")));
        if made_process || network_write || opened_to_write || changed_file {
            offences.push(line);
        }
    }
    assert!(offences.is_empty(), "{offences:#?}");
    assert!(trace.contains("RTM_GETLINK"), "the trace shows nothing of netlink");
}

#[test]
fn drifts_are_named_and_healed_and_nothing_else_is_touched() {
    if ran_in_lab() {
        return;
    }
    let tutorial = Tutorial::new();
    tutorial.edit("vm3.yaml", "  cpus: 1", "  runStrategy: Halted\n  cpus: 1");
    tutorial.apply();
    let mut vm1 = tutorial.guest("vm1");
    let (pid1, pid2) = (tutorial.pid("vm1"), tutorial.pid("vm2").unwrap());
    let uptime = vm1.uptime_s();

    // One drift after the other, each named alone.
    let drift = |what: &str, command: &str, names: &[&str]| {
        run(command);
        assert_eq!(tutorial.differing(), names, "{what}");
        tutorial.apply();
        tutorial.diff(0);
    };
    drift("a tap is detached", "ip link set vm2.net0 nomaster", &["VirtualMachine/vm2"]);
    drift("an MTU is changed", "ip link set eth0.20 mtu 1400", &["Vlan/eth0-20"]);
    drift(
        "a blank volume of a halted VM is deleted",
        "rm /var/lib/vmctl/images/vm3-data.raw",
        &["Volume/vm3-data"],
    );
    drift("a VM is killed", &format!("kill -9 {pid2}"), &["VirtualMachine/vm2"]);
    drift(
        "a bridge is deleted",
        "ip link del brvlan10",
        &["Bridge/brvlan10", "VirtualMachine/vm1", "VirtualMachine/vm2", "Vlan/eth0-10"],
    );
    // All at once.
    let pid2 = tutorial.pid("vm2").unwrap();
    drift(
        "everything",
        &format!(
            "ip link del brvlan10; kill -9 {pid2}; ip link set eth0.20 mtu 1300; rm /var/lib/vmctl/images/vm3-data.raw"
        ),
        &[
            "Bridge/brvlan10",
            "VirtualMachine/vm1",
            "VirtualMachine/vm2",
            "Vlan/eth0-10",
            "Vlan/eth0-20",
            "Volume/vm3-data",
        ],
    );
    // The tap of a running guest is deleted: it gets a new one and keeps running.
    drift("a tap is deleted", "ip link del vm1.net0", &["VirtualMachine/vm1"]);

    assert_eq!(tutorial.pid("vm1"), pid1, "vm1 was never restarted");
    assert!(vm1.uptime_s() > uptime, "vm1 was never rebooted");
    assert_ne!(tutorial.pid("vm2"), Some(pid2));
    tutorial.guest("vm2").succeeds("ip link");
    vm1.succeeds("ping -c 2 -W 10 192.168.10.12");
    vm1.succeeds("ping -c 2 -W 10 192.168.10.1");
}

fn memory_kib(guest: &mut Guest) -> u64 {
    let text = guest.succeeds("grep MemTotal /proc/meminfo");
    text.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).unwrap_or_else(|| panic!("{text}"))
}

#[test]
fn edits_are_planned_and_applied_as_declared() {
    if ran_in_lab() {
        return;
    }
    let tutorial = Tutorial::new();
    tutorial.apply();
    let before_kib = memory_kib(&mut tutorial.guest("vm1"));
    let mut vm2 = tutorial.guest("vm2");
    let (pid1, pid2) = (tutorial.pid("vm1"), tutorial.pid("vm2"));

    // Memory: staged, and no difference any more; then allowed, and restarted.
    tutorial.edit("vm1.yaml", "memory: 128Mi", "memory: 160Mi");
    let plan = tutorial.diff(1);
    assert!(plan.contains("128Mi → 160Mi") && plan.contains("staged"), "{plan}");
    tutorial.apply();
    assert!(tutorial.diff(0).contains("memory 160Mi takes effect at the next start"));
    assert_eq!(tutorial.pid("vm1"), pid1);
    tutorial.edit("vm1.yaml", "  cpus: 1", "  restartPolicy: Allowed\n  cpus: 1");
    let plan = tutorial.diff(1);
    assert!(plan.contains("128Mi → 160Mi") && plan.contains("restart"), "{plan}");
    tutorial.apply();
    assert_ne!(tutorial.pid("vm1"), pid1);
    let after_kib = memory_kib(&mut tutorial.guest("vm1"));
    assert!(after_kib >= before_kib + (24 << 10), "{before_kib} KiB, then {after_kib} KiB");

    // A disk grows under a running guest, which sees it at once.
    let sectors = "cat /sys/block/vda/size /sys/block/vdb/size";
    let before = vm2.succeeds(sectors);
    assert_eq!(before.split_whitespace().collect::<Vec<_>>(), ["4194304", "524288"]);
    tutorial.edit("vm2.yaml", "capacity: 2Gi", "capacity: 3Gi");
    tutorial.edit("vm2.yaml", "capacity: 256Mi", "capacity: 512Mi");
    assert_eq!(tutorial.differing(), ["Volume/vm2-data", "Volume/vm2-root"]);
    tutorial.apply();
    until("the guest sees its disks grow", Duration::from_secs(30), || {
        let now = vm2.succeeds(sectors);
        (now.split_whitespace().collect::<Vec<_>>() == ["6291456", "1048576"]).then_some(())
    });

    // A NIC moves live.
    tutorial.edit("vm2.yaml", "bridge: brvlan10", "bridge: brvlan20");
    assert_eq!(tutorial.differing(), ["VirtualMachine/vm2"]);
    tutorial.apply();
    assert_eq!(tutorial.pid("vm2"), pid2);
    vm2.succeeds("ip addr add 192.168.20.12/24 dev eth0");
    vm2.succeeds("ping -c 2 -W 10 192.168.20.1");
    let (status, _) = vm2.run("ping -c 2 -W 2 -I 192.168.10.12 192.168.10.1");
    assert_ne!(status, 0, "still in VLAN 10");

    // A VM goes, its volumes stay, byte for byte.
    let digest = "sha256sum /var/lib/vmctl/images/vm3-*";
    until("vm3 is up, so that its shutdown is a clean one", Duration::from_secs(120), || {
        tutorial.guest("vm3");
        Some(())
    });
    let hashes = run(digest);
    std::fs::remove_file(tutorial.source.join("vm3.yaml")).unwrap();
    let plan = tutorial.diff(1);
    assert!(plan.contains(". Volume/vm3-root") && plan.contains("- VirtualMachine/vm3"), "{plan}");
    let pid3 = tutorial.pid("vm3").unwrap();
    tutorial.apply();
    tutorial.diff(0);
    assert_eq!(run(digest), hashes);
    assert!(!std::path::Path::new(&format!("/proc/{pid3}")).exists());
    assert!(!run("ip link").contains("vm3.net0"));

    // A rename: the VM comes back under its new name, with its disks.
    tutorial.edit(
        "vm2.yaml",
        "kind: VirtualMachine\nmetadata:\n  name: vm2\n",
        "kind: VirtualMachine\nmetadata:\n  name: web\n",
    );
    vm2.succeeds("printf precious | dd of=/dev/vdb conv=fsync 2>/dev/null");
    tutorial.apply();
    tutorial.diff(0);
    assert_eq!(tutorial.pid("vm2"), None);
    let mut web = tutorial.guest("web");
    assert_eq!(web.succeeds("dd if=/dev/vdb bs=8 count=1 2>/dev/null"), "precious");
}

/// What is on the host, apart from process ids.
fn census() -> BTreeSet<String> {
    let links = run("ip -br -o link | sed 's/[@ ].*//'");
    let files = run(
        "find /var/lib/vmctl /run/vmctl -not -name lock -not -name console.log -not -path '*/.vmctl/tmp/*' | sort",
    );
    links.lines().chain(files.lines()).map(str::to_owned).collect()
}

fn vm_processes() -> usize {
    run("pgrep -c vmctl-vmm || true").trim().parse().unwrap()
}

/// After a kill: one more apply converges, and nothing is there twice or left over.
#[track_caller]
fn converges(tutorial: &Tutorial, smooth: &BTreeSet<String>, when: &str) {
    let output = tutorial.apply_output();
    assert!(output.status.success(), "{when}: {}", said(&output));
    tutorial.diff(0);
    let now = census();
    let leaked: Vec<_> = now.difference(smooth).collect();
    let missing: Vec<_> = smooth.difference(&now).collect();
    assert!(leaked.is_empty() && missing.is_empty(), "{when}: leaked {leaked:?}, missing {missing:?}");
    assert_eq!(vm_processes(), 3, "{when}");
    let garbage = run("find /var/lib/vmctl -path '*/.vmctl/tmp/*'");
    assert_eq!(garbage, "", "{when}");
}

/// Everything away again, by the ordinary way.
fn clean_up(tutorial: &Tutorial) {
    run(&format!("vmctl delete --timeout 0 -f {}", tutorial.source.display()));
    run("rm -rf /var/lib/vmctl /run/vmctl");
    assert!(!run("ip -d link").contains("alias vmctl:"));
    assert_eq!(vm_processes(), 0);
}

fn without_boot_delay(tutorial: &Tutorial) {
    for vm in ALL_VMS {
        tutorial.edit(&format!("{vm}.yaml"), "  cpus: 1", "  shutdownTimeoutSeconds: 0\n  cpus: 1");
    }
}

#[test]
fn death_before_any_step_converges() {
    if ran_in_lab() {
        return;
    }
    let tutorial = Tutorial::new();
    without_boot_delay(&tutorial);
    tutorial.apply();
    let smooth = census();
    clean_up(&tutorial);
    let source = tutorial.source.display();
    let mut deaths = 0;
    for step in 1.. {
        let output = shell(&format!("VMCTL_CRASH_BEFORE_STEP={step} vmctl apply --prune -f {source}"));
        let killed = !output.status.success();
        converges(&tutorial, &smooth, &format!("killed before step {step}"));
        clean_up(&tutorial);
        if !killed {
            break;
        }
        deaths += 1;
    }
    assert!(deaths >= 15, "only {deaths} steps");
    println!("killed before each of {deaths} steps; each time the next apply converged");
}

#[test]
fn death_at_random_instants_converges() {
    if ran_in_lab() {
        return;
    }
    let tutorial = Tutorial::new();
    without_boot_delay(&tutorial);
    tutorial.apply();
    let smooth = census();
    clean_up(&tutorial);
    // The first run is a slow one: everything is read from the disk.
    let start = Instant::now();
    tutorial.apply();
    let mut whole = start.elapsed();
    clean_up(&tutorial);
    let (mut killed, mut rounds) = (0u32, 0u32);
    while killed < 50 {
        // Spread over the whole run, in an order that doesn't follow it.
        let share = f64::from(rounds * 29 % 50) / 50.0;
        rounds += 1;
        assert!(rounds < 150, "only {killed} of {rounds} were killed in time");
        let start = Instant::now();
        let mut child = std::process::Command::new("vmctl")
            .args(["apply", "--prune", "-f"])
            .arg(&tutorial.source)
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let instant = whole.mul_f64(share);
        let mut over = false;
        while !over && start.elapsed() < instant {
            std::thread::sleep(Duration::from_millis(1));
            over = child.try_wait().unwrap().is_some();
        }
        if over {
            // It was over sooner than the last one: aim earlier from now on.
            whole = start.elapsed().min(whole);
        } else {
            child.kill().unwrap();
        }
        let succeeded = child.wait().unwrap().success();
        killed += u32::from(!over && !succeeded);
        converges(&tutorial, &smooth, &format!("killed at {:.0} % of {whole:?}", share * 100.0));
        clean_up(&tutorial);
    }
    println!("killed at {killed} instants in {rounds} runs; each time the next apply converged");
}
