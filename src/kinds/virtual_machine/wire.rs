//! The YAML form of a VirtualMachine.

use std::collections::BTreeSet;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Boot as InnerBoot, Disk as InnerDisk, Interface as InnerInterface, VirtualMachine as Inner};
use crate::host::snapshot::RunStrategy;
use crate::kinds::storage_pool::wire::parse_path;
use crate::kinds::{Problems, SpecProblem};
use crate::name::{ByteSize, MacAddress, ObjectName};
use crate::vmm::config::{MEMORY_BYTES_MAX, MEMORY_BYTES_MIN, MICRO_DEVICES_MAX as DEVICES_MAX};

/// A guest: a process of the host, with a thread for each vCPU.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct VirtualMachine {
    /// Number of vCPUs, 1 to 16. Default: 1.
    #[schemars(range(min = 1, max = 16))]
    pub cpus: Option<u8>,
    /// Guest memory, a binary quantity such as `2Gi`, 16Mi to 64Gi, a multiple of 1Mi.
    pub memory: String,
    /// What the guest boots.
    pub boot: Boot,
    /// Disks, in the order in which the guest finds them (`/dev/vda`, `/dev/vdb`…).
    pub disks: Option<Vec<Disk>>,
    /// NICs, in the order in which the guest finds them (`eth0`, `eth1`…).
    pub interfaces: Option<Vec<Interface>>,
    /// When it runs. `Always`: started again whenever it ends. `Halted`: never. `RerunOnFailure`: started
    /// again unless the guest powered itself off. `Manual`: as `vmctl start` and `vmctl stop` say. Default: Always.
    pub run_strategy: Option<RunStrategy>,
    /// Whether a change that needs a restart may restart the guest. `Never`: the change is staged until the
    /// next start. `Allowed`: the guest is shut down and started at once. Default: Never.
    pub restart_policy: Option<RestartPolicy>,
    /// Seconds that the guest has to shut down when asked, before it is stopped by force, 0 to 3600. Default: 60.
    #[schemars(range(min = 0, max = 3600))]
    pub shutdown_timeout_seconds: Option<u32>,
}

/// Direct kernel boot.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Boot {
    /// An absolute path of a bzImage, or of an uncompressed vmlinux with a PVH entry (the faster of the two).
    pub kernel: String,
    /// An absolute path of an initial RAM disk.
    pub initrd: Option<String>,
    /// The kernel's command line, at most 2047 bytes.
    pub cmdline: Option<String>,
}

/// A disk of the guest.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Disk {
    /// The Volume.
    pub volume: String,
    /// The disk's name in the VM and its serial number in the guest, at most 20 bytes. Default: `disk<index>`.
    pub name: Option<String>,
    /// Default: false.
    pub read_only: Option<bool>,
}

/// A NIC of the guest.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Interface {
    /// The Bridge that its tap is a port of.
    pub bridge: String,
    /// The NIC's name in the VM, at most 20 bytes. Default: `net<index>`.
    pub name: Option<String>,
    /// Its address. Default: made from the set's, the VM's and the NIC's names, and so always the same.
    pub mac_address: Option<String>,
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
        let memory = problems.take("/memory", self.memory.parse::<ByteSize>());
        if let Some(ByteSize(bytes)) = memory
            && (!(MEMORY_BYTES_MIN..=MEMORY_BYTES_MAX).contains(&bytes) || !bytes.is_multiple_of(1 << 20))
        {
            problems.add(SpecProblem::new(
                "/memory",
                format!("`{}`: memory is 16Mi to 64Gi and a multiple of 1Mi", self.memory),
            ));
        }
        let boot = self.boot.decode(&mut problems);
        let disks = self.disks.unwrap_or_default();
        let interfaces = self.interfaces.unwrap_or_default();
        if disks.len() + interfaces.len() > DEVICES_MAX {
            problems.add(SpecProblem::new(
                "",
                format!(
                    "{} disks and interfaces; a VM has at most {DEVICES_MAX}",
                    disks.len() + interfaces.len()
                ),
            ));
        }
        let mut names = BTreeSet::new();
        let disks: Vec<_> = disks
            .into_iter()
            .enumerate()
            .filter_map(|(index, disk)| {
                let pointer = format!("/disks/{index}");
                let name = device_name(disk.name, "disk", index, &pointer, &mut names, &mut problems);
                let volume = problems.take(&format!("{pointer}/volume"), ObjectName::parse(&disk.volume));
                Some(InnerDisk { name: name?, volume: volume?, read_only: disk.read_only.unwrap_or(false) })
            })
            .collect();
        let interfaces: Vec<_> = interfaces
            .into_iter()
            .enumerate()
            .filter_map(|(index, nic)| {
                let pointer = format!("/interfaces/{index}");
                let name = device_name(nic.name, "net", index, &pointer, &mut names, &mut problems);
                let bridge = problems.take(&format!("{pointer}/bridge"), ObjectName::parse(&nic.bridge));
                let mac_address = match &nic.mac_address {
                    Some(text) => Some(
                        problems.take(&format!("{pointer}/macAddress"), MacAddress::parse_unicast(text))?,
                    ),
                    None => None,
                };
                Some(InnerInterface { name: name?, bridge: bridge?, mac_address })
            })
            .collect();
        let inner = (|| {
            Some(Inner {
                cpus: self.cpus.unwrap_or(1),
                memory: memory?,
                boot: boot?,
                disks,
                interfaces,
                run_strategy: self.run_strategy.unwrap_or_default(),
                restart_allowed: self.restart_policy == Some(RestartPolicy::Allowed),
                shutdown_timeout_seconds: self.shutdown_timeout_seconds.unwrap_or(60),
            })
        })();
        problems.finish(inner)
    }
}

impl Boot {
    fn decode(self, problems: &mut Problems) -> Option<InnerBoot> {
        let kernel = problems.take("/boot/kernel", parse_path(&self.kernel));
        let initrd = self.initrd.as_ref().map(|text| problems.take("/boot/initrd", parse_path(text)));
        let cmdline = self.cmdline.unwrap_or_default();
        if cmdline.len() > 2047 || cmdline.contains('\0') {
            problems.add(SpecProblem::new(
                "/boot/cmdline",
                format!("{} bytes; a kernel's command line has at most 2047, and no NUL", cmdline.len()),
            ));
        }
        let initrd = match initrd {
            Some(path) => Some(path?),
            None => None,
        };
        Some(InnerBoot { kernel: kernel?, initrd, cmdline })
    }
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
