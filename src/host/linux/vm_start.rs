//! Starting a VM: everything that it will hold is opened here, for its process opens nothing.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use sha2::Digest as _;

use super::hugepages;
use super::links;
use super::netlink::Netlink;
use super::ofd::{self, Lock};
use super::storage;
use super::tap::{self, AttachError};
use super::vm_place::VmPlace;
use super::vm_process::{self, LOOK_TIMEOUT, chain};
use super::vm_vsock;
use crate::host::error::StepError;
use crate::host::snapshot::{Capability, VmDefinition};
use crate::name::{LinkName, Mark, ObjectName};
use crate::vmm::client;
use crate::vmm::config::{BootConfig, DiskConfig, VmConfig};
use crate::vmm::protocol::{FdRole, Launch, VERSION};

/// VM processes run as users from here to 0x7fff_ffff. No distribution gives these out (systemd leaves
/// them alone, containers end below), and nothing on the host belongs to them.
const UID_BASE: u32 = 0x7000_0000;
const UID_MASK: u32 = 0x0fff_ffff;

/// The user that a VM's process becomes: always the same for the same name, so that a look at the
/// process list tells. (Among a thousand VMs two share one with a chance of 1 in 500; that costs them
/// nothing but the difference.)
pub fn uid(vm: &ObjectName) -> u32 {
    let digest = sha2::Sha256::digest(vm.as_str().as_bytes());
    let word = digest.iter().take(4).fold(0u32, |word, &byte| word << 8 | u32::from(byte));
    UID_BASE | word & UID_MASK
}

pub fn start(
    program: &Path,
    place: &VmPlace,
    vm: &ObjectName,
    definition: &VmDefinition,
) -> Result<(), StepError> {
    let what = || format!("start the VM {vm}");
    let failed = |error: &dyn ToString| StepError::failed(what(), error.to_string());
    require_definition(place, &definition.mark, &what)?;
    let directory = place.make_socket_directory().map_err(|error| failed(&error))?;
    vm_process::settle(place).map_err(|error| failed(&error))?;
    if let Some(control) = vm_process::connect(&directory, LOOK_TIMEOUT).map_err(|error| failed(&error))? {
        let state = control.state().map_err(|error| failed(&error))?;
        if state.config == definition.config {
            return Ok(());
        }
        let why = format!("it runs already (pid {}), with another configuration", state.pid);
        let hint = Some("stop it first: `vmctl stop`".to_owned());
        return Err(StepError::Failed { what: what(), why, hint });
    }

    // Held by the VM process for as long as it lives: no second one is made, whatever kills us.
    let console_log = place.console_log().map_err(|error| failed(&error))?;
    match ofd::try_lock(&console_log, Lock::Exclusive) {
        Ok(true) => {}
        Ok(false) => return Err(failed(&"another process of it has just been started")),
        Err(errno) => return Err(failed(&format!("lock its console log: {}", io::Error::from(errno)))),
    }

    hugepages::check(&definition.config).map_err(|shortage| StepError::Failed {
        what: what(),
        why: shortage.why,
        hint: Some(shortage.hint),
    })?;

    // First all that can fail without a trace.
    let (mut roles, mut fds) = open_files(&definition.config, &what)?;
    open_taps(definition, &what, &mut roles, &mut fds)?;
    let uid = uid(vm);
    if definition.config.vsock.is_some() {
        let files = vm_vsock::make(&place.vsock_directory(), uid)
            .map_err(|error| failed(&format!("make its vsock's sockets: {error}")))?;
        roles.extend([FdRole::Vsock, FdRole::VsockListener]);
        fds.extend([files.directory, files.listener]);
    }
    roles.push(FdRole::ExitRecord);
    fds.push(place.new_exit_record().map_err(|error| failed(&error))?.into());
    roles.push(FdRole::Control);
    fds.push(directory.bind().map_err(|error| failed(&error))?);
    // Last, for a process that ends closes its descriptors in their order: when this lock is free, the
    // disks and taps are.
    roles.push(FdRole::ConsoleLog);
    fds.push(console_log.into());

    let launch = Launch {
        version: VERSION,
        config: definition.config.clone(),
        uid,
        gid: uid,
        fds: roles,
        missing: Vec::new(),
    };
    match client::launch(program, &launch, fds) {
        Ok(_) => Ok(()),
        Err(error) => {
            // Unless a process lives after all, which is then found by it, the socket is dead.
            if let Ok(None) = vm_process::connect(&directory, LOOK_TIMEOUT) {
                let _ = directory.remove_socket();
            }
            Err(StepError::failed(what(), chain(&error)))
        }
    }
}

/// The definition must be there, and ours.
pub fn require_definition(
    place: &VmPlace,
    mark: &Mark,
    what: &dyn Fn() -> String,
) -> Result<VmDefinition, StepError> {
    match place.definition() {
        Ok(Some(definition)) if definition.mark == *mark => Ok(definition),
        Ok(Some(definition)) => {
            let why = format!("it is defined with the mark `{}`", definition.mark);
            Err(StepError::NotOurs { what: what(), why })
        }
        Ok(None) => Err(StepError::NotOurs { what: what(), why: "it is not defined here".to_owned() }),
        Err(error) => Err(StepError::failed(what(), error)),
    }
}

