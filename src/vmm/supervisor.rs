//! The event loop: the one owner of a VM's state. vCPUs, devices and clients tell it what happened, and
//! it alone decides: pause, reset, stop.

mod plug;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{Timespec, epoll::Event as EpollEvent};

use super::conditions::Conditions;
use super::config::{Limits, NicConfig, VmConfig};
use super::console::Log;
use super::control::{Clients, Received};
use super::device::net::{NetError, NetHandle};
use super::event::MachineEvent;
use super::machine::{Machine, MachineError, Signals, source_of};
use super::metrics::Metrics;
use super::protocol::{
    ConditionKind, Event, ExitReason, ExitRecord, Phase, Response, VERSION, Verb, VmState,
};
use super::sandbox::Spawner;
use super::serial::Raised;

const LISTENER: u64 = 0;
const MACHINE_EVENT: u64 = 1;
const OUTPUT: u64 = 2;
const INPUT_WANTED: u64 = 3;
const SIGNAL: u64 = 4;
const FIRST_CLIENT: u64 = 16;

/// Output is handed on this long after it was announced, so that a burst of single bytes costs one
/// packet and one write to the log.
const OUTPUT_DELAY: Duration = Duration::from_millis(2);
/// A guest that has done nothing about the serial port's interrupt for so long may never have had it.
const SERIAL_CHECK: Duration = Duration::from_millis(100);
/// A guest that has the interrupt masked is asked less and less often.
const SERIAL_CHECK_MAX: Duration = Duration::from_secs(10);
/// Input that the port didn't take, with no word of when it will, is offered again after this time.
const INPUT_RETRY: Duration = Duration::from_millis(50);
/// A guest whose processor gives up this soon after its start, so many times in a row, never works.
const EARLY_FAULT: Duration = Duration::from_secs(1);
const EARLY_FAULTS_MAX: u32 = 3;
const EVENTS_PER_ROUND: usize = 32;

/// What the loop needs from outside.
pub struct Outside {
    pub control: OwnedFd,
    pub console_log: Option<Log>,
    /// Readable when the process was asked to end (SIGTERM).
    pub termination: OwnedFd,
    /// Makes devices while the loop runs, which itself can make no thread.
    pub spawner: Spawner,
    /// This process, as its launcher sees it.
    pub pid: i32,
    /// What of the sandbox could not be had.
    pub missing: Vec<String>,
}

pub struct Supervisor {
    config: VmConfig,
    machine: Machine,
    signals: Signals,
    epoll: Arc<OwnedFd>,
    clients: Clients,
    console_log: Option<Log>,
    termination: OwnedFd,
    spawner: Spawner,
    pid: i32,
    /// What clients asked for last: whether the guest should run.
    wanted: Phase,
    /// What it does. A guest that should run is paused while the storage below a disk is full.
    phase: Phase,
    conditions: Conditions,
    started: Instant,
    /// Of the guest: the process's start or its last reset.
    booted: Instant,
    reboots: u64,
    early_faults: u32,
    flush_at: Option<Instant>,
    input: VecDeque<u8>,
    retry_input_at: Option<Instant>,
    /// When to look whether the guest took note of the serial port's interrupt, and after how long then
    /// to look again.
    serial_check: Option<(Instant, Duration)>,
}

/// Why the loop ends.
struct End(ExitRecord);

impl End {
    fn new(reason: ExitReason, message: impl Into<String>) -> Self {
        Self(ExitRecord { reason, message: message.into() })
    }
}

impl From<MachineError> for End {
    fn from(error: MachineError) -> Self {
        Self::new(ExitReason::Internal, format!("{error}: {}", source_of(&error)))
    }
}

