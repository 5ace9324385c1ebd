//! The YAML form of a VirtualMachine: its fields, and what each may hold. `cpu` and `devices` have the
//! parts of their names.

mod cloud_init;
mod cpu;
mod devices;

use std::collections::BTreeSet;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Boot as InnerBoot, VirtualMachine as Inner};
use crate::host::snapshot::RunStrategy;
use crate::kinds::storage_pool::wire::parse_path;
use crate::kinds::{Problems, SpecProblem};
use crate::name::{ByteSize, ObjectName};
use crate::vmm::config::{DiskBoot, MEMORY_BYTES_MAX, MEMORY_BYTES_MIN, MachineKind};
use cloud_init::CloudInit;
use cpu::{Cpu, MemoryBacking};
use devices::{Balloon, Disk, Entropy, Interface, Vsock};

/// A guest: a process of the host, with a thread for each vCPU.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct VirtualMachine {
    /// What the guest is plugged into. `pci`: disks and NICs come and go while it runs, at most 26 of them.
    /// `micro`: no PCI, a smaller machine whose devices never change while it runs, at most 12 of them.
    /// Default: pci.
    pub machine: Option<Machine>,
    /// Number of vCPUs, 1 to 16. Default: 1.
    #[schemars(range(min = 1, max = 16))]
    pub cpus: Option<u8>,
    /// What the vCPUs look like, and their part of the host's CPUs.
    pub cpu: Option<Cpu>,
    /// Guest memory, a binary quantity such as `2Gi`, 16Mi to 64Gi, a multiple of 1Mi.
    pub memory: String,
    /// What guest memory is made of on the host.
    pub memory_backing: Option<MemoryBacking>,
    /// What the guest boots: a kernel of the host (`kernel`), or what one of its disks holds (`disk`).
    pub boot: Boot,
    /// Disks, in the order in which the guest finds them (`/dev/vda`, `/dev/vdb`…). Those that are added
    /// while it runs come last until its next start.
    pub disks: Option<Vec<Disk>>,
    /// NICs, in the order in which the guest finds them (`eth0`, `eth1`…).
    pub interfaces: Option<Vec<Interface>>,
    /// A memory balloon. Default: none.
    pub balloon: Option<Balloon>,
    /// A vsock device: sockets between the guest and Unix sockets of the host. Default: none.
    pub vsock: Option<Vsock>,
    /// The guest's source of random numbers, which every VM has.
    pub entropy: Option<Entropy>,
    /// What cloud-init in the guest finds, on a small read-only disk labelled `CIDATA` (data source NoCloud)
    /// that takes one place among the devices. A change takes effect at the next start. Default: none.
    pub cloud_init: Option<CloudInit>,
    /// When it runs. `Always`: started again whenever it ends. `Halted`: never. `RerunOnFailure`: started
    /// again unless the guest powered itself off. `Manual`: as `vmctl start` and `vmctl stop` say. A guest
    /// whose kernel panics has failed. Default: Always.
    pub run_strategy: Option<RunStrategy>,
    /// Whether a change that needs a restart may restart the guest. `Never`: the change is staged until the
    /// next start. `Allowed`: the guest is shut down and started at once. Default: Never.
    pub restart_policy: Option<RestartPolicy>,
    /// Seconds that the guest has to shut down when asked, before it is stopped by force, 0 to 3600. Default: 60.
    #[schemars(range(min = 0, max = 3600))]
    pub shutdown_timeout_seconds: Option<u32>,
}

/// What a guest is plugged into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Machine {
    Pci,
    Micro,
}

impl From<Machine> for MachineKind {
    fn from(machine: Machine) -> Self {
        match machine {
            Machine::Pci => Self::Pci,
            Machine::Micro => Self::Micro,
        }
    }
}

