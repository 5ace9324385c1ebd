//! Storage beside `qemu-img`, `cp` and `sha256sum`, in one run on one file system:
//! `cargo run --release --example bench_storage -- [DIRECTORY]`.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use vmctl::host::Scope;
use vmctl::host::linux::storage::{Export, ExportFormat, Storage};
use vmctl::host::snapshot::Pool;
use vmctl::host::step::{Container, ImageFile, ImageOrigin, ImageSource, NewVolume, NewVolumeContent, Step};
use vmctl::name::{Mark, ObjectName};
use vmctl::vmm::config::DiskFormat::{self, Qcow2, Raw};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const ROUNDS: u32 = 100;
const IMAGE_BYTES: u64 = 1 << 30;
const VOLUMES: u32 = 10_000;

fn main() -> Result<()> {
    let parent = std::env::args_os().nth(1).map_or_else(std::env::temp_dir, PathBuf::from);
    let base = parent.join(format!("vmctl-bench-{}", std::process::id()));
    fs::create_dir_all(&base)?;
    let result = Bench::new(&base).and_then(|bench| bench.run());
    fs::remove_dir_all(&base)?;
    result
}

struct Bench {
    storage: Storage,
    base: PathBuf,
    pool: PathBuf,
}

fn mark(kind: &str, name: &str) -> Result<Mark> {
    Ok(format!("vmctl:default:{kind}/{name}").parse()?)
}

fn shell(command: &str) -> Result<()> {
    match Command::new("sh").args(["-c", command]).status()?.success() {
        true => Ok(()),
        false => Err(format!("`{command}` failed").into()),
    }
}

fn digest(path: &Path) -> Result<String> {
    let output = Command::new("sha256sum").arg(path).output()?;
    Ok(String::from_utf8(output.stdout)?.split(' ').next().unwrap_or_default().to_owned())
}

fn timed(action: impl FnOnce() -> Result<()>) -> Result<Duration> {
    let start = Instant::now();
    action()?;
    Ok(start.elapsed())
}

fn line(what: &str, ours: Duration, theirs: Duration, peer: &str) {
    let ratio = ours.as_secs_f64() / theirs.as_secs_f64();
    println!("{what:<44} {ours:>12.3?}   {peer:<28} {theirs:>12.3?}   ratio {ratio:.2}");
}

impl Bench {
    fn new(base: &Path) -> Result<Self> {
        let bench = Self {
            storage: Storage::new(base.join("state")),
            base: base.to_owned(),
            pool: base.join("pool"),
        };
        let (name, path) = (ObjectName::parse("pool")?, bench.pool.clone());
        bench.storage.run(&Step::CreatePool { name, path, mark: mark("StoragePool", "pool")? })?;
        Ok(bench)
    }

    fn create(&self, volume: &str, format: DiskFormat, bytes: u64, content: NewVolumeContent) -> Result<()> {
        let new = NewVolume {
            pool_path: self.pool.clone(),
            file: Pool::volume_file(&ObjectName::parse(volume)?, format),
            format,
            capacity_bytes: bytes,
            content,
            preallocate: false,
            mark: mark("Volume", volume)?,
            reclaim_delete: false,
        };
        Ok(self.storage.run(&Step::CreateVolume(new))?)
    }

    fn import(&self, source: &Path) -> Result<ImageFile> {
        let digest = digest(source)?;
        let image = ImageFile { pool_path: self.pool.clone(), file: format!("{digest}.raw"), format: Raw };
        let step = Step::ImportImage {
            image: image.clone(),
            source: source.to_owned().into(),
            sha256: digest.parse()?,
            mark: mark("Image", "image")?,
        };
        let ours = timed(|| Ok(self.storage.run(&step)?))?;
        let copy = self.base.join("copy");
        let command = format!(
            "cp --sparse=always --reflink=auto {0} {1} && sync {1} && sha256sum {1} >/dev/null",
            source.display(),
            copy.display()
        );
        let theirs = timed(|| shell(&command))?;
        line("import 1 GiB, half of it holes (synced)", ours, theirs, "cp, sync, sha256sum");
        Ok(image)
    }

