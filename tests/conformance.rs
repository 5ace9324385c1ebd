//! One suite for every host: the same steps on the simulator and on Linux must succeed or be refused
//! alike, and leave what looks the same. A simulator that lies is worse than none.

#[path = "support/host.rs"]
mod host;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use vmctl::host::error::StepError;
use vmctl::host::limits::ProcessLimits;
use vmctl::host::linux::LinuxHost;
use vmctl::host::sim::SimHost;
use vmctl::host::snapshot::{
    BaseChain, Chain, CpuShare, HostSetting, IpFamily, KsmRules, LinkKind, PolicyRules, PoolPlace, PortFacts,
    Rule, RunStrategy, ServiceConfig, Table, TableId, VmDefinition,
};
use vmctl::host::step::{LinkChange, NewVolume, NewVolumeContent, Step, StopHow};
use vmctl::host::{Host, Scope};
use vmctl::name::{Kind, Mark, ObjectName};
use vmctl::vmm::config::{BootConfig, DiskConfig, DiskFormat, Limits, NicConfig, VmConfig};

struct Pair {
    linux: LinuxHost,
    sim: SimHost,
    scope: Scope,
    pool: PathBuf,
    root: PathBuf,
}

impl Pair {
    fn new(name: &str) -> Self {
        let root = host::scratch(name);
        let _ = std::fs::remove_dir_all(&root);
        std::fs::create_dir_all(&root).unwrap();
        let pool = root.join("pool");
        let scope = Scope {
            pools: vec![(object("default"), PoolPlace::Directory(pool.clone()))],
            ..Scope::default()
        };
        let linux = LinuxHost::new(root.join("state"), root.join("run"), "/nonexistent/vmctl-vmm")
            .with_host_files(host_files(&root));
        Self { linux, sim: SimHost::new(), scope, pool, root }
    }

    /// Runs a step on both: they must agree on the result and on what is there afterwards.
    fn run(&self, step: &Step) -> &'static str {
        let verdict = |result: &Result<(), StepError>| match result {
            Ok(()) => "done",
            Err(StepError::NotOurs { .. }) => "not ours",
            Err(_) => "failed",
        };
        let linux = self.linux.run(&[step]).pop().unwrap();
        let sim = self.sim.run(&[step]).pop().unwrap();
        assert_eq!(verdict(&linux), verdict(&sim), "{step:?}: Linux {linux:?}, simulator {sim:?}");
        assert_eq!(self.seen(&self.linux), self.seen(&self.sim), "after {step:?}");
        verdict(&linux)
    }

    /// A snapshot without what only a real host has (addresses the kernel chose, sizes on disk).
    fn seen(&self, host: &dyn Host) -> String {
        let snapshot = host.snapshot(&self.scope);
        let mut lines = Vec::new();
        for (name, link) in snapshot.links.unwrap() {
            if name.as_str() == "lo" {
                continue;
            }
            let kind = match &link.kind {
                LinkKind::Bridge(bridge) => format!(
                    "bridge stp {} ageing {} snooping {}",
                    bridge.stp, bridge.ageing_seconds, bridge.multicast_snooping
                ),
                kind => format!("{kind:?}"),
            };
            let port = link.port.map(|port| PortFacts { vlans: BTreeMap::new(), ..port });
            lines.push(format!(
                "{name}: {kind} mtu {} up {} alias {:?} master {:?} port {port:?} addresses {:?}",
                link.mtu, link.up, link.alias, link.master, link.addresses
            ));
        }
        for (id, table) in snapshot.tables.unwrap() {
            lines.push(format!("table {id}: {table:?}"));
        }
        for (mark, service) in snapshot.services.unwrap() {
            lines.push(format!("service {mark}: {:?} runs {}", service.config, service.pid.is_some()));
        }
        for (family, facts) in snapshot.forwarding.unwrap() {
            lines.push(format!("{family} forwarding {} for {:?}", facts.on, facts.users));
        }
        for (name, pool) in snapshot.pools {
            let pool = pool.unwrap();
            lines.push(format!("pool {name}: registered {:?}", pool.registered));
            let Some(directory) = pool.directory else { continue };
            lines.push(format!("directory: {:?}", directory.mark));
            for (file, facts) in directory.files {
                let header = &facts.header;
                lines.push(format!(
                    "{file}: {:?} retained {:?} delete {} {:?} {} backing {:?}",
                    facts.mark,
                    facts.retained,
                    facts.reclaim_delete,
                    header.format,
                    header.virtual_size_bytes,
                    header.backing
                ));
            }
        }
        for (name, vm) in snapshot.vms.unwrap() {
            lines.push(format!(
                "vm {name}: {:?} runs {} held {}",
                vm.definition,
                vm.process.is_some(),
                vm.held
            ));
        }
        let facts = snapshot.host.unwrap();
        lines.push(format!("policy {:?} KSM {:?}", facts.policy, facts.ksm));
        lines.join("\n")
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        // What a test that failed left running.
        for (mark, _) in self.linux.snapshot(&self.scope).services.into_iter().flatten() {
            self.linux.run(&[&Step::RemoveService { mark }]);
        }
        let _ = std::fs::remove_dir_all(&self.root);
    }
}

