//! What logical volumes and groups carry of ours, as LVM tags: `vmctl.owner=vmctl:<set>:<Kind>/<name>`.
//! All of it is of characters that a tag may hold (`A-Za-z0-9_+.-/=!:#&`).

use crate::name::Mark;

pub const OWNER: &str = "vmctl.owner=";
pub const RETAINED: &str = "vmctl.retained=";
/// What a manifest with `reclaimPolicy: Delete` leaves.
pub const RECLAIM_DELETE: &str = "vmctl.reclaim=Delete";
/// Its content is not whole yet; or of a thin pool: it is not set up yet.
pub const MAKING: &str = "vmctl.making";
/// It was so many bytes long before it was extended, and what is beyond is not zeroed yet.
pub const GROWING: &str = "vmctl.growing=";

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tags {
    pub owner: Option<Mark>,
    pub retained: Option<Mark>,
    pub reclaim_delete: bool,
    pub making: bool,
    pub growing_from_bytes: Option<u64>,
}

impl Tags {
    pub fn parse(text: &str) -> Self {
        let mut tags = Self::default();
        for tag in text.split(',') {
            if let Some(mark) = tag.strip_prefix(OWNER) {
                tags.owner = mark.parse().ok();
            } else if let Some(mark) = tag.strip_prefix(RETAINED) {
                tags.retained = mark.parse().ok();
            } else if let Some(bytes) = tag.strip_prefix(GROWING) {
                tags.growing_from_bytes = bytes.parse().ok();
            }
            tags.reclaim_delete |= tag == RECLAIM_DELETE;
            tags.making |= tag == MAKING;
        }
        tags
    }
}

pub fn owner(mark: &Mark) -> String {
    format!("{OWNER}{mark}")
}

pub fn retained(mark: &Mark) -> String {
    format!("{RETAINED}{mark}")
}

pub fn growing(bytes: u64) -> String {
    format!("{GROWING}{bytes}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_read_back_and_are_legal() {
        let mark: Mark = "vmctl:default:Volume/web-root".parse().unwrap();
        let all = [owner(&mark), RECLAIM_DELETE.into(), MAKING.into(), growing(4096), "backup".into()];
        let legal = |c: char| c.is_ascii_alphanumeric() || "_+.-/=!:#&".contains(c);
        assert!(all.iter().all(|tag| tag.chars().all(legal)), "{all:?}");
        let tags = Tags::parse(&all.join(","));
        let expected = Tags {
            owner: Some(mark.clone()),
            retained: None,
            reclaim_delete: true,
            making: true,
            growing_from_bytes: Some(4096),
        };
        assert_eq!(tags, expected);
        assert_eq!(Tags::parse(&retained(&mark)).retained, Some(mark));
        assert_eq!(Tags::parse(""), Tags::default());
        assert_eq!(Tags::parse("vmctl.owner=nonsense,x"), Tags::default());
    }
}
