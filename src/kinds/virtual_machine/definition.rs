//! From a declared VM to what a VM process is given: every name settled, every path known.

use std::collections::BTreeMap;
use std::path::Path;

use super::{Boot, Interface, VirtualMachine, cloud_init};
use crate::host::snapshot::{LvmPlace, PoolPlace, VlanFlags, VmDefinition};
use crate::kinds::action::Blocker;
use crate::kinds::bridge::Bridge;
use crate::kinds::stable::stable_hash;
use crate::kinds::storage_pool::compare::resolve;
use crate::kinds::volume::Content;
use crate::kinds::{Context, volume::Volume};
use crate::name::{LinkName, MacAddress, Mark, ObjectName, SetName, VlanId};
use crate::vmm::config::{
    BackingConfig, BootConfig, CacheMode, DiskConfig, DiskFormat, NicConfig, VmConfig, VsockConfig,
};

/// The address of a NIC that declares none: in QEMU's and libvirt's customary range.
pub fn default_mac(set: &SetName, vm: &ObjectName, nic: &str) -> MacAddress {
    let hash = stable_hash(&[set.as_str(), vm.as_str(), nic]).to_be_bytes();
    MacAddress([0x52, 0x54, 0x00, hash[0], hash[1], hash[2]])
}

/// The tap of a NIC: readable where 15 bytes allow it, else a hash.
pub fn tap_name(vm: &ObjectName, nic: &str) -> LinkName {
    let readable = format!("{vm}.{nic}");
    let name = if readable.len() <= 15 {
        readable
    } else {
        format!("vt{:013x}", stable_hash(&[vm.as_str(), nic]) & 0xf_ffff_ffff_ffff)
    };
    match LinkName::parse(&name) {
        Ok(name) => name,
        // Labels and hexadecimal digits are legal in a link's name.
        Err(error) => unreachable!("{error}"),
    }
}

/// The context id of a vsock that declares none: far from those that people count up from 3.
pub fn default_cid(set: &SetName, vm: &ObjectName) -> u32 {
    const FIRST: u32 = 0x1000_0000;
    // The mask keeps the sum far below the reserved ids at the end.
    FIRST + (stable_hash(&[set.as_str(), vm.as_str(), "vsock"]) as u32 & 0x3fff_ffff)
}

/// What VMGenID says: the same for the same VM on every host and after every upgrade, so that no guest
/// takes an ordinary restart for its own clone. A UUID of version 8 (made by a rule of ours).
fn generation_id(set: &SetName, vm: &ObjectName) -> String {
    use sha2::Digest as _;
    let digest = sha2::Sha256::digest(format!("vmctl generation\0{set}\0{vm}"));
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest[..16]);
    bytes[6] = bytes[6] & 0x0f | 0x80;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}

/// What this VM is to be, or why that can't be said.
pub fn define(
    vm: &ObjectName,
    want: &VirtualMachine,
    mark: Mark,
    context: &Context,
) -> Result<VmDefinition, Blocker> {
    let (mut nics, mut bridges, mut vlans) = (Vec::new(), Vec::new(), Vec::new());
    for nic in &want.interfaces {
        let Some(place) = nic.attachment.place(context.declared) else {
            return Err(Blocker::new(format!("{} is not declared", nic.attachment.object())));
        };
        let invalid = |error: crate::name::NameError| Blocker::new(error.to_string());
        let place = place.map_err(invalid)?;
        let bridge = place.bridge();
        bridges.push(place.link(&nic.attachment.object().name).map_err(invalid)?);
        vlans.push(port_vlans(nic, bridge));
        let mac = nic.mac_address.unwrap_or_else(|| default_mac(&mark.set, vm, &nic.name));
        nics.push(NicConfig {
            mtu: u16::try_from(bridge.mtu).unwrap_or(u16::MAX),
            queue_pairs: nic.queues,
            link_up: nic.link_up,
            receive_limits: nic.receive_limits,
            transmit_limits: nic.transmit_limits,
            ..NicConfig::new(&nic.name, tap_name(vm, &nic.name).to_string(), mac.to_string())
        });
    }
    let mut disks =
        want.disks.iter().map(|disk| define_disk(disk, context)).collect::<Result<Vec<_>, _>>()?;
    let seed =
        want.cloud_init.as_ref().map(|cloud_init| cloud_init.seed(&mark.set, vm, &want.interfaces, &nics));
    // Last: it moves none of the guest's own disks.
    disks.extend(seed.as_ref().map(|seed| cloud_init::disk(seed, context.snapshot)));
    let config = VmConfig {
        machine: want.machine,
        vcpus: want.cpus,
        cpu: want.cpu.clone(),
        memory: want.memory_backing,
        disks,
        nics,
        balloon: want.balloon,
        vsock: want
            .vsock
            .map(|vsock| VsockConfig { cid: vsock.cid.unwrap_or_else(|| default_cid(&mark.set, vm)) }),
        entropy: want.entropy,
        generation_id: Some(generation_id(&mark.set, vm)),
        ..VmConfig::new(vm.as_str(), mark.to_string(), want.memory.0, define_boot(&want.boot)?)
    };
    let (cpu_share, run_strategy) = (want.cpu_share, want.run_strategy);
    Ok(VmDefinition { mark, config, bridges, vlans, cpu_share, run_strategy, seed })
}

