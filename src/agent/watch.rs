//! What wakes the agent for files: inotify on the source (each directory of it, and the parent of every
//! symbolic link on the way to it, so that an atomic swap is seen) and on the pools.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};

/// Symbolic links followed on the way to the source, as the kernel allows.
const LINKS_MAX: usize = 40;
/// Directories of a source that are watched.
const DIRECTORIES_MAX: usize = 10_000;
/// Times that a tree is gone through again because it changed meanwhile.
const REFRESHES_MAX: usize = 5;

/// What happened since the last look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Touched {
    pub source: bool,
    pub pools: bool,
}

/// Why a directory is watched.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Interest {
    /// All of it is the source.
    source: bool,
    /// These entries of it decide where the source is.
    source_names: BTreeSet<OsString>,
    /// All of it is a pool.
    pool: bool,
    /// These entries of it decide where a pool is.
    pool_names: BTreeSet<OsString>,
}

type Interests = BTreeMap<PathBuf, Interest>;

pub struct Watch {
    fd: OwnedFd,
    source: PathBuf,
    watched: BTreeMap<i32, (PathBuf, Interest)>,
}

impl Watch {
    pub fn open(source: &Path) -> io::Result<Self> {
        let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        // A relative path has no parent to watch.
        Ok(Self { fd, source: std::path::absolute(source)?, watched: BTreeMap::new() })
    }

    /// Watches what the source and the pools are now. Called before every read of the source, and after
    /// every change of the host.
    pub fn refresh(&mut self, pools: &BTreeSet<PathBuf>) {
        let mut wanted = self.wanted(pools);
        for _ in 0..REFRESHES_MAX {
            self.watch(&wanted);
            // What was made in a directory before it was watched is no event.
            let now = self.wanted(pools);
            if now == wanted {
                return;
            }
            wanted = now;
        }
    }

    fn watch(&mut self, wanted: &Interests) {
        let stale: Vec<i32> = self
            .watched
            .iter()
            .filter(|(_, (path, _))| !wanted.contains_key(path))
            .map(|(descriptor, _)| *descriptor)
            .collect();
        stale.into_iter().for_each(|descriptor| self.forget(descriptor));
        let flags = WatchFlags::CREATE
            | WatchFlags::CLOSE_WRITE
            | WatchFlags::MOVED_FROM
            | WatchFlags::MOVED_TO
            | WatchFlags::DELETE
            | WatchFlags::DELETE_SELF
            | WatchFlags::MOVE_SELF
            | WatchFlags::ATTRIB
            | WatchFlags::ONLYDIR;
        for (path, interest) in wanted {
            // Adding a watch twice gives the same descriptor. What is not there can't be watched; where
            // it would be is.
            let Ok(added) = inotify::add_watch(&self.fd, path, flags) else { continue };
            // A directory that was at this path before and lives on elsewhere.
            let former: Vec<i32> = self
                .watched
                .iter()
                .filter(|(descriptor, (other, _))| **descriptor != added && other == path)
                .map(|(descriptor, _)| *descriptor)
                .collect();
            former.into_iter().for_each(|descriptor| self.forget(descriptor));
            self.watched.insert(added, (path.clone(), interest.clone()));
        }
    }

    fn forget(&mut self, descriptor: i32) {
        // Gone with its directory already, as often as not.
        let _ = inotify::remove_watch(&self.fd, descriptor);
        self.watched.remove(&descriptor);
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
            let Some((_, interest)) = self.watched.get(&event.wd()) else { continue };
            let name = event.file_name().map(|name| OsStr::from_bytes(name.to_bytes()));
            let one_of = |names: &BTreeSet<OsString>| match name {
                Some(name) => names.contains(name),
                // It happened to the directory itself.
                None => !names.is_empty(),
            };
            // A pool's own hidden directory is where we work.
            let hidden = name.is_some_and(|name| name.as_bytes().starts_with(b"."));
            touched.source |= interest.source || one_of(&interest.source_names);
            touched.pools |= (interest.pool && !hidden) || one_of(&interest.pool_names);
            if event.events().contains(ReadFlags::IGNORED) {
                self.watched.remove(&event.wd());
            }
        }
    }

    fn wanted(&self, pools: &BTreeSet<PathBuf>) -> Interests {
        let mut interests = Interests::new();
        let place = decide_place(&self.source, |directory, name| {
            interests.entry(directory).or_default().source_names.insert(name);
        });
        for directory in walk(&place) {
            interests.entry(directory).or_default().source = true;
        }
        for pool in pools {
            let place = decide_place(pool, |directory, name| {
                interests.entry(directory).or_default().pool_names.insert(name);
            });
            interests.entry(place).or_default().pool = true;
        }
        interests
    }
}

