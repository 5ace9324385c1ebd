//! `vmctl delete`: removes what a person names, and nothing else.

use std::collections::BTreeSet;
use std::time::Duration;

use clap::Args;

use super::apply::{Task, parse_hash};
use super::args::{Format, Resource, SetArg, SourceArgs, parse_duration, parse_resources};
use super::error::{CliError, Result};
use super::exit::Exit;
use super::power::stop_how;
use super::session::Session;
use crate::host::Host;
use crate::name::ObjectId;
use crate::plan::{Policy, Removal, plan};
use crate::resolve::Desired;

/// Remove objects from the host
///
/// A VM is shut down first. The data of volumes stays in its pool, unless the volume's reclaimPolicy was applied
/// as Delete: then it goes to the pool's trash, with --approve. Objects of other sets are never touched.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  vmctl delete vm/web volume/web-root
  vmctl delete vm web db
  vmctl delete -f web.yaml                what that file declares
  vmctl delete vm/web --dry-run           what would happen")]
pub struct Command {
    /// Objects: KIND/NAME, or KIND NAME…
    #[arg(value_name = "KIND/NAME", conflicts_with = "filename", required_unless_present = "filename")]
    objects: Vec<String>,
    #[command(flatten)]
    source: SourceArgs,
    #[command(flatten)]
    set: SetArg,
    /// Don't call it an error if an object is not there (with -f it never is)
    #[arg(long)]
    ignore_not_found: bool,
    /// Print the plan, change nothing, exit 0
    #[arg(long)]
    dry_run: bool,
    /// Allow what was refused in the plan with this hash, and only in that plan
    #[arg(long, value_name = "HASH", value_parser = parse_hash)]
    approve: Option<String>,
    /// How long a guest has to shut down before it is stopped by force: 90s, 5m; 0: at once
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_duration)]
    timeout: Duration,
    /// How long to wait for another run to end
    #[arg(long, value_name = "TIME", default_value = "0", value_parser = parse_duration)]
    lock_timeout: Duration,
    /// How to print the outcome
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub output: Format,
}

impl Command {
    pub fn run(self, session: &Session) -> Result {
        let named = !self.objects.is_empty();
        let ids = self.ids(session)?;
        let desired = Desired::nothing(self.set.set.clone());
        let policy =
            Policy { removal: Removal::Only(ids.clone()), only: None, approve: self.approve.clone() };
        let host = session.host();
        let found = plan(&desired, &host.snapshot(&desired.scope()), &policy);
        let found: BTreeSet<&ObjectId> = found.actions.iter().map(|action| &action.object).collect();
        let missing: Vec<String> =
            ids.iter().filter(|id| !found.contains(id)).map(ToString::to_string).collect();
        if !missing.is_empty() && named && !self.ignore_not_found {
            let message = format!("set {} has no {} on this host", self.set.set, missing.join(", "));
            return Err(
                CliError::failed(message).hint("nothing was removed; `vmctl get all` lists what is there")
            );
        }
        if !missing.is_empty() {
            session.out.note(&format!("Not there: {}", missing.join(", ")));
        }
        let task = Task {
            desired: &desired,
            policy: &policy,
            warnings: &[],
            dry_run: self.dry_run,
            lock_timeout: self.lock_timeout,
            output: self.output,
            command: "vmctl delete",
            stop: Some(stop_how(false, self.timeout)),
        };
        if found.is_empty() && self.output == Format::Text {
            return Ok(Exit::Ok);
        }
        task.perform(session, &host, None)
    }

    fn ids(&self, session: &Session) -> Result<BTreeSet<ObjectId>> {
        if self.objects.is_empty() {
            return Ok(session.declare(&self.set.set, &self.source)?.manifests.into_keys().collect());
        }
        let one = |resource| match resource {
            Resource::Object(id) => Ok(id),
            Resource::All => Err(CliError::usage("`all` can't be deleted; name the objects")),
            Resource::Kind(kind) => {
                Err(CliError::usage(format!("every {kind} can't be deleted; name the objects: {kind}/NAME")))
            }
        };
        parse_resources(&self.objects)?.into_iter().map(one).collect()
    }
}
