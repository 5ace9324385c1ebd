//! Why a command did not do what it was asked: what, what to do about it, and the exit code.

use serde::Serialize;

use super::exit::Exit;
use crate::load::Diagnostic;

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CliError {
    pub exit_code: Exit,
    pub message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// Of the manifests, each with its place.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<Diagnostic>,
}

impl CliError {
    pub fn new(exit_code: Exit, message: impl Into<String>) -> Self {
        Self { exit_code, message: message.into(), hint: None, problems: Vec::new() }
    }

    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Invalid, message)
    }

    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(Exit::Failed, message)
    }

    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    pub fn problems(mut self, problems: Vec<Diagnostic>) -> Self {
        self.problems = problems;
        self
    }
}

pub type Result<T = Exit, E = CliError> = std::result::Result<T, E>;
