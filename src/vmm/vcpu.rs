//! One vCPU thread: runs the guest, answers its exits, obeys orders.
//!
//! A kick can't get lost: it sets `immediate_exit` in the vCPU's shared page and then sends a signal.
//! If the vCPU is in the guest, the signal brings it out; if it is about to enter, KVM sees
//! `immediate_exit` and returns at once; and the vCPU clears it only before it looks for new orders.

use std::io;
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicU8, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use kvm_bindings::{CpuId, kvm_run};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::bus::Bus;
use super::cpu::state::InitialState;
use super::cpu::statistics::Statistics;
use super::cpu::{self, CpuError};
use super::event::{EventSender, MachineEvent};
use super::gate::{Gate, Order};
use super::metrics::{VcpuExitCounters, VcpuMetrics};
use super::power::{self, PowerRequest};

/// Deep enough for the devices' register handlers in debug builds; only touched pages count.
const STACK_BYTES: usize = 256 * 1024;

/// No instruction makes more accesses: the longest, `rep outs`, stops at a page of data.
const UNFINISHED_ACCESSES_MAX: usize = 4096;

/// What all vCPUs share.
#[derive(Clone)]
pub struct Shared {
    pub gate: Arc<Gate>,
    pub pio: Arc<Bus>,
    pub mmio: Arc<Bus>,
    pub events: EventSender,
}

/// A vCPU before its thread runs.
pub struct Vcpu {
    fd: VcpuFd,
    index: u8,
    /// The host's CPUs that its thread may run on; empty: all.
    cpus: Vec<u16>,
    initial: InitialState,
    /// Whether the guest ran since the last reset.
    has_run: bool,
    exits: Arc<VcpuExitCounters>,
    statistics: Option<Statistics>,
    shared: Shared,
}

impl Vcpu {
    pub fn new(
        fd: VcpuFd,
        index: u8,
        cpuid: &CpuId,
        msr_indices: &[u32],
        shared: Shared,
    ) -> Result<Self, CpuError> {
        // CPUID first: it decides which MSRs there are.
        fd.set_cpuid2(cpuid).map_err(cpu::failed("set CPUID"))?;
        cpu::state::prepare(&fd)?;
        let initial = InitialState::save(&fd, msr_indices, index == 0)?;
        let statistics = Statistics::of(&fd);
        Ok(Self {
            fd,
            index,
            cpus: Vec::new(),
            initial,
            has_run: false,
            exits: Arc::default(),
            statistics,
            shared,
        })
    }

    pub fn pinned_to(mut self, cpus: Vec<u16>) -> Self {
        self.cpus = cpus;
        self
    }