impl Supervisor {
    pub fn new(config: VmConfig, machine: Machine, signals: Signals, outside: Outside) -> io::Result<Self> {
        let epoll = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC)?);
        let clients = Clients::new(epoll.clone(), outside.control, LISTENER, FIRST_CLIENT)?;
        let watch = |fd: &dyn std::os::fd::AsFd, token| {
            epoll::add(&*epoll, fd.as_fd(), EventData::new_u64(token), EventFlags::IN)
        };
        watch(&borrow(&signals.events_wake), MACHINE_EVENT)?;
        watch(&borrow(signals.output.wake()), OUTPUT)?;
        watch(&borrow(&signals.input_wanted), INPUT_WANTED)?;
        watch(&outside.termination, SIGNAL)?;
        let now = Instant::now();
        let mut conditions = Conditions::default();
        if !outside.missing.is_empty() {
            // Nobody watches yet.
            conditions.raise(ConditionKind::SandboxIncomplete, None, outside.missing.join("; "));
        }
        Ok(Self {
            config,
            machine,
            signals,
            epoll,
            clients,
            console_log: outside.console_log,
            termination: outside.termination,
            spawner: outside.spawner,
            pid: outside.pid,
            wanted: Phase::Paused,
            phase: Phase::Paused,
            conditions,
            started: now,
            booted: now,
            reboots: 0,
            early_faults: 0,
            flush_at: None,
            input: VecDeque::new(),
            retry_input_at: None,
            serial_check: None,
        })
    }

    /// Lets the guest run for the first time.
    pub fn start(&mut self) -> Result<(), MachineError> {
        self.machine.resume()?;
        (self.wanted, self.phase) = (Phase::Running, Phase::Running);
        (self.started, self.booted) = (Instant::now(), Instant::now());
        Ok(())
    }

    /// Serves the VM to its end: when it returns the guest has stopped, its disks are flushed and all
    /// watchers know.
    pub fn run(mut self) -> ExitRecord {
        let End(mut record) = loop {
            if let Err(end) = self.round() {
                break end;
            }
        };
        self.phase = Phase::Stopping;
        self.clients.announce(&Event::Phase(Phase::Stopping));
        let Self { machine, mut clients, signals, mut console_log, .. } = self;
        if let Err(error) = machine.stop() {
            record.message = format!("{}; at the end: {error}: {}", record.message, source_of(&error));
        }
        clients.flush_consoles(&signals.output);
        if let Some(log) = &mut console_log {
            log.write_from(&signals.output, &mut vec![0; LOG_CHUNK_BYTES]);
        }
        clients.announce(&Event::Exit(record.clone()));
        record
    }

    /// Waits for events and handles them.
    fn round(&mut self) -> Result<(), End> {
        let mut events: Vec<EpollEvent> = Vec::with_capacity(EVENTS_PER_ROUND);
        let timeout = self.timeout();
        match epoll::wait(&*self.epoll, rustix::buffer::spare_capacity(&mut events), timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(End::new(ExitReason::Internal, format!("wait for events: {errno}"))),
        }
        // What the guest did comes before what clients want of it.
        if events.iter().any(|event| event.data.u64() == MACHINE_EVENT) {
            let _ = self.signals.events_wake.read();
            while let Ok(event) = self.signals.events.try_recv() {
                self.machine_event(event)?;
            }
        }
        for event in events {
            // The structure is packed: copy its fields.
            let (token, flags) = (event.data.u64(), event.flags);
            match token {
                MACHINE_EVENT => {}
                LISTENER => self.clients.accept(),
                OUTPUT => {
                    let _ = self.signals.output.wake().read();
                    self.flush_at.get_or_insert_with(|| Instant::now() + OUTPUT_DELAY);
                }
                INPUT_WANTED => {
                    let _ = self.signals.input_wanted.read();
                    self.type_in();
                }
                SIGNAL => self.signal()?,
                client => self.client_event(client, flags)?,
            }
        }
        let now = Instant::now();
        if self.flush_at.is_some_and(|at| at <= now) {
            self.flush_output();
        }
        if self.retry_input_at.is_some_and(|at| at <= now) {
            self.type_in();
        }
        if let Some((at, delay)) = self.serial_check
            && at <= now
        {
            let delay = (delay * 2).min(SERIAL_CHECK_MAX);
            let again = match self.machine.raise_serial_again() {
                Raised::No => false,
                Raised::NotAskedFor => true,
                // Some drivers leave it enabled with nothing to send.
                Raised::StillWaitedFor => delay < SERIAL_CHECK_MAX,
            };
            self.serial_check = again.then(|| (now + delay, delay));
        }
        Ok(())
    }

    fn timeout(&self) -> Option<Timespec> {
        let check = self.serial_check.map(|(at, _)| at);
        let at = [self.flush_at, self.retry_input_at, check].into_iter().flatten().min()?;
        let left = at.saturating_duration_since(Instant::now());
        // Rounded up to milliseconds, so that the loop doesn't spin through the last fraction.
        let left_ms = left.as_micros().div_ceil(1000) as i64;
        Some(Timespec { tv_sec: left_ms / 1000, tv_nsec: left_ms % 1000 * 1_000_000 })
    }

    /// Never later than it would be anyway: what a guest prints without the interrupt, its kernel's messages,
    /// says nothing of the interrupt that its programs wait for.
    fn check_serial_later(&mut self) {
        let soon = Instant::now() + SERIAL_CHECK;
        let at = self.serial_check.map_or(soon, |(at, _)| at.min(soon));
        self.serial_check = Some((at, SERIAL_CHECK));
    }

    fn flush_output(&mut self) {
        self.flush_at = None;
        self.check_serial_later();
        self.signals.output.acknowledge();
        if let Some(log) = &mut self.console_log {
            log.write_from(&self.signals.output, &mut [0; LOG_CHUNK_BYTES]);
        }
        self.clients.flush_consoles(&self.signals.output);
    }

    fn type_in(&mut self) {
        self.retry_input_at = None;
        self.check_serial_later();
        let taken = self.machine.type_in(self.input.make_contiguous());
        self.input.drain(..taken);
        if !self.input.is_empty() && taken == 0 {
            self.retry_input_at = Some(Instant::now() + INPUT_RETRY);
        }
        self.clients.hold_input(!self.input.is_empty());
    }

    /// SIGTERM comes from whoever shuts the host down: an orderly end is better than being killed.
    fn signal(&mut self) -> Result<(), End> {
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        match rustix::io::read(&self.termination, &mut info) {
            Ok(_) => Err(End::new(ExitReason::Stopped, "SIGTERM")),
            Err(_) => Ok(()),
        }
    }

    fn machine_event(&mut self, event: MachineEvent) -> Result<(), End> {
        match event {
            MachineEvent::Reset => self.reset(),
            MachineEvent::PowerOff => {
                Err(End::new(ExitReason::GuestPowerOff, "the guest powered itself off"))
            }
            MachineEvent::TripleFault => {
                let early = self.booted.elapsed() < EARLY_FAULT;
                self.early_faults = if early { self.early_faults + 1 } else { 0 };
                if self.early_faults >= EARLY_FAULTS_MAX {
                    let message = format!("{EARLY_FAULTS_MAX} triple faults right after the start");
                    return Err(End::new(ExitReason::GuestFault, message));
                }
                self.reset()
            }
            MachineEvent::GuestFault(message) => Err(End::new(ExitReason::GuestFault, message)),
            MachineEvent::Failed(message) => Err(End::new(ExitReason::Internal, message)),
            MachineEvent::DiskFull { disk } => {
                let message = format!("the storage below disk {disk} is full: a write waits for room");
                let event = self.conditions.raise(ConditionKind::DiskFull, Some(&disk), message);
                self.announce(event);
                self.settle()
            }
            MachineEvent::DiskHasRoom { disk } => {
                let event = self.conditions.clear(ConditionKind::DiskFull, Some(&disk));
                self.announce(event);
                self.settle()
            }
            MachineEvent::Ejected { slot } => {
                self.ejected(slot);
                self.settle()
            }
            MachineEvent::GuestPanicked { dumps: true } => {
                let message = "the guest's kernel crashed and goes on, perhaps to write its dump";
                let event = self.conditions.raise(ConditionKind::GuestPanicked, None, message);
                self.announce(event);
                Ok(())
            }
            MachineEvent::GuestPanicked { dumps: false } => {
                Err(End::new(ExitReason::GuestPanicked, "the guest's kernel crashed"))
            }
        }
    }

    /// Resets the machine; a paused one stays paused.
    fn reset(&mut self) -> Result<(), End> {
        for device in self.machine.reset()? {
            self.forget_device(device);
        }
        // All vCPUs stand at the start: what they said before is void, but for failures and for what the
        // guest let go of.
        while let Ok(event) = self.signals.events.try_recv() {
            match event {
                MachineEvent::Failed(message) => return Err(End::new(ExitReason::Internal, message)),
                MachineEvent::Ejected { slot } => self.ejected(slot),
                _ => {}
            }
        }
        self.reboots += 1;
        self.booted = Instant::now();
        // The write that waited for room went with the guest that asked for it.
        let over = self.conditions.clear_all(ConditionKind::DiskFull);
        self.announce(over);
        // So did the kernel that crashed.
        let over = self.conditions.clear_all(ConditionKind::GuestPanicked);
        self.announce(over);
        if self.phase == Phase::Running {
            self.machine.resume()?;
        }
        self.clients.announce(&Event::Rebooted);
        self.settle()
    }

    /// Lets the guest run or holds it, as is wanted and possible now.
    fn settle(&mut self) -> Result<(), End> {
        let phase = match self.conditions.any(ConditionKind::DiskFull) {
            true => Phase::Paused,
            false => self.wanted,
        };
        if phase != self.phase {
            match phase {
                Phase::Running => self.machine.resume()?,
                _ => self.machine.pause()?,
            }
            self.phase = phase;
            self.clients.announce(&Event::Phase(phase));
        }
        Ok(())
    }

    fn announce(&mut self, events: impl IntoIterator<Item = Event>) {
        for event in events {
            self.clients.announce(&event);
        }
    }

    fn client_event(&mut self, client: u64, flags: EventFlags) -> Result<(), End> {
        match self.clients.serve(client, flags, &self.signals.output) {
            Received::Nothing => Ok(()),
            Received::Input(bytes) => {
                self.input.extend(bytes);
                self.type_in();
                Ok(())
            }
            Received::Request { client, verb, fds } => self.request(client, verb, fds),
        }
    }

    fn request(&mut self, client: u64, verb: Verb, fds: Vec<OwnedFd>) -> Result<(), End> {
        let wanted = match &verb {
            Verb::ReplaceTap { nic } => {
                let config = self.config.nics.iter().find(|config| config.name == *nic);
                config.map_or(1, |config| config.queue_pairs.into())
            }
            _ => 0,
        };
        let plugs = matches!(verb, Verb::AddDisk { .. } | Verb::AddNic { .. });
        if !plugs && fds.len() != wanted {
            let message = format!("the request needs {wanted} descriptors and came with {}", fds.len());
            self.clients.respond(client, &Response::Error { message });
            return Ok(());
        }
        let response = match verb {
            Verb::Get => Response::State(Box::new(self.state())),
            Verb::Metrics => Response::Metrics(Box::new(self.metrics())),
            Verb::PowerButton => answer(self.machine.press_power_button()),
            Verb::Stop => {
                // The end of the connection is the end of the process.
                self.clients.respond(client, &Response::Done);
                return Err(End::new(ExitReason::Stopped, "stopped on request"));
            }
            Verb::Pause => {
                self.wanted = Phase::Paused;
                self.settle()?;
                Response::Done
            }
            Verb::Resume => {
                self.wanted = Phase::Running;
                self.settle()?;
                // Somebody may have made room.
                for disk in &self.config.disks {
                    self.machine.disk(&disk.name).inspect(|handle| handle.look_again());
                }
                Response::Done
            }
            Verb::Reboot => {
                self.reset()?;
                Response::Done
            }
            Verb::ResizeDisk { disk, capacity_bytes } => match self.machine.disk(&disk) {
                Some(handle) => answer(handle.resize(capacity_bytes)),
                None => Response::Error { message: format!("this VM has no disk {disk:?}") },
            },
            Verb::SetDiskLimits { disk, limits } => self.set_disk_limits(&disk, limits),
            Verb::ReplaceTap { nic } => self.replace_tap(&nic, fds),
            Verb::AddDisk { disk } => self.add_disk(disk, fds),
            Verb::AddNic { nic } => self.add_nic(nic, fds),
            Verb::RemoveDevice { device } => self.remove_device(&device),
            Verb::SetNicLimits { nic, receive, transmit } => self.change_nic(&nic, |handle, config| {
                handle.set_limits(receive, transmit);
                (config.receive_limits, config.transmit_limits) = (receive, transmit);
                Ok(())
            }),
            Verb::SetLink { nic, up } => self.change_nic(&nic, |handle, config| {
                config.link_up = up;
                handle.set_link(up)
            }),
            Verb::SetBalloon { target_bytes } => self.set_balloon(target_bytes),
            Verb::SetGenerationId { id } => {
                let response = answer(self.machine.set_generation_id(&id));
                if response == Response::Done {
                    self.config.generation_id = Some(id);
                }
                response
            }
            Verb::ConsoleAttach { replay_bytes } => {
                self.clients.attach_console(client, replay_bytes, &self.signals.output);
                return Ok(());
            }
            Verb::Watch => {
                self.clients.watch(client);
                return Ok(());
            }
        };
        self.clients.respond(client, &response);
        Ok(())
    }

    fn set_disk_limits(&mut self, disk: &str, limits: Limits) -> Response {
        let config = self.config.disks.iter_mut().find(|config| config.name == disk);
        let (Some(config), Some(handle)) = (config, self.machine.disk(disk)) else {
            return Response::Error { message: format!("this VM has no disk {disk:?}") };
        };
        let result = handle.set_limits(limits);
        if result.is_ok() {
            config.limits = limits;
        }
        answer(result)
    }

    fn state(&self) -> VmState {
        VmState {
            version: VERSION,
            program: env!("CARGO_PKG_VERSION").to_owned(),
            pid: self.pid,
            phase: self.phase,
            uptime_ms: self.started.elapsed().as_millis() as u64,
            reboots: self.reboots,
            config: self.config.clone(),
            disk_capacity_bytes: self.machine.disk_capacity_bytes(),
            conditions: self.conditions.list(),
        }
    }

    fn set_balloon(&mut self, target_bytes: u64) -> Response {
        let (Some(balloon), Some(config)) = (self.machine.balloon(), &mut self.config.balloon) else {
            return Response::Error { message: "this VM has no balloon".into() };
        };
        let response = answer(balloon.set_target_bytes(target_bytes));
        if response == Response::Done {
            config.target_bytes = target_bytes;
        }
        response
    }

    fn metrics(&self) -> Metrics {
        Metrics { uptime_ms: self.started.elapsed().as_millis() as u64, ..self.machine.metrics() }
    }

    fn replace_tap(&mut self, nic: &str, taps: Vec<OwnedFd>) -> Response {
        // As many descriptors came as the NIC has queue pairs: the caller has counted.
        let mut names = taps.iter().map(tap_name);
        let name = match names.next() {
            Some(Ok(name)) => name,
            Some(Err(error)) => {
                return Response::Error { message: format!("the descriptor is no tap: {error}") };
            }
            None => return Response::Error { message: "no descriptor came with the request".into() },
        };
        if !names.all(|other| other.is_ok_and(|other| other == name)) {
            return Response::Error { message: format!("not all descriptors are of the tap {name}") };
        }
        self.change_nic(nic, |handle, config| {
            handle.replace_tap(taps)?;
            config.tap = name;
            Ok(())
        })
    }

    /// Changes a NIC of the running machine, and what this process says that it runs.
    fn change_nic(
        &mut self,
        nic: &str,
        change: impl FnOnce(&NetHandle, &mut NicConfig) -> Result<(), NetError>,
    ) -> Response {
        let config = self.config.nics.iter_mut().find(|config| config.name == nic);
        match (self.machine.nic(nic), config) {
            (Some(handle), Some(config)) => answer(change(handle, config)),
            _ => Response::Error { message: format!("this VM has no NIC {nic:?}") },
        }
    }
}

/// How much output goes to the log in one write, in bytes.
const LOG_CHUNK_BYTES: usize = 4096;

fn answer<E: std::error::Error>(result: Result<(), E>) -> Response {
    match result {
        Ok(()) => Response::Done,
        Err(error) if error.source().is_some() => {
            Response::Error { message: format!("{error}: {}", source_of(&error)) }
        }
        Err(error) => Response::Error { message: error.to_string() },
    }
}

fn borrow(event: &vmm_sys_util::eventfd::EventFd) -> std::os::fd::BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as the event is borrowed.
    unsafe { std::os::fd::BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// `TUNGETIFF`: which interface a tap's descriptor belongs to.
pub(super) const TUNGETIFF: u32 = 0x8004_54d2;

fn tap_name(tap: &OwnedFd) -> io::Result<String> {
    // SAFETY: an all-zero ifreq is a valid one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: TUNGETIFF writes at most one ifreq to where we point.
    if unsafe { libc::ioctl(tap.as_raw_fd(), TUNGETIFF.into(), &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let name: Vec<u8> =
        request.ifr_name.iter().map(|&byte| byte as u8).take_while(|&byte| byte != 0).collect();
    Ok(String::from_utf8_lossy(&name).into_owned())
}
