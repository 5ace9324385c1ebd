//! The host's end of a VM's vsock: a directory of Unix sockets.
//!
//! | path below `<run>/vms/<name>/vsock/` | is |
//! |---|---|
//! | `vsock` | where the host connects: `CONNECT <port>\n`, answered with `OK <port>\n`; for root alone |
//! | `vsock_<P>` | made by whoever serves the guest's connections to port P of the host |
//!
//! The VM's user may do nothing in the directory but look a name up in it: it is root's, with the VM's
//! group, which is also that of all sockets made in it (set-group-ID). A service lets the guest in by
//! giving its socket's group the right to write (`chmod g+w`), which is what `connect` asks for.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

const SOCKET: &str = "vsock";
const NEW_SOCKET: &str = "vsock.new";

/// What the VM process gets.
pub struct VsockFiles {
    /// Bound, not listening.
    pub listener: OwnedFd,
    pub directory: OwnedFd,
}

/// Makes the directory and its listening socket, in the place of one of an earlier process.
pub fn make(directory: &Path, group: u32) -> io::Result<VsockFiles> {
    match std::fs::create_dir(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::open(directory, flags, Mode::empty())?;
    // A short path for a directory at any depth: addresses of sockets hold 107 bytes.
    let path = PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    if rustix::process::geteuid().is_root() {
        let group = rustix::fs::Gid::from_raw(group);
        rustix::fs::chownat(&fd, "", Some(rustix::fs::Uid::ROOT), Some(group), AtFlags::EMPTY_PATH)?;
    }
    // After the owner, which takes the set-group-ID bit away.
    rustix::fs::chmod(&path, Mode::RWXU | Mode::XGRP | Mode::SGID)?;
    let listener = bind(&fd, &path)?;
    Ok(VsockFiles { listener, directory: fd })
}

fn bind(directory: &OwnedFd, path: &Path) -> io::Result<OwnedFd> {
    match std::fs::remove_file(path.join(NEW_SOCKET)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path.join(NEW_SOCKET))?)?;
    rustix::fs::chmodat(directory, NEW_SOCKET, Mode::RUSR | Mode::WUSR, AtFlags::empty())?;
    rustix::fs::renameat(directory, NEW_SOCKET, directory, SOCKET)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;

    const GROUP: u32 = 0x7000_0001;

    #[test]
    fn the_directory_is_the_vms_to_look_into_and_no_more() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let parent = vmm_sys_util::tempdir::TempDir::new().unwrap();
        let place = parent.as_path().join("vsock");
        for _ in 0..2 {
            let files = make(&place, GROUP).unwrap();
            let metadata = std::fs::metadata(&place).unwrap();
            assert_eq!((metadata.uid(), metadata.gid(), metadata.mode() & 0o7777), (0, GROUP, 0o2710));
            let socket = std::fs::metadata(place.join(SOCKET)).unwrap();
            assert_eq!((socket.uid(), socket.mode() & 0o777), (0, 0o600));
            // What a service makes is the group's.
            let service = std::os::unix::net::UnixListener::bind(place.join("vsock_9")).unwrap();
            assert_eq!(std::fs::metadata(place.join("vsock_9")).unwrap().gid(), GROUP);
            std::fs::remove_file(place.join("vsock_9")).unwrap();
            drop(service);

            rustix::net::listen(&files.listener, 1).unwrap();
            std::os::unix::net::UnixStream::connect(place.join(SOCKET)).unwrap();
            let own = rustix::fs::statat(&files.directory, "", AtFlags::EMPTY_PATH).unwrap();
            assert_eq!(own.st_ino, metadata.ino());
        }
    }
}
