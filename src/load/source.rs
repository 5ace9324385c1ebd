//! The only reader of manifest files. Reads whole, bounded, regular UTF-8 files, and says of anything
//! that it could not read that it could not, never that it isn't there.
//!
//! A directory is opened once and everything in it is reached through that descriptor: when a published
//! symlink is swapped meanwhile (git-sync), files of two trees are never mixed. Links are followed as
//! long as they stay within the directory (Kubernetes' AtomicWriter: `a.yaml` → `..data/a.yaml`). At the
//! end everything is looked at once more, the path of the directory too: what changed while it was read
//! is read again, a few times, and then reported. So a load is of one moment, or it is incomplete. What
//! no single look can tell is whether somebody is in the middle of writing or removing files one by one;
//! that is why the agent waits until two looks agree.

use std::collections::BTreeSet;
use std::ffi::{CStr, OsStr};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;
use sha2::Digest;

use super::diagnostic::Diagnostic;
use super::text::{SourceFile, Span};
use super::{Input, Limits};
use crate::name::Sha256;

/// What was read, in the order of the inputs.
#[derive(Debug)]
pub struct Sources {
    pub files: Vec<Arc<SourceFile>>,
    /// Whatever could not be read. Each is an error: the load is incomplete.
    pub problems: Vec<Diagnostic>,
    /// Of the names and bytes of all files, and of whatever could not be read.
    pub fingerprint: Sha256,
}

/// How often a directory that changes while it is read is read again.
const ATTEMPTS: usize = 4;

/// The first wait before that; it grows with each attempt.
const PAUSE: std::time::Duration = std::time::Duration::from_millis(5);

/// Reads all inputs within `limits`.
pub fn read(inputs: &[Input], limits: &Limits) -> Sources {
    let mut reader = Reader {
        limits,
        files: Vec::new(),
        problems: Vec::new(),
        seen: BTreeSet::new(),
        bytes: 0,
        before_open: None,
    };
    reader.inputs(inputs);
    reader.finish()
}

/// Reads standard input (or another stream) up to the limit of one file; the byte after it is an error
/// of `load`, so that nothing is cut off in silence.
pub fn read_stdin(stream: impl Read, limits: &Limits) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    stream.take(limits.file_bytes as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// A file's bytes, as read, with the name that people know it by.
struct RawFile {
    name: String,
    bytes: Vec<u8>,
}

struct Reader<'l> {
    limits: &'l Limits,
    files: Vec<RawFile>,
    problems: Vec<Diagnostic>,
    /// Device and inode of each file that was read: a file that is named twice is read once.
    seen: BTreeSet<(u64, u64)>,
    bytes: usize,
    /// Tests change the tree here, just before a file is opened.
    before_open: Option<&'l dyn Fn(&Path)>,
}

/// What tells whether a file or directory is still what was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    size: i64,
    modified: (i64, u64),
    changed: (i64, u64),
}

impl Identity {
    #[allow(clippy::unnecessary_cast, reason = "the widths differ between architectures")]
    fn of(stat: &Stat) -> Self {
        Self {
            device: stat.st_dev as u64,
            inode: stat.st_ino as u64,
            size: stat.st_size as i64,
            modified: (stat.st_mtime as i64, stat.st_mtime_nsec as u64),
            changed: (stat.st_ctime as i64, stat.st_ctime_nsec as u64),
        }
    }
}

/// One reading of a directory tree.
#[derive(Default)]
struct Tree {
    files: Vec<(RawFile, (u64, u64))>,
    problems: Vec<Diagnostic>,
    /// Relative path and identity of all that was opened, to be compared at the end.
    opened: Vec<(PathBuf, Identity)>,
    directories: BTreeSet<(u64, u64)>,
    entries: usize,
    /// Manifests seen in subdirectories that were not asked for.
    nested: bool,
    /// Something vanished or changed: worth another look.
    unsteady: bool,
    bytes: usize,
}

