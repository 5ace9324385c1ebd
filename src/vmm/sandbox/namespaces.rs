//! A world of its own: namespaces that hold nothing, and a root directory without a file.
//!
//! | namespace | what it takes away | cost here |
//! |---|---|---|
//! | mount | every path of the host | 0.3 ms with the new root |
//! | IPC | System V objects, POSIX message queues | 0.04 ms |
//! | UTS, cgroup | the host's name, its cgroups | < 0.01 ms |
//! | PID (made at birth) | every other process | 0.02 ms |
//! | network | interfaces, abstract Unix sockets | 0.5 ms, and a clean-up by the kernel of tens of ms |
//!
//! The network namespace is made only for a VM with a vsock device: no thread of any other may make a
//! socket, so there is nothing that it would take away, and it costs more than all else together.

use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags,
    UnmountFlags,
};
use rustix::thread::UnshareFlags;

use super::{SandboxError, failed, unshare};

/// Where the directory with the VM's vsock sockets is, for a VM that has one: the one thing in the root.
pub const VSOCK_DIRECTORY: &str = "/vsock";

/// Enters the namespaces and the empty root. `vsock`: the directory that is to be seen there, read-only;
/// what is given back is its place in the new root, from where `..` leads to that root and no further.
pub fn enter(vsock: Option<BorrowedFd<'_>>) -> Result<Option<OwnedFd>, SandboxError> {
    let mut flags =
        UnshareFlags::NEWNS | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS | UnshareFlags::NEWCGROUP;
    flags.set(UnshareFlags::NEWNET, vsock.is_some());
    unshare(flags).map_err(|errno| failed("make the namespaces")(errno.into()))?;
    empty_root(vsock)?;
    let open = |_| {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(VSOCK_DIRECTORY, flags, Mode::empty())
            .map_err(|errno| failed("open the vsock directory in the new root")(errno.into()))
    };
    vsock.map(open).transpose()
}

fn empty_root(vsock: Option<BorrowedFd<'_>>) -> Result<(), SandboxError> {
    let failed = |what| move |errno: Errno| failed(what)(errno.into());
    // What is mounted here from now on is not seen by others.
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).map_err(failed("make the mounts private"))?;

    let making = failed("make an empty root");
    let tmpfs = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(making)?;
    for (key, value) in [("size", "4k"), ("nr_inodes", "4"), ("mode", "0555")] {
        rustix::mount::fsconfig_set_string(&tmpfs, key, value).map_err(making)?;
    }
    rustix::mount::fsconfig_create(&tmpfs).map_err(making)?;
    let harmless = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let root = rustix::mount::fsmount(&tmpfs, FsMountFlags::FSMOUNT_CLOEXEC, harmless).map_err(making)?;
    // Over the old root, of which this process still holds what is below.
    let empty_path = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(&root, "", CWD, "/", empty_path).map_err(making)?;
    rustix::process::fchdir(&root).map_err(making)?;
    if let Some(vsock) = vsock {
        bind(vsock)?;
    }

    match rustix::process::pivot_root(".", ".") {
        // Both roots are mounted at `/` now, the old one on top.
        Ok(()) => {
            rustix::mount::unmount(".", UnmountFlags::DETACH).map_err(failed("let go of the old root"))?
        }
        // The old root is the kernel's first one (an initial ram disk), which can't be moved.
        Err(Errno::INVAL) => rustix::process::chroot(".").map_err(failed("change the root"))?,
        Err(errno) => return Err(failed("change the root")(errno)),
    }
    let flags = MountFlags::BIND | MountFlags::RDONLY | HARMLESS;
    rustix::mount::mount_remount("/", flags, "").map_err(failed("make the root read-only"))?;
    rustix::process::chdir("/").map_err(failed("change to the new root"))
}

const HARMLESS: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

/// Binds the directory into the new root, in which the process stands while the old one is still there.
fn bind(directory: BorrowedFd<'_>) -> Result<(), SandboxError> {
    let failed = |errno: Errno| failed("put the vsock directory into the new root")(errno.into());
    // A descriptor from another mount namespace can't be bound: its path can, if it still leads there.
    let path = rustix::fs::readlink(format!("/proc/self/fd/{}", directory.as_raw_fd()), Vec::new());
    let path = PathBuf::from(std::ffi::OsString::from(
        path.map_err(failed)?.into_string().map_err(|_| failed(Errno::ILSEQ))?,
    ));
    let inside = VSOCK_DIRECTORY.trim_start_matches('/');
    rustix::fs::mkdir(inside, Mode::RUSR | Mode::XUSR).map_err(failed)?;
    rustix::mount::mount_bind(&path, inside).map_err(failed)?;
    let flags = MountFlags::BIND | MountFlags::RDONLY | HARMLESS;
    rustix::mount::mount_remount(inside, flags, "").map_err(failed)?;
    let (wanted, got) =
        (rustix::fs::fstat(directory).map_err(failed)?, rustix::fs::stat(inside).map_err(failed)?);
    if (wanted.st_dev, wanted.st_ino) == (got.st_dev, got.st_ino) {
        Ok(())
    } else {
        Err(failed(Errno::STALE))
    }
}