/// Follows the symbolic links of a path (any part of it may be one). `entry` is told of every directory
/// with the entry in it that decides where the path leads.
fn decide_place(path: &Path, mut entry: impl FnMut(PathBuf, OsString)) -> PathBuf {
    let mut tell = |path: &Path| {
        if let (Some(directory), Some(name)) = (path.parent(), path.file_name()) {
            entry(directory.to_owned(), name.to_owned());
        }
    };
    let mut path = path.to_owned();
    for _ in 0..LINKS_MAX {
        // Up to the first that is there: the others can't be watched yet.
        for part in path.ancestors() {
            tell(part);
            if part.parent().is_none_or(|parent| parent.is_dir()) {
                break;
            }
        }
        let Some(link) = path.ancestors().filter(|part| part.is_symlink()).last().map(Path::to_owned) else {
            break;
        };
        tell(&link);
        let Ok(target) = std::fs::read_link(&link) else { break };
        let Ok(rest) = path.strip_prefix(&link) else { break };
        let target = link.parent().unwrap_or(Path::new("/")).join(target);
        path = if rest.as_os_str().is_empty() { target } else { target.join(rest) };
    }
    path
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The directories of a tree, as far as they are there.
fn walk(path: &Path) -> Vec<PathBuf> {
    let mut directories = Vec::new();
    let mut queue = vec![path.to_owned()];
    while let Some(path) = queue.pop() {
        if directories.len() >= DIRECTORIES_MAX {
            break;
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
    directories
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
        watch.refresh(&BTreeSet::new());
        assert_eq!(watch.drain().unwrap(), Touched::default());

        std::fs::write(root.join("a/x.yaml"), "x").unwrap();
        assert!(watch.drain().unwrap().source);

        std::os::unix::fs::symlink("b", root.join("tmp")).unwrap();
        std::fs::rename(root.join("tmp"), &source).unwrap();
        assert!(watch.drain().unwrap().source);
        watch.refresh(&BTreeSet::new());
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
        watch.refresh(&BTreeSet::from([root.join("pool")]));
        std::fs::write(root.join("pool/v.raw"), "").unwrap();
        assert_eq!(watch.drain().unwrap(), Touched { source: false, pools: true });
        std::fs::remove_file(root.join("pool/v.raw")).unwrap();
        assert_eq!(watch.drain().unwrap(), Touched { source: false, pools: true });
        std::fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn what_is_not_there_yet_is_awaited_and_neighbours_are_not() {
        let root = scratch("absent");
        let mut watch = Watch::open(&root.join("a/b/source")).unwrap();
        watch.refresh(&BTreeSet::new());
        std::fs::write(root.join("neighbour"), "").unwrap();
        assert_eq!(watch.drain().unwrap(), Touched::default());
        for directory in ["a", "a/b", "a/b/source"] {
            std::fs::create_dir(root.join(directory)).unwrap();
            assert!(watch.drain().unwrap().source, "{directory}");
            watch.refresh(&BTreeSet::new());
        }
        std::fs::write(root.join("a/neighbour"), "").unwrap();
        std::fs::write(root.join("a/b/neighbour"), "").unwrap();
        assert_eq!(watch.drain().unwrap(), Touched::default());
        std::fs::write(root.join("a/b/source/x.yaml"), "").unwrap();
        assert!(watch.drain().unwrap().source);
        std::fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn a_directory_that_made_way_for_another_is_forgotten() {
        let root = scratch("replaced");
        std::fs::create_dir(root.join("source")).unwrap();
        let mut watch = Watch::open(&root.join("source")).unwrap();
        watch.refresh(&BTreeSet::new());
        std::fs::rename(root.join("source"), root.join("old")).unwrap();
        std::fs::create_dir(root.join("source")).unwrap();
        assert!(watch.drain().unwrap().source);
        watch.refresh(&BTreeSet::new());
        watch.drain().unwrap();
        std::fs::write(root.join("old/x.yaml"), "").unwrap();
        assert_eq!(watch.drain().unwrap(), Touched::default());
        std::fs::write(root.join("source/x.yaml"), "").unwrap();
        assert!(watch.drain().unwrap().source);
        std::fs::remove_dir_all(&root).unwrap();
    }
}
