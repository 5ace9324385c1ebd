//! Times `load`: `cargo run --release --example load_bench -- [OBJECTS] [FILES]`, or with a path to see
//! what it says of one's own manifests.

use std::path::{Path, PathBuf};
use std::time::Instant;
use std::{env, fs, io};

use vmctl::load::{Input, Options, load};

/// One object of every kind in turn, each referring to those before it.
fn document(index: usize) -> String {
    let (kind, spec) = match index % 6 {
        0 => ("Bridge", "mtu: 1500\n  vlanFiltering: true\n  ports:\n    - interface: eth1\n      pvid: 10\n      tagged: [20, 30]".to_owned()),
        1 => ("Vlan", format!("parent: eth0\n  id: {}\n  interfaceName: v{index}\n  bridge: o{}", index % 4000 + 1, index - 1)),
        2 => ("StoragePool", format!("directory:\n    path: /var/lib/vmctl/p{index}")),
        3 => ("Image", format!("pool: o{}\n  source: {{path: /srv/{index}.qcow2}}\n  sha256: \"{index:064x}\"\n  format: qcow2", index - 1)),
        4 => ("Volume", format!("pool: o{}\n  format: qcow2\n  capacity: 20Gi\n  source:\n    image: o{}", index - 2, index - 1)),
        _ => (
            "VirtualMachine",
            format!(
                "cpus: 2\n  memory: 2Gi\n  boot:\n    kernel: /boot/vmlinux\n    initrd: /boot/initrd\n    cmdline: \"console=ttyS0 rw\"\n  disks:\n    - volume: o{}\n  interfaces:\n    - bridge: o{}\n      macAddress: 52:54:{:02x}:{:02x}:{:02x}:ff",
                index - 1,
                index - 5,
                index >> 16 & 255,
                index >> 8 & 255,
                index & 255
            ),
        ),
    };
    format!(
        "---\napiVersion: vmctl.dev/v1alpha1\nkind: {kind}\nmetadata:\n  name: o{index}\n  labels: {{app: web}}\nspec:\n  {spec}\n"
    )
}

fn generate(directory: &Path, objects: usize, files: usize) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    let each = objects.div_ceil(files.max(1)).max(1);
    for (file, start) in (0..objects).step_by(each).enumerate() {
        let text: String = (start..objects.min(start + each)).map(document).collect();
        fs::write(directory.join(format!("{file:04}.yaml")), text)?;
    }
    Ok(())
}

fn main() -> io::Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let number = |index: usize| arguments.get(index).and_then(|text| text.parse::<usize>().ok());
    let (path, generated): (PathBuf, bool) = match arguments.first() {
        Some(path) if number(0).is_none() => (path.into(), false),
        _ => (env::temp_dir().join(format!("vmctl-load-bench-{}", std::process::id())), true),
    };
    if generated {
        generate(&path, number(0).unwrap_or(10_000), number(1).unwrap_or(10))?;
    }
    let input = if path.is_dir() {
        Input::Directory { path: path.clone(), recursive: true }
    } else {
        Input::File(path.clone())
    };
    let mut times = Vec::new();
    for _ in 0..if generated { 10 } else { 1 } {
        let started = Instant::now();
        let loaded = load(std::slice::from_ref(&input), &Options::default());
        times.push(started.elapsed());
        if times.len() == 1 {
            loaded.problems.iter().for_each(|problem| println!("{problem}\n"));
            println!(
                "{} manifests, {} problems, complete: {}",
                loaded.manifests.len(),
                loaded.problems.len(),
                loaded.complete
            );
        }
    }
    times.sort();
    println!(
        "load: median {:?}, best {:?}, worst {:?}",
        times[times.len() / 2],
        times[0],
        times[times.len() - 1]
    );
    if generated { fs::remove_dir_all(&path) } else { Ok(()) }
}
