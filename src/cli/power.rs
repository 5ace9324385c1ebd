//! What `start`, `stop`, `restart`, `pause` and `resume` share: VMs by name, as they are defined on this host.

use std::collections::BTreeSet;

use clap::Args;

use super::args::{Format, SetArg, parse_kind, parse_name};
use super::error::{CliError, Result};
use super::session::Session;
use super::{direct, progress};
use crate::host::{Host, Scope};
use crate::kinds::virtual_machine::power::{Power, power};
use crate::name::{Kind, ObjectName};

/// Which VMs.
#[derive(Debug, Args)]
pub struct VmArgs {
    /// Names of VMs: `web` or `vm/web`
    #[arg(value_name = "VM", required = true)]
    vms: Vec<String>,
    #[command(flatten)]
    set: SetArg,
    /// How to print the outcome
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub output: Format,
}

/// `web` or `vm/web`.
pub fn vm_name(text: &str) -> Result<ObjectName> {
    let Some((kind, name)) = text.split_once('/') else { return parse_name(text) };
    match parse_kind(kind)? {
        Kind::VirtualMachine => parse_name(name),
        other => Err(CliError::usage(format!("{other}/{name} is not a VM"))),
    }
}

impl VmArgs {
    pub fn run(&self, session: &Session, power_to: Power, command: &str) -> Result {
        let names = self.vms.iter().map(|text| vm_name(text)).collect::<Result<BTreeSet<_>>>()?;
        let host = session.host();
        let look = || {
            let snapshot = host.snapshot(&Scope::default());
            let actions = names.iter().map(|name| power(name, &self.set.set, power_to, &snapshot)).collect();
            direct::plan(&self.set.set, &snapshot, actions)
        };
        let first = look();
        if !first.has_steps() {
            return direct::report(session, self.output, &first, &Default::default());
        }
        let _lock = session.lock(command, std::time::Duration::ZERO)?;
        let plan = look();
        let silent = self.output == Format::Json;
        let outcomes = progress::with_live(&session.out, silent, |live| {
            crate::pipeline::apply(&plan, &host, &mut |progress| live.hear(progress))
        });
        direct::report(session, self.output, &plan, &outcomes)
    }
}

/// The timeout of a graceful stop, in the form that steps want.
pub fn stop_how(force: bool, timeout: std::time::Duration) -> crate::host::step::StopHow {
    use crate::host::step::StopHow;
    match u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX) {
        _ if force => StopHow::Forced,
        0 => StopHow::Forced,
        timeout_ms => StopHow::Graceful { timeout_ms },
    }
}
