//! What wakes the agent for files: inotify on the source (each directory of it, and the parent of every
//! symbolic link on the way to it, so that an atomic swap is seen) and on the pools.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};

/// Symbolic links followed on the way to the source, as the kernel allows.
const LINKS_MAX: usize = 40;
/// Directories of a source that are watched.
const DIRECTORIES_MAX: usize = 10_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Source,
    Pool,
}

/// What happened since the last look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Touched {
    pub source: bool,
    pub pools: bool,
}

pub struct Watch {
    fd: OwnedFd,
    source: PathBuf,
    roles: BTreeMap<i32, (PathBuf, BTreeSet<u8>)>,
}

fn code(role: Role) -> u8 {
    role as u8
}

impl Watch {
    pub fn open(source: &Path) -> io::Result<Self> {
        let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        Ok(Self { fd, source: source.to_owned(), roles: BTreeMap::new() })
    }

    /// Watches what the source and the pools are now. Called after every change of either.
    pub fn refresh(&mut self, pools: impl Iterator<Item = PathBuf>) {
        let mut wanted: BTreeMap<PathBuf, BTreeSet<u8>> = BTreeMap::new();
        for directory in self.source_directories() {
            wanted.entry(directory).or_default().insert(code(Role::Source));
        }
        for pool in pools {
            wanted.entry(pool).or_default().insert(code(Role::Pool));
        }
        let stale: Vec<i32> = self
            .roles
            .iter()
            .filter(|(_, (path, roles))| wanted.get(path) != Some(roles))
            .map(|(descriptor, _)| *descriptor)
            .collect();
        for descriptor in stale {
            // Gone with its directory already, as often as not.
            let _ = inotify::remove_watch(&self.fd, descriptor);
            self.roles.remove(&descriptor);
        }
        let flags = WatchFlags::CREATE
            | WatchFlags::CLOSE_WRITE
            | WatchFlags::MOVED_FROM
            | WatchFlags::MOVED_TO
            | WatchFlags::DELETE
            | WatchFlags::DELETE_SELF
            | WatchFlags::MOVE_SELF
            | WatchFlags::ATTRIB
            | WatchFlags::ONLYDIR;
        for (path, roles) in wanted {
            // Adding a watch twice gives the same descriptor. What is not there can't be watched; its
            // parent is.
            if let Ok(descriptor) = inotify::add_watch(&self.fd, &path, flags) {
                self.roles.insert(descriptor, (path, roles));
            }
        }
    }

    /// Reads all pending events, without waiting.
    pub fn drain(&mut self) -> io::Result<Touched> {
        let mut touched = Touched::default();
        let mut buffer = [const { MaybeUninit::<u8>::uninit() }; 16 * 1024];
        let mut reader = inotify::Reader::new(&self.fd, &mut buffer);
        loop {
            let event = match reader.next() {
                Ok(event) => event,
                Err(rustix::io::Errno::AGAIN) => return Ok(touched),
                Err(error) => return Err(error.into()),
            };
            if event.events().contains(ReadFlags::QUEUE_OVERFLOW) {
                touched = Touched { source: true, pools: true };
                continue;
            }
            let Some((_, roles)) = self.roles.get(&event.wd()) else { continue };
            let roles = roles.clone();
            if event.events().contains(ReadFlags::IGNORED) {
                self.roles.remove(&event.wd());
            }
            // A pool's own hidden directory is where we work.
            let hidden = event.file_name().is_some_and(|name| name.to_bytes().starts_with(b"."));
            touched.source |= roles.contains(&code(Role::Source));
            touched.pools |= roles.contains(&code(Role::Pool)) && !hidden;
        }
    }

    /// The directories of the source, and those whose entries decide where it is.
    fn source_directories(&self) -> Vec<PathBuf> {
        let mut directories = Vec::new();
        let mut path = self.source.clone();
        for _ in 0..LINKS_MAX {
            // Any part of the path may be a link.
            let links =
                path.ancestors().filter(|part| part.is_symlink()).map(Path::to_owned).collect::<Vec<_>>();
            directories.extend(path.parent().map(Path::to_owned));
            directories.extend(links.iter().filter_map(|link| link.parent().map(Path::to_owned)));
            let Some(outermost) = links.last() else { break };
            let Ok(target) = std::fs::read_link(outermost) else { break };
            let Ok(rest) = path.strip_prefix(outermost) else { break };
            let base = outermost.parent().unwrap_or(Path::new("/"));
            let target = base.join(target);
            path = if rest.as_os_str().is_empty() { target } else { target.join(rest) };
        }
        walk(&path, &mut directories);
        directories
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn walk(path: &Path, directories: &mut Vec<PathBuf>) {
    let mut queue = vec![path.to_owned()];
    while let Some(path) = queue.pop() {
        if directories.len() >= DIRECTORIES_MAX {
            return;
        }
        let Ok(entries) = std::fs::read_dir(&path) else { continue };
        for entry in entries.flatten() {
            let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
            let is_git = entry.file_name() == ".git";
            if is_directory && !is_git {
                queue.push(entry.path());
            }
        }
        directories.push(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("vmctl-watch-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    #[test]
    fn a_written_file_and_a_swapped_link_are_seen() {
        let root = scratch("swap");
        for revision in ["a", "b"] {
            std::fs::create_dir(root.join(revision)).unwrap();
        }
        let source = root.join("current");
        std::os::unix::fs::symlink("a", &source).unwrap();
        let mut watch = Watch::open(&source).unwrap();
        watch.refresh(std::iter::empty());
        assert_eq!(watch.drain().unwrap(), Touched::default());

        std::fs::write(root.join("a/x.yaml"), "x").unwrap();
        assert!(watch.drain().unwrap().source);

        std::os::unix::fs::symlink("b", root.join("tmp")).unwrap();
        std::fs::rename(root.join("tmp"), &source).unwrap();
        assert!(watch.drain().unwrap().source);
        watch.refresh(std::iter::empty());
        assert_eq!(watch.drain().unwrap(), Touched::default());
        std::fs::write(root.join("b/y.yaml"), "y").unwrap();
        assert!(watch.drain().unwrap().source);
        std::fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn a_pool_is_told_apart_from_the_source() {
        let root = scratch("pool");
        for directory in ["source", "pool", "pool/.vmctl"] {
            std::fs::create_dir(root.join(directory)).unwrap();
        }
        let mut watch = Watch::open(&root.join("source")).unwrap();
        watch.refresh([root.join("pool")].into_iter());
        std::fs::write(root.join("pool/v.raw"), "").unwrap();
        assert_eq!(watch.drain().unwrap(), Touched { source: false, pools: true });
        std::fs::remove_file(root.join("pool/v.raw")).unwrap();
        assert_eq!(watch.drain().unwrap(), Touched { source: false, pools: true });
        std::fs::remove_dir_all(&root).unwrap();
    }
}
