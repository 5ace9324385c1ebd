//! The host's policy where it is real: the kernel's huge pages and KSM, and a guest whose balloon the agent
//! fills and empties. Every test here runs in the lab (`tests/lab/`).

#[path = "support/in_lab.rs"]
mod in_lab;
#[path = "support/tutorial.rs"]
mod tutorial;

use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use in_lab::ran_in_lab;
use tutorial::*;

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(90);
const PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
const KSM: &str = "/sys/kernel/mm/ksm/run";
const SCAN: &str = "/sys/kernel/mm/ksm/pages_to_scan";

fn number(path: &str) -> u64 {
    fs::read_to_string(path).unwrap().trim().parse().unwrap()
}

/// A host of this name's own manifests.
fn host(name: &str) -> Tutorial {
    let source = format!("/tmp/{name}");
    fs::create_dir_all(&source).unwrap();
    Tutorial { source: source.into(), state: "/var/lib/vmctl".into(), run: "/run/vmctl".into() }
}

impl Tutorial {
    fn policy(&self, spec: &str) {
        let text = format!(
            "{{apiVersion: vmctl.dev/v1alpha1, kind: HostPolicy, metadata: {{name: host}}, spec: {spec}}}\n"
        );
        // Whole or not at all: the agent may read it at any moment.
        fs::write(self.source.join(".policy"), text).unwrap();
        fs::rename(self.source.join(".policy"), self.source.join("policy.yaml")).unwrap();
    }
}

#[test]
fn huge_pages_and_ksm_are_set_healed_and_given_back() {
    if ran_in_lab() {
        return;
    }
    let host = host("settings");
    fs::write(PAGES, "2").unwrap();
    let scan = number(SCAN);
    let before = (number(PAGES), number(KSM), scan);
    assert_eq!(before.0, 2);
    host.policy("{cpuOvercommit: 2, hugepages: {2Mi: 8}, ksm: {run: true, pagesToScan: 321}}");
    host.apply();
    assert_eq!((number(PAGES), number(KSM), number(SCAN)), (8, 1, 321));
    host.diff(0);
    // Somebody turns at it.
    fs::write(PAGES, "0").unwrap();
    fs::write(KSM, "2").unwrap();
    let diff = host.diff(1);
    assert!(diff.contains("hugepages.2Mi  0 → 8") && diff.contains("ksm.run        2 → 1"), "{diff}");
    host.apply();
    assert_eq!((number(PAGES), number(KSM)), (8, 1));
    let said = run("vmctl get host");
    assert!(said.contains("8/8 of 2Mi free") && said.contains("0.00/2"), "{said}");
    run("vmctl check -o json | grep -q '8/8 of 2Mi free'");

    // More than there is memory: what there is stays, and is said.
    host.policy("{hugepages: {2Mi: 100000}}");
    let failed = host.apply_output();
    assert_eq!(failed.status.code(), Some(3), "{}", said_of(&failed));
    assert!(said_of(&failed).contains("the kernel found room for"), "{}", said_of(&failed));
    assert_eq!((number(KSM), number(SCAN)), (before.1, before.2), "declared no more: as it was");
    host.policy("{hugepages: {2Mi: 4}}");
    host.apply();
    assert_eq!(number(PAGES), 4);

    fs::remove_file(host.source.join("policy.yaml")).unwrap();
    run("vmctl delete host/host");
    assert_eq!((number(PAGES), number(KSM), number(SCAN)), before);
    assert!(!fs::exists("/var/lib/vmctl/host-policy.json").unwrap());
}

fn said_of(output: &std::process::Output) -> String {
    said(output)
}

#[test]
fn the_agent_fills_a_balloon_when_memory_is_short_and_empties_it_again() {
    if ran_in_lab() {
        return;
    }
    let host = host("balloon");
    initrd_with(&["virtio_balloon"], "/tmp/initrd");
    let vm = "
apiVersion: vmctl.dev/v1alpha1
kind: VirtualMachine
metadata: {name: web}
spec:
  memory: 640Mi
  boot: {kernel: /guest/vmlinux, initrd: /tmp/initrd, cmdline: console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable}
  balloon: {minMemory: 512Mi}
";
    fs::write(host.source.join("web.yaml"), vm).unwrap();
    // More than this host has: memory is short.
    host.policy("{balloon: {low: 100Gi, high: 200Gi}}");
    host.apply();
    host.guest("web").succeeds("insmod /extra/virtio_balloon.ko");
    let log = fs::File::create("/tmp/agent.log").unwrap();
    let mut agent = Command::new("vmctl")
        .args(["agent", "--resync", "1h", "--source"])
        .arg(&host.source)
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap();
    let balloon = || host.control("web").unwrap().metrics().unwrap().balloon.unwrap();
    let begun = std::time::Instant::now();
    until("the balloon is full", PATIENCE, || {
        let now = balloon();
        assert!(now.target_bytes <= 128 * MIB, "never below what the guest keeps");
        (now.actual_bytes == 128 * MIB).then_some(())
    });
    println!("full after {} ms", begun.elapsed().as_millis());
    let total = host.guest("web").succeeds("grep MemTotal /proc/meminfo");
    println!("the guest says {total}");
    std::thread::sleep(Duration::from_secs(5));
    assert_eq!(balloon().target_bytes, 128 * MIB, "and it stays there");
    host.diff(0);

    // Between the bounds nothing changes.
    host.policy("{balloon: {low: 1Mi, high: 200Gi}}");
    std::thread::sleep(Duration::from_secs(5));
    assert_eq!(balloon().target_bytes, 128 * MIB);

    host.policy("{balloon: {low: 1Mi, high: 2Mi}}");
    let begun = std::time::Instant::now();
    until("the balloon is empty", PATIENCE, || (balloon().actual_bytes == 0).then_some(()));
    println!("empty after {} ms", begun.elapsed().as_millis());
    host.diff(0);
    agent.kill().unwrap();
    agent.wait().unwrap();
    let log = fs::read_to_string("/tmp/agent.log").unwrap();
    println!("{log}");
    assert!(log.contains("VirtualMachine/web: balloon 0 → 80Mi"), "{log}");
}
