//! Grounds (file systems) to test on, a host that lives in one directory, and `qemu-img` as judge.

#![allow(dead_code)] // Each test binary uses its own part.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use sha2::Digest;
use vmctl::host::Scope;
use vmctl::host::error::StepError;
use vmctl::host::linux::storage::Storage;
use vmctl::host::snapshot::{Pool, PoolDirectory, PoolFile, PoolPlace};
use vmctl::host::step::{ImageFile, NewVolume, NewVolumeContent, Step};
use vmctl::name::{Mark, ObjectName, Sha256};
use vmctl::vmm::config::DiskFormat;

static COUNTER: AtomicU32 = AtomicU32::new(0);

/// A fresh directory of the test's own.
fn fresh() -> PathBuf {
    let count = COUNTER.fetch_add(1, Ordering::Relaxed);
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("storage-{}-{count}", std::process::id()));
    fs::create_dir_all(&path).unwrap();
    path
}

/// A directory on the file system to test on.
pub struct Ground {
    path: PathBuf,
    pub has_holes: bool,
    is_mount: bool,
}

impl Drop for Ground {
    fn drop(&mut self) {
        if self.is_mount {
            let _ = Command::new("umount").arg("-l").arg(&self.path).status();
            let _ = fs::remove_dir(&self.path);
        }
    }
}

impl Ground {
    pub fn here() -> Self {
        Self { path: fresh(), has_holes: true, is_mount: false }
    }

    fn mounted(arguments: &[&str], has_holes: bool) -> Self {
        let path = fresh();
        run("mount", &[arguments, &[text(&path)]].concat());
        Self { path, has_holes, is_mount: true }
    }

    pub fn tmpfs(size: &str) -> Self {
        Self::mounted(&["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"], true)
    }

    /// Has no extended attributes, no holes and no `fallocate`.
    pub fn ramfs() -> Self {
        Self::mounted(&["-t", "ramfs", "ramfs"], false)
    }

    pub fn btrfs(size: &str) -> Self {
        Self::loop_device("btrfs", size)
    }

    pub fn loop_device(kind: &str, size: &str) -> Self {
        let file = fresh().join("device");
        run("truncate", &["-s", size, text(&file)]);
        run(&format!("mkfs.{kind}"), &["-q", text(&file)]);
        let ground = Self::mounted(&["-t", kind, "-o", "loop", text(&file)], true);
        // The mount keeps the file; its name isn't needed any more.
        fs::remove_dir_all(file.parent().unwrap()).unwrap();
        ground
    }
}

/// Runs `test` in a thread whose mounts nobody else sees, and which end with it.
pub fn in_mount_namespace(test: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: takes no pointers; a mount namespace of its own changes nothing but what
            // paths mean to this thread.
            let result = unsafe { libc::unshare(libc::CLONE_NEWNS) };
            assert_eq!(result, 0, "these tests need root: {}", std::io::Error::last_os_error());
            run("mount", &["--make-rprivate", "/"]);
            test();
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

/// Gives this thread the file permissions of `nobody`.
pub fn become_nobody() {
    // SAFETY: plain system calls on integers, which change this thread alone.
    unsafe {
        libc::setfsgid(65534);
        libc::setfsuid(65534);
    }
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {} {errors}", output.status);
    String::from_utf8(output.stdout).unwrap()
}

pub fn qemu_img(arguments: &[&str]) -> String {
    run("qemu-img", arguments)
}

pub fn tag(format: DiskFormat) -> &'static str {
    match format {
        DiskFormat::Raw => "raw",
        DiskFormat::Qcow2 => "qcow2",
    }
}

/// `qemu-img` finds no fault and no leak.
pub fn check(path: &Path, format: DiskFormat) {
    if format == DiskFormat::Qcow2 {
        qemu_img(&["check", "-q", "-f", "qcow2", text(path)]);
    }
}

pub fn info(path: &Path) -> serde_json::Value {
    serde_json::from_str(&qemu_img(&["info", "--output=json", "-f", "qcow2", text(path)])).unwrap()
}

/// The second reads like the first with zeroes up to `bytes`.
pub fn same_content(
    first: &Path,
    first_format: DiskFormat,
    second: &Path,
    second_format: DiskFormat,
    bytes: u64,
) {
    // Without `-s`, what one has more must be zero.
    qemu_img(&[
        "compare",
        "-q",
        "-f",
        tag(first_format),
        "-F",
        tag(second_format),
        text(first),
        text(second),
    ]);
    let info = qemu_img(&["info", "--output=json", "-f", tag(second_format), text(second)]);
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["virtual-size"], bytes, "{}", second.display());
}