impl Reader<'_> {
    fn inputs(&mut self, inputs: &[Input]) {
        for input in inputs {
            match input {
                Input::File(path) => self.file(path),
                Input::Directory { path, recursive } => self.directory(path, *recursive),
                Input::Stdin(bytes) => self.text("<stdin>", bytes.clone()),
                Input::Text { name, text } => self.text(name, text.clone().into_bytes()),
            }
        }
    }

    fn text(&mut self, name: &str, bytes: Vec<u8>) {
        if bytes.len() > self.limits.file_bytes {
            self.problems.push(too_large(name, self.limits.file_bytes));
        } else if self.bytes + bytes.len() > self.limits.total_bytes {
            self.problems.push(too_much(name, self.limits.total_bytes));
        } else {
            self.bytes += bytes.len();
            self.files.push(RawFile { name: name.to_owned(), bytes });
        }
    }

    fn file(&mut self, path: &Path) {
        let name = path.display().to_string();
        let mut outcome = Err(Unread::Changed);
        for _ in 0..ATTEMPTS {
            outcome = self.read_path(path);
            if !matches!(outcome, Err(Unread::Changed)) {
                break;
            }
        }
        match outcome {
            Ok((bytes, identity)) => {
                if self.seen.insert((identity.device, identity.inode)) {
                    self.text(&name, bytes);
                }
            }
            Err(unread) => self.problems.push(unread.diagnostic(&name, self.limits)),
        }
    }

    fn read_path(&self, path: &Path) -> Result<(Vec<u8>, Identity), Unread> {
        // Looked at before it is opened: opening a device or a FIFO can do things.
        let stat = rustix::fs::stat(path).map_err(Unread::Io)?;
        regular(&stat)?;
        self.hook(path);
        let fd = rustix::fs::open(path, FILE_FLAGS, Mode::empty()).map_err(Unread::Io)?;
        read_open(fd, self.limits.file_bytes)
    }

    fn hook(&self, path: &Path) {
        if let Some(before_open) = self.before_open {
            before_open(path);
        }
    }

    fn directory(&mut self, path: &Path, recursive: bool) {
        let name = path.display().to_string();
        for attempt in 1..=ATTEMPTS {
            let mut tree = Tree { bytes: self.bytes, ..Tree::default() };
            match self.walk_root(path, recursive, &mut tree) {
                Ok(()) => {}
                Err(error) => {
                    // A link that is being swapped may dangle for a moment.
                    if error == Errno::NOENT && attempt < ATTEMPTS {
                        continue;
                    }
                    return self.problems.push(unreadable(&name, error));
                }
            }
            if tree.unsteady && attempt < ATTEMPTS {
                // Long enough for a writer of a few files, short enough for a person who waits.
                std::thread::sleep(PAUSE * attempt as u32);
                continue;
            }
            if tree.unsteady {
                tree.problems
                    .push(Diagnostic::error(format!("{name}: the directory changes while it is read")).hint(
                    "publish manifests by renaming a symlink or a directory, or try again when nobody writes",
                ));
            } else if tree.files.is_empty() && tree.problems.is_empty() {
                tree.problems.push(no_manifests(&name, tree.nested && !recursive));
            }
            return self.take(tree);
        }
    }

    fn take(&mut self, tree: Tree) {
        self.problems.extend(tree.problems);
        for (file, identity) in tree.files {
            if self.seen.insert(identity) {
                self.bytes += file.bytes.len();
                self.files.push(file);
            }
        }
    }

    fn walk_root(&self, path: &Path, recursive: bool, tree: &mut Tree) -> Result<(), Errno> {
        let root = rustix::fs::open(path, DIRECTORY_FLAGS, Mode::empty())?;
        let before = Identity::of(&rustix::fs::fstat(&root)?);
        let walk = Walk { reader: self, root: &root, shown: path, recursive };
        tree.directories.insert((before.device, before.inode));
        walk.directory(Path::new(""), 0, tree)?;
        let after = rustix::fs::fstat(&root)?;
        // A directory that was removed while it was open lists nothing, and has no links.
        tree.unsteady |= Identity::of(&after) != before || after.st_nlink == 0;
        let still = |(path, identity): &(PathBuf, Identity)| {
            let now = walk.open(path, OFlags::PATH | OFlags::CLOEXEC).and_then(rustix::fs::fstat);
            now.is_ok_and(|stat| Identity::of(&stat) == *identity)
        };
        tree.unsteady |= !tree.opened.iter().all(still);
        // A link that was swapped: its old tree may have been half removed when it was listed.
        let now = rustix::fs::stat(path)?;
        tree.unsteady |= (now.st_dev, now.st_ino) != (after.st_dev, after.st_ino);
        Ok(())
    }

    fn finish(self) -> Sources {
        let mut digest = sha2::Sha256::new();
        let mut part = |bytes: &[u8]| {
            digest.update((bytes.len() as u64).to_le_bytes());
            digest.update(bytes);
        };
        let mut problems = self.problems;
        let mut files = Vec::with_capacity(self.files.len());
        for raw in self.files {
            part(raw.name.as_bytes());
            part(&raw.bytes);
            match decode(raw) {
                Ok(file) => files.push(Arc::new(file)),
                Err(problem) => problems.push(*problem),
            }
        }
        for problem in &problems {
            part(problem.message.as_bytes());
        }
        Sources { files, problems, fingerprint: Sha256(digest.finalize().into()) }
    }
}

