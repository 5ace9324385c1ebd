//! How long a no-op `diff` of many objects takes: manifests of every kind from files, against the
//! simulator's snapshot of a host that has them all. Prints each stage, the whole, and the peak memory.
//!
//! ```text
//! cargo run --release --example bench_diff -- [OBJECTS] [ROUNDS]
//! ```

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vmctl::execute::execute;
use vmctl::host::Host as _;
use vmctl::host::sim::SimHost;
use vmctl::host::snapshot::{FileFacts, ImageHeader, Link, LinkKind};
use vmctl::load::{self, Input, Options};
use vmctl::pipeline::{Declaration, declare};
use vmctl::plan::{Policy, Removal, plan};
use vmctl::vmm::config::DiskFormat;

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1).map(|text| text.parse::<usize>());
    let objects = arguments.next().unwrap_or(Ok(10_000))?;
    let rounds = arguments.next().unwrap_or(Ok(10))?;
    let directory = std::env::temp_dir().join(format!("vmctl-bench-diff-{}", std::process::id()));
    std::fs::create_dir_all(&directory)?;
    let result = bench(&directory, objects, rounds);
    std::fs::remove_dir_all(&directory)?;
    result
}

fn bench(directory: &Path, objects: usize, rounds: usize) -> Result<(), Failure> {
    write_manifests(directory, objects)?;
    let host = prepare(directory)?;
    let mut wholes = Vec::new();
    for round in 0..rounds {
        let begin = Instant::now();
        let declaration = read(directory)?;
        let loaded = begin.elapsed();
        let snapshot = host.snapshot(&declaration.desired.scope());
        let observed = begin.elapsed();
        let policy = Policy { removal: Removal::Prune, ..Policy::default() };
        let plan = plan(&declaration.desired, &snapshot, &policy);
        let whole = begin.elapsed();
        if !plan.is_empty() {
            return Err("the plan isn't empty".into());
        }
        if round == 0 {
            println!(
                "{} objects: load and resolve {loaded:?}, copy the snapshot {:?}, plan {:?}",
                plan.actions.len(),
                observed - loaded,
                whole - observed
            );
        }
        wholes.push(whole);
    }
    wholes.sort();
    let median: Duration = wholes[wholes.len() / 2];
    println!(
        "diff, {rounds} rounds: min {:?}, median {median:?}, max {:?}",
        wholes[0],
        wholes[wholes.len() - 1]
    );
    let status = std::fs::read_to_string("/proc/self/status")?;
    let peak = status.lines().find(|line| line.starts_with("VmHWM")).unwrap_or("VmHWM unknown");
    println!(
        "peak memory of this process, the simulated host included: {}",
        peak.trim_start_matches("VmHWM:").trim()
    );
    Ok(())
}

fn read(directory: &Path) -> Result<Declaration, Failure> {
    let input = Input::Directory { path: PathBuf::from(directory), recursive: false };
    Ok(declare("default".parse()?, load::load(&[input], &Options::default()))?)
}

/// Of ten objects: two bridges, two VLANs, four volumes and two VMs; and one pool.
fn write_manifests(directory: &Path, objects: usize) -> Result<(), Failure> {
    let head = |kind: &str, name: &str| {
        format!("apiVersion: vmctl.dev/v1alpha1\nkind: {kind}\nmetadata:\n  name: {name}\nspec:\n")
    };
    let mut text = head("StoragePool", "default") + "  directory:\n    path: /pool\n";
    let mut files = 0;
    for group in 0..objects / 10 {
        for half in 0..2 {
            let number = group * 2 + half;
            let (parent, id) = (number / 4000, number % 4000 + 1);
            let parts = [
                head("Bridge", &format!("b{number}")) + "  mtu: 1500\n",
                head("Vlan", &format!("v{number}"))
                    + &format!("  parent: up{parent}\n  id: {id}\n  bridge: b{number}\n"),
                head("Volume", &format!("vm{number}-root")) + "  pool: default\n  capacity: 20Gi\n",
                head("Volume", &format!("vm{number}-data"))
                    + "  pool: default\n  format: raw\n  capacity: 100Gi\n  reclaimPolicy: Delete\n",
                head("VirtualMachine", &format!("vm{number}"))
                    + &format!(
                        "  cpus: 2\n  memory: 2Gi\n  boot:\n    kernel: /boot/vmlinux\n  disks:\n    - volume: vm{number}-root\n    - volume: vm{number}-data\n  interfaces:\n    - bridge: b{number}\n"
                    ),
            ];
            for part in parts {
                write!(text, "---\n{part}")?;
            }
        }
        if text.len() > 500_000 {
            std::fs::write(directory.join(format!("{files:04}.yaml")), std::mem::take(&mut text))?;
            files += 1;
        }
    }
    std::fs::write(directory.join(format!("{files:04}.yaml")), text)?;
    Ok(())
}

fn prepare(directory: &Path) -> Result<SimHost, Failure> {
    let host = SimHost::new();
    host.edit(|world| -> Result<(), Failure> {
        let links = world.links.as_mut().map_err(|error| error.to_string())?;
        for uplink in 0..4 {
            let link = Link {
                mac_address: None,
                mtu: 1500,
                up: true,
                alias: None,
                master: None,
                parent: None,
                kind: LinkKind::Other(String::new()),
                port: None,
                addresses: Default::default(),
            };
            links.insert(format!("up{uplink}").parse()?, link);
        }
        Ok(())
    })?;
    let header = ImageHeader {
        format: DiskFormat::Raw,
        virtual_size_bytes: 1 << 20,
        backing: None,
        encrypted: false,
        unusable: None,
    };
    host.add_file(
        "/boot/vmlinux",
        FileFacts { size_bytes: 1 << 20, modified_unix_ns: 0, header, kind: Default::default() },
    );
    let declaration = read(directory)?;
    let first = plan(&declaration.desired, &host.snapshot(&declaration.desired.scope()), &Policy::default());
    let outcomes = execute(&first, &host, &mut |_| {});
    match outcomes.values().find(|outcome| !outcome.is_done()) {
        Some(outcome) => Err(format!("the host could not be prepared: {outcome:?}").into()),
        None => Ok(host),
    }
}