pub fn is_zero(path: &Path, format: DiskFormat, bytes: u64) {
    let zeroes = fresh();
    let file = zeroes.join("zeroes");
    fs::File::create(&file).unwrap().set_len(bytes).unwrap();
    same_content(&file, DiskFormat::Raw, path, format, bytes);
    fs::remove_dir_all(zeroes).unwrap();
}

pub fn random(bytes: usize) -> Vec<u8> {
    let mut buffer = vec![0; bytes];
    fs::File::open("/dev/urandom").unwrap().read_exact(&mut buffer).unwrap();
    buffer
}

pub fn sync() {
    run("sync", &[]);
}

/// Bytes in use on the file system of `path`.
pub fn used(path: &Path) -> u64 {
    sync();
    run("df", &["-B1", "--output=used", text(path)]).lines().nth(1).unwrap().trim().parse().unwrap()
}

pub fn sha256_of(path: &Path) -> Sha256 {
    Sha256(sha2::Sha256::digest(fs::read(path).unwrap()).into())
}

pub fn name(text: &str) -> ObjectName {
    ObjectName::parse(text).unwrap()
}

pub fn mark(kind: &str, name: &str) -> Mark {
    format!("vmctl:default:{kind}/{name}").parse().unwrap()
}

/// One pool, with a state directory and a directory for what is outside of pools.
pub struct Host {
    pub storage: Storage,
    pub base: PathBuf,
    pub state: PathBuf,
    pub path: PathBuf,
    /// It is the child that is killed: it is not for it to judge.
    pub is_crashed: bool,
    _keep: Option<Keep>,
}

impl Drop for Host {
    /// Whatever a test did: `qemu-img` finds no fault and no leak in what it leaves, but in images that we see
    /// ourselves to be unusable, which tests make on purpose.
    fn drop(&mut self) {
        if std::thread::panicking() || self.is_crashed {
            return;
        }
        let pools = self.storage.observe(&self.scope()).0;
        for pool in pools.values().flatten() {
            let Some(directory) = &pool.directory else { continue };
            let images = directory
                .images
                .iter()
                .map(|(name, file)| (Pool::image_directory(&pool.path).join(name), file));
            let volumes = directory.files.iter().map(|(name, file)| (pool.path.join(name), file));
            for (path, file) in images.chain(volumes) {
                let header = &file.header;
                let usable = header.unusable.is_none() && !header.encrypted;
                let whole = header.backing.as_ref().is_none_or(|backing| backing.exists());
                let declared = path.extension().is_some_and(|ending| ending == "qcow2");
                if declared && header.format == DiskFormat::Qcow2 && usable && whole {
                    check(&path, DiskFormat::Qcow2);
                }
            }
        }
    }
}

/// Removes a test's directory when its host goes.
struct Keep(PathBuf);

impl Drop for Keep {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
        // Where it was a ground's only host, the ground's directory too.
        let _ = self.0.parent().map(fs::remove_dir);
    }
}

impl Host {
    pub fn new(ground: &Ground) -> Self {
        let count = COUNTER.fetch_add(1, Ordering::Relaxed);
        let base = ground.path.join(format!("host-{count}"));
        fs::create_dir_all(base.join("outside")).unwrap();
        let mut host = Self::at(&base);
        host._keep = Some(Keep(base));
        host
    }

    pub fn at(base: &Path) -> Self {
        fs::create_dir_all(base.join("outside")).unwrap();
        let state = base.join("state");
        let (path, base) = (base.join("pools/pool"), base.to_owned());
        Self { storage: Storage::new(state.clone()), base, state, path, is_crashed: false, _keep: None }
    }

    pub fn outside(&self, name: &str) -> PathBuf {
        self.base.join("outside").join(name)
    }

    pub fn run(&self, step: &Step) -> Result<(), StepError> {
        self.storage.run(step)
    }

    pub fn pool_mark(&self) -> Mark {
        mark("StoragePool", "pool")
    }

    pub fn image_mark(&self) -> Mark {
        mark("Image", "image")
    }

    pub fn make_pool(&self) {
        let step = Step::CreatePool { name: name("pool"), path: self.path.clone(), mark: self.pool_mark() };
        self.run(&step).unwrap();
    }

