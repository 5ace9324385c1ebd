//! What one VM process runs. This is the whole truth about a running VM: the process answers
//! `get` with it, and the reconciler compares it with what the manifests declare.
//!
//! Nothing here is opened by path: paths are kept to be shown and compared, and the open files
//! travel beside the configuration as descriptors (see [`crate::vmm::protocol::FdRole`]).

use serde::{Deserialize, Serialize};

/// Most vCPUs a VM may have.
pub const VCPUS_MAX: u8 = 16;
/// Most guest memory, in bytes.
pub const MEMORY_BYTES_MAX: u64 = 64 << 30;
/// Least guest memory, in bytes.
pub const MEMORY_BYTES_MIN: u64 = 16 << 20;
/// Most disks and NICs together: each takes one virtio-mmio slot, and one is the entropy device's.
pub const DEVICES_MAX: usize = 15;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// The VM's object name.
    pub name: String,
    /// Whose VM this is: the same mark that its links and files carry (`vmctl:<set>:<Kind>/<name>`).
    pub mark: String,
    /// 1 to [`VCPUS_MAX`].
    pub vcpus: u8,
    /// Between [`MEMORY_BYTES_MIN`] and [`MEMORY_BYTES_MAX`], a multiple of 1 MiB.
    pub memory_bytes: u64,
    pub boot: BootConfig,
    pub disks: Vec<DiskConfig>,
    pub nics: Vec<NicConfig>,
}

/// Direct kernel boot. The kernel may be a bzImage or an uncompressed vmlinux with a PVH note.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootConfig {
    pub kernel_path: String,
    pub initrd_path: Option<String>,
    pub cmdline: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    Raw,
    Qcow2,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Unique in the VM; also the virtio-blk serial (its first 20 bytes).
    pub name: String,
    pub path: String,
    pub format: DiskFormat,
    pub read_only: bool,
    /// The backing chain, nearest first. Each has its descriptor; nothing is opened implicitly.
    pub backing: Vec<BackingConfig>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackingConfig {
    pub path: String,
    pub format: DiskFormat,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NicConfig {
    /// Unique in the VM.
    pub name: String,
    /// The tap's name on the host, to be shown and compared.
    pub tap: String,
    /// Lower-case, colon-separated.
    pub mac_address: String,
    /// What the guest is told (VIRTIO_NET_F_MTU), in bytes.
    pub mtu: u16,
}
