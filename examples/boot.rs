//! Boots a kernel in a VM process and shows its serial console, as `vmctl` would start it, but from the
//! command line and without manifests. For development and for measuring; the guest's input is what is
//! given with `--type`.
//!
//! ```text
//! boot [OPTIONS] --kernel FILE | --boot-disk NAME
//!   --boot-disk NAME  find the kernel on this disk; --cmdline is appended to what the disk says
//!   --kernel FILE --initrd FILE --cmdline TEXT --vcpus N --memory MIB
//!   --disk NAME=FILE[:raw|:qcow2]   --tap NAME=TAP=MAC[,pairs=N][,vhost]
//!   --until TEXT    stop once the console shows TEXT, and say how long that took
//!   --type TEXT     type it once --until was seen, then wait for the end
//!   --then TEXT     wait for TEXT before the next --type; may be repeated with it
//!   --power-button  press the power button once --until was seen
//!   --timeout S     of each wait    --quiet   don't show the console
//!   --repeat N      boot so many times, print each time
//!   --interactive   standard input is typed
//!   --program FILE  the vmctl-vmm to start (default: beside this program's folder)
//! ```

#[path = "../tests/support/mod.rs"]
mod support;

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use support::Vm;
use vmctl::vmm::config::{DiskConfig, DiskFormat, MachineKind, NicConfig};

#[derive(Default)]
struct Options {
    kernel: PathBuf,
    boot_disk: Option<String>,
    initrd: Option<PathBuf>,
    cmdline: String,
    vcpus: u8,
    memory_mib: u64,
    disks: Vec<String>,
    taps: Vec<String>,
    until: Option<String>,
    /// What to wait for and what to type then.
    typed: Vec<(Option<String>, String)>,
    then: Option<String>,
    repeat: usize,
    timeout_s: u64,
    quiet: bool,
    micro: bool,
    metrics: bool,
    interactive: bool,
    power_button: bool,
    program: PathBuf,
}

fn main() {
    let options = options();
    for _ in 0..options.repeat {
        boot(&options);
    }
}

fn options() -> Options {
    let mut options = Options { vcpus: 1, memory_mib: 256, repeat: 1, timeout_s: 60, ..Default::default() };
    let beside = std::env::current_exe().unwrap();
    options.program = beside.parent().and_then(Path::parent).unwrap().join("vmctl-vmm");
    let mut arguments = std::env::args().skip(1);
    while let Some(flag) = arguments.next() {
        let mut value = || arguments.next().unwrap_or_else(|| panic!("{flag} needs a value"));
        match flag.as_str() {
            "--kernel" => options.kernel = value().into(),
            "--boot-disk" => options.boot_disk = Some(value()),
            "--initrd" => options.initrd = Some(value().into()),
            "--cmdline" => options.cmdline = value(),
            "--vcpus" => options.vcpus = value().parse().unwrap(),
            "--memory" => options.memory_mib = value().parse().unwrap(),
            "--disk" => options.disks.push(value()),
            "--tap" => options.taps.push(value()),
            "--until" => options.until = Some(value()),
            "--type" => {
                let text = value();
                options.typed.push((options.then.take(), text));
            }
            "--then" => options.then = Some(value()),
            "--repeat" => options.repeat = value().parse().unwrap(),
            "--timeout" => options.timeout_s = value().parse().unwrap(),
            "--program" => options.program = value().into(),
            "--micro" => options.micro = true,
            "--metrics" => options.metrics = true,
            "--interactive" => options.interactive = true,
            "--quiet" => options.quiet = true,
            "--power-button" => options.power_button = true,
            other => panic!("unknown option {other}"),
        }
    }
    options
}

