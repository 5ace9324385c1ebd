//! `vmctl completion`: what a shell needs to complete command lines.

use clap::{Args, CommandFactory, ValueEnum};
use clap_complete::Shell as Generator;

use super::error::Result;
use super::exit::Exit;
use super::session::Session;

/// Print a shell's completion script
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  source <(vmctl completion bash)                                        this shell only
  vmctl completion bash > /etc/bash_completion.d/vmctl                   all shells
  vmctl completion zsh > \"${fpath[1]}/_vmctl\"
  vmctl completion fish > ~/.config/fish/completions/vmctl.fish")]
pub struct Command {
    shell: Shell,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Shell {
    Bash,
    Zsh,
    Fish,
    Elvish,
}

impl Command {
    pub fn run(self, session: &Session) -> Result {
        let generator = match self.shell {
            Shell::Bash => Generator::Bash,
            Shell::Zsh => Generator::Zsh,
            Shell::Fish => Generator::Fish,
            Shell::Elvish => Generator::Elvish,
        };
        let mut script = Vec::new();
        clap_complete::generate(generator, &mut super::Cli::command(), "vmctl", &mut script);
        session.out.print_bytes(&script);
        Ok(Exit::Ok)
    }
}