/// What a guest boots: exactly one of `kernel` and `disk`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Boot {
    /// An absolute path of a bzImage, or of an uncompressed vmlinux with a PVH entry (the faster of the two).
    pub kernel: Option<String>,
    /// With `kernel`: an absolute path of an initial RAM disk.
    pub initrd: Option<String>,
    /// With `kernel`: the kernel's command line, at most 2047 bytes.
    pub cmdline: Option<String>,
    /// The name of one of this VM's disks: kernel, initial RAM disk and command line are read from its own
    /// boot loader's configuration, with no firmware.
    pub disk: Option<String>,
    /// With `disk`: which of its boot entries, by title, id or kernel version. Default: the disk's own default.
    pub entry: Option<String>,
    /// With `disk`: what is added to that entry's command line, at most 2047 bytes.
    pub append: Option<String>,
}

/// Whether a change may restart a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RestartPolicy {
    Never,
    Allowed,
}

impl VirtualMachine {
    pub fn decode(self) -> Result<Inner, Vec<SpecProblem>> {
        let mut problems = Problems::default();
        let machine = self.machine.map(MachineKind::from).unwrap_or_default();
        let cpus = self.cpus.unwrap_or(1);
        let memory = self.memory_size(&mut problems);
        let (cpu, cpu_share) = self.cpu.unwrap_or_default().decode(cpus, &mut problems);
        let memory_backing = self.memory_backing.unwrap_or_default().decode(memory, &mut problems);
        let disks = self.disks.unwrap_or_default();
        let interfaces = self.interfaces.unwrap_or_default();
        let devices_max = machine.devices_max();
        let found = disks.len() + interfaces.len() + usize::from(self.cloud_init.is_some());
        if found > devices_max {
            let mut problem = SpecProblem::new(
                "",
                format!("{found} disks and interfaces; a VM of this machine has at most {devices_max}"),
            );
            if found <= MachineKind::Pci.devices_max() {
                problem = problem.hint("`machine: pci` takes as many");
            }
            problems.add(problem);
        }
        let mut names = BTreeSet::new();
        let mut inner_disks = Vec::new();
        for (index, disk) in disks.into_iter().enumerate() {
            inner_disks.extend(disk.decode(index, machine, cpus, &mut names, &mut problems));
        }
        let disk_names = names.clone();
        let mut inner_interfaces = Vec::new();
        for (index, nic) in interfaces.into_iter().enumerate() {
            inner_interfaces.extend(nic.decode(index, self.cloud_init.is_some(), &mut names, &mut problems));
        }
        let cloud_init = self.cloud_init.map(|cloud_init| cloud_init.decode(&names, &mut problems));
        let boot = self.boot.decode(&disk_names, &mut problems);
        let (balloon, least_memory) = match self.balloon {
            Some(balloon) => {
                let (balloon, least) = balloon.decode(memory, &mut problems);
                (Some(balloon), least)
            }
            None => (None, None),
        };
        let vsock = self.vsock.map(Vsock::decode);
        let entropy = self.entropy.unwrap_or_default().decode(&mut problems);
        let inner = memory.zip(boot).map(|(memory, boot)| Inner {
            machine,
            cpus,
            cpu,
            cpu_share,
            memory,
            memory_backing,
            boot,
            disks: inner_disks,
            interfaces: inner_interfaces,
            balloon,
            least_memory,
            vsock,
            entropy,
            cloud_init: cloud_init.flatten(),
            run_strategy: self.run_strategy.unwrap_or_default(),
            restart_allowed: self.restart_policy == Some(RestartPolicy::Allowed),
            shutdown_timeout_seconds: self.shutdown_timeout_seconds.unwrap_or(60),
        });
        problems.finish(inner)
    }

    fn memory_size(&self, problems: &mut Problems) -> Option<ByteSize> {
        let memory = problems.take("/memory", self.memory.parse::<ByteSize>())?;
        let ByteSize(bytes) = memory;
        if !(MEMORY_BYTES_MIN..=MEMORY_BYTES_MAX).contains(&bytes) || !bytes.is_multiple_of(1 << 20) {
            problems.add(SpecProblem::new(
                "/memory",
                format!("`{}`: memory is 16Mi to 64Gi and a multiple of 1Mi", self.memory),
            ));
        }
        Some(memory)
    }
}

