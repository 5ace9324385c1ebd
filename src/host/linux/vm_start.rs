//! Starting a VM: everything that it will hold is opened here, for its process opens nothing.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use super::cgroup::{self, Limits, NewCgroup};
use super::hugepages;
use super::kernel_cache;
use super::links;
use super::netlink::Netlink;
use super::ofd::{self, Lock};
use super::storage;
use super::tap::{self, AttachError};
use super::vm_place::VmPlace;
use super::vm_process::{self, LOOK_TIMEOUT, chain};
use super::vm_seed;
use super::vm_user;
use super::vm_vsock;
use crate::host::error::StepError;
use crate::host::limits::ProcessLimits;
use crate::host::snapshot::{Capability, SEED_DISK, Seed, VmDefinition};
use crate::name::{LinkName, Mark, ObjectName};
use crate::vmm::client;
use crate::vmm::config::{BootConfig, DiskConfig};
use crate::vmm::protocol::{FdRole, Launch, VERSION};

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
    let (mut roles, mut fds) = open_files(definition, place, &what)?;
    open_taps(definition, &what, &mut roles, &mut fds)?;
    let confined = confine(vm, definition, &mut roles, &mut fds);
    let Confinement { uid, gid, missing, cgroup } = confined.map_err(|error| failed(&error))?;
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

    let config = definition.config.clone();
    let launch = Launch { version: VERSION, config, uid, gid, fds: roles, missing };
    let launched = client::launch(program, &launch, fds);
    // The process is in it now, or it is empty.
    drop(cgroup);
    match launched {
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

/// Who the process becomes, and what holds it to its part of the host.
struct Confinement {
    uid: u32,
    gid: u32,
    /// Nobody takes it for left-over as long as this is there.
    cgroup: Option<NewCgroup>,
    missing: Vec<String>,
}

/// A user of its own and a cgroup with limits. Root has both; another user's VMs are processes of that user.
fn confine(
    vm: &ObjectName,
    definition: &VmDefinition,
    roles: &mut Vec<FdRole>,
    fds: &mut Vec<OwnedFd>,
) -> io::Result<Confinement> {
    if !rustix::process::geteuid().is_root() {
        let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        let missing = vec!["a user and a cgroup of its own: only root can give them".to_owned()];
        return Ok(Confinement { uid, gid, cgroup: None, missing });
    }
    // A seed is too small to count.
    let is_disk = |role: &FdRole| matches!(role, FdRole::Disk { name } if name != SEED_DISK);
    let mut files = roles.iter().zip(fds.iter());
    let in_memory = files.any(|(role, fd)| is_disk(role) && cgroup::lies_in_memory(fd));
    let process = ProcessLimits::of(&definition.config, in_memory);
    let limits = Limits { process, cpu: definition.cpu_share };
    let user = vm_user::claim(vm)?;
    let made = NewCgroup::make(vm, user.uid, &limits).and_then(|cgroup| Ok((cgroup.open()?, cgroup)));
    roles.push(FdRole::User);
    fds.push(user.hold);
    let (cgroup, missing) = match made {
        Ok((open, cgroup)) => {
            for (role, fd) in open {
                roles.push(role);
                fds.push(fd);
            }
            (Some(cgroup), Vec::new())
        }
        Err(error) => (None, vec![format!("a cgroup with limits: {error}")]),
    };
    Ok(Confinement { uid: user.uid, gid: user.uid, cgroup, missing })
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
    definition: &VmDefinition,
    place: &VmPlace,
    what: &dyn Fn() -> String,
) -> Result<(Vec<FdRole>, Vec<OwnedFd>), StepError> {
    let config = &definition.config;
    let mut roles = vec![FdRole::Kvm];
    let mut fds = vec![open_kvm(what)?];
    if let BootConfig::Kernel(boot) = &config.boot {
        roles.push(FdRole::Kernel);
        let kernel = open_boot_file(&boot.kernel_path, "kernel", what)?;
        fds.push(kernel_cache::uncompressed(&place.kernels(), kernel.into()).into());
        if let Some(initrd) = &boot.initrd_path {
            roles.push(FdRole::Initrd);
            fds.push(open_boot_file(initrd, "initrd", what)?);
        }
    }
    for disk in &config.disks {
        roles.push(FdRole::Disk { name: disk.name.clone() });
        roles.extend((0..disk.backing.len()).map(|depth| FdRole::Backing { disk: disk.name.clone(), depth }));
        match &definition.seed {
            Some(seed) if disk.name == SEED_DISK => fds.push(make_seed(seed, place, what)?),
            _ => fds.extend(open_disk(disk, what)?),
        }
    }
    Ok((roles, fds))
}

fn make_seed(seed: &Seed, place: &VmPlace, what: &dyn Fn() -> String) -> Result<OwnedFd, StepError> {
    let path = vm_seed::image(seed)
        .and_then(|image| place.write_seed(&image))
        .map_err(|error| StepError::failed(what(), format!("make its cloud-init seed: {error}")))?;
    storage::open_disk(&path, true)
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