const FILE_FLAGS: OFlags =
    OFlags::RDONLY.union(OFlags::CLOEXEC).union(OFlags::NONBLOCK).union(OFlags::NOCTTY);
const DIRECTORY_FLAGS: OFlags = OFlags::RDONLY.union(OFlags::CLOEXEC).union(OFlags::DIRECTORY);

/// The way through one opened directory.
struct Walk<'w> {
    reader: &'w Reader<'w>,
    root: &'w OwnedFd,
    /// The directory as the user named it.
    shown: &'w Path,
    recursive: bool,
}

impl Walk<'_> {
    /// Opens a path below the root; links that leave the root fail with `EXDEV`.
    fn open(&self, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let mut outcome = Err(Errno::AGAIN);
        // The kernel gives EAGAIN when something was renamed while it looked for `..` in the path.
        for _ in 0..16 {
            let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
            outcome = rustix::fs::openat2(self.root, path, flags, Mode::empty(), resolve);
            if !matches!(outcome, Err(Errno::AGAIN)) {
                break;
            }
        }
        outcome
    }

    fn directory(&self, path: &Path, depth: usize, tree: &mut Tree) -> Result<(), Errno> {
        let fd = self.open(path, DIRECTORY_FLAGS)?;
        tree.opened.push((path.to_owned(), Identity::of(&rustix::fs::fstat(&fd)?)));
        for name in self.names(Dir::read_from(&fd)?, tree)? {
            let below = path.join(OsStr::from_bytes(&name));
            let shown = self.shown.join(&below).display().to_string();
            if tree.entries > self.reader.limits.entries || tree.files.len() > self.reader.limits.files {
                return Ok(());
            }
            if let Err(error) = self.entry(&name, &below, &shown, depth, tree) {
                // Gone since it was listed, or swapped: look again before it is called an error.
                tree.unsteady |= error == Errno::NOENT;
                tree.problems.push(self.refused(&below, &shown, error));
            }
        }
        Ok(())
    }

    /// The names of a directory, sorted, without hidden ones.
    fn names(&self, entries: Dir, tree: &mut Tree) -> Result<Vec<Vec<u8>>, Errno> {
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry?;
            tree.entries += 1;
            if tree.entries > self.reader.limits.entries {
                let message =
                    format!("{}: more than {} entries", self.shown.display(), self.reader.limits.entries);
                tree.problems.push(Diagnostic::error(message).hint("is this the right directory?"));
                break;
            }
            let name: &CStr = entry.file_name();
            // Hidden files, the lock files of editors, `.` and `..`, AtomicWriter's `..data`.
            if !name.to_bytes().starts_with(b".") {
                names.push(name.to_bytes().to_vec());
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    fn entry(
        &self,
        name: &[u8],
        path: &Path,
        shown: &str,
        depth: usize,
        tree: &mut Tree,
    ) -> Result<(), Errno> {
        let is_manifest = is_manifest_name(name);
        let own = rustix::fs::statat(self.root, path, AtFlags::SYMLINK_NOFOLLOW)?;
        let kind = FileType::from_raw_mode(own.st_mode);
        if !is_manifest && !matches!(kind, FileType::Directory | FileType::Symlink) {
            return Ok(());
        }
        // Looked at through the link before it is opened: opening a device or a FIFO can do things.
        let target = match self.open(path, OFlags::PATH | OFlags::CLOEXEC) {
            Ok(target) => rustix::fs::fstat(target)?,
            // A link to anywhere that doesn't look like a manifest is none of our business.
            Err(_) if !is_manifest && kind == FileType::Symlink && !self.recursive => return Ok(()),
            Err(error) => return Err(error),
        };
        if FileType::from_raw_mode(target.st_mode) == FileType::Directory {
            return self.subdirectory(path, shown, depth, &target, tree);
        }
        if is_manifest { self.manifest(path, shown, &target, tree) } else { Ok(()) }
    }

    fn subdirectory(
        &self,
        path: &Path,
        shown: &str,
        depth: usize,
        stat: &Stat,
        tree: &mut Tree,
    ) -> Result<(), Errno> {
        if !self.recursive {
            tree.nested = true;
            return Ok(());
        }
        if depth >= self.reader.limits.directory_depth {
            tree.problems.push(Diagnostic::error(format!("{shown}: directories are nested too deeply")));
            return Ok(());
        }
        let identity = Identity::of(stat);
        // A directory that a link shows again, or a loop of links, is read once.
        if !tree.directories.insert((identity.device, identity.inode)) {
            return Ok(());
        }
        self.directory(path, depth + 1, tree)
    }

    fn manifest(&self, path: &Path, shown: &str, stat: &Stat, tree: &mut Tree) -> Result<(), Errno> {
        let limits = self.reader.limits;
        if tree.files.len() >= limits.files {
            let message = format!("{}: more than {} manifest files", self.shown.display(), limits.files);
            tree.problems.push(
                Diagnostic::error(message).hint("several manifests may be in one file, separated by `---`"),
            );
            // One more than allowed: ends the walk.
            tree.files.push((RawFile { name: shown.to_owned(), bytes: Vec::new() }, (0, 0)));
            return Ok(());
        }
        let outcome = regular(stat).and_then(|()| {
            self.reader.hook(path);
            let fd = self.open(path, FILE_FLAGS).map_err(Unread::Io)?;
            read_open(fd, limits.file_bytes)
        });
        match outcome {
            Ok((bytes, identity)) => {
                if tree.bytes + bytes.len() > limits.total_bytes {
                    tree.problems.push(too_much(shown, limits.total_bytes));
                    return Ok(());
                }
                tree.bytes += bytes.len();
                tree.opened.push((path.to_owned(), identity));
                tree.files
                    .push((RawFile { name: shown.to_owned(), bytes }, (identity.device, identity.inode)));
            }
            Err(Unread::Io(error)) => return Err(error),
            Err(unread) => {
                tree.unsteady |= matches!(unread, Unread::Changed);
                tree.problems.push(unread.diagnostic(shown, limits));
            }
        }
        Ok(())
    }

    fn refused(&self, path: &Path, shown: &str, error: Errno) -> Diagnostic {
        if error != Errno::XDEV {
            return unreadable(shown, error);
        }
        let target = rustix::fs::readlinkat(self.root, path, Vec::new());
        let target = target.map_or(String::new(), |target| format!(" to `{}`", target.to_string_lossy()));
        Diagnostic::error(format!("{shown}: a symbolic link{target} leaves `{}`", self.shown.display()))
            .hint("copy the file into the directory, or name it with `-f` by itself")
    }
}

/// `*.yaml`, `*.yml` and `*.json`: backups such as `a.yaml~` and `#a.yaml#` don't match.
fn is_manifest_name(name: &[u8]) -> bool {
    [b".yaml".as_slice(), b".yml", b".json"].iter().any(|end| name.len() > end.len() && name.ends_with(end))
}

/// Why a file gave nothing.
enum Unread {
    Io(Errno),
    NotRegular(FileType),
    TooLarge,
    Changed,
}

impl Unread {
    fn diagnostic(&self, name: &str, limits: &Limits) -> Diagnostic {
        match self {
            Unread::Io(error) => unreadable(name, *error),
            Unread::TooLarge => too_large(name, limits.file_bytes),
            Unread::Changed => Diagnostic::error(format!("{name}: the file changes while it is read")),
            Unread::NotRegular(kind) => {
                let what = match kind {
                    FileType::Directory => "a directory",
                    FileType::Fifo => "a FIFO",
                    FileType::Socket => "a socket",
                    FileType::CharacterDevice | FileType::BlockDevice => "a device",
                    _ => "no regular file",
                };
                Diagnostic::error(format!("{name}: this is {what}, not a file"))
                    .hint("to read from a pipe, use `-f -`")
            }
        }
    }
}

fn regular(stat: &Stat) -> Result<(), Unread> {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Ok(()),
        other => Err(Unread::NotRegular(other)),
    }
}

