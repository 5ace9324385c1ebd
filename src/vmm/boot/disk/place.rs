//! The places of a disk where files may lie: its partitions, each with its file system or why there is none.

use super::ext::Ext;
use super::fat::Fat;
use super::filesystem::FileSystem;
use super::read::{ReadError, Volume};
use super::signature::{self, Content};
use super::table::Partition;

pub(super) struct Place {
    pub partition: Partition,
    pub content: Opened,
}

pub(super) enum Opened {
    FileSystem(FileSystem),
    /// What lies there and why it isn't read.
    Refused {
        kind: &'static str,
        reason: String,
    },
    Nothing,
}

impl Place {
    pub fn open(partition: Partition) -> Self {
        let content = open(&partition.volume);
        Self { partition, content }
    }

    pub fn file_system(&self) -> Option<&FileSystem> {
        match &self.content {
            Opened::FileSystem(file_system) => Some(file_system),
            Opened::Refused { .. } | Opened::Nothing => None,
        }
    }

    /// `partition 1 (ext4)`.
    pub fn describe(&self) -> String {
        let kind = match &self.content {
            Opened::FileSystem(file_system) => file_system.kind(),
            Opened::Refused { kind, .. } => kind,
            Opened::Nothing => "nothing known",
        };
        format!("{} ({kind})", self.partition.name())
    }
}

fn open(volume: &Volume) -> Opened {
    let refused = |kind, error: ReadError| Opened::Refused { kind, reason: error.to_string() };
    match signature::content(volume) {
        Content::Ext => match Ext::open_volume(volume) {
            Ok(ext) => Opened::FileSystem(FileSystem::Ext(ext)),
            Err(error) => refused("ext4", error),
        },
        Content::Fat => match Fat::open_volume(volume) {
            Ok(fat) => Opened::FileSystem(FileSystem::Fat(fat)),
            Err(error) => refused("vfat", error),
        },
        Content::Foreign(kind) => Opened::Refused { kind, reason: "not read here".into() },
        Content::Irrelevant(kind) => Opened::Refused { kind, reason: "holds no files".into() },
        Content::Unknown => Opened::Nothing,
    }
}