    pub fn scope(&self) -> Scope {
        Scope { pools: vec![(name("pool"), PoolPlace::Directory(self.path.clone()))], ..Scope::default() }
    }

    pub fn observe_declared(&self) -> Pool {
        self.storage.observe(&self.scope()).0.remove(&name("pool")).unwrap().unwrap()
    }

    pub fn pool(&self) -> Pool {
        self.storage.observe(&Scope::default()).0.remove(&name("pool")).unwrap().unwrap()
    }

    pub fn directory(&self) -> PoolDirectory {
        self.pool().directory.unwrap()
    }

    pub fn file(&self, file: &str) -> PoolFile {
        self.directory().files.remove(file).unwrap_or_else(|| panic!("{file} is missing"))
    }

    /// A raw file with data at its start, unaligned in its middle and at its end, and holes.
    pub fn raw_source(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.outside(name);
        let file = fs::File::create(&path).unwrap();
        file.set_len(bytes).unwrap();
        for (at, length) in [(0, 300_000), (bytes / 2 + 12_345, 200_001), (bytes - 70_000, 70_000)] {
            file.write_all_at(&random(length), at).unwrap();
        }
        path
    }

    pub fn image_file(&self, digest: &str, format: DiskFormat) -> ImageFile {
        ImageFile { pool_path: self.path.clone(), file: format!("{digest}.{}", tag(format)), format }
    }

    pub fn import(&self, source: &Path, format: DiskFormat) -> Result<ImageFile, StepError> {
        let sha256 = if source.is_file() { sha256_of(source) } else { Sha256([0; 32]) };
        let image = self.image_file(&sha256.to_string(), format);
        let (source, mark) = (source.to_owned(), self.image_mark());
        self.run(&Step::ImportImage { image: image.clone(), source: source.into(), sha256, mark })
            .map(|()| image)
    }

    pub fn new_volume(&self, volume: &str, format: DiskFormat, capacity_bytes: u64) -> NewVolume {
        NewVolume {
            pool_path: self.path.clone(),
            file: Pool::volume_file(&name(volume), format),
            format,
            capacity_bytes,
            content: NewVolumeContent::Blank,
            preallocate: false,
            mark: mark("Volume", volume),
            reclaim_delete: false,
        }
    }

    pub fn create(
        &self,
        volume: &str,
        format: DiskFormat,
        capacity_bytes: u64,
        content: NewVolumeContent,
        preallocate: bool,
    ) -> Result<String, StepError> {
        let new = NewVolume { content, preallocate, ..self.new_volume(volume, format, capacity_bytes) };
        let file = new.file.clone();
        let step = Step::CreateVolume(new);
        self.run(&step)?;
        self.run(&step).expect("a step that finds its work done succeeds");
        Ok(file)
    }

    pub fn grow(&self, file: &str, format: DiskFormat, capacity_bytes: u64) -> Result<(), StepError> {
        let owner = file.split('.').next().unwrap();
        self.run(&Step::GrowVolume {
            pool_path: self.path.clone(),
            file: file.to_owned(),
            format,
            capacity_bytes,
            mark: mark("Volume", owner),
        })
    }

    pub fn trash_volume(&self, volume: &str) -> Result<(), StepError> {
        self.trash_volume_of(volume, DiskFormat::Qcow2)
    }

    pub fn trash_volume_of(&self, volume: &str, format: DiskFormat) -> Result<(), StepError> {
        let file = Pool::volume_file(&name(volume), format);
        self.run(&Step::TrashVolume { pool_path: self.path.clone(), file, mark: mark("Volume", volume) })
    }

    fn names(&self, below: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path.join(below)).into_iter().flatten();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    pub fn leftovers(&self) -> Vec<String> {
        self.names(".vmctl/tmp")
    }

    pub fn trash(&self) -> Vec<String> {
        self.names(".vmctl/trash")
    }
}

/// Starts this test program as the child that works in `base`, and kills it `after` it was ready.
pub fn kill_child_after(base: &Path, after: Duration) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "crash_child", "--nocapture", "--test-threads=1"])
        .env("VMCTL_STORAGE_CRASH_BASE", base)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("ready")), "the child ended before it began");
    std::thread::sleep(after);
    assert_eq!(child.try_wait().unwrap(), None, "the child must work until it is killed");
    child.kill().unwrap();
    child.wait().unwrap();
}
