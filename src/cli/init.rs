//! `vmctl init`: the manifests that a host starts from.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use clap::Args;

use super::error::{CliError, Result};
use super::exit::Exit;
use super::session::Session;

/// Part of the program, so that a host needs nothing else to start from.
const MANIFESTS: [(&str, &str); 2] = [
    ("default-network.yaml", include_str!("../../manifests/default-network.yaml")),
    ("default-pool.yaml", include_str!("../../manifests/default-pool.yaml")),
];

/// Write the manifests that a host starts from: a network behind its address, and a pool
///
/// Files that are there are left as they are. Nothing is applied.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  vmctl init                              into /etc/vmctl/manifests
  vmctl init ./host && vmctl diff -f ./host
  vmctl init --print | vmctl apply -f -")]
pub struct Command {
    /// Where to write them; made if it isn't there
    #[arg(value_name = "DIR", default_value = "/etc/vmctl/manifests", value_hint = clap::ValueHint::DirPath)]
    directory: PathBuf,
    /// Print them instead
    #[arg(long, conflicts_with = "directory")]
    print: bool,
}

impl Command {
    pub fn run(self, session: &Session) -> Result {
        if self.print {
            let texts: Vec<&str> = MANIFESTS.iter().map(|(_, text)| *text).collect();
            session.out.print(&texts.join("---\n"));
            return Ok(Exit::Ok);
        }
        let failed = |path: &Path| {
            let path = path.display().to_string();
            move |error: std::io::Error| {
                CliError::failed(format!("write {path}: {error}"))
                    .hint("run as root, or name another directory: `vmctl init DIR`")
            }
        };
        std::fs::create_dir_all(&self.directory).map_err(failed(&self.directory))?;
        for (name, text) in MANIFESTS {
            let path = self.directory.join(name);
            let said = if write_new(&path, text).map_err(failed(&path))? {
                "written"
            } else {
                "is there, and stays"
            };
            session.out.print(&format!("{} {said}\n", path.display()));
        }
        session.out.note(&format!("Read them, then: vmctl diff -f {}", self.directory.display()));
        Ok(Exit::Ok)
    }
}

/// False: something is there. What is written is there whole or not at all, and never in place of another.
fn write_new(path: &Path, text: &str) -> std::io::Result<bool> {
    let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
    let mut file = std::fs::File::create(&temporary)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    let linked = std::fs::hard_link(&temporary, path);
    std::fs::remove_file(&temporary)?;
    match linked {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}