/// Reads a file to its end, and makes sure that it was the same at both ends of the reading.
fn read_open(fd: OwnedFd, bytes_max: usize) -> Result<(Vec<u8>, Identity), Unread> {
    let before = rustix::fs::fstat(&fd).map_err(Unread::Io)?;
    regular(&before)?;
    if before.st_size as u64 > bytes_max as u64 {
        return Err(Unread::TooLarge);
    }
    let mut bytes = Vec::with_capacity(before.st_size as usize);
    let mut file = File::from(fd);
    (&mut file)
        .take(bytes_max as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| Unread::Io(Errno::from_io_error(&error).unwrap_or(Errno::IO)))?;
    if bytes.len() > bytes_max {
        return Err(Unread::TooLarge);
    }
    let after = rustix::fs::fstat(&file).map_err(Unread::Io)?;
    let (before, after) = (Identity::of(&before), Identity::of(&after));
    let same = (before.size, before.modified) == (after.size, after.modified);
    if !same || after.size != bytes.len() as i64 {
        return Err(Unread::Changed);
    }
    Ok((bytes, after))
}

fn unreadable(name: &str, error: Errno) -> Diagnostic {
    let diagnostic = |why: &str| Diagnostic::error(format!("{name}: {why}"));
    match error {
        Errno::NOENT => {
            diagnostic("no such file or directory").hint("a link that leads nowhere looks the same")
        }
        Errno::NOTDIR => diagnostic("not a directory"),
        Errno::LOOP => diagnostic("a loop of symbolic links"),
        Errno::ACCESS | Errno::PERM => diagnostic("permission denied"),
        Errno::NOSYS => diagnostic("the kernel lacks openat2").hint("Linux 5.6 or newer is needed"),
        error => diagnostic(&format!("can't be read: {error}")),
    }
}

