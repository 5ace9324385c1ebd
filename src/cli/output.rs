//! Where results and errors go: results to stdout, all else to stderr. A reader that goes away (a closed
//! pipe) ends the printing and not the work.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use clap::ValueEnum;
use serde::Serialize;

use super::error::CliError;
use crate::load::Diagnostic;
use crate::report::text::Style;
use crate::report::units::size;

/// When output is coloured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Color {
    // On a terminal, unless NO_COLOR is set.
    #[default]
    Auto,
    Always,
    Never,
}

impl Color {
    fn wanted(self, is_terminal: bool) -> bool {
        match self {
            Color::Always => true,
            Color::Never => false,
            Color::Auto => {
                let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
                is_terminal && !set("NO_COLOR") && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
            }
        }
    }
}

#[derive(Debug)]
pub struct Output {
    /// For stdout.
    pub style: Style,
    stderr_style: Style,
    /// stdout is a terminal that lines can be rewritten on.
    pub is_terminal: bool,
    pub quiet: bool,
    pub verbose: u8,
    /// Errors are JSON objects.
    pub json: bool,
    failed: AtomicBool,
    /// What is being copied, and how far that is: bytes done, and in all (0: not known).
    pub copies: Copies,
}

pub type Copies = Arc<Mutex<BTreeMap<PathBuf, (u64, u64)>>>;

impl Output {
    pub fn new(color: Color, quiet: bool, verbose: u8, json: bool) -> Self {
        let (stdout, stderr) = (io::stdout().is_terminal(), io::stderr().is_terminal());
        let width = if stdout { terminal_width() } else { None };
        Self {
            style: Style { colour: color.wanted(stdout), width },
            stderr_style: Style { colour: color.wanted(stderr), width: None },
            is_terminal: stdout && std::env::var_os("TERM").is_none_or(|term| term != "dumb"),
            quiet,
            verbose,
            json,
            failed: AtomicBool::new(false),
            copies: Copies::default(),
        }
    }

    /// `1.2Gi of 4.0Gi, 30 %`, while something is copied.
    pub fn copied(&self) -> Option<String> {
        let copies = self.copies.lock().unwrap_or_else(PoisonError::into_inner);
        let (done, total) = copies.values().fold((0, 0), |sum, copy| (sum.0 + copy.0, sum.1 + copy.1));
        match (copies.is_empty(), total) {
            (true, _) => None,
            (false, 0) => Some(size(done)),
            (false, _) => {
                Some(format!("{} of {}, {} %", size(done), size(total), done.min(total) * 100 / total))
            }
        }
    }

    /// A result.
    pub fn print(&self, text: &str) {
        self.print_bytes(text.as_bytes());
    }

    pub fn print_bytes(&self, bytes: &[u8]) {
        if self.failed.load(Ordering::Relaxed) {
            return;
        }
        let mut stdout = io::stdout().lock();
        if let Err(error) = stdout.write_all(bytes).and_then(|()| stdout.flush()) {
            self.failed.store(true, Ordering::Relaxed);
            if error.kind() != io::ErrorKind::BrokenPipe {
                self.error(&CliError::failed(format!("write to stdout: {error}")));
            }
        }
    }

    pub fn json<T: Serialize>(&self, value: &T) -> Result<(), CliError> {
        let text = serde_json::to_string_pretty(value)
            .map_err(|error| CliError::failed(format!("write JSON: {error}")))?;
        self.print(&format!("{text}\n"));
        Ok(())
    }

    /// Nobody reads stdout any more.
    pub fn is_closed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }

    /// Something that is worth knowing and is no result.
    pub fn note(&self, text: &str) {
        if !self.quiet {
            self.to_stderr(&format!("{text}\n"));
        }
    }

    pub fn warnings(&self, warnings: &[Diagnostic]) {
        if self.json || self.quiet {
            return;
        }
        for warning in warnings {
            self.to_stderr(&format!("{}\n", warning.render(self.stderr_style.colour)));
        }
    }

    pub fn error(&self, error: &CliError) {
        if self.json {
            // Plain data with text keys: it serialises.
            let value = serde_json::json!({ "error": error });
            self.to_stderr(&format!("{value:#}\n"));
            return;
        }
        let mut text = String::new();
        for problem in &error.problems {
            text.push_str(&format!("{}\n\n", problem.render(self.stderr_style.colour)));
        }
        text.push_str(&format!("{} {}\n", self.stderr_style.red("error:"), error.message));
        if let Some(hint) = &error.hint {
            text.push_str(&format!("{} {hint}\n", self.stderr_style.dim("hint:")));
        }
        self.to_stderr(&text);
    }

    fn to_stderr(&self, text: &str) {
        // There is nobody else to tell.
        let _ = io::stderr().write_all(text.as_bytes());
    }
}

/// Columns of the terminal behind stdout.
fn terminal_width() -> Option<usize> {
    let size = rustix::termios::tcgetwinsize(io::stdout()).ok()?;
    (size.ws_col >= 40).then_some(usize::from(size.ws_col))
}
