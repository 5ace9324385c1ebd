//! `vmctl export`.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use super::args::{Resource, SetArg, parse_resources};
use super::error::{CliError, Result};
use super::exit::Exit;
use super::session::Session;
use crate::host::linux::storage::{Export, ExportFormat};
use crate::host::snapshot::{PoolFile, Snapshot, Vm};
use crate::host::{Host as _, Scope};
use crate::kinds::volume::compare::capacity_bytes;
use crate::name::{Kind, Mark, ObjectId};
use crate::report::units::size;
use crate::vmm::config::DiskFormat;

/// Write a volume to a file that needs nothing else
#[derive(Debug, Args)]
#[command(after_help = "\
What a guest sees of the volume is written, backing image included; the file appears when it is whole, and
never in the place of another. A volume that a VM runs on is refused: what is being written holds not still.

Examples:
  vmctl export volume/web-root /srv/web.qcow2 --compress
  vmctl export volume web-root web.vmdk --format vmdk")]
pub struct Command {
    /// The volume (volume/NAME), and the file
    #[arg(value_name = "VOLUME FILE", num_args = 2..=3, required = true)]
    words: Vec<String>,
    /// What to write. vmdk: streamOptimized, which is always compressed [default: by the file's ending, else qcow2]
    #[arg(long)]
    format: Option<Format>,
    /// Compress the clusters of a qcow2 file
    #[arg(long)]
    compress: bool,
    #[command(flatten)]
    set: SetArg,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    Raw,
    Qcow2,
    Vmdk,
}

impl Command {
    pub fn run(mut self, session: &Session) -> Result {
        let to = PathBuf::from(self.words.pop().unwrap_or_default());
        let resources = parse_resources(&self.words)?;
        let [Resource::Object(id)] = &resources[..] else {
            return Err(CliError::usage("name one volume and the file to write")
                .hint("`vmctl export volume/NAME FILE`"));
        };
        if id.kind != Kind::Volume {
            return Err(CliError::usage(format!("{id} is no volume; only volumes are exported")));
        }
        let format = self.format(&to)?;
        let host = session.host();
        let snapshot = host.snapshot(&Scope::default());
        let mark = Mark::new(self.set.set.clone(), id.clone());
        let (path, volume_format, file) = find(&snapshot, &mark).ok_or_else(|| missing(id, &snapshot))?;
        check(id, &path, file, &snapshot)?;
        let export = Export { volume: &path, volume_format, to: &to, format };
        let written = super::progress::with_live(&session.out, session.out.quiet, |_| host.export(&export));
        let bytes = written.map_err(|error| {
            let failed = CliError::failed(error.to_string());
            match error.hint() {
                Some(hint) => failed.hint(hint),
                None => failed,
            }
        })?;
        if !session.out.quiet {
            let capacity = size(capacity_bytes(volume_format, file));
            session.out.print(&format!("{} written: {id} of {capacity} in {}\n", to.display(), size(bytes)));
        }
        Ok(Exit::Ok)
    }

    fn format(&self, to: &std::path::Path) -> Result<ExportFormat> {
        let ending = to.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        let format = self.format.unwrap_or(match ending {
            "raw" | "img" => Format::Raw,
            "vmdk" => Format::Vmdk,
            _ => Format::Qcow2,
        });
        match (format, self.compress) {
            (Format::Raw, true) => Err(CliError::usage("a raw file can't be compressed")
                .hint("`--format qcow2`, or pipe it through gzip")),
            (Format::Raw, false) => Ok(ExportFormat::Raw),
            (Format::Qcow2, true) => Ok(ExportFormat::CompressedQcow2),
            (Format::Qcow2, false) => Ok(ExportFormat::Qcow2),
            (Format::Vmdk, _) => Ok(ExportFormat::Vmdk),
        }
    }
}

/// The volume's path, its format (never by its content, which is a guest's), and what is known of it.
fn find<'a>(snapshot: &'a Snapshot, mark: &Mark) -> Option<(PathBuf, DiskFormat, &'a PoolFile)> {
    snapshot.pools.values().flatten().find_map(|pool| {
        let files = &pool.directory.as_ref()?.files;
        let (name, file) = files.iter().find(|(_, file)| file.mark.as_ref() == Some(mark))?;
        let path = pool.path.join(name);
        let is_raw = pool.lvm.is_some() || path.extension().is_some_and(|extension| extension == "raw");
        Some((path, if is_raw { DiskFormat::Raw } else { DiskFormat::Qcow2 }, file))
    })
}

/// What can't be exported now, with what to do about it.
fn check(id: &ObjectId, path: &Path, file: &PoolFile, snapshot: &Snapshot) -> Result<()> {
    let runs_on_it = |vm: &Vm| {
        let process = vm.process.as_ref().and_then(|process| process.as_ref().ok());
        let mut disks = process.into_iter().flat_map(|process| &process.config.disks);
        disks.any(|disk| !disk.read_only && Path::new(&disk.path) == path)
    };
    if let Some((vm, _)) = snapshot.vms.iter().flatten().find(|(_, vm)| runs_on_it(vm)) {
        return Err(CliError::failed(format!("{id} is a disk of VirtualMachine/{vm}, which runs"))
            .hint(format!("what it writes doesn't hold still: `vmctl stop {vm}` first")));
    }
    if file.half_made {
        return Err(CliError::failed(format!("{id} is not whole: its making was cut short"))
            .hint("apply its manifest again"));
    }
    if file.inactive {
        return Err(CliError::failed(format!("{id} is a logical volume that is not active"))
            .hint(format!("`lvchange -ay {}`, or apply its manifest again", path.display())));
    }
    Ok(())
}

fn missing(id: &ObjectId, snapshot: &Snapshot) -> CliError {
    match snapshot.pools.values().find_map(|pool| pool.as_ref().err()) {
        Some(error) => {
            CliError::failed(format!("{id} was not found, and not every pool could be looked at: {error}"))
        }
        None => CliError::failed(format!("there is no {id} on this host"))
            .hint("`vmctl get volumes` lists those that are"),
    }
}
