//! The command line: arguments to work, results to text or JSON, errors to exit codes. One file a command.
//!
//! Nothing is decided here about the host: that is `plan`'s. What a command changes, it changes through
//! plans and their steps.

mod adopt;
mod agent;
mod apply;
mod args;
mod check;
mod completion;
mod console;
mod delete;
mod describe;
mod diff;
mod direct;
mod error;
mod exit;
mod explain;
mod export;
mod get;
mod graph;
mod init;
mod interrupt;
mod lists;
mod logs;
mod objects;
mod output;
mod pause;
mod power;
mod progress;
mod restart;
mod resume;
mod saved_plan;
mod schema;
mod selector;
mod session;
mod start;
mod stop;
mod top;
mod validate;
mod version;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{ColorChoice, CommandFactory, FromArgMatches, Parser, Subcommand};

use args::Format;
use error::CliError;
use exit::Exit;
use session::{GlobalArgs, Session};

/// Declares virtual machines, disks and networks on this host, and makes it so.
#[derive(Debug, Parser)]
#[command(name = "vmctl", version, max_term_width = 110, arg_required_else_help = true, after_long_help = long_help())]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    global: GlobalArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    Apply(apply::Command),
    Diff(diff::Command),
    Validate(validate::Command),
    Init(init::Command),
    Get(get::Command),
    Describe(describe::Command),
    Graph(graph::Command),
    Delete(delete::Command),
    Start(start::Command),
    Stop(stop::Command),
    Restart(restart::Command),
    Pause(pause::Command),
    Resume(resume::Command),
    Console(console::Command),
    Logs(logs::Command),
    Top(top::Command),
    List(lists::list::Command),
    Domiflist(lists::domiflist::Command),
    Domblklist(lists::domblklist::Command),
    VolList(lists::vol_list::Command),
    PoolList(lists::pool_list::Command),
    NetList(lists::net_list::Command),
    Adopt(adopt::Command),
    Export(export::Command),
    Agent(agent::Command),
    Explain(explain::Command),
    Schema(schema::Command),
    Check(check::Command),
    Completion(completion::Command),
    Version(version::Command),
}

fn long_help() -> String {
    format!("Exit codes:\n{}", Exit::table())
}

impl Command {
    /// Whether errors are JSON, as results are.
    fn is_json(&self) -> bool {
        match self {
            Self::Apply(command) => command.output == Format::Json,
            Self::Diff(command) => command.output == diff::Format::Json,
            Self::Validate(command) => command.output == Format::Json,
            Self::Get(command) => command.output == get::Format::Json,
            Self::Delete(command) => command.output == Format::Json,
            Self::Start(command) => command.vms.output == Format::Json,
            Self::Stop(command) => command.vms.output == Format::Json,
            Self::Restart(command) => command.vms.output == Format::Json,
            Self::Pause(command) => command.vms.output == Format::Json,
            Self::Resume(command) => command.vms.output == Format::Json,
            Self::Explain(command) => command.output == Format::Json,
            Self::Check(command) => command.output == Format::Json,
            Self::Version(command) => command.output == Format::Json,
            Self::Top(command) => command.output == top::Format::Json,
            Self::Graph(command) => command.output == graph::Format::Json,
            Self::List(command) => command.view.output == lists::Format::Json,
            Self::Domiflist(command) => command.view.output == lists::Format::Json,
            Self::Domblklist(command) => command.view.output == lists::Format::Json,
            Self::VolList(command) => command.view.output == lists::Format::Json,
            Self::PoolList(command) => command.view.output == lists::Format::Json,
            Self::NetList(command) => command.view.output == lists::Format::Json,
            Self::Init(_)
            | Self::Describe(_)
            | Self::Console(_)
            | Self::Logs(_)
            | Self::Adopt(_)
            | Self::Agent(_)
            | Self::Export(_)
            | Self::Schema(_)
            | Self::Completion(_) => false,
        }
    }

    fn run(self, session: &Session) -> error::Result {
        match self {
            Self::Apply(command) => command.run(session),
            Self::Diff(command) => command.run(session),
            Self::Validate(command) => command.run(session),
            Self::Init(command) => command.run(session),
            Self::Get(command) => command.run(session),
            Self::Describe(command) => command.run(session),
            Self::Delete(command) => command.run(session),
            Self::Start(command) => command.run(session),
            Self::Stop(command) => command.run(session),
            Self::Restart(command) => command.run(session),
            Self::Pause(command) => command.run(session),
            Self::Resume(command) => command.run(session),
            Self::Console(command) => command.run(session),
            Self::Logs(command) => command.run(session),
            Self::Top(command) => command.run(session),
            Self::Graph(command) => command.run(session),
            Self::List(command) => command.run(session),
            Self::Domiflist(command) => command.run(session),
            Self::Domblklist(command) => command.run(session),
            Self::VolList(command) => command.run(session),
            Self::PoolList(command) => command.run(session),
            Self::NetList(command) => command.run(session),
            Self::Adopt(command) => command.run(session),
            Self::Export(command) => command.run(session),
            Self::Agent(command) => command.run(session),
            Self::Explain(command) => command.run(session),
            Self::Schema(command) => command.run(session),
            Self::Check(command) => command.run(session),
            Self::Completion(command) => command.run(session),
            Self::Version(command) => command.run(session),
        }
    }
}

/// Runs one command line; the whole of `bin/vmctl.rs`.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let command = Cli::command().color(early_color(&arguments));
    let parsed = command.try_get_matches_from(&arguments).and_then(|matches| Cli::from_arg_matches(&matches));
    let cli = match parsed {
        Ok(cli) => cli,
        Err(error) => return usage(&error, &arguments).into(),
    };
    let session = Session::new(cli.global, cli.command.is_json());
    match cli.command.run(&session) {
        Ok(exit) => exit.into(),
        Err(error) => {
            session.out.error(&error);
            error.exit_code.into()
        }
    }
}

/// Help, or what is wrong with the arguments.
fn usage(error: &clap::Error, arguments: &[OsString]) -> Exit {
    if error.use_stderr() && wants_json(arguments) {
        let text = error.to_string();
        let message = text.trim_start_matches("error: ").trim();
        let value = serde_json::json!({ "error": CliError::usage(message) });
        // There is nobody else to tell.
        let _ = std::io::Write::write_all(&mut std::io::stderr(), format!("{value:#}\n").as_bytes());
    } else {
        // A reader that went away has seen enough.
        let _ = error.print();
    }
    if error.use_stderr() { Exit::Invalid } else { Exit::Ok }
}

/// Whether `-o json` was asked for, of arguments that could not be parsed.
fn wants_json(arguments: &[OsString]) -> bool {
    let words: Vec<&str> = arguments.iter().filter_map(|word| word.to_str()).collect();
    words.iter().any(|word| matches!(*word, "-ojson" | "-o=json" | "--output=json"))
        || words.windows(2).any(|pair| matches!(pair, ["-o" | "--output", "json"]))
}

/// `--color` decides about the help too, which is printed before arguments are parsed.
fn early_color(arguments: &[OsString]) -> ColorChoice {
    let words: Vec<&str> = arguments.iter().filter_map(|word| word.to_str()).collect();
    let after = words.windows(2).find(|pair| pair[0] == "--color").map(|pair| pair[1]);
    match after.or_else(|| words.iter().find_map(|word| word.strip_prefix("--color="))) {
        Some("always") => ColorChoice::Always,
        Some("never") => ColorChoice::Never,
        _ => ColorChoice::Auto,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_hold_together() {
        Cli::command().debug_assert();
    }
}
