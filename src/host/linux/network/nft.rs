//! `nft`: our own tables read as JSON and written as one transaction. Other tables are never listed, and
//! never touched.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::{Value, json};

use super::{remove_file, replace_file};
use crate::host::error::{ObserveError, StepError};
use crate::host::nftables::{Listed, transaction};
use crate::host::snapshot::{Capability, Observed, Table, TableId};

/// How often a transaction is made anew when the table changed under it.
const ATTEMPTS_MAX: u32 = 4;
/// Of a table that is ours; longer output is not read.
const OUTPUT_BYTES_MAX: usize = 64 << 20;
/// The file that says that tables were made here.
const MADE: &str = "tables";

/// Why `nft` did not do what it was told.
enum NftError {
    /// It isn't there.
    Missing,
    /// It said so.
    Refused(String),
}

impl std::fmt::Display for NftError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Missing => f.write_str("the program `nft` is not there"),
            Self::Refused(why) => f.write_str(why),
        }
    }
}

impl NftError {
    fn step(self, what: String) -> StepError {
        match self {
            Self::Missing => StepError::Lacks { what, capability: Capability::Nftables },
            Self::Refused(why) => {
                let hint = why.contains("Operation not permitted");
                let hint = hint.then(|| "nftables is root's to change (CAP_NET_ADMIN)".to_owned());
                StepError::Failed { what, why, hint }
            }
        }
    }
}

/// A program that an administrator's own search path may not have.
pub fn find_program(name: &str) -> Option<PathBuf> {
    use std::os::unix::fs::PermissionsExt as _;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/sbin", "/sbin", "/usr/bin", "/usr/local/sbin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .filter(|directory| directory.is_absolute())
        .chain(usual)
        .map(|directory| directory.join(name))
        .find(|path| {
            path.metadata().is_ok_and(|facts| facts.is_file() && facts.permissions().mode() & 0o111 != 0)
        })
}

/// How it showed that there is no nftables here.
pub fn lacks() -> Option<String> {
    match run(&[json!({"list": {"tables": {}}})]) {
        Ok(_) => None,
        Err(error) => Some(error.to_string()),
    }
}

/// Runs commands in one transaction; gives the objects of each answer.
fn run(commands: &[Value]) -> Result<Vec<Vec<Value>>, NftError> {
    let refused = |error: io::Error| NftError::Refused(format!("run nft: {error}"));
    let program = find_program("nft").ok_or(NftError::Missing)?;
    // A file and not `-`: that is `/dev/stdin` to nft, which a host without udev may lack.
    let input = memfd_create("vmctl-nft", MemfdFlags::CLOEXEC);
    let mut input = File::from(input.map_err(|error| refused(error.into()))?);
    input.write_all(json!({"nftables": commands}).to_string().as_bytes()).map_err(refused)?;
    let output = Command::new(program)
        .args(["-j", "-f", "/proc/self/fd/0"])
        .env_clear()
        .env("LC_ALL", "C")
        .current_dir("/")
        .stdin(input)
        .output()
        .map_err(refused)?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        let errors: Vec<&str> =
            text.lines().filter_map(|line| line.split_once("Error: ")).map(|(_, why)| why).collect();
        let why = if errors.is_empty() { text.trim().to_owned() } else { errors.join("; ") };
        return Err(NftError::Refused(why));
    }
    if output.stdout.len() > OUTPUT_BYTES_MAX {
        return Err(NftError::Refused("nft says more than we read".to_owned()));
    }
    let nonsense =
        |error: serde_json::Error| NftError::Refused(format!("nft's answer makes no sense: {error}"));
    let answers = serde_json::Deserializer::from_slice(&output.stdout).into_iter::<Value>();
    answers
        .map(|answer| match answer.map_err(nonsense)?.get_mut("nftables").map(Value::take) {
            Some(Value::Array(objects)) => Ok(objects),
            _ => Err(NftError::Refused("nft's answer makes no sense".to_owned())),
        })
        .collect()
}

fn ours() -> Result<Vec<TableId>, NftError> {
    let tables = run(&[json!({"list": {"tables": {}}})])?;
    let id = |object: &Value| {
        let table = object.get("table")?;
        TableId::parse(table.get("family")?.as_str()?, table.get("name")?.as_str()?)
    };
    Ok(tables.iter().flatten().filter_map(id).collect())
}

/// One table a run: some versions of `nft` find the last one alone when they are asked for several.
fn list(id: &TableId) -> Result<Listed, NftError> {
    let answers = run(&[json!({"list": {"table": {"family": id.family.as_str(), "name": id.name()}}})])?;
    let objects: Vec<Value> = answers.into_iter().flatten().collect();
    Listed::parse(&objects).map_err(NftError::Refused)
}

/// What there is of this table, if it is there.
fn read(id: &TableId) -> Result<Option<Listed>, NftError> {
    if !ours()?.contains(id) {
        return Ok(None);
    }
    list(id).map(Some)
}

pub fn observe(directory: &Path, wanted: bool) -> Observed<BTreeMap<TableId, Table>> {
    if !wanted && !directory.join(MADE).exists() {
        return Ok(BTreeMap::new());
    }
    let look = || {
        let ids = ours()?.into_iter();
        ids.map(|id| list(&id).map(|listed| (id, listed.table))).collect()
    };
    match look() {
        Ok(tables) => Ok(tables),
        // Without `nft` here there are none of ours; who needs it hears that it is lacking.
        Err(NftError::Missing) if !directory.join(MADE).exists() => Ok(BTreeMap::new()),
        Err(error) => Err(ObserveError::new("list our nftables tables", error)),
    }
}

pub fn set(directory: &Path, id: &TableId, table: &Table) -> Result<(), StepError> {
    let what = || format!("write the nftables table {id}");
    replace_file(directory, MADE, b"").map_err(|error| StepError::failed(what(), error))?;
    let mut attempt = 1;
    loop {
        let have = read(id).map_err(|error| error.step(what()))?;
        let commands = transaction(id, have.as_ref(), table);
        if commands.is_empty() {
            return Ok(());
        }
        match run(&commands) {
            Ok(_) => return Ok(()),
            // Somebody else was at it between our look and our write: nothing of ours was done.
            Err(NftError::Refused(_)) if attempt < ATTEMPTS_MAX => attempt += 1,
            Err(error) => return Err(error.step(what())),
        }
    }
}

pub fn delete(directory: &Path, id: &TableId) -> Result<(), StepError> {
    let what = || format!("delete the nftables table {id}");
    let command = json!({"delete": {"table": {"family": id.family.as_str(), "name": id.name()}}});
    let left = ours().map_err(|error| error.step(what()))?;
    if left.contains(id) {
        run(&[command]).map_err(|error| error.step(what()))?;
    }
    if left.iter().all(|other| other == id) {
        remove_file(&directory.join(MADE)).map_err(|error| StepError::failed(what(), error))?;
    }
    Ok(())
}