fn no_manifests(name: &str, nested: bool) -> Diagnostic {
    let diagnostic = Diagnostic::error(format!("no manifests in {name}"));
    if nested {
        diagnostic.hint("there are directories in it: `-R` reads them too")
    } else {
        diagnostic.hint("manifests are files named `*.yaml`, `*.yml` or `*.json`; to remove everything, say so with `vmctl delete`")
    }
}

fn too_large(name: &str, bytes_max: usize) -> Diagnostic {
    Diagnostic::error(format!("{name}: larger than {bytes_max} bytes")).hint("split it into several files")
}

fn too_much(name: &str, bytes_max: usize) -> Diagnostic {
    Diagnostic::error(format!("{name}: all manifests together are larger than {bytes_max} bytes"))
}

/// Bytes to text, without a byte-order mark.
fn decode(raw: RawFile) -> Result<SourceFile, Box<Diagnostic>> {
    let RawFile { name, mut bytes } = raw;
    if bytes.starts_with(b"\xef\xbb\xbf") {
        bytes.drain(..3);
    }
    let utf16 = bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff");
    String::from_utf8(bytes).map(|text| SourceFile::new(&name, text)).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let bytes = error.into_bytes();
        let code = bytes[at];
        // Up to the bad byte the text and its lossy form have the same offsets.
        let shown = SourceFile::new(&name, String::from_utf8_lossy(&bytes).into_owned());
        let problem = Diagnostic::error(format!("byte {at} (0x{code:02x}) is not UTF-8"))
            .at(shown.place(Span::new(at, at + 1)));
        Box::new(match utf16 {
            true => problem.hint("the file is UTF-16; save it as UTF-8"),
            false => problem.hint("save the file as UTF-8; in an editor it is probably Latin-1 or binary"),
        })
    })
}

#[cfg(test)]
#[path = "source_tests.rs"]
mod tests;
