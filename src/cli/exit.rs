//! How a command ends, as a number. Scripts rely on these: a number never changes its meaning.

use std::process::ExitCode;

use serde::Serialize;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    Ok = 0,
    Differs = 1,
    Invalid = 2,
    Failed = 3,
    TimedOut = 4,
    Refused = 5,
    HostChanged = 6,
    /// Kept free for transactions that roll back.
    RolledBack = 7,
    Locked = 8,
    Interrupted = 130,
}

impl Exit {
    pub const ALL: [Exit; 10] = [
        Self::Ok,
        Self::Differs,
        Self::Invalid,
        Self::Failed,
        Self::TimedOut,
        Self::Refused,
        Self::HostChanged,
        Self::RolledBack,
        Self::Locked,
        Self::Interrupted,
    ];

    pub fn code(self) -> u8 {
        self as u8
    }

    pub fn meaning(self) -> &'static str {
        match self {
            Self::Ok => "done, or no difference",
            Self::Differs => "`diff` found differences",
            Self::Invalid => "wrong usage, or invalid manifests; nothing was touched",
            Self::Failed => "some step failed, or an object is blocked or not there",
            Self::TimedOut => "the wait timed out",
            Self::Refused => "a guard refused; see --approve",
            Self::HostChanged => "the host has changed since the plan was saved",
            Self::RolledBack => "rolled back",
            Self::Locked => "another run holds the lock",
            Self::Interrupted => "interrupted; running steps were finished",
        }
    }

    /// The table that the help prints.
    pub fn table() -> String {
        Self::ALL.iter().map(|exit| format!("  {:>3}  {}\n", exit.code(), exit.meaning())).collect()
    }
}

/// As its number.
impl Serialize for Exit {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u8(self.code())
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit.code())
    }
}