    /// Starts the thread, on its CPUs, and waits until `start` has returned on it, before anything else; its error
    /// is the result.
    pub fn spawn(
        mut self,
        start: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<VcpuHandle> {
        let run: *mut kvm_run = self.fd.get_kvm_run();
        // SAFETY: `run` points to the page that KVM shares with us, mapped as long as the VcpuFd lives.
        let immediate_exit = unsafe { &raw mut (*run).immediate_exit };
        let tid = Arc::new(AtomicI32::new(0));
        let (exits, statistics) = (self.exits.clone(), self.statistics.take());
        let (report, started) = mpsc::sync_channel(1);
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{}", self.index))
            .stack_size(STACK_BYTES)
            .spawn({
                let tid = tid.clone();
                move || {
                    // SAFETY: gettid has no preconditions.
                    tid.store(unsafe { libc::gettid() }, Ordering::Release);
                    let index = self.index;
                    let result = cpu::affinity::pin(&self.cpus)
                        .map_err(|error| io::Error::new(error.kind(), format!("pin vCPU {index}: {error}")))
                        .and_then(|()| start());
                    let ready = result.is_ok();
                    // The spawner waits for it.
                    let _ = report.send(result);
                    drop(report);
                    if ready {
                        self.follow_orders();
                    }
                    self
                }
            })?;
        started.recv().map_err(|_| io::Error::other("the thread ended at its start"))??;
        Ok(VcpuHandle { thread, tid, exits, statistics, immediate_exit })
    }

    fn follow_orders(&mut self) {
        let mut seen = 0;
        let mut parked = true;
        loop {
            let order = if parked {
                Some(self.shared.gate.wait_newer(seen))
            } else {
                // Cleared before looking: an order given after this look brings a kick of its own.
                self.fd.set_kvm_immediate_exit(0);
                self.shared.gate.newer(seen)
            };
            if let Some((number, order)) = order {
                let was_run = seen > 0 && parked;
                seen = number;
                match order {
                    Order::Park => parked = true,
                    Order::Reset(entry) => {
                        parked = true;
                        if let Err(error) = self.reset(entry) {
                            self.fail(&error.to_string());
                        }
                    }
                    Order::Run => {
                        if was_run {
                            // Tells the guest's watchdogs that it was stopped. Without kvmclock in the
                            // guest KVM answers EINVAL, and there is nothing to tell.
                            let _ = self.fd.kvmclock_ctrl();
                        }
                        parked = false;
                    }
                    Order::End => return self.shared.gate.obeyed(number),
                }
                self.shared.gate.obeyed(number);
                continue;
            }
            parked = self.run_guest() == Next::Park;
        }
    }

    fn reset(&mut self, entry: super::boot::Entry) -> Result<(), CpuError> {
        if std::mem::take(&mut self.has_run) {
            self.finish_access();
        }
        self.initial.restore(&self.fd)?;
        if self.index == 0 {
            cpu::entry::apply(&self.fd, entry)?;
        }
        Ok(())
    }

    /// The instruction of the last exit is finished by KVM at the next entry: it must be before the
    /// registers are set, or it would be finished with the new ones.
    fn finish_access(&mut self) {
        self.fd.set_kvm_immediate_exit(1);
        for _ in 0..UNFINISHED_ACCESSES_MAX {
            // An instruction that has several accesses exits for the next one; its data don't matter.
            if self.fd.run().is_err() {
                break;
            }
        }
        self.fd.set_kvm_immediate_exit(0);
    }

    /// Runs the guest until an order may have come, or it can't go on.
    fn run_guest(&mut self) -> Next {
        self.has_run = true;
        let run: *mut kvm_run = self.fd.get_kvm_run();
        let exits = self.exits.clone();
        loop {
            let event = match self.fd.run() {
                Ok(VcpuExit::IoOut(port, data)) => {
                    exits.port_writes.increment();
                    // SAFETY: `run` is the page shared with KVM, alive with `self.fd`; the exit is one of
                    // port I/O, so the union holds `io`. The field is read by pointer, for `data`
                    // borrows from the same mapping, though not from this field.
                    let width = unsafe { ptr::addr_of!((*run).__bindgen_anon_1.io.size).read() };
                    port_write(&self.shared.pio, port, data, width.into())
                }
                Ok(VcpuExit::IoIn(port, data)) => {
                    exits.port_reads.increment();
                    // SAFETY: as above.
                    let width = unsafe { ptr::addr_of!((*run).__bindgen_anon_1.io.size).read() };
                    port_read(&self.shared.pio, port, data, width.into());
                    None
                }
                Ok(VcpuExit::MmioRead(address, data)) => {
                    exits.mmio_reads.increment();
                    self.shared.mmio.read(address, data);
                    None
                }
                Ok(VcpuExit::MmioWrite(address, data)) => {
                    exits.mmio_writes.increment();
                    self.shared.mmio.write(address, data);
                    None
                }
                Ok(rest) => match rare_exit(self.index, &exits, &rest) {
                    Some(event) => Some(event),
                    None => return Next::LookForOrders,
                },
                Err(error) if error.errno() == libc::EINTR => {
                    exits.interrupted.increment();
                    return Next::LookForOrders;
                }
                // A page of guest memory that a device of the host must fill isn't there yet, or an
                // application processor waits for its start-up message.
                Err(error) if error.errno() == libc::EAGAIN => {
                    exits.again.increment();
                    None
                }
                Err(error) => Some(MachineEvent::Failed(format!("run vCPU {}: {error}", self.index))),
            };
            if let Some(event) = event {
                self.shared.events.send(event);
                return Next::Park;
            }
        }
    }

    fn fail(&self, message: &str) {
        self.shared.events.send(MachineEvent::Failed(format!("vCPU {}: {message}", self.index)));
    }
}

#[derive(PartialEq, Eq)]
enum Next {
    LookForOrders,
    Park,
}

/// `None`: nothing happened that the event loop must know of.
fn rare_exit(index: u8, exits: &VcpuExitCounters, exit: &VcpuExit) -> Option<MachineEvent> {
    match exit {
        VcpuExit::Hlt => exits.halts.increment(),
        VcpuExit::IrqWindowOpen => exits.interrupt_windows.increment(),
        VcpuExit::Intr => exits.interrupted.increment(),
        VcpuExit::Shutdown | VcpuExit::SystemEvent(..) => {
            exits.others.increment();
            return Some(MachineEvent::TripleFault);
        }
        other => {
            exits.others.increment();
            return Some(MachineEvent::GuestFault(format!("vCPU {index}: {other:?}")));
        }
    }
    None
}

/// A string instruction brings many accesses in one exit, `width` bytes each.
fn port_write(pio: &Bus, port: u16, data: &[u8], width: usize) -> Option<MachineEvent> {
    for access in data.chunks(width.max(1)) {
        match power::request(port, access) {
            Some(PowerRequest::Reset) => return Some(MachineEvent::Reset),
            Some(PowerRequest::PowerOff) => return Some(MachineEvent::PowerOff),
            None => {
                pio.write(port.into(), access);
            }
        }
    }
    None
}

fn port_read(pio: &Bus, port: u16, data: &mut [u8], width: usize) {
    for access in data.chunks_mut(width.max(1)) {
        match (power::read(port), &mut *access) {
            (Some(value), [byte]) => *byte = value,
            _ => {
                pio.read(port.into(), access);
            }
        }
    }
}

/// A running vCPU thread.
pub struct VcpuHandle {
    /// Gives the vCPU back, so that its shared page stays mapped as long as this handle may kick it.
    thread: JoinHandle<Vcpu>,
    tid: Arc<AtomicI32>,
    exits: Arc<VcpuExitCounters>,
    statistics: Option<Statistics>,
    immediate_exit: *mut u8,
}

impl VcpuHandle {
    /// Brings the vCPU out of the guest, so that it looks for orders.
    pub fn kick(&self) {
        // SAFETY: the shared page is mapped until the VcpuFd is dropped, which the thread doesn't: it
        // gives it back when it is joined. The byte is written by others too, hence the atomic.
        unsafe { AtomicU8::from_ptr(self.immediate_exit) }.store(1, Ordering::SeqCst);
        let tid = self.tid.load(Ordering::Acquire);
        if tid != 0 {
            // SAFETY: sends a signal whose handler does nothing to a thread of ours that is not joined.
            // One that has already ended can't be mistaken for another: the thread group is given.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, kick_signal()) };
        }
    }

