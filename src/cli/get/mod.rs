//! `vmctl get`: the objects that the host has, with their live state.

mod leases;
pub mod table;

use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::args::{Resource, parse_resources};
use super::error::{CliError, Result};
use super::exit::Exit;
use super::objects::{Object, host_status, objects};
use super::session::Session;
use crate::host::{Host, Scope};
use crate::load::API_VERSION;
use crate::name::{Kind, SetName};

/// List what vmctl has on this host, as it is now
///
/// Objects are found by their marks, whether or not a manifest still declares them.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  vmctl get all
  vmctl get vm                            or vms, VirtualMachine
  vmctl get vm/web volume -o wide
  vmctl get vm web -o json | jq .status.pid
  vmctl get volumes -o name
  vmctl get leases                        addresses that guests have of DHCP

Kinds: host (hostpolicy), bridge (br), vlan, network (net), storagepool (pool, sp), image (img), volume (vol),
       virtualmachine (vm)")]
pub struct Command {
    /// KIND, KIND/NAME, KIND NAME…, KIND,KIND or `all`
    #[arg(value_name = "KIND[/NAME]", required = true)]
    resources: Vec<String>,
    /// Only objects of this set [default: all sets]
    #[arg(long, value_name = "NAME", env = "VMCTL_SET", hide_env_values = true)]
    set: Option<SetName>,
    /// How to print them
    #[arg(short, long, value_name = "FORMAT", default_value = "table")]
    pub output: Format,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    #[default]
    Table,
    /// With more columns
    Wide,
    Json,
    Yaml,
    /// KIND/NAME, one a line
    Name,
}

impl Command {
    pub fn run(self, session: &Session) -> Result {
        let asks_for_leases = leases::is_asked_for(&self.resources);
        let resources = if asks_for_leases { Vec::new() } else { parse_resources(&self.resources)? };
        let snapshot = session.host().snapshot(&Scope::default());
        let (all, unseen) = objects(&snapshot, self.set.as_ref());
        if asks_for_leases {
            leases::print(session, &all, self.output)?;
            for error in &unseen {
                session.out.error(&CliError::failed(format!("could not look: {error}")));
            }
            return Ok(if unseen.is_empty() { Exit::Ok } else { Exit::Failed });
        }
        let (shown, missing) = select(&all, &resources);
        match self.output {
            Format::Table | Format::Wide if shown.is_empty() && missing.is_empty() => {
                session.out.note("There are none on this host.");
                if resources.contains(&Resource::Kind(Kind::HostPolicy))
                    && let Ok(host) = &snapshot.host
                {
                    // Without a policy nothing is bounded; what there is can be seen all the same.
                    let host = host_status(host, &snapshot);
                    session.out.print(&format!("{}; {}\n", host.cpu_text(), host.memory_text()));
                }
            }
            Format::Table | Format::Wide => {
                let wide = self.output == Format::Wide;
                session.out.print(&table::tables(&shown, wide, session.out.style));
            }
            Format::Name => {
                session.out.print(&shown.iter().map(|object| format!("{}\n", object.id)).collect::<String>());
            }
            Format::Json => session.out.json(&document(&shown, &resources))?,
            Format::Yaml => {
                let text = serde_saphyr::to_string(&document(&shown, &resources))
                    .map_err(|error| CliError::failed(format!("write YAML: {error}")))?;
                session.out.print(&text);
            }
        }
        let mut exit = Exit::Ok;
        for error in &unseen {
            exit = Exit::Failed;
            session.out.error(&CliError::failed(format!("could not look: {error}")));
        }
        if !missing.is_empty() {
            return Err(not_found(&missing, self.set.as_ref()));
        }
        Ok(exit)
    }
}

pub fn not_found(missing: &[String], set: Option<&SetName>) -> CliError {
    let set = set.map(|set| format!(" of set {set}")).unwrap_or_default();
    CliError::failed(format!("there is no {}{set} on this host", missing.join(", ")))
        .hint("`vmctl get all` lists what is there")
}

/// What was asked for, each object once, and what of it is not there.
pub fn select<'a>(all: &'a [Object], resources: &[Resource]) -> (Vec<&'a Object>, Vec<String>) {
    let wanted = |object: &&Object| {
        resources.iter().any(|resource| match resource {
            Resource::All => true,
            Resource::Kind(kind) => object.id.kind == *kind,
            Resource::Object(id) => object.id == *id,
        })
    };
    let missing = resources.iter().filter_map(|resource| match resource {
        Resource::Object(id) if !all.iter().any(|object| object.id == *id) => Some(id.to_string()),
        _ => None,
    });
    (all.iter().filter(wanted).collect(), missing.collect())
}

/// One object as itself where one was named, else a List, as kubectl does.
pub fn document(shown: &[&Object], resources: &[Resource]) -> Value {
    match (shown, resources) {
        ([one], [Resource::Object(_)]) => manifest(one),
        _ => {
            let items: Vec<Value> = shown.iter().map(|object| manifest(object)).collect();
            json!({ "apiVersion": API_VERSION, "kind": "List", "items": items })
        }
    }
}

fn manifest(object: &Object) -> Value {
    json!({
        "apiVersion": API_VERSION,
        "kind": object.id.kind.as_str(),
        "metadata": { "name": object.id.name.as_str(), "annotations": { "vmctl.dev/set": object.set.as_str() } },
        "status": object.status,
    })
}

/// The kinds in the order in which tables show them.
pub const KINDS: [Kind; 8] = [
    Kind::HostPolicy,
    Kind::VirtualMachine,
    Kind::Network,
    Kind::Bridge,
    Kind::Vlan,
    Kind::StoragePool,
    Kind::Image,
    Kind::Volume,
];
