//! System calls made in a thread of another process, as if what runs there had been taken over: the
//! thread is stopped, its registers set, one instruction executed, and all is put back.
#![allow(dead_code, reason = "each test binary uses its own part of this")]

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

/// What came of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The kernel's answer: a result, or an error number below zero.
    Returned(i64),
    /// Seccomp raised SIGSYS for this call. The signal was kept from the process.
    Trapped(i64),
    /// The process is dead, of this signal.
    Killed(i32),
}

/// A thread, stopped as long as this is there.
pub struct Thread {
    tid: i32,
    memory: File,
    saved: libc::user_regs_struct,
    /// Of a `syscall` instruction.
    instruction: u64,
    alive: bool,
}

const SYSCALL: [u8; 2] = [0x0f, 0x05];
/// Below the stack, and beyond the part of it that functions use without asking.
const SCRATCH_BELOW_STACK: u64 = 2048;
const ATTEMPTS: u32 = 1000;

impl Thread {
    /// Stops a thread in a system call: one of a VM process that has little to do is in one nearly always.
    pub fn stop(pid: i32, tid: i32) -> Self {
        let memory = File::options().read(true).write(true).open(format!("/proc/{pid}/mem")).unwrap();
        for _ in 0..ATTEMPTS {
            ptrace(libc::PTRACE_SEIZE, tid, 0, 0).expect("seize the thread");
            ptrace(libc::PTRACE_INTERRUPT, tid, 0, 0).unwrap();
            while libc::WSTOPSIG(wait(tid)) != libc::SIGTRAP {
                ptrace(libc::PTRACE_CONT, tid, 0, 0).unwrap();
            }
            let saved = registers(tid);
            let mut bytes = [0; 2];
            let instruction = saved.rip.wrapping_sub(2);
            if memory.read_exact_at(&mut bytes, instruction).is_ok() && bytes == SYSCALL {
                return Self { tid, memory, saved, instruction, alive: true };
            }
            ptrace(libc::PTRACE_DETACH, tid, 0, 0).unwrap();
            std::thread::sleep(Duration::from_micros(300));
        }
        panic!("the thread {tid} was never seen in a system call");
    }

    /// Puts bytes where no other code of the thread looks; gives their address.
    pub fn put(&self, bytes: &[u8]) -> u64 {
        let address = (self.saved.rsp - SCRATCH_BELOW_STACK) & !15;
        self.memory.write_all_at(bytes, address).unwrap();
        address
    }

    pub fn call(&mut self, number: i64, arguments: [u64; 6]) -> Outcome {
        let mut wanted = self.saved;
        wanted.rip = self.instruction;
        wanted.rax = number as u64;
        // Not in a call that would be begun again.
        wanted.orig_rax = u64::MAX;
        [wanted.rdi, wanted.rsi, wanted.rdx, wanted.r10, wanted.r8, wanted.r9] = arguments;
        set_registers(self.tid, &wanted);
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            assert!(Instant::now() < deadline, "call {number} does not return");
            ptrace(libc::PTRACE_SINGLESTEP, self.tid, 0, 0).unwrap();
            let status = wait(self.tid);
            if !libc::WIFSTOPPED(status) {
                self.alive = false;
                assert!(libc::WIFSIGNALED(status), "it ended with {status:#x}");
                return Outcome::Killed(libc::WTERMSIG(status));
            }
            let now = registers(self.tid);
            match libc::WSTOPSIG(status) {
                libc::SIGSYS => return Outcome::Trapped(refused_call(self.tid)),
                libc::SIGTRAP if now.rip == self.instruction + 2 => {
                    return Outcome::Returned(now.rax as i64);
                }
                // A stop that was on its way before the step, or a vCPU's kick: neither is for us.
                _ => set_registers(self.tid, &wanted),
            }
        }
    }
}

impl Thread {
    /// After a call that was trapped: the process gets the signal that was kept from it, and ends of it.
    pub fn deliver(mut self) {
        ptrace(libc::PTRACE_CONT, self.tid, 0, libc::SIGSYS as usize).unwrap();
        self.alive = false;
        while libc::WIFSTOPPED(wait(self.tid)) {
            ptrace(libc::PTRACE_CONT, self.tid, 0, 0).unwrap();
        }
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        if self.alive {
            set_registers(self.tid, &self.saved);
            let _ = ptrace(libc::PTRACE_DETACH, self.tid, 0, 0);
        }
    }
}

fn ptrace(request: libc::c_uint, tid: i32, address: usize, data: usize) -> io::Result<()> {
    // SAFETY: the requests used here read or write at most what `data` points to, which is valid.
    if unsafe { libc::ptrace(request, tid, address, data) } < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn wait(tid: i32) -> i32 {
    let mut status = 0;
    // SAFETY: the status is written where we point. `__WALL`: threads are waited for as processes are.
    let waited = unsafe { libc::waitpid(tid, &mut status, libc::__WALL) };
    assert_eq!(waited, tid, "wait for the thread: {}", io::Error::last_os_error());
    status
}

fn registers(tid: i32) -> libc::user_regs_struct {
    // SAFETY: all-zero registers are valid ones.
    let mut registers: libc::user_regs_struct = unsafe { std::mem::zeroed() };
    ptrace(libc::PTRACE_GETREGS, tid, 0, (&raw mut registers).addr()).unwrap();
    registers
}

fn set_registers(tid: i32, registers: &libc::user_regs_struct) {
    let _ = ptrace(libc::PTRACE_SETREGS, tid, 0, (&raw const *registers).addr());
}

/// The number of the call for which SIGSYS stopped the thread.
fn refused_call(tid: i32) -> i64 {
    #[repr(C)]
    struct CallInfo {
        header: [libc::c_int; 4],
        address: u64,
        number: libc::c_int,
        architecture: libc::c_uint,
        rest: [u64; 12],
    }
    const SYS_SECCOMP: libc::c_int = 1;
    const { assert!(size_of::<CallInfo>() == size_of::<libc::siginfo_t>()) };
    // SAFETY: all zero is a valid value.
    let mut info: CallInfo = unsafe { std::mem::zeroed() };
    ptrace(libc::PTRACE_GETSIGINFO, tid, 0, (&raw mut info).addr()).unwrap();
    assert_eq!(info.header[2], SYS_SECCOMP, "SIGSYS came from seccomp");
    info.number.into()
}
