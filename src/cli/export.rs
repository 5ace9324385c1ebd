//! `vmctl export`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::args::{Resource, SetArg, parse_resources};
use super::error::{CliError, Result};
use super::exit::Exit;
use super::session::Session;
use crate::host::linux::storage::{Export, ExportFormat};
use crate::host::snapshot::{PoolFile, Snapshot};
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
        let (path, file) = find(&snapshot, &mark).ok_or_else(|| missing(id, &snapshot))?;
        let volume_format = match path.extension().and_then(|extension| extension.to_str()) {
            Some("raw") => DiskFormat::Raw,
            _ => DiskFormat::Qcow2,
        };
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

fn find<'a>(snapshot: &'a Snapshot, mark: &Mark) -> Option<(PathBuf, &'a PoolFile)> {
    snapshot.pools.values().flatten().find_map(|pool| {
        let files = &pool.directory.as_ref()?.files;
        let (name, file) = files.iter().find(|(_, file)| file.mark.as_ref() == Some(mark))?;
        Some((pool.path.join(name), file))
    })
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
