//! Where a VM's records are, and how they are read and written so that a crash leaves the old or the
//! new one.
//!
//! | path | is |
//! |---|---|
//! | `<state>/vms/<name>/definition.json` | what `apply` defined it as |
//! | `<state>/vms/<name>/console.log` | its console's output, bounded by the VM process |
//! | `<state>/vms/<name>/hold` | there while `vmctl stop` holds it down |
//! | `<state>/kernels/` | kernels uncompressed, shared by all VMs (see `kernel_cache`) |
//! | `<run>/vms/<name>/control.sock` | the VM process's socket; a dead one is no VM |
//! | `<run>/vms/<name>/vsock/` | its vsock's sockets, see [`super::vm_vsock`] |
//! | `<run>/vms/<name>/seed.img` | its cloud-init seed, see [`super::vm_seed`] |
//! | `<run>/vms/<name>/exit.json` | how the process ended; empty while it runs, or if it was killed |
//!
//! Disks are not here, and nothing here ever removes one.

use std::fs::{DirBuilder, File};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

use super::ofd;
use crate::host::snapshot::VmDefinition;
use crate::name::ObjectName;
use crate::vmm::protocol::ExitRecord;

const DEFINITION: &str = "definition.json";
const CONSOLE_LOG: &str = "console.log";
const HOLD: &str = "hold";
const SOCKET: &str = "control.sock";
const VSOCK: &str = "vsock";
const EXIT: &str = "exit.json";
const SEED: &str = "seed.img";
/// A file that isn't in its place yet; the next writer replaces it.
const NEW: &str = ".new";
const RECORD_VERSION: u32 = 1;
const RECORD_BYTES_MAX: u64 = 1 << 20;

#[derive(Serialize, Deserialize)]
struct Record<T> {
    version: u32,
    definition: T,
}

/// The two directories of one VM.
#[derive(Clone, Debug)]
pub struct VmPlace {
    state: PathBuf,
    run: PathBuf,
    kernels: PathBuf,
}

/// A directory held open, and a path to a socket in it that is short enough for any directory.
pub struct SocketDirectory {
    fd: OwnedFd,
}

impl SocketDirectory {
    /// An address holds 107 bytes of path; this takes about 40.
    pub fn socket(&self) -> PathBuf {
        self.path().join(SOCKET)
    }

    /// Binds a new socket and puts it in the place of a dead one, if there is one.
    pub fn bind(&self) -> io::Result<OwnedFd> {
        use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
        let new = self.path().join(format!("{SOCKET}{NEW}"));
        ignore_absent(std::fs::remove_file(&new))?;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(&new)?)?;
        rustix::fs::chmodat(
            &self.fd,
            format!("{SOCKET}{NEW}"),
            Mode::RUSR | Mode::WUSR,
            rustix::fs::AtFlags::empty(),
        )?;
        std::fs::rename(&new, self.socket())?;
        Ok(socket)
    }

    pub fn remove_socket(&self) -> io::Result<()> {
        ignore_absent(std::fs::remove_file(self.socket()))
    }

    fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.fd.as_raw_fd()))
    }
}

impl VmPlace {
    pub fn new(state_dir: &Path, run_dir: &Path, vm: &ObjectName) -> Self {
        Self {
            state: state_dir.join("vms").join(vm.as_str()),
            run: run_dir.join("vms").join(vm.as_str()),
            kernels: state_dir.join("kernels"),
        }
    }

    /// Where all VMs' kernels are kept uncompressed.
    pub fn kernels(&self) -> PathBuf {
        self.kernels.clone()
    }

    /// The names of all VMs that have a directory in either place.
    pub fn list(state_dir: &Path, run_dir: &Path) -> io::Result<std::collections::BTreeSet<ObjectName>> {
        let mut names = std::collections::BTreeSet::new();
        for directory in [state_dir.join("vms"), run_dir.join("vms")] {
            let entries = match std::fs::read_dir(&directory) {
                Ok(entries) => entries,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(named(&directory, error)),
            };
            for entry in entries {
                let name = entry.map_err(|error| named(&directory, error))?.file_name();
                names.extend(name.to_str().and_then(|name| ObjectName::parse(name).ok()));
            }
        }
        Ok(names)
    }

    pub fn definition(&self) -> io::Result<Option<VmDefinition>> {
        let path = self.state.join(DEFINITION);
        let Some(bytes) = read_bounded(&path)? else { return Ok(None) };
        let record: Record<VmDefinition> =
            serde_json::from_slice(&bytes).map_err(|error| named(&path, error.into()))?;
        if record.version != RECORD_VERSION {
            let version = record.version;
            return Err(io::Error::other(format!("{}: its form has version {version}", path.display())));
        }
        Ok(Some(record.definition))
    }

    pub fn write_definition(&self, definition: &VmDefinition) -> io::Result<()> {
        make_directory(&self.state)?;
        let record = Record { version: RECORD_VERSION, definition };
        write_atomically(&self.state, DEFINITION, &serde_json::to_vec_pretty(&record)?)
    }

