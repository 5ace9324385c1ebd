//! The views that people know from virsh: its words, its columns, its states, for the objects of vmctl.
//!
//! They show nothing that `get` and `describe` don't; they are for fingers and scripts that know virsh.

pub mod domblklist;
pub mod domiflist;
pub mod list;
pub mod net_list;
pub mod pool_list;
pub mod vol_list;

use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::args::parse_name;
use super::error::{CliError, Result};
use super::exit::Exit;
use super::get::{document, not_found};
use super::objects::{Object, Status, VmStatus, objects};
use super::session::Session;
use crate::host::error::ObserveError;
use crate::host::{Host, Scope};
use crate::name::{Kind, ObjectId, SetName};

/// Options of all of them.
#[derive(Debug, Args)]
pub struct ViewArgs {
    /// Only objects of this set [default: all sets]
    #[arg(long, value_name = "NAME", env = "VMCTL_SET", hide_env_values = true)]
    set: Option<SetName>,
    /// How to print it
    #[arg(short, long, value_name = "FORMAT", default_value = "table")]
    pub output: Format,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// As virsh prints it
    #[default]
    Table,
    Json,
    Yaml,
    /// Names, one a line
    Name,
}

/// What the host has, and what could not be looked at.
struct Seen {
    objects: Vec<Object>,
    unseen: Vec<ObserveError>,
}

impl ViewArgs {
    fn look(&self, session: &Session) -> Seen {
        let snapshot = session.host().snapshot(&Scope::default());
        let (objects, unseen) = objects(&snapshot, self.set.as_ref());
        Seen { objects, unseen }
    }

    /// Objects of a kind, a row for each.
    fn objects<const N: usize>(
        &self,
        session: &Session,
        seen: &Seen,
        head: [&str; N],
        rows: Vec<(&Object, [String; N])>,
    ) -> Result {
        let shown: Vec<&Object> = rows.iter().map(|(object, _)| *object).collect();
        let names = shown.iter().map(|object| object.id.to_string()).collect();
        let value = document(&shown, &[]);
        self.print(session, head, rows.into_iter().map(|(_, row)| row).collect(), names, &value)?;
        Ok(seen.tell(session))
    }

    /// The devices of one VM.
    fn devices<const N: usize>(
        &self,
        session: &Session,
        (vm, field, devices): (&Object, &str, Value),
        head: [&str; N],
        rows: Vec<(String, [String; N])>,
    ) -> Result {
        let (names, rows) = rows.into_iter().unzip();
        let value = json!({ "virtualMachine": vm.id.name.as_str(), field: devices });
        self.print(session, head, rows, names, &value)?;
        Ok(Exit::Ok)
    }

    fn print<const N: usize>(
        &self,
        session: &Session,
        head: [&str; N],
        rows: Vec<[String; N]>,
        names: Vec<String>,
        value: &Value,
    ) -> Result<()> {
        match self.output {
            Format::Table => session.out.print(&table(head, &rows)),
            Format::Name => {
                session.out.print(&names.iter().map(|name| format!("{name}\n")).collect::<String>());
            }
            Format::Json => session.out.json(value)?,
            Format::Yaml => {
                let text = serde_saphyr::to_string(value)
                    .map_err(|error| CliError::failed(format!("write YAML: {error}")))?;
                session.out.print(&text);
            }
        }
        Ok(())
    }
}

impl Seen {
    fn of_kind(&self, kind: Kind) -> impl Iterator<Item = &Object> {
        self.objects.iter().filter(move |object| object.id.kind == kind)
    }

    /// The VM that was named, as `web` or `vm/web`.
    fn vm(&self, text: &str, set: Option<&SetName>) -> Result<(&Object, &VmStatus)> {
        let name = match text.split_once('/') {
            Some((kind, name)) if Kind::parse_alias(kind) == Some(Kind::VirtualMachine) => name,
            Some(_) => return Err(CliError::usage(format!("`{text}` is not a VM"))),
            None => text,
        };
        let id = ObjectId::new(Kind::VirtualMachine, parse_name(name)?);
        let found = self.objects.iter().find_map(|object| match &object.status {
            Status::VirtualMachine(vm) if object.id == id => Some((object, vm.as_ref())),
            _ => None,
        });
        found.ok_or_else(|| not_found(&[id.to_string()], set))
    }

    fn tell(&self, session: &Session) -> Exit {
        for error in &self.unseen {
            session.out.error(&CliError::failed(format!("could not look: {error}")));
        }
        if self.unseen.is_empty() { Exit::Ok } else { Exit::Failed }
    }
}

/// virsh's own shape, which scripts cut at its columns: a head, a line, the rows, an empty line.
fn table<const N: usize>(head: [&str; N], rows: &[[String; N]]) -> String {
    let widths: [usize; N] = std::array::from_fn(|column| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.chain([head[column].chars().count()]).max().unwrap_or(0)
    });
    let line = |cells: [&str; N]| {
        let cells = cells.iter().zip(widths).map(|(cell, width)| format!(" {cell:<width$}  "));
        format!("{}\n", cells.collect::<String>().trim_end())
    };
    let mut out = line(head);
    out.push_str(&format!("{}\n", "-".repeat(widths.iter().map(|width| width + 3).sum())));
    for row in rows {
        out.push_str(&line(std::array::from_fn(|column| row[column].as_str())));
    }
    out.push('\n');
    out
}

fn yes_no(yes: bool) -> String {
    if yes { "yes" } else { "no" }.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_have_the_shape_of_virsh() {
        let rows = [["1", "fedora28", "running"], ["-", "db", "shut off"]].map(|row| row.map(str::to_owned));
        let expected = concat!(
            " Id   Name       State\n",
            "---------------------------\n",
            " 1    fedora28   running\n",
            " -    db         shut off\n\n"
        );
        assert_eq!(table(["Id", "Name", "State"], &rows), expected);
        assert_eq!(table(["Id", "Name"], &[]), " Id   Name\n------------\n\n");
    }
}