fn open_files(
    config: &VmConfig,
    what: &dyn Fn() -> String,
) -> Result<(Vec<FdRole>, Vec<OwnedFd>), StepError> {
    let mut roles = vec![FdRole::Kvm];
    let mut fds = vec![open_kvm(what)?];
    if let BootConfig::Kernel(boot) = &config.boot {
        roles.push(FdRole::Kernel);
        fds.push(open_boot_file(&boot.kernel_path, "kernel", what)?);
        if let Some(initrd) = &boot.initrd_path {
            roles.push(FdRole::Initrd);
            fds.push(open_boot_file(initrd, "initrd", what)?);
        }
    }
    for disk in &config.disks {
        roles.push(FdRole::Disk { name: disk.name.clone() });
        roles.extend((0..disk.backing.len()).map(|depth| FdRole::Backing { disk: disk.name.clone(), depth }));
        fds.extend(open_disk(disk, what)?);
    }
    Ok((roles, fds))
}

/// A disk's image, then its backing chain, each locked.
pub fn open_disk(disk: &DiskConfig, what: &dyn Fn() -> String) -> Result<Vec<OwnedFd>, StepError> {
    let mut fds = vec![open_image(&disk.path, disk.read_only, what)?];
    for backing in &disk.backing {
        fds.push(open_image(&backing.path, true, what)?);
    }
    Ok(fds)
}

fn open_kvm(what: &dyn Fn() -> String) -> Result<OwnedFd, StepError> {
    match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(file) => Ok(file.into()),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::ENXIO)) => {
            Err(StepError::Lacks { what: what(), capability: Capability::Kvm })
        }
        Err(error) => Err(StepError::failed(what(), format!("open /dev/kvm: {error}"))),
    }
}

fn open_boot_file(path: &str, which: &str, what: &dyn Fn() -> String) -> Result<OwnedFd, StepError> {
    let open = || -> io::Result<File> {
        // Without waiting: somebody may have put a FIFO there.
        let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("it is not a regular file"));
        }
        Ok(file)
    };
    let failed = |error| StepError::failed(what(), format!("open its {which} {path}: {error}"));
    open().map(OwnedFd::from).map_err(failed)
}

fn open_image(path: &str, read_only: bool, what: &dyn Fn() -> String) -> Result<OwnedFd, StepError> {
    storage::open_disk(Path::new(path), read_only).map_err(|error| {
        let hint = error.hint();
        StepError::Failed { what: what(), why: error.to_string(), hint }
    })
}

fn open_taps(
    definition: &VmDefinition,
    what: &dyn Fn() -> String,
    roles: &mut Vec<FdRole>,
    fds: &mut Vec<OwnedFd>,
) -> Result<(), StepError> {
    for nic in &definition.config.nics {
        let tap = LinkName::parse(&nic.tap).map_err(|error| StepError::failed(what(), error))?;
        roles.extend((0..nic.queue_pairs).map(|pair| FdRole::Tap { nic: nic.name.clone(), pair }));
        fds.extend(open_tap(&tap, nic.queue_pairs, &definition.mark, what)?);
        let vhost = open_vhost(nic.queue_pairs);
        roles.extend((0..).zip(&vhost).map(|(pair, _)| FdRole::Vhost { nic: nic.name.clone(), pair }));
        fds.extend(vhost);
    }
    Ok(())
}

/// `/dev/vhost-net` for each queue pair, or none: a host that hasn't got it, or doesn't let us, leaves the
/// frames to the VM process.
pub fn open_vhost(queue_pairs: u16) -> Vec<OwnedFd> {
    let open = |_| File::options().read(true).write(true).open("/dev/vhost-net").map(OwnedFd::from);
    (0..queue_pairs).map(open).collect::<io::Result<_>>().unwrap_or_default()
}

/// Takes hold of a tap that carries a mark of this VM, once for each queue pair.
pub fn open_tap(
    tap: &LinkName,
    queue_pairs: u16,
    mark: &Mark,
    what: &dyn Fn() -> String,
) -> Result<Vec<OwnedFd>, StepError> {
    let failed = |error: &dyn ToString| {
        StepError::failed(what(), format!("take hold of the tap {tap}: {}", error.to_string()))
    };
    let link = Netlink::open().and_then(|mut netlink| links::read_link(&mut netlink, tap));
    let Some(link) = link.map_err(|error| failed(&error))? else {
        return Err(failed(&AttachError::NotThere));
    };
    let ours = |found: &Mark| found.set == mark.set && found.owner == mark.owner;
    if !link.mark().as_ref().is_some_and(ours) {
        let alias = link.alias.unwrap_or_default();
        let why = format!("the tap {tap} carries the mark `{alias}`, not one of `{mark}`");
        return Err(StepError::NotOurs { what: what(), why });
    }
    tap::attach(tap, queue_pairs).map_err(|error| failed(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_high_and_lasting() {
        let web = uid(&ObjectName::parse("web").unwrap());
        assert_eq!(web, uid(&ObjectName::parse("web").unwrap()));
        assert_ne!(web, uid(&ObjectName::parse("db").unwrap()));
        assert!((0x7000_0000..=0x7fff_ffff).contains(&web));
    }
}
