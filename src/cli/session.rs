//! What every command works with: where the state is, which host, and where to print.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use clap::Args;

use super::args::SourceArgs;
use super::error::{CliError, Result};
use super::exit::Exit;
use super::output::{Color, Output};
use crate::host::linux::storage::{Progress, Storage};
use crate::host::linux::{HostLock, LinuxHost, LockError};
use crate::load::{self, Options};
use crate::name::SetName;
use crate::pipeline::{self, Declaration};

/// Options of all commands.
#[derive(Debug, Args)]
#[command(next_help_heading = "Global options")]
pub struct GlobalArgs {
    /// Where definitions and the pools' index live; outlives a reboot
    #[arg(long, global = true, env = "VMCTL_STATE_DIR", default_value = "/var/lib/vmctl", hide_env_values = true,
          value_name = "DIR", value_hint = clap::ValueHint::DirPath)]
    pub state_dir: PathBuf,

    /// Where running VMs have their sockets
    #[arg(long, global = true, env = "VMCTL_RUN_DIR", default_value = "/run/vmctl", hide_env_values = true,
          value_name = "DIR", value_hint = clap::ValueHint::DirPath)]
    pub run_dir: PathBuf,

    /// The program that runs one VM [default: vmctl-vmm beside this program, then in PATH]
    #[arg(long, global = true, env = "VMCTL_VMM", hide_env_values = true, value_name = "PATH",
          value_hint = clap::ValueHint::ExecutablePath)]
    pub vmm: Option<PathBuf>,

    /// Colour the output; NO_COLOR is obeyed by auto
    #[arg(long, global = true, value_name = "WHEN", default_value = "auto")]
    pub color: Color,

    /// Print results and errors only
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,

    /// Print each step, too
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

#[derive(Debug)]
pub struct Session {
    pub out: Output,
    pub state_dir: PathBuf,
    pub run_dir: PathBuf,
    pub vmm_program: PathBuf,
}

impl Session {
    pub fn new(args: GlobalArgs, json: bool) -> Self {
        Self {
            out: Output::new(args.color, args.quiet, args.verbose, json),
            state_dir: absolute(args.state_dir),
            run_dir: absolute(args.run_dir),
            vmm_program: args.vmm.map(absolute).unwrap_or_else(find_vmm),
        }
    }

    pub fn host(&self) -> LinuxHost {
        let host = LinuxHost::new(&self.state_dir, &self.run_dir, &self.vmm_program);
        if !self.out.is_terminal {
            return host;
        }
        let copies = Arc::clone(&self.out.copies);
        let hook = move |progress: Progress| {
            let mut copies = copies.lock().unwrap_or_else(PoisonError::into_inner);
            if progress.done_bytes == progress.total_bytes {
                copies.remove(&progress.path);
            } else {
                copies.insert(progress.path, (progress.done_bytes, progress.total_bytes));
            }
        };
        host.with_storage(Storage::new(&self.state_dir).with_progress(Arc::new(hook)))
    }

    /// One run at a time; `command` is what others are told while we hold the lock.
    pub fn lock(&self, command: &str, wait: Duration) -> Result<HostLock> {
        HostLock::acquire(&self.state_dir, command, wait).map_err(|error| match error {
            LockError::Locked { .. } => CliError::new(Exit::Locked, error.to_string())
                .hint("wait for it with `--lock-timeout 1m`, or see what it is doing"),
            LockError::Io { .. } => CliError::failed(error.to_string())
                .hint("run as root, or choose another folder with `--state-dir`"),
        })
    }

    /// From files to what is desired; every problem at once, before the host is looked at.
    pub fn declare(&self, set: &SetName, source: &SourceArgs) -> Result<Declaration> {
        if source.filename.is_empty() {
            return Err(
                CliError::usage("no manifests were named").hint("say which: `-f FILE`, `-f DIR` or `-f -`")
            );
        }
        let loaded = load::load(&source.inputs()?, &Options::default());
        let declaration = pipeline::declare(set.clone(), loaded)
            .map_err(|invalid| CliError::usage(invalid.to_string()).problems(invalid.0))?;
        if declaration.manifests.is_empty() {
            return Err(CliError::usage("there are no manifests in the source").hint(
                "an empty source changes nothing; to remove objects, name them: `vmctl delete KIND/NAME`",
            ));
        }
        self.out.warnings(&declaration.warnings);
        Ok(declaration)
    }
}

/// Paths go into definitions and to other processes, which live in other directories.
fn absolute(path: PathBuf) -> PathBuf {
    std::path::absolute(&path).unwrap_or(path)
}

fn find_vmm() -> PathBuf {
    const NAME: &str = "vmctl-vmm";
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join(NAME)));
    let in_path = || {
        let path = std::env::var_os("PATH")?;
        std::env::split_paths(&path).map(|directory| directory.join(NAME)).find(|program| is_program(program))
    };
    beside.filter(|program| is_program(program)).or_else(in_path).unwrap_or_else(|| PathBuf::from(NAME))
}

pub fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.metadata().is_ok_and(|facts| facts.is_file() && facts.permissions().mode() & 0o111 != 0)
}
