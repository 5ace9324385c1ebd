//! The user that a VM's process becomes: one that no other process of this host is.
//!
//! There is no list of who has which: a list can be lost, and be out of date. Whoever has a user holds an
//! abstract Unix socket with its number in its name, which the kernel gives to one holder at a time, and
//! takes back when the last process that has the descriptor is gone, however it went. The launcher binds
//! it and passes it on. The names are those of a network namespace: VMs are to be started from one.

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use sha2::Digest as _;

use crate::name::ObjectName;

/// VM processes run as users from here to 0x7fff_ffff. No distribution gives these out (systemd leaves
/// them alone, containers end below), and nothing on the host belongs to them.
const UID_BASE: u32 = 0x7000_0000;
const UID_MASK: u32 = 0x0fff_ffff;
/// Somebody may hold names only to be in the way; not all of those that are tried.
const ATTEMPTS: u32 = 64;
/// From one attempt to the next: odd, so that all are reached, and far, for neighbours fall together.
const STRIDE: u32 = 0x009e_3779;

/// A user that is nobody else's as long as `hold` is open anywhere.
pub struct User {
    pub uid: u32,
    pub hold: OwnedFd,
}

/// Takes a user for the VM's next process: the same as last time, unless somebody has that one.
pub fn claim(vm: &ObjectName) -> io::Result<User> {
    let first = first_choice(vm);
    for attempt in 0..ATTEMPTS {
        let uid = UID_BASE | (first.wrapping_add(attempt.wrapping_mul(STRIDE)) & UID_MASK);
        match hold(uid) {
            Err(rustix::io::Errno::ADDRINUSE) => {}
            other => return Ok(User { uid, hold: other? }),
        }
    }
    Err(io::Error::other(format!("{ATTEMPTS} users were tried, and other processes are all of them")))
}

/// The first that is tried for a VM.
pub fn first_choice(vm: &ObjectName) -> u32 {
    let digest = sha2::Sha256::digest(vm.as_str().as_bytes());
    let word = digest.iter().take(4).fold(0u32, |word, &byte| word << 8 | u32::from(byte));
    UID_BASE | word & UID_MASK
}

fn hold(uid: u32) -> rustix::io::Result<OwnedFd> {
    let address = SocketAddrUnix::new_abstract_name(format!("vmctl/user/{uid}").as_bytes())?;
    // Never listened on: who connects is refused.
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    rustix::net::bind(&socket, &address)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn name(text: &str) -> ObjectName {
        ObjectName::parse(text).unwrap()
    }

    #[test]
    fn users_are_high_and_lasting() {
        let web = first_choice(&name("web"));
        assert_eq!(web, first_choice(&name("web")));
        assert_ne!(web, first_choice(&name("db")));
        assert!((0x7000_0000..=0x7fff_ffff).contains(&web));
    }

    #[test]
    fn no_two_have_the_same_however_they_come() {
        let vm = name("claimed-by-many");
        let claim_ten = || (0..10).map(|_| claim(&vm).unwrap()).collect::<Vec<_>>();
        let users: Vec<User> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..5).map(|_| scope.spawn(claim_ten)).collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        let uids: BTreeSet<u32> = users.iter().map(|user| user.uid).collect();
        assert_eq!(uids.len(), 50);
        assert!(uids.iter().all(|uid| (0x7000_0000..=0x7fff_ffff).contains(uid)));
        // Free again with the last descriptor.
        let first = users.into_iter().find(|user| user.uid == first_choice(&vm)).expect("one has it");
        let copy = first.hold.try_clone().unwrap();
        drop(first);
        assert_ne!(claim(&vm).unwrap().uid, first_choice(&vm));
        drop(copy);
        assert_eq!(claim(&vm).unwrap().uid, first_choice(&vm));
    }
}