fn object(name: &str) -> ObjectName {
    name.parse().unwrap()
}

fn definition(memory_mib: u64) -> VmDefinition {
    let mark = host::mark(Kind::VirtualMachine, "web");
    VmDefinition {
        config: VmConfig::new("web", mark.to_string(), memory_mib << 20, BootConfig::kernel("/k", None, "")),
        mark,
        bridges: Vec::new(),
        vlans: Vec::new(),
        cpu_share: CpuShare::default(),
        run_strategy: RunStrategy::Halted,
        seed: None,
    }
}

/// Every step that both can do, over few names, so that they meet again and again.
fn any_step(pool: PathBuf) -> impl Strategy<Value = Step> {
    let mark =
        prop::sample::select(vec!["br0", "br1", "br2"]).prop_map(|owner| host::mark(Kind::Bridge, owner));
    let link = prop::sample::select(vec!["br0", "br1", "br2"]);
    let change = prop_oneof![
        (1300u32..1500).prop_map(LinkChange::Mtu),
        any::<bool>().prop_map(LinkChange::Up),
        any::<bool>().prop_map(LinkChange::Stp),
        (1u32..900).prop_map(LinkChange::AgeingSeconds),
        any::<bool>().prop_map(LinkChange::MulticastSnooping),
    ];
    let address = prop::sample::select(vec!["192.0.2.1/24", "198.51.100.1/24"]);
    let links = (link, mark, change, address, 0usize..8).prop_map(|(link, mark, change, address, which)| {
        let name = host::name(link);
        let address = address.parse().unwrap();
        match which {
            0 | 1 => Step::CreateLink(vmctl::host::step::NewLink { mtu: Some(1500), ..host::bridge(link) }),
            2 => Step::DeleteLink { link: name, mark },
            3 => Step::MarkLink { link: name, mark },
            4 => Step::UnmarkLink { link: name, mark },
            5 => Step::AddAddress { link: name, address },
            6 => Step::RemoveAddress { link: name, address },
            _ => Step::SetLink { link: name, change },
        }
    });
    let volumes = (any::<bool>(), any::<bool>(), any::<bool>(), 1u64..4, 0usize..7).prop_map(
        move |(own, qcow2, delete, mib, which)| {
            let mark = host::mark(Kind::Volume, if own { "data" } else { "other" });
            let format = if qcow2 { DiskFormat::Qcow2 } else { DiskFormat::Raw };
            let (pool_path, file) = (pool.clone(), if qcow2 { "data.qcow2" } else { "data.raw" }.to_owned());
            let capacity_bytes = mib << 20;
            match which {
                0 | 1 => Step::CreateVolume(NewVolume {
                    pool_path,
                    file,
                    format,
                    capacity_bytes: 1 << 20,
                    content: NewVolumeContent::Blank,
                    preallocate: false,
                    mark: host::mark(Kind::Volume, "data"),
                    reclaim_delete: delete,
                }),
                2 => Step::GrowVolume { pool_path, file, format, capacity_bytes, mark },
                3 => Step::TrashVolume { pool_path, file, mark },
                4 => Step::RetainVolume { pool_path, file, mark },
                5 => Step::AdoptVolume { pool_path, file, mark, reclaim_delete: delete },
                _ => Step::SetReclaim { pool_path, file, mark, delete },
            }
        },
    );
    let vms = (any::<bool>(), any::<bool>(), 0usize..13).prop_map(|(own, held, which)| {
        let vm = object("web");
        let mark = host::mark(Kind::VirtualMachine, if own { "web" } else { "other" });
        match which {
            0 => Step::DefineVm { vm, definition: Box::new(definition(if held { 32 } else { 64 })) },
            1 => Step::UndefineVm { vm, mark },
            2 => Step::StopVm { vm, mark, how: StopHow::Forced },
            // Of a VM that doesn't run: what must be refused, and whose it is before that.
            3 => Step::PauseVm { vm, mark, paused: held },
            4 => {
                let disk = DiskConfig::new("data", "/nonexistent", DiskFormat::Raw);
                Step::AddDisk { vm, mark, disk: Box::new(disk) }
            }
            5 => {
                let nic = NicConfig::new("net0", "web.net0", "52:54:00:00:00:01");
                Step::AddNic { vm, mark, nic: Box::new(nic) }
            }
            6 => Step::RemoveDevice { vm, mark, device: "data".to_owned() },
            7 => Step::SetDiskLimits { vm, mark, disk: "data".to_owned(), limits: Limits::default() },
            8 => Step::SetCarrier { vm, mark, nic: "net0".to_owned(), up: held },
            9 => Step::SetBalloon { vm, mark, target_bytes: 0 },
            10 => Step::ReplaceTap { vm, mark, nic: "net0".to_owned(), tap: host::name("br0") },
            11 => {
                let limits = ProcessLimits { memory_bytes: None, threads: None };
                Step::SetProcessLimits { vm, mark, limits }
            }
            _ => Step::HoldVm { vm, mark, held },
        }
    });
    prop_oneof![4 => links, 3 => volumes, 2 => vms]
}

