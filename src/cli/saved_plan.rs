//! A plan in a file: what a person has read is what runs, or nothing is.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::Digest;

use super::error::{CliError, Result};
use crate::host::Scope;
use crate::host::snapshot::{Capability, PoolPlace};
use crate::name::ObjectName;
use crate::plan::Plan;

/// The form of the file. Another form is refused, for a plan must mean what it meant.
const FORM: &str = "vmctl.dev/saved-plan/v1";
/// No honest plan comes near: 10,000 VMs take about 30 MiB.
const BYTES_MAX: u64 = 512 << 20;

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Envelope {
    form: String,
    /// The program that saved it: another version may plan and run otherwise.
    program: String,
    /// Of `body`: tells a damaged or edited file.
    sha256: String,
    body: SavedPlan,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SavedPlan {
    /// What has to be looked at again.
    scope: SavedScope,
    pub plan: Plan,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct SavedScope {
    pools: Vec<(ObjectName, PoolPlace)>,
    #[serde(default)]
    devices: BTreeMap<ObjectName, Vec<PathBuf>>,
    capabilities: BTreeSet<Capability>,
    files: BTreeSet<PathBuf>,
    tables: bool,
}

impl SavedPlan {
    pub fn new(scope: Scope, plan: Plan) -> Self {
        let Scope { pools, devices, capabilities, files, tables } = scope;
        Self { scope: SavedScope { pools, devices, capabilities, files, tables }, plan }
    }

    pub fn scope(&self) -> Scope {
        let SavedScope { pools, devices, capabilities, files, tables } = &self.scope;
        Scope {
            pools: pools.clone(),
            devices: devices.clone(),
            capabilities: capabilities.clone(),
            files: files.clone(),
            tables: *tables,
        }
    }

    /// Written beside its place and renamed: a reader sees all of it or nothing.
    pub fn write(self, path: &Path) -> Result<()> {
        let failed = |error: &dyn std::fmt::Display| {
            CliError::failed(format!("save the plan to {}: {error}", path.display()))
        };
        let envelope = Envelope {
            form: FORM.to_owned(),
            program: env!("CARGO_PKG_VERSION").to_owned(),
            sha256: digest(&self).map_err(|error| failed(&error))?,
            body: self,
        };
        let text = serde_json::to_string_pretty(&envelope).map_err(|error| failed(&error))?;
        let name = path.file_name().ok_or_else(|| CliError::usage("--out needs the name of a file"))?;
        let mut temporary = name.to_owned();
        temporary.push(format!(".{}.tmp", std::process::id()));
        let temporary = path.with_file_name(temporary);
        let written = File::create(&temporary)
            .and_then(|mut file| file.write_all(text.as_bytes()).and_then(|()| file.sync_all()))
            .and_then(|()| std::fs::rename(&temporary, path));
        written.map_err(|error| {
            // The error that matters is the first.
            let _ = std::fs::remove_file(&temporary);
            failed(&error)
        })
    }

    pub fn read(path: &Path) -> Result<Self> {
        let wrong = |why: &dyn std::fmt::Display| {
            CliError::usage(format!("the saved plan {}: {why}", path.display()))
                .hint("make a new one with `vmctl diff --out FILE`")
        };
        let mut text = String::new();
        File::open(path)
            .and_then(|file| file.take(BYTES_MAX + 1).read_to_string(&mut text))
            .map_err(|error| wrong(&error))?;
        if text.len() as u64 > BYTES_MAX {
            return Err(wrong(&"larger than 512 MiB"));
        }
        let envelope: Envelope = serde_json::from_str(&text).map_err(|error| wrong(&error))?;
        if envelope.form != FORM || envelope.program != env!("CARGO_PKG_VERSION") {
            return Err(wrong(&format!("saved by vmctl {} in the form {}", envelope.program, envelope.form)));
        }
        if digest(&envelope.body).map_err(|error| wrong(&error))? != envelope.sha256 {
            return Err(wrong(&"it was edited or damaged"));
        }
        Ok(envelope.body)
    }
}

fn digest(body: &SavedPlan) -> serde_json::Result<String> {
    let bytes = serde_json::to_vec(body)?;
    Ok(sha2::Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect())
}