    pub fn held(&self) -> io::Result<bool> {
        let path = self.state.join(HOLD);
        path.try_exists().map_err(|error| named(&path, error))
    }

    pub fn set_held(&self, held: bool) -> io::Result<()> {
        if self.held()? == held {
            return Ok(());
        }
        if held {
            return write_atomically(&self.state, HOLD, b"");
        }
        ignore_absent(std::fs::remove_file(self.state.join(HOLD)))?;
        sync_directory(&self.state)
    }

    /// How the last process ended, if it could say so.
    pub fn exit_record(&self) -> io::Result<Option<ExitRecord>> {
        let bytes = read_bounded(&self.run.join(EXIT))?;
        // Empty: killed, or still running. Half-written: it crashed while it wrote.
        Ok(bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()))
    }

    pub fn remove_exit_record(&self) -> io::Result<()> {
        let path = self.run.join(EXIT);
        ignore_absent(std::fs::remove_file(&path)).map_err(|error| named(&path, error))
    }

    pub fn new_exit_record(&self) -> io::Result<File> {
        let path = self.run.join(EXIT);
        let mut options = File::options();
        options.write(true).create(true).truncate(true).mode(0o600);
        options.open(&path).map_err(|error| named(&path, error))
    }

    pub fn console_log(&self) -> io::Result<File> {
        let path = self.state.join(CONSOLE_LOG);
        // Read too: the process that bounds it may have to carry its end over.
        let mut options = File::options();
        options.read(true).append(true).create(true).mode(0o600);
        options.open(&path).map_err(|error| named(&path, error))
    }

    /// Whether a process of this VM lives, or is about to: from before it is made until it is gone it
    /// holds the lock on its console log, whether its socket answers or not.
    pub fn has_process(&self) -> io::Result<bool> {
        let path = self.state.join(CONSOLE_LOG);
        match File::open(&path) {
            Ok(file) => ofd::is_locked(&file).map_err(|errno| named(&path, errno.into())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(named(&path, error)),
        }
    }

    /// Puts a seed in the place of the last one, which a process that still runs keeps; gives its path.
    pub fn write_seed(&self, image: &[u8]) -> io::Result<PathBuf> {
        make_directory(&self.run)?;
        // A new file each time: one that lay there may have been opened when it could be.
        ignore_absent(std::fs::remove_file(self.run.join(format!("{SEED}{NEW}"))))?;
        write_atomically(&self.run, SEED, image)?;
        Ok(self.run.join(SEED))
    }

    /// There is no seed any more: what it holds may be secret.
    pub fn remove_seed(&self) -> io::Result<()> {
        let path = self.run.join(SEED);
        ignore_absent(std::fs::remove_file(&path)).map_err(|error| named(&path, error))
    }

    pub fn vsock_directory(&self) -> PathBuf {
        self.run.join(VSOCK)
    }

    pub fn console_log_path(&self) -> PathBuf {
        self.state.join(CONSOLE_LOG)
    }

    /// `None`: the VM never ran here.
    pub fn socket_directory(&self) -> io::Result<Option<SocketDirectory>> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match rustix::fs::open(&self.run, flags, Mode::empty()) {
            Ok(fd) => Ok(Some(SocketDirectory { fd })),
            Err(rustix::io::Errno::NOENT) => Ok(None),
            Err(errno) => Err(named(&self.run, errno.into())),
        }
    }

    pub fn make_socket_directory(&self) -> io::Result<SocketDirectory> {
        make_directory(&self.run)?;
        self.socket_directory()?.ok_or_else(|| named(&self.run, io::ErrorKind::NotFound.into()))
    }

    /// Removes both directories; the definition, which says whose they are, goes last.
    pub fn remove(&self) -> io::Result<()> {
        ignore_absent(std::fs::remove_dir_all(&self.run)).map_err(|error| named(&self.run, error))?;
        for file in [HOLD, CONSOLE_LOG] {
            ignore_absent(std::fs::remove_file(self.state.join(file)))?;
        }
        for file in [DEFINITION, HOLD] {
            ignore_absent(std::fs::remove_file(self.state.join(format!("{file}{NEW}"))))?;
        }
        ignore_absent(std::fs::remove_file(self.state.join(DEFINITION)))?;
        ignore_absent(std::fs::remove_dir(&self.state)).map_err(|error| named(&self.state, error))
    }
}

/// Says which file an error is about.
fn named(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

fn ignore_absent(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// What is in it is for root alone: a console may show secrets, a socket commands a VM.
fn make_directory(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|error| named(path, error))
}

fn read_bounded(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(named(path, error)),
    };
    let mut bytes = Vec::new();
    file.take(RECORD_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(|error| named(path, error))?;
    if bytes.len() as u64 > RECORD_BYTES_MAX {
        return Err(io::Error::other(format!("{}: longer than {RECORD_BYTES_MAX} bytes", path.display())));
    }
    Ok(Some(bytes))
}

fn write_atomically(directory: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let (path, new) = (directory.join(name), directory.join(format!("{name}{NEW}")));
    let write = || {
        let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&new, &path)?;
        sync_directory(directory)
    };
    write().map_err(|error| named(&path, error))
}

fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}