fn machine(options: &Options) -> Vm {
    let vm = match &options.boot_disk {
        Some(disk) => Vm::from_disk(disk, &options.cmdline),
        None => Vm::new(File::open(&options.kernel).expect("open the kernel"), &options.cmdline),
    };
    let mut vm = vm.vcpus(options.vcpus).memory_bytes(options.memory_mib << 20);
    if options.micro {
        vm.launch.config.machine = MachineKind::Micro;
    }
    if let Some(initrd) = &options.initrd {
        vm = vm.initrd(File::open(initrd).expect("open the initrd"));
    }
    for disk in &options.disks {
        let (name, file) = disk.split_once('=').expect("--disk NAME=FILE");
        let (path, format) = match file.rsplit_once(':') {
            Some((path, "qcow2")) => (path, DiskFormat::Qcow2),
            Some((path, "raw")) => (path, DiskFormat::Raw),
            _ => (file, DiskFormat::Raw),
        };
        let image = File::options().read(true).write(true).open(path).expect("open the disk");
        vm = vm.disk(DiskConfig::new(name, path, format), image);
    }
    for tap in &options.taps {
        vm = add_nic(vm, tap);
    }
    vm
}

fn add_nic(vm: Vm, option: &str) -> Vm {
    let mut options = option.split(',');
    let parts: Vec<&str> = options.next().unwrap().split('=').collect();
    let [name, tap, mac] = parts[..] else { panic!("--tap NAME=TAP=MAC") };
    let mut config = NicConfig::new(name, tap, mac);
    let mut vhost = false;
    for option in options {
        match option.split_once('=') {
            Some(("pairs", pairs)) => config.queue_pairs = pairs.parse().unwrap(),
            None if option == "vhost" => vhost = true,
            _ => panic!("--tap: unknown option {option}"),
        }
    }
    let pairs = config.queue_pairs;
    let taps = (0..pairs).map(|_| support::open_tap_queue(tap, pairs > 1)).collect();
    let vhosts = (0..if vhost { pairs } else { 0 }).map(|_| support::open_vhost()).collect();
    vm.nic_of_pairs(config, taps, vhosts)
}

fn boot(options: &Options) {
    let timeout = Duration::from_secs(options.timeout_s);
    let vm = machine(options);
    let start = Instant::now();
    let vm = vm.launch(&options.program).unwrap_or_else(|error| {
        eprintln!("boot: {error}");
        std::process::exit(1)
    });
    let launched = start.elapsed();
    let mut console = vm.console();
    if options.interactive {
        type_what_comes(&vm);
    }
    if let Some(until) = &options.until {
        let text = console.expect_within(until, timeout);
        let took = start.elapsed();
        if !options.quiet {
            println!("{text}");
        }
        println!("launched {} ms, seen {} ms", launched.as_millis(), took.as_millis());
        if options.metrics {
            println!("{}", serde_json::to_string(&vm.control().metrics().unwrap()).unwrap());
        }
    }
    // A guest may not listen yet: a person would press again.
    for _ in 0..if options.power_button { 10 } else { 0 } {
        if vm.has_ended() {
            break;
        }
        vm.control().command(&vmctl::vmm::protocol::Verb::PowerButton).unwrap();
        std::thread::sleep(Duration::from_secs(2));
    }
    for (wanted, text) in &options.typed {
        if let Some(wanted) = wanted {
            let seen = console.expect_within(wanted, timeout);
            if !options.quiet {
                print!("{seen}");
            }
        }
        console.type_in(&text.replace("\\n", "\n"));
    }
    if !options.typed.is_empty() || options.power_button || options.until.is_none() {
        let deadline = Instant::now() + timeout;
        let mut buffer = [0; 4096];
        while Instant::now() < deadline {
            match console.console.read(&mut buffer, Duration::from_secs(1)).unwrap() {
                Some(0) => break,
                Some(length) if !options.quiet => {
                    print!("{}", String::from_utf8_lossy(&buffer[..length]));
                    // A prompt doesn't end its line.
                    std::io::stdout().flush().expect("print");
                }
                _ => {}
            }
        }
        if vm.has_ended() || Instant::now() < deadline {
            println!("\nend: {:?}", vm.wait());
        } else {
            let state = vm.control().state().unwrap();
            println!("\nstill {:?} after {} reboots", state.phase, state.reboots);
        }
    }
}

/// Types standard input into the guest, until it ends.
fn type_what_comes(vm: &support::RunningVm) {
    let console = vm.control().attach_console(0).expect("attach to the console");
    std::thread::spawn(move || {
        let (mut input, mut buffer) = (std::io::stdin(), [0; 4096]);
        while let Ok(length @ 1..) = input.read(&mut buffer) {
            console.write(&buffer[..length]).expect("type into the guest");
        }
    });
}