/// `/proc` and `/sys` of a host like the simulated one. Nothing but KSM is plain enough to be played by files.
fn host_files(root: &Path) -> PathBuf {
    let files = root.join("host");
    for (path, text) in [
        ("proc/meminfo", "MemTotal: 67108864 kB\nMemAvailable: 62914560 kB\n"),
        ("proc/sys/kernel/random/boot_id", "one\n"),
        ("sys/devices/system/cpu/online", "0-15\n"),
        ("sys/kernel/mm/ksm/run", "0\n"),
        ("sys/kernel/mm/ksm/pages_to_scan", "100\n"),
        ("sys/kernel/mm/ksm/pages_sharing", "0\n"),
    ] {
        let path = files.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    files
}

#[test]
fn the_hosts_policy_is_one_sets_and_gives_back_what_it_changed() {
    host::private_network();
    let pair = Pair::new("policy");
    let mark = host::mark(Kind::HostPolicy, "host");
    let mut other = mark.clone();
    other.set = "other".parse().unwrap();
    let record = |mark: &Mark, run| {
        let ksm = Some(KsmRules { run, pages_to_scan: None });
        Step::RecordHostPolicy {
            mark: mark.clone(),
            rules: Box::new(PolicyRules { ksm, ..Default::default() }),
        }
    };
    let set = |mark: &Mark, setting, value| Step::SetHostSetting { mark: mark.clone(), setting, value };
    let restore = |mark: &Mark, setting| Step::RestoreHostSetting { mark: mark.clone(), setting };
    let forget = |mark: &Mark| Step::ForgetHostPolicy { mark: mark.clone() };
    let (run, scan) = (HostSetting::KsmRun, HostSetting::KsmPagesToScan);
    let renamed = host::mark(Kind::HostPolicy, "renamed");
    for (step, expected) in [
        (set(&mark, run, 1), "not ours"),
        (restore(&mark, run), "not ours"),
        (forget(&mark), "done"),
        (record(&mark, true), "done"),
        (record(&mark, true), "done"),
        (record(&other, false), "not ours"),
        (set(&other, run, 1), "not ours"),
        (set(&mark, run, 1), "done"),
        (set(&mark, run, 1), "done"),
        (set(&mark, scan, 500), "done"),
        (set(&mark, scan, 700), "done"),
        (set(&mark, HostSetting::HugePages { page_bytes: 4096 }, 1), "failed"),
        (restore(&other, scan), "not ours"),
        (restore(&mark, scan), "done"),
        (restore(&mark, scan), "done"),
        (record(&renamed, true), "done"),
        (forget(&mark), "not ours"),
        (restore(&renamed, run), "done"),
        (forget(&other), "not ours"),
        (forget(&renamed), "done"),
        (forget(&renamed), "done"),
    ] {
        assert_eq!(pair.run(&step), expected, "{step:?}");
    }
}

fn create_pool(pool: &Path, mark: Mark) -> Step {
    Step::CreatePool { name: object("default"), path: pool.to_owned(), mark }
}

#[test]
fn the_simulator_and_linux_agree_on_any_steps() {
    host::private_network();
    let mut runner = TestRunner::new(Config { cases: 24, failure_persistence: None, ..Config::default() });
    let pool = host::scratch("any").join("pool");
    runner
        .run(&prop::collection::vec(any_step(pool), 1..25), |steps| {
            // What a case that failed left behind.
            for link in ["br0", "br1", "br2"] {
                let _ = std::process::Command::new("ip").args(["link", "del", link]).output();
            }
            let pair = Pair::new("any");
            assert_eq!(pair.run(&create_pool(&pair.pool, host::mark(Kind::StoragePool, "default"))), "done");
            for step in &steps {
                pair.run(step);
            }
            Ok(())
        })
        .unwrap();
}

#[test]
fn pools_are_made_found_again_and_let_go_of() {
    host::private_network();
    let pair = Pair::new("pools");
    let mark = host::mark(Kind::StoragePool, "default");
    let create = create_pool(&pair.pool, mark.clone());
    let forget = Step::ForgetPool { name: object("default"), path: pair.pool.clone(), mark };
    for step in [&create, &create, &forget, &forget, &create] {
        assert_eq!(pair.run(step), "done");
    }
    let mut other = host::mark(Kind::StoragePool, "default");
    other.set = "other".parse().unwrap();
    assert_eq!(pair.run(&create_pool(&pair.pool, other)), "not ours");
}

#[test]
fn taps_and_ports_agree() {
    host::private_network();
    let pair = Pair::new("taps");
    let bridge = vmctl::host::step::NewLink { mtu: Some(1500), ..host::bridge("br0") };
    let tap = vmctl::host::step::NewLink { mtu: Some(1500), ..host::tap("web-net0", Some("br0")) };
    let (tap_name, tap_mark) = (tap.name.clone(), tap.mark.clone());
    let set = |change| Step::SetLink { link: tap_name.clone(), change };
    let steps = [
        Step::CreateLink(bridge),
        Step::CreateLink(tap.clone()),
        Step::CreateLink(tap.clone()),
        set(LinkChange::Master(None)),
        set(LinkChange::Master(Some(host::name("br0")))),
        set(LinkChange::PortFlags(PortFacts { isolated: true, learning: false, ..PortFacts::default() })),
        set(LinkChange::Mtu(1400)),
        Step::DeleteLink { link: tap_name.clone(), mark: tap_mark.clone() },
        Step::DeleteLink { link: tap_name.clone(), mark: tap_mark },
        Step::CreateLink(tap),
        Step::DeleteLink { link: host::name("br0"), mark: host::mark(Kind::Bridge, "br0") },
    ];
    for step in &steps {
        assert_eq!(pair.run(step), "done", "{step:?}");
    }
}

#[test]
fn tables_and_forwarding_agree() {
    host::private_network();
    let pair = Pair::new("networks");
    let (web, lab) = (host::mark(Kind::Network, "web"), host::mark(Kind::Network, "lab"));
    let rule = |comment: &str, verdict: &str| Rule {
        comment: comment.to_owned(),
        expr: vec![serde_json::json!({ verdict: null })],
    };
    let table = |hook: &str, rules: Vec<Rule>| {
        let kind = "filter".to_owned();
        let base = BaseChain { kind, hook: hook.to_owned(), priority: 0, policy: "accept".to_owned() };
        Table {
            chains: [("forward".to_owned(), Chain { base: Some(base), rules })].into(),
            ..Table::default()
        }
    };
    let set = |mark: &Mark, table: Table| Step::SetTable { id: TableId::of_network(mark), table };
    let guard = |mark: &Mark, table: Table| Step::SetTable { id: TableId::of_guards(mark), table };
    let unguard = |mark: &Mark| Step::DeleteTable { id: TableId::of_guards(mark) };
    let delete = |mark: &Mark| Step::DeleteTable { id: TableId::of_network(mark) };
    let require = |family, mark: &Mark| Step::RequireForwarding { family, mark: mark.clone() };
    let release = |family, mark: &Mark| Step::ReleaseForwarding { family, mark: mark.clone() };
    use IpFamily::{Ipv4, Ipv6};
    let steps = [
        set(&web, table("forward", vec![rule("a", "accept"), rule("b", "drop")])),
        set(&lab, table("input", vec![])),
        set(&web, table("forward", vec![rule("c", "drop"), rule("a", "accept")])),
        set(&web, table("forward", vec![rule("c", "drop"), rule("a", "accept")])),
        set(&web, table("input", vec![rule("a", "accept"), rule("a", "accept")])),
        set(&web, Table::default()),
        unguard(&web),
        guard(&web, table("prerouting", vec![rule("a", "drop")])),
        guard(&lab, table("forward", vec![rule("a", "accept")])),
        guard(&web, table("prerouting", vec![rule("b", "accept"), rule("a", "drop")])),
        guard(&web, table("prerouting", vec![rule("b", "accept"), rule("a", "drop")])),
        unguard(&web),
        unguard(&web),
        require(Ipv4, &web),
        require(Ipv4, &web),
        require(Ipv4, &lab),
        require(Ipv6, &lab),
        release(Ipv4, &web),
        release(Ipv4, &web),
        release(Ipv6, &web),
        release(Ipv4, &lab),
        release(Ipv6, &lab),
        delete(&web),
        delete(&web),
        delete(&lab),
        unguard(&lab),
    ];
    for step in &steps {
        assert_eq!(pair.run(step), "done", "{step:?}");
    }
}

#[test]
fn services_agree() {
    host::private_network();
    let pair = Pair::new("services");
    let mark = host::mark(Kind::Network, "lab");
    let bridge = vmctl::host::step::NewLink { mtu: Some(1500), ..host::bridge("br0") };
    let address = "192.0.2.1/24".parse().unwrap();
    let set = |lease_seconds: u32, names: &str| {
        let main = format!(
            "bind-interfaces\nexcept-interface=lo\nport=0\ninterface=br0\ndhcp-range=192.0.2.9,192.0.2.20,{lease_seconds}\n"
        );
        let config =
            ServiceConfig { bridge: host::name("br0"), main, hosts: String::new(), names: names.to_owned() };
        Step::SetService { mark: mark.clone(), config }
    };
    let make = Step::CreateLink(bridge);
    let delete = Step::DeleteLink { link: host::name("br0"), mark: host::mark(Kind::Bridge, "br0") };
    let remove = Step::RemoveService { mark: mark.clone() };
    let (mut linux, mut sim) = (None, None);
    // And whether the process that ran before goes on.
    for (number, (step, verdict, goes_on)) in [
        (remove.clone(), "done", false),
        // Without its bridge it is only known.
        (set(600, ""), "failed", false),
        (remove.clone(), "done", false),
        (set(600, ""), "failed", false),
        (make.clone(), "done", false),
        (Step::AddAddress { link: host::name("br0"), address }, "done", false),
        (set(600, ""), "done", false),
        (set(600, ""), "done", true),
        (set(600, "192.0.2.9 web\n"), "done", true),
        (set(900, "192.0.2.9 web\n"), "done", false),
        // What listened on a bridge that went is as good as gone, whatever comes in the bridge's place.
        (delete.clone(), "done", false),
        (set(900, "192.0.2.9 web\n"), "failed", false),
        (make.clone(), "done", false),
        (set(900, "192.0.2.9 web\n"), "done", false),
        (delete.clone(), "done", false),
        (make, "done", false),
        (set(900, ""), "done", false),
        (delete, "done", false),
        (remove.clone(), "done", false),
        (remove, "done", false),
    ]
    .into_iter()
    .enumerate()
    {
        assert_eq!(pair.run(&step), verdict, "step {number}: {step:?}");
        let pid = |host: &dyn Host| {
            let services = host.snapshot(&pair.scope).services.unwrap();
            services.get(&mark).and_then(|service| service.pid)
        };
        let now = (pid(&pair.linux), pid(&pair.sim));
        let same = |before: Option<i32>, now: Option<i32>| now.is_some() && before == now;
        assert_eq!((same(linux, now.0), same(sim, now.1)), (goes_on, goes_on), "step {number}: {step:?}");
        (linux, sim) = now;
    }
}
