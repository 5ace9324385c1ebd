//! From a declared VM to what a VM process is given: every name settled, every path known.

use std::path::Path;

use super::VirtualMachine;
use crate::host::snapshot::VmDefinition;
use crate::kinds::action::Blocker;
use crate::kinds::storage_pool::compare::resolve;
use crate::kinds::volume::Content;
use crate::kinds::{Context, volume::Volume};
use crate::name::{LinkName, MacAddress, Mark, ObjectName, SetName};
use crate::vmm::config::{
    BackingConfig, BootConfig, DiskConfig, DiskFormat, MachineKind, NicConfig, VmConfig,
};

/// FNV-1a: stable for all time, which the names and addresses made from it must be.
fn stable_hash(parts: &[&str]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in parts.join("\0").bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    // The low bits of FNV mix well only after a final avalanche.
    hash ^= hash >> 33;
    hash = hash.wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash ^ (hash >> 33)
}

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

/// The host's end of the wire: the guest's address with a high first byte, so that a bridge that takes the
/// lowest address of its ports never takes this one.
pub fn tap_mac(guest: MacAddress) -> MacAddress {
    let [_, rest @ ..] = guest.0;
    let mut bytes = [0xfe; 6];
    bytes[1..].copy_from_slice(&rest);
    MacAddress(bytes)
}

/// What this VM is to be, or why that can't be said.
pub fn define(
    vm: &ObjectName,
    want: &VirtualMachine,
    mark: Mark,
    context: &Context,
) -> Result<VmDefinition, Blocker> {
    let mut nics = Vec::new();
    let mut bridges = Vec::new();
    for nic in &want.interfaces {
        let Some(bridge) = context.declared.bridge(&nic.bridge) else {
            return Err(Blocker::new(format!("Bridge/{} is not declared", nic.bridge)));
        };
        bridges.push(bridge.link_name(&nic.bridge).map_err(|error| Blocker::new(error.to_string()))?);
        let mac = nic.mac_address.unwrap_or_else(|| default_mac(&mark.set, vm, &nic.name));
        nics.push(NicConfig {
            mtu: u16::try_from(bridge.mtu).unwrap_or(u16::MAX),
            ..NicConfig::new(&nic.name, tap_name(vm, &nic.name).to_string(), mac.to_string())
        });
    }
    let disks = want.disks.iter().map(|disk| define_disk(disk, context)).collect::<Result<_, _>>()?;
    let boot = BootConfig::kernel(
        text(&want.boot.kernel)?,
        want.boot.initrd.as_deref().map(text).transpose()?,
        &want.boot.cmdline,
    );
    let config = VmConfig {
        machine: MachineKind::Micro,
        vcpus: want.cpus,
        disks,
        nics,
        ..VmConfig::new(vm.as_str(), mark.to_string(), want.memory.0, boot)
    };
    Ok(VmDefinition { mark, config, bridges, run_strategy: want.run_strategy })
}

fn define_disk(disk: &super::Disk, context: &Context) -> Result<DiskConfig, Blocker> {
    let Some(volume) = context.declared.volume(&disk.volume) else {
        return Err(Blocker::new(format!("Volume/{} is not declared", disk.volume)));
    };
    let (pool_path, directory) = resolve(&volume.pool, context)?;
    let have = directory.and_then(|directory| directory.files.get(&volume.file(&disk.volume)));
    let backing = match have {
        // What it has been made on, whatever is declared now.
        Some(have) if volume.format == DiskFormat::Qcow2 => match &have.header.backing {
            Some(path) => vec![BackingConfig { path: text(path)?, format: backing_format(path)? }],
            None => Vec::new(),
        },
        Some(_) => Vec::new(),
        None => declared_backing(volume, pool_path, context)?,
    };
    Ok(DiskConfig {
        read_only: disk.read_only,
        backing,
        ..DiskConfig::new(&disk.name, text(&volume.path(&disk.volume, pool_path))?, volume.format)
    })
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
}