    /// What was counted so far, without a word to the vCPU.
    pub fn metrics(&self) -> VcpuMetrics {
        VcpuMetrics {
            run_us: thread_run_us(self.tid.load(Ordering::Acquire)),
            exits: self.exits.snapshot(),
            kvm: self.statistics.as_ref().map(Statistics::read),
        }
    }

    /// Waits for the thread's end; order [`Order::End`] first.
    pub fn join(self) {
        // A panic has already ended the process.
        let _ = self.thread.join();
    }
}

/// Processor time of a thread of this process; 0 if it has ended.
fn thread_run_us(tid: libc::pid_t) -> u64 {
    /// `CPUCLOCK_SCHED` and `CPUCLOCK_PERTHREAD_MASK` of the kernel's sources: with the thread's number
    /// they make the clock that pthread_getcpuclockid would give.
    const SCHEDULED_OF_THREAD: libc::clockid_t = 2 | 4;
    clock_us(!tid << 3 | SCHEDULED_OF_THREAD)
}

/// What one of the processor-time clocks says; 0 if it is of a thread that has ended.
pub fn clock_us(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes one timespec to where we point, or nothing.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } < 0 {
        return 0;
    }
    // Neither part of a processor time is negative.
    time.tv_sec as u64 * 1_000_000 + time.tv_nsec as u64 / 1000
}

fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn do_nothing(_: libc::c_int) {}

/// Makes the kick's signal harmless; once per process, before the first vCPU runs.
pub fn install_kick_handler() -> io::Result<()> {
    // SAFETY: an all-zero sigaction is a valid one.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // No SA_RESTART: the point is that KVM_RUN returns.
    action.sa_sigaction = do_nothing as extern "C" fn(libc::c_int) as usize;
    // SAFETY: the handler does nothing at all, so it is safe at any instant.
    if unsafe { libc::sigaction(kick_signal(), &action, ptr::null_mut()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
