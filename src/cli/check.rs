//! `vmctl check`: what this host can and can't do, each with its remedy.

use std::path::Path;

use clap::Args;
use serde::Serialize;

use super::args::Format;
use super::error::Result;
use super::exit::Exit;
use super::objects::{HostStatus, host_status};
use super::session::{Session, is_program};
use crate::host::linux::{capability, cgroup};
use crate::host::snapshot::Capability;
use crate::host::{Host, Scope};
use crate::report::units::size;

/// Say what this host can and can't do, and how to change that
///
/// Tries each ability and leaves no trace. Exits 0 when nothing is missing, else 3. Objects that don't need what is
/// missing work all the same.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  vmctl check
  vmctl check -o json | jq '.checks[] | select(.ok | not)'")]
pub struct Command {
    /// How to print it
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub output: Format,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Check {
    name: String,
    ok: bool,
    /// How it showed, or what was found.
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

impl Check {
    fn good(name: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { name: name.into(), ok: true, detail: Some(detail.into()), remedy: None }
    }

    fn bad(name: impl Into<String>, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name: name.into(), ok: false, detail: Some(detail.into()), remedy: Some(remedy.into()) }
    }
}

impl Command {
    pub fn run(self, session: &Session) -> Result {
        let checks = checks(session);
        let ok = checks.iter().all(|check| check.ok);
        match self.output {
            Format::Json => session.out.json(&serde_json::json!({ "ok": ok, "checks": checks }))?,
            Format::Text => session.out.print(&text(session, &checks)),
        }
        Ok(if ok { Exit::Ok } else { Exit::Failed })
    }
}

fn text(session: &Session, checks: &[Check]) -> String {
    let style = session.out.style;
    let mut out = String::new();
    for check in checks.iter().filter(|check| !session.out.quiet || !check.ok) {
        let sign = if check.ok { style.green("✓") } else { style.red("✗") };
        let detail =
            check.detail.as_ref().map(|detail| style.dim(&format!("  {detail}"))).unwrap_or_default();
        out.push_str(&format!("{sign} {}{detail}\n", check.name));
        if let Some(remedy) = &check.remedy {
            out.push_str(&format!("    {remedy}\n"));
        }
    }
    let missing = checks.iter().filter(|check| !check.ok).count();
    if missing > 0 {
        out.push_str(&format!("{missing} of {} missing; objects that don't need it work.\n", checks.len()));
    }
    out
}

fn checks(session: &Session) -> Vec<Check> {
    let mut checks = vec![rights()];
    let scope = Scope { capabilities: Capability::ALL.into(), ..Scope::default() };
    let snapshot = session.host().snapshot(&scope);
    for capability in Capability::ALL {
        let name = capability.name().to_owned();
        checks.push(match snapshot.lacks.get(&capability) {
            None => Check { name, ok: true, detail: None, remedy: None },
            Some(how) => Check::bad(name, how, capability.remedy_for(how)),
        });
    }
    if let Ok(host) = &snapshot.host {
        checks.extend(capacity(&host_status(host, &snapshot)));
    }
    checks.push(cgroups());
    checks.push(landlock());
    checks.push(vmm(&session.vmm_program));
    checks.push(folder("state folder", &session.state_dir, "--state-dir"));
    checks.push(folder("run folder", &session.run_dir, "--run-dir"));
    let unseen = snapshot.host.err().into_iter().chain(snapshot.links.err()).chain(snapshot.vms.err());
    let unseen = unseen.chain(snapshot.pools.into_values().filter_map(|pool| pool.err()));
    checks.extend(
        unseen.map(|error| Check::bad(error.what, error.why, "see what its state is, and try again")),
    );
    checks
}

/// What VMs have and may have: no ability, but what people ask next.
fn capacity(host: &HostStatus) -> Vec<Check> {
    let memory = format!("{}, {} available", host.memory_text(), size(host.available_bytes));
    vec![
        Check::good("CPUs", host.cpu_text()),
        Check::good("memory", memory),
        Check::good("huge pages", host.pages_text()),
        Check::good("KSM", host.ksm_text()),
    ]
}

fn rights() -> Check {
    if rustix::process::geteuid().is_root() {
        Check::good("rights", "root")
    } else {
        Check::bad(
            "rights",
            "not root",
            "run it with `sudo`; without it `validate`, `explain` and `schema` work",
        )
    }
}

fn cgroups() -> Check {
    let name = "cgroups (limits of VMs)";
    match cgroup::lacking() {
        None => Check { name: name.to_owned(), ok: true, detail: None, remedy: None },
        Some(why) => Check::bad(
            name,
            why,
            "mount cgroup2 with memory, cpu and pids at /sys/fs/cgroup; in a container, delegate them. VMs run without limits",
        ),
    }
}

/// Not a lack: what it forbids is out of reach already.
fn landlock() -> Check {
    let detail = match capability::landlock_version() {
        Some(version) => format!("version {version}, a part of each VM's sandbox"),
        None => "not in this kernel, or off: a VM's sandbox has its other parts alone".to_owned(),
    };
    Check::good("Landlock", detail)
}

fn vmm(program: &Path) -> Check {
    let shown = program.display().to_string();
    if program.is_absolute() && is_program(program) {
        Check::good("VM program", shown)
    } else {
        let remedy = "put vmctl-vmm beside vmctl or into PATH, or name it with `--vmm`";
        Check::bad("VM program", format!("{shown} is not a program that can be run"), remedy)
    }
}

/// The folder, or the nearest one above it that is there, can be written to.
fn folder(name: &str, path: &Path, option: &str) -> Check {
    let present = path.ancestors().find(|path| path.exists()).unwrap_or(path);
    let writable = rustix::fs::access(present, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK);
    match writable {
        Ok(()) if present.is_dir() => Check::good(name, path.display().to_string()),
        Ok(()) => Check::bad(
            name,
            format!("{} is not a folder", present.display()),
            format!("choose another one with `{option}`"),
        ),
        Err(errno) => Check::bad(
            name,
            format!("{}: {errno}", present.display()),
            format!("run as root, or choose another one with `{option}`"),
        ),
    }
}
