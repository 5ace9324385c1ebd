//! What networks need of the host beyond their links: tables of nftables, forwarding, and `dnsmasq`.
//!
//! All that is kept here is in the state directory's `networks/`: what forwarding was before us and who
//! needs it, and which tables were made (so that a host without any is never asked for them).

mod forwarding;
pub mod nft;
pub mod service;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::host::error::StepError;
use crate::host::snapshot::{Forwarding, IpFamily, Observed, Service, Table, TableId};
use crate::host::step::Step;
use crate::name::Mark;

/// Steps of several networks run at once, and share what is kept.
static KEPT: Mutex<()> = Mutex::new(());

pub struct Networks {
    directory: PathBuf,
}

impl Networks {
    pub fn new(state_dir: &Path) -> Self {
        Self { directory: state_dir.join("networks") }
    }

    /// `wanted`: tables are declared; else they are looked for only if some were made before.
    pub fn tables(&self, wanted: bool) -> Observed<BTreeMap<TableId, Table>> {
        nft::observe(&self.directory, wanted)
    }

    pub fn forwarding(&self) -> Observed<BTreeMap<IpFamily, Forwarding>> {
        forwarding::observe(&self.directory)
    }

    pub fn services(&self) -> Observed<BTreeMap<Mark, Service>> {
        service::observe(&self.directory)
    }

    pub fn service_watch(&self, mark: &Mark) -> Option<OwnedFd> {
        service::watch(&self.directory, mark)
    }

    pub fn run(&self, step: &Step) -> Result<(), StepError> {
        // Nothing is half-done by who panicked: every step may be repeated.
        let _kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
        match step {
            Step::SetTable { id, table } => nft::set(&self.directory, id, table),
            Step::DeleteTable { id } => nft::delete(&self.directory, id),
            Step::SetService { mark, config } => service::set(&self.directory, mark, config),
            Step::RemoveService { mark } => service::remove(&self.directory, mark),
            Step::RequireForwarding { family, mark } => {
                forwarding::require(&self.directory, *family, mark).map_err(failed(step))
            }
            Step::ReleaseForwarding { family, mark } => {
                forwarding::release(&self.directory, *family, mark).map_err(failed(step))
            }
            _ => Err(StepError::failed(step.to_string(), "it is not about networks")),
        }
    }
}

fn failed(step: &Step) -> impl FnOnce(std::io::Error) -> StepError {
    let what = step.to_string();
    |error| StepError::Failed {
        hint: (error.kind() == std::io::ErrorKind::PermissionDenied).then(|| {
            "settings of the network are root's to change; in a container, /proc/sys may be read-only"
                .to_owned()
        }),
        what,
        why: error.to_string(),
    }
}

/// Writes a small file of ours whole or not at all.
fn replace_file(directory: &Path, name: &str, content: &[u8]) -> std::io::Result<()> {
    std::fs::create_dir_all(directory)?;
    let temporary = directory.join(format!(".{name}.new"));
    let file = std::fs::File::create(&temporary)?;
    std::io::Write::write_all(&mut &file, content)?;
    file.sync_all()?;
    std::fs::rename(&temporary, directory.join(name))?;
    std::fs::File::open(directory)?.sync_all()
}

fn remove_file(path: &Path) -> std::io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