    fn run(&self) -> Result<()> {
        let source = self.base.join("source.raw");
        let mut file = fs::File::create(&source)?;
        let mut random = fs::File::open("/dev/urandom")?.take(IMAGE_BYTES / 2);
        std::io::copy(&mut random, &mut file)?;
        file.set_len(IMAGE_BYTES)?;
        file.flush()?;
        file.sync_all()?;
        let image = self.import(&source)?;

        self.small("blank", &NewVolumeContent::Blank, &[])?;
        let backing = image.path().display().to_string();
        self.small("overlay", &NewVolumeContent::OverlayOn(image.clone()), &["-b", &backing, "-F", "raw"])?;

        let copy = NewVolumeContent::CopyOf(image.clone());
        let ours = timed(|| self.create("converted", Qcow2, IMAGE_BYTES, copy.clone()))?;
        let (from, to) = (image.path(), self.base.join("converted.qcow2"));
        let convert = |flags: &str| {
            shell(&format!(
                "qemu-img convert {flags} -f raw -O qcow2 {0} {1} && sync {1}",
                from.display(),
                to.display()
            ))
        };
        line(
            "convert raw to qcow2, 1 GiB (synced)",
            ours,
            timed(|| convert("-W -m 8"))?,
            "qemu-img convert -W -m 8",
        );
        let ours = timed(|| self.create("copied", Raw, IMAGE_BYTES, copy))?;
        let command =
            format!("cp --sparse=always {0} {1} && sync {1}", from.display(), self.base.join("c2").display());
        line("copy raw, 1 GiB (synced)", ours, timed(|| shell(&command))?, "cp");
        self.imports_and_exports()?;
        self.scan()
    }

    /// 2 GiB of which half is data that compresses somewhat, as a system's files do.
    fn imports_and_exports(&self) -> Result<()> {
        let raw = self.base.join("system.raw");
        let mut file = fs::File::create(&raw)?;
        let mut noise = vec![0; 1 << 20];
        for round in 0..1024u32 {
            fs::File::open("/dev/urandom")?.read_exact(&mut noise[..400 << 10])?;
            noise[400 << 10..].fill(round as u8);
            file.write_all(&noise)?;
        }
        file.set_len(2 << 30)?;
        file.sync_all()?;
        let disk = |name: &str| self.base.join(name).display().to_string();
        for kind in ["monolithicSparse", "streamOptimized"] {
            let path = disk(&format!("{kind}.vmdk"));
            shell(&format!("qemu-img convert -f raw -O vmdk -o subformat={kind} {} {path}", raw.display()))?;
            let sha256 = digest(Path::new(&path))?;
            let image =
                ImageFile { pool_path: self.pool.clone(), file: format!("{sha256}.qcow2"), format: Qcow2 };
            let origin = ImageOrigin::Path(path.clone().into());
            let source = ImageSource { origin, compression: None, container: Container::Vmdk };
            let (sha256, mark) = (sha256.parse()?, mark("Image", "image")?);
            let step = Step::ImportImage { image: image.clone(), source, sha256, mark };
            let ours = timed(|| Ok(self.storage.run(&step)?))?;
            let to = disk("imported.qcow2");
            let convert = format!("qemu-img convert -W -m 8 -f vmdk -O qcow2 {path} {to} && sync {to}");
            let what = format!("import {kind} vmdk, 2 GiB (synced)");
            line(&what, ours, timed(|| shell(&convert))?, "qemu-img convert -W -m 8");
            let verified = timed(|| shell(&format!("sha256sum {path} >/dev/null && {convert}")))?;
            line(&what, ours, verified, "sha256sum, qemu-img convert");
            fs::remove_file(image.path())?;
        }
        for (format, options, ending) in [
            (ExportFormat::Qcow2, "-O qcow2", "qcow2"),
            (ExportFormat::CompressedQcow2, "-c -O qcow2", "qcow2"),
            (ExportFormat::Vmdk, "-O vmdk -o subformat=streamOptimized", "vmdk"),
        ] {
            let to = self.base.join(format!("export.{ending}"));
            let export = Export { volume: &raw, volume_format: Raw, to: &to, format };
            let ours = timed(|| Ok(self.storage.export(&export).map(drop)?))?;
            let theirs = disk(&format!("their.{ending}"));
            let flags = if options.contains("vmdk") { "" } else { "-W" };
            let command = format!(
                "qemu-img convert {flags} -m 8 -f raw {options} {} {theirs} && sync {theirs}",
                raw.display()
            );
            let theirs = timed(|| shell(&command))?;
            line(
                &format!("export {format:?}, 2 GiB (synced)"),
                ours,
                theirs,
                &format!("qemu-img convert {options}"),
            );
            fs::remove_file(&to)?;
        }
        Ok(())
    }

