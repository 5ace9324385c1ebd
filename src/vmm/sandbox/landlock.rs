//! Landlock: no file, no port, no abstract socket, no signal to anybody, whatever else fails. As much of
//! it as the kernel knows.

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, PathBeneath, PathFd, Ruleset, RulesetAttr as _,
    RulesetCreatedAttr as _, RulesetError, Scope,
};

use super::SandboxError;
use super::namespaces::VSOCK_DIRECTORY;

/// The newest that is known here.
const KNOWN: ABI = ABI::V10;

/// For the calling thread and all that it makes.
pub fn restrict(vsock: bool) -> Result<(), SandboxError> {
    let restrict = || -> Result<(), RulesetError> {
        let mut ruleset = Ruleset::default()
            .handle_access(AccessFs::from_all(KNOWN))?
            .handle_access(AccessNet::from_all(KNOWN))?
            .scope(Scope::from_all(KNOWN))?
            .create()?;
        // Its sockets may be connected to, and nothing be read or made.
        if vsock && let Ok(directory) = PathFd::new(VSOCK_DIRECTORY) {
            ruleset = ruleset.add_rule(PathBeneath::new(directory, AccessFs::ResolveUnix))?;
        }
        ruleset.restrict_self().map(|_| ())
    };
    restrict().map_err(|error| SandboxError::Landlock(error.to_string()))
}