fn define_boot(boot: &Boot) -> Result<BootConfig, Blocker> {
    Ok(match boot {
        Boot::Kernel { kernel, initrd, cmdline } => {
            BootConfig::kernel(text(kernel)?, initrd.as_deref().map(text).transpose()?, cmdline)
        }
        Boot::Disk(disk) => BootConfig::Disk(disk.clone()),
    })
}

/// The VLANs of a NIC's tap: of a bridge that filters, what is declared or what the bridge gives its ports.
fn port_vlans(nic: &Interface, bridge: &Bridge) -> BTreeMap<VlanId, VlanFlags> {
    if !bridge.settings.vlan_filtering {
        return BTreeMap::new();
    }
    match &nic.vlans {
        Some(vlans) => vlans.membership(),
        None => VlanId::new(bridge.settings.default_pvid.into())
            .map(|id| (id, VlanFlags { pvid: true, untagged: true }))
            .into_iter()
            .collect(),
    }
}

fn define_disk(disk: &super::Disk, context: &Context) -> Result<DiskConfig, Blocker> {
    let Some(volume) = context.declared.volume(&disk.volume) else {
        return Err(Blocker::new(format!("Volume/{} is not declared", disk.volume)));
    };
    let pool = resolve(&volume.pool, context)?;
    let have =
        pool.directory.and_then(|directory| directory.files.get(&volume.file(&disk.volume, pool.place)));
    let backing = match have {
        // What it has been made on, whatever is declared now.
        Some(have) if volume.format == DiskFormat::Qcow2 => match &have.header.backing {
            Some(path) => vec![BackingConfig { path: text(path)?, format: backing_format(path)? }],
            None => Vec::new(),
        },
        Some(_) => Vec::new(),
        None => declared_backing(volume, &pool.path, context)?,
    };
    Ok(DiskConfig {
        read_only: disk.read_only,
        backing,
        cache: disk.cache.unwrap_or(default_cache(pool.place)),
        queues: disk.queues,
        limits: disk.limits,
        ..DiskConfig::new(&disk.name, text(&volume.path(&disk.volume, pool.place))?, volume.format)
    })
}

/// A thin pool tells that it is full when it is written to. Past the page cache the guest's own write waits for
/// room; in the page cache it would have been called done already, and be lost.
fn default_cache(place: &PoolPlace) -> CacheMode {
    match place {
        PoolPlace::Lvm(LvmPlace { thin_pool: Some(_), .. }) => CacheMode::Direct,
        PoolPlace::Lvm(_) | PoolPlace::Directory(_) => CacheMode::Writeback,
    }
}

fn declared_backing(
    volume: &Volume,
    pool_path: &Path,
    context: &Context,
) -> Result<Vec<BackingConfig>, Blocker> {
    let Content::OverlayOn(name) = &volume.content else { return Ok(Vec::new()) };
    let Some(image) = context.declared.image(name) else {
        return Err(Blocker::new(format!("Image/{name} is not declared")));
    };
    let cached = image.cached(pool_path);
    Ok(vec![BackingConfig { path: text(&cached.path())?, format: cached.format }])
}

/// The format of a cached image is in its name, where we put it.
fn backing_format(path: &Path) -> Result<DiskFormat, Blocker> {
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("raw") => Ok(DiskFormat::Raw),
        Some("qcow2") => Ok(DiskFormat::Qcow2),
        _ => Err(Blocker::new(format!("the backing file {} is not one of vmctl's images", path.display()))
            .hint("flatten the volume with `qemu-img convert`")),
    }
}

fn text(path: &Path) -> Result<String, Blocker> {
    match path.to_str() {
        Some(text) => Ok(text.to_owned()),
        None => Err(Blocker::new(format!("the path {} is not UTF-8", path.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::super::taps::tap_mac;
    use super::*;

    #[test]
    fn taps_fit_and_stay_apart() {
        let name = |text: &str| ObjectName::parse(text).unwrap();
        assert_eq!(tap_name(&name("vm1"), "net0").as_str(), "vm1.net0");
        let long = tap_name(&name("a-rather-long-name"), "net0");
        assert_eq!(long.as_str().len(), 15);
        assert_ne!(long, tap_name(&name("a-rather-long-name"), "net1"));
        assert_ne!(tap_mac(default_mac(&"default".parse().unwrap(), &name("vm1"), "net0")).0[0] & 2, 0);
    }

    /// A guest would notice another one: these values are for all time.
    #[test]
    fn what_is_made_from_names_never_changes() {
        let (set, vm) = ("default".parse().unwrap(), ObjectName::parse("web").unwrap());
        assert_eq!(generation_id(&set, &vm), "f34f01f3-0abd-8ba7-96a5-5bbb9ef8f7b8");
        assert_eq!(default_cid(&set, &vm), 1006455884);
        assert_eq!(default_mac(&set, &vm, "net0").to_string(), "52:54:00:8f:e8:85");
    }
}