impl Boot {
    fn decode(self, disks: &BTreeSet<String>, problems: &mut Problems) -> Option<InnerBoot> {
        match (self.kernel.is_some(), self.disk.is_some()) {
            (true, false) => self.decode_kernel(problems),
            (false, true) => self.decode_disk(disks, problems),
            (true, true) => {
                problems.add(
                    SpecProblem::new(
                        "/boot",
                        "`kernel` and `disk` are both given; a VM boots from one of them",
                    )
                    .hint(
                        "`kernel` is a file of the host; with `disk` the kernel comes from the disk itself",
                    ),
                );
                None
            }
            (false, false) => {
                problems.add(
                    SpecProblem::new(
                        "/boot",
                        "neither `kernel` nor `disk` is given; a VM boots from one of them",
                    )
                    .hint("`disk: disk0` boots what the VM's first disk holds"),
                );
                None
            }
        }
    }

    /// What belongs to the other way to boot.
    fn misplaced(fields: [(&str, bool); 2], needs: &str, problems: &mut Problems) {
        for (field, _) in fields.into_iter().filter(|(_, given)| *given) {
            let message = format!("`{field}` has a meaning only with `{needs}`");
            problems.add(SpecProblem::new(format!("/boot/{field}"), message));
        }
    }

    fn decode_kernel(self, problems: &mut Problems) -> Option<InnerBoot> {
        let fields = [("entry", self.entry.is_some()), ("append", self.append.is_some())];
        Self::misplaced(fields, "disk", problems);
        let kernel = problems.take("/boot/kernel", parse_path(self.kernel.as_deref()?));
        let initrd = self.initrd.as_ref().map(|text| problems.take("/boot/initrd", parse_path(text)));
        let cmdline = command_line("/boot/cmdline", self.cmdline, problems);
        let initrd = match initrd {
            Some(path) => Some(path?),
            None => None,
        };
        Some(InnerBoot::Kernel { kernel: kernel?, initrd, cmdline })
    }

    fn decode_disk(self, disks: &BTreeSet<String>, problems: &mut Problems) -> Option<InnerBoot> {
        let fields = [("initrd", self.initrd.is_some()), ("cmdline", self.cmdline.is_some())];
        Self::misplaced(fields, "kernel", problems);
        let disk = self.disk?;
        if !disks.contains(&disk) {
            let names: Vec<&str> = disks.iter().map(String::as_str).collect();
            let problem = SpecProblem::new("/boot/disk", format!("`{disk}` is not a disk of this VM"));
            problems.add(match names.as_slice() {
                [] => problem.hint("it has no disks; list one under `disks`"),
                names => problem.hint(format!("its disks are: {}", names.join(", "))),
            });
        }
        if self.entry.as_deref() == Some("") {
            problems.add(SpecProblem::new("/boot/entry", "an entry has a name"));
        }
        let append = command_line("/boot/append", self.append, problems);
        Some(InnerBoot::Disk(DiskBoot { disk, entry: self.entry, append }))
    }
}

fn command_line(pointer: &str, text: Option<String>, problems: &mut Problems) -> String {
    let text = text.unwrap_or_default();
    if text.len() > 2047 || text.contains('\0') {
        problems.add(SpecProblem::new(
            pointer,
            format!("{} bytes; a kernel's command line has at most 2047, and no NUL", text.len()),
        ));
    }
    text
}

/// A device's declared or default name, unique in the VM.
fn device_name(
    declared: Option<String>,
    stem: &str,
    index: usize,
    pointer: &str,
    names: &mut BTreeSet<String>,
    problems: &mut Problems,
) -> Option<String> {
    let pointer = if declared.is_some() { format!("{pointer}/name") } else { pointer.to_owned() };
    let name = declared.unwrap_or_else(|| format!("{stem}{index}"));
    if name.len() > 20 {
        problems.add(SpecProblem::new(
            pointer,
            format!("`{name}` has {} bytes; a device's name has at most 20", name.len()),
        ));
        return None;
    }
    problems.take(&pointer, ObjectName::parse(&name))?;
    if !names.insert(name.clone()) {
        problems.add(SpecProblem::new(pointer, format!("`{name}` is the name of two devices of this VM")));
        return None;
    }
    Some(name)
}
