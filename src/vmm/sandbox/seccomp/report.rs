//! The last words of a process whose thread made a call that isn't listed. They go to
//! the exit record, or, before there is one, to the launcher.
//!
//! All of it runs in a signal handler, in whatever state the thread was: no allocation, no lock, and only
//! calls that every filter allows.

use std::fmt::{self, Write as _};
use std::io;
use std::ptr;

use crate::vmm::exit;
use crate::vmm::protocol::LAUNCH_FD;

/// As a shell would show it.
const STATUS: libc::c_int = 128 + libc::SIGSYS;
/// `si_code` of a SIGSYS by a seccomp filter.
const SYS_SECCOMP: libc::c_int = 1;

pub fn install() -> io::Result<()> {
    // SAFETY: an all-zero sigaction is a valid one.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction =
        handle as extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) as usize;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: the handler is async-signal-safe: it formats into its own stack, writes and ends.
    if unsafe { libc::sigaction(libc::SIGSYS, &action, ptr::null_mut()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// What SIGSYS carries (`_sigsys` in the kernel's `siginfo`), after three numbers and padding.
#[repr(C)]
struct CallInfo {
    header: [libc::c_int; 4],
    address: *mut libc::c_void,
    number: libc::c_int,
    architecture: libc::c_uint,
}

extern "C" fn handle(_: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives a SA_SIGINFO handler valid pointers to both.
    let (code, call, context) =
        unsafe { ((*info).si_code, &*info.cast::<CallInfo>(), &*context.cast::<libc::ucontext_t>()) };
    if code != SYS_SECCOMP {
        // SAFETY: _exit has no preconditions.
        unsafe { libc::_exit(STATUS) }
    }
    let arguments = [libc::REG_RDI, libc::REG_RSI, libc::REG_RDX, libc::REG_R10, libc::REG_R8, libc::REG_R9]
        .map(|register| context.uc_mcontext.gregs[register as usize] as u64);
    let mut name = [0u8; 16];
    // SAFETY: the kernel writes at most 16 bytes there, the last one zero.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    let text = Text::of(&name, call.number, call.architecture, &arguments, exit::record_fd().is_some());
    // SAFETY: the buffer is valid for its length. The descriptors are ours; if one isn't open any more
    // there is nobody to tell. _exit has no preconditions.
    unsafe {
        match exit::record_fd() {
            Some(fd) => libc::pwrite(fd, text.bytes.as_ptr().cast(), text.length, 0),
            None => libc::write(LAUNCH_FD, text.bytes.as_ptr().cast(), text.length),
        };
        libc::_exit(STATUS)
    }
}

/// A message in a fixed buffer; what doesn't fit is left out.
struct Text {
    bytes: [u8; 512],
    length: usize,
}

impl Text {
    /// An exit record, or a launch's reply, in the form that `serde_json` reads.
    fn of(name: &[u8], number: i32, architecture: u32, arguments: &[u64; 6], record: bool) -> Self {
        let mut text = Self { bytes: [0; 512], length: 0 };
        let (before, after) = if record {
            (r#"{"reason":"internal","message":""#, r#""}"#)
        } else {
            (r#"{"failed":{"error":""#, r#""}}"#)
        };
        // Writing to it can't fail.
        let _ = text.write_str(before);
        let _ = text.write_str("seccomp (SIGSYS): the thread ");
        for &byte in name.iter().take_while(|&&byte| byte != 0) {
            let plain = byte.is_ascii_alphanumeric() || b"-_.:/".contains(&byte);
            let _ = text.write_char(if plain { byte.into() } else { '?' });
        }
        let _ = write!(text, " may not make system call {number} (architecture {architecture:#x}) with");
        for argument in arguments {
            let _ = write!(text, " {argument:#x}");
        }
        let _ = text.write_str(after);
        text
    }
}

impl fmt::Write for Text {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for &byte in text.as_bytes() {
            if let Some(slot) = self.bytes.get_mut(self.length) {
                *slot = byte;
                self.length += 1;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::protocol::{ExitReason, ExitRecord, LaunchReply};

    #[test]
    fn the_last_words_are_understood() {
        let words = |record| {
            let text = Text::of(b"vcpu\"0\0junk", 41, 0xc000_003e, &[u64::MAX; 6], record);
            text.bytes[..text.length].to_vec()
        };
        let record: ExitRecord = serde_json::from_slice(&words(true)).unwrap();
        assert_eq!(record.reason, ExitReason::Internal);
        assert!(
            record.message.starts_with("seccomp (SIGSYS): the thread vcpu?0 may not make system call 41 ")
        );
        assert!(record.message.ends_with(" 0xffffffffffffffff"), "{}", record.message);
        let reply: LaunchReply = serde_json::from_slice(&words(false)).unwrap();
        assert!(matches!(reply, LaunchReply::Failed { error } if error == record.message));
    }
}