    /// Images that are nothing but metadata: `qemu-img` started directly, without and with a sync.
    fn small(&self, what: &str, content: &NewVolumeContent, options: &[&str]) -> Result<()> {
        let ours = timed(|| {
            (0..ROUNDS)
                .try_for_each(|i| self.create(&format!("{what}-{i}"), Qcow2, 10 << 30, content.clone()))
        })?;
        let theirs = |sync: bool| {
            (0..ROUNDS).try_for_each(|i| -> Result<()> {
                let path = self.base.join(format!("{what}-{sync}-{i}"));
                let mut command = Command::new("qemu-img");
                command.args(["create", "-q", "-f", "qcow2"]).args(options).arg(&path).arg("10G");
                if !command.status()?.success() {
                    return Err("qemu-img failed".into());
                }
                if sync {
                    fs::File::open(&path)?.sync_all()?;
                    fs::File::open(&self.base)?.sync_all()?;
                }
                Ok(())
            })
        };
        let unsynced = timed(|| theirs(false))?;
        line(
            &format!("{what} qcow2 (only ours synced)"),
            ours / ROUNDS,
            unsynced / ROUNDS,
            "qemu-img create",
        );
        let synced = timed(|| theirs(true))?;
        line(&format!("{what} qcow2 (both synced)"), ours / ROUNDS, synced / ROUNDS, "qemu-img create, sync");
        Ok(())
    }

    fn scan(&self) -> Result<()> {
        let pool = self.base.join("many");
        let (name, path) = (ObjectName::parse("many")?, pool.clone());
        self.storage.run(&Step::CreatePool {
            name: name.clone(),
            path,
            mark: mark("StoragePool", "many")?,
        })?;
        let first = fs::read(self.pool.join("blank-0.qcow2"))?;
        for index in 0..VOLUMES {
            let file = format!("volume-{index}.qcow2");
            fs::write(pool.join(&file), &first[..4096])?;
            let owner = mark("Volume", &format!("volume-{index}"))?;
            let path = pool.join(&file);
            rustix::fs::setxattr(
                &path,
                "user.vmctl.owner",
                owner.to_string().as_bytes(),
                rustix::fs::XattrFlags::empty(),
            )?;
        }
        let scope = Scope {
            pools: vec![(name, vmctl::host::snapshot::PoolPlace::Directory(pool))],
            ..Scope::default()
        };
        for round in 0..4 {
            if round == 3 {
                // Best effort: needs root.
                let _ = shell("sync; echo 3 >/proc/sys/vm/drop_caches");
            }
            let start = Instant::now();
            let (pools, _) = self.storage.observe(&scope);
            let took = start.elapsed();
            let seen =
                pools.values().flatten().flat_map(|pool| &pool.directory).map(|pool| pool.files.len()).max();
            let cache = if round == 3 { "cold" } else { "warm" };
            println!("scan of {} marked volumes, {cache}: {took:.1?}", seen.unwrap_or(0));
        }
        Ok(())
    }
}
