//! Whose a link is: the one place that decides whether we may touch it.

use super::link_failure::Doing;
use super::links::RawLink;
use crate::host::error::StepError;
use crate::name::{Kind, LinkName, Mark};

/// The kernel's bound on `ifalias` (`IFALIASZ` less its NUL).
const ALIAS_BYTES_MAX: usize = 255;
/// A mark whose part begins so is on a link that isn't ours, whose membership in our bridge is.
const PORT_PART: &str = "port-";

/// The mark as it is written on a link.
pub fn alias_text(mark: &Mark, link: &LinkName) -> Result<String, StepError> {
    let text = mark.to_string();
    if text.len() > ALIAS_BYTES_MAX {
        let why = format!("its mark has {} bytes, and the kernel allows {ALIAS_BYTES_MAX}", text.len());
        return Err(StepError::failed(Doing::Mark.phrase(link), why));
    }
    Ok(text)
}

/// Of a link that isn't ours, but whose membership in our bridge is.
pub fn is_port_mark(mark: &Mark) -> bool {
    // (A NIC may be named so: a VM's taps are its own.)
    mark.owner.kind == Kind::Bridge && mark.part.as_ref().is_some_and(|part| part.starts_with(PORT_PART))
}

pub fn require_mark(link: &RawLink, mark: &Mark, what: &str) -> Result<(), StepError> {
    if link.alias.as_ref() == Some(&mark.to_string()) { Ok(()) } else { Err(not_ours(link, what.to_owned())) }
}

/// Any mark of ours, of whichever set: the plan has seen to the set.
pub fn require_ours_or_port(link: &RawLink, what: String) -> Result<Mark, StepError> {
    link.mark().ok_or_else(|| not_ours(link, what))
}

/// A mark on a link that is ours as a whole.
pub fn require_ours(link: &RawLink, what: String) -> Result<(), StepError> {
    match link.mark() {
        Some(mark) if !is_port_mark(&mark) => Ok(()),
        _ => Err(not_ours(link, what)),
    }
}

pub fn not_ours(link: &RawLink, what: String) -> StepError {
    let why = match &link.alias {
        Some(alias) => format!("{} is there with the mark `{alias}`", link.name),
        None => format!("{} is there without a mark of ours", link.name),
    };
    StepError::NotOurs { what, why }
}
