//! The pipeline in a loop: it waits for a change of the source or of the host, looks, plans, and runs
//! what differs. Level-triggered: an event only says "look", and truth comes from looking.
//!
//! ```text
//!            ┌──────────── wait: source · links · VMs · pools · signals · back-off · resync
//!            ▼
//!   quiet 20 ms (cap 500 ms) ──▶ read the source ──▶ pass: drain events, look, plan ──▶ nothing: wait
//!                                                      ▲                │ differs
//!                                                      └──── execute ◀──┘ (under the lock)
//! ```
//!
//! Our own writes wake the next pass once; it finds nothing and waits. Nothing is removed while the
//! source can't be read whole. VMs outlive this process, however it ends.

mod backoff;
mod balloon;
mod log;
mod services;
mod source;
mod vms;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::execute::{Outcome, Outcomes, Progress, execute_until};
use crate::host::linux::signals::{Signal, Signals};
use crate::host::linux::{HostLock, LinkEvents, LinuxHost, LockError};
use crate::host::{Host, Step};
use crate::kinds::Spec;
use crate::kinds::action::Verb;
use crate::name::{Kind, ObjectId, ObjectName, SetName, Sha256};
use crate::pipeline::Declaration;
use crate::plan::{Plan, Policy, Removal, plan};
use crate::report::text;
use backoff::{Backoff, STEADY};
use balloon::Balloons;
use log::Log;
use services::Services;
use source::{Reading, Source};
use vms::Vms;
use watch::Watch;

/// A burst of events is over when nothing came for so long.
const QUIET: Duration = Duration::from_millis(20);
/// A burst that doesn't end is acted upon after so long.
const QUIET_CAP: Duration = Duration::from_millis(500);
/// Passes without a wait in between. Who isn't done after so many is in a fight with somebody.
const PASSES_MAX: usize = 8;
/// The wait after that.
const FIGHT_PAUSE: Duration = Duration::from_secs(1);
/// A wait for another run's lock, and for nothing else; then it is tried again.
const LOCK_WAIT: Duration = Duration::from_millis(300);

pub struct Options {
    pub source: PathBuf,
    pub set: SetName,
    /// Everything is looked at again after so long, events or not.
    pub resync: Duration,
}

#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error("{what}: {source}")]
    Setup {
        what: &'static str,
        #[source]
        source: std::io::Error,
    },
}

/// What is waiting to be looked at.
#[derive(Default)]
struct Due {
    source: bool,
    host: bool,
    /// When the burst that is going on began, and when its last event came.
    burst: Option<(Instant, Instant)>,
}

struct Agent<'a> {
    host: &'a LinuxHost,
    options: Options,
    source: Source,
    signals: Signals,
    links: LinkEvents,
    watch: Watch,
    vms: Vms,
    services: Services,
    declared: Option<(Declaration, Sha256)>,
    /// The source was whole when it was last read.
    source_is_good: bool,
    backoff: Backoff,
    balloons: Balloons,
    started: BTreeMap<ObjectId, Instant>,
    due: Due,
    last_pass: Instant,
    /// Not before then: somebody undoes what we do.
    pause_until: Option<Instant>,
    ends: bool,
    log: Log,
}

/// Runs until `SIGTERM` or `SIGINT`.
pub fn run(host: &LinuxHost, options: Options) -> Result<(), AgentError> {
    let failed = |what: &'static str| move |source: std::io::Error| AgentError::Setup { what, source };
    let signals = Signals::open().map_err(failed("wait for signals"))?;
    let links = LinkEvents::open().map_err(failed("listen to the kernel's network events"))?;
    let watch = Watch::open(&options.source).map_err(failed("watch the source"))?;
    let mut agent = Agent {
        host,
        source: Source::new(&options.source, options.set.clone()),
        options,
        signals,
        links,
        watch,
        vms: Vms::default(),
        services: Services::default(),
        declared: None,
        source_is_good: false,
        backoff: Backoff::default(),
        balloons: Balloons::default(),
        started: BTreeMap::new(),
        due: Due { source: true, host: true, burst: None },
        last_pass: Instant::now(),
        pause_until: None,
        ends: false,
        log: Log::default(),
    };
    agent.log.say(&format!("watching {} for set {}", agent.options.source.display(), agent.options.set));
    agent.refresh_watches();
    while !agent.ends {
        if agent.due.source {
            agent.read_source();
        }
        if agent.due.host {
            agent.passes();
        }
        agent.wait().map_err(failed("wait for events"))?;
    }
    agent.log.say("ends; the VMs run on");
    Ok(())
}

impl Agent<'_> {
    fn read_source(&mut self) {
        self.due.source = false;
        // Watched first: what changes from here on is an event.
        self.refresh_watches();
        let in_force = self.declared.as_ref().map(|(_, fingerprint)| *fingerprint);
        let path = self.options.source.display().to_string();
        let consequence = match &self.declared {
            Some(_) => "what it declared last stays in force, and nothing is removed",
            None => "nothing is changed",
        };
        match self.source.read(in_force) {
            Reading::Unchanged => {
                if !self.source_is_good {
                    self.log.state("source", &format!("source {path}: as it was before"));
                }
                // What it removes could not be removed while it was bad.
                self.due.host |= !self.source_is_good;
                self.source_is_good = true;
            }
            Reading::Declared(declaration, fingerprint) => {
                let count = declaration.desired.order.len();
                self.log.state(
                    "source",
                    &format!("source {path}: {count} objects, revision {}", short(fingerprint)),
                );
                for warning in &declaration.warnings {
                    self.log.say(&warning.to_string());
                }
                self.declared = Some((*declaration, fingerprint));
                self.source_is_good = true;
                self.backoff.reset();
                self.due.host = true;
                self.refresh_watches();
            }
            Reading::Unavailable(why) => {
                self.source_is_good = false;
                self.log.state("source", &format!("source {path}: {why}; {consequence}"));
            }
            Reading::Invalid(invalid) => {
                self.source_is_good = false;
                let texts: Vec<String> = invalid.0.iter().map(ToString::to_string).collect();
                self.log.state(
                    "source",
                    &format!("source {path}: {invalid}; {consequence}\n{}", texts.join("\n")),
                );
            }
            Reading::BeingWritten(file) => {
                self.source_is_good = false;
                self.log.state(
                    "source",
                    &format!("source {path}: {} is being written; {consequence}", file.display()),
                );
            }
            Reading::Unsettled => {
                self.source_is_good = false;
                self.log.state("source", &format!("source {path}: it keeps changing; {consequence}"));
                self.due.source = true;
                self.note_event(Instant::now());
            }
        }
    }

    /// Looks and runs until there is nothing to run, or nothing that may be run now.
    fn passes(&mut self) {
        for _ in 0..PASSES_MAX {
            // Whatever happened before the look is covered by it.
            self.drain_events();
            self.due.host = false;
            self.last_pass = Instant::now();
            let has_run = self.pass();
            if has_run {
                // Pools may be there now that were not.
                self.refresh_watches();
            }
            if !has_run || self.ends || self.due.source {
                self.log.forget("fight");
                return;
            }
        }
        self.log.state("fight", "something changes the host back as often as it is changed: slowing down");
        self.due.host = true;
        self.pause_until = Some(Instant::now() + FIGHT_PAUSE);
    }

    /// One look at everything. True: something was run, so look again.
    fn pass(&mut self) -> bool {
        // Before the look: a VM that dies after it is an event.
        self.watch_vms();
        let Some((declaration, _)) = &self.declared else { return false };
        let desired = &declaration.desired;
        let removal = if self.source_is_good { Removal::Prune } else { Removal::Frozen };
        let policy = Policy { removal, ..Policy::default() };
        let look = || {
            let mut plan = plan(desired, &self.host.snapshot(&desired.scope()), &policy);
            plan.hold(&self.backoff.held(Instant::now()));
            plan
        };
        let mut next = look();
        if !next.has_steps() {
            self.say_what_stands_still(&next, true);
            return false;
        }
        let _lock = match HostLock::acquire(self.host.state_dir(), "vmctl agent", LOCK_WAIT) {
            Ok(lock) => lock,
            Err(error) => {
                self.wait_for_lock(&error);
                return false;
            }
        };
        self.log.forget("lock");
        next = look();
        let (outcomes, starts) = self.execute(&next);
        self.say_what_stands_still(&next, outcomes.is_empty());
        self.settle(&outcomes, &starts);
        !outcomes.is_empty()
    }

    fn wait_for_lock(&mut self, error: &LockError) {
        let text = match error {
            // (Without the time for which it is held: it would be news every time.)
            LockError::Locked { holder: Some(holder), .. } => {
                format!(
                    "waiting for `{}` (pid {}), which is at work on this host",
                    holder.command, holder.pid
                )
            }
            error => error.to_string(),
        };
        self.log.state("lock", &text);
        self.due.host = true;
        self.note_event(Instant::now());
    }

    /// Runs a plan, and ends early (between steps) when told to end. Also the objects whose VM was started.
    fn execute(&mut self, plan: &Plan) -> (Outcomes, BTreeSet<ObjectId>) {
        let mut starts = BTreeSet::new();
        let cancel = AtomicBool::new(false);
        let (log, signals, ends, due) = (&self.log, &self.signals, &mut self.ends, &mut self.due);
        let outcomes = execute_until(plan, self.host, &cancel, &mut |progress| {
            match progress {
                Progress::Begins { object, step: Step::StartVm { .. }, .. } => {
                    starts.insert(object.clone());
                }
                Progress::Begins { .. } => {}
                Progress::Ended { object, verb, outcome } => {
                    log.say(text::outcome(object, verb, outcome, text::Style::default()).trim_end());
                }
            }
            match signals.next() {
                Ok(Some(Signal::End)) => {
                    *ends = true;
                    cancel.store(true, Ordering::Relaxed);
                }
                Ok(Some(Signal::Reload)) => due.source = true,
                Ok(None) | Err(_) => {}
            }
        });
        (outcomes, starts)
    }

    /// Keeps account of what failed, and of VMs that don't stay up.
    fn settle(&mut self, outcomes: &Outcomes, starts: &BTreeSet<ObjectId>) {
        let now = Instant::now();
        for (object, outcome) in outcomes {
            match outcome {
                Outcome::Done { .. } if starts.contains(object) => {
                    let before = self.started.insert(object.clone(), now);
                    if before.is_none_or(|before| now - before >= STEADY) {
                        self.backoff.succeeded(object);
                    } else {
                        let delay = self.backoff.failed(object, now);
                        self.log.say(&format!(
                            "{object} doesn't stay up; it is left alone for {} ms",
                            delay.as_millis()
                        ));
                    }
                }
                Outcome::Done { .. } => {
                    if let Some(delay) = self.backoff.repaired(object, now) {
                        self.log.say(&format!(
                            "{object} is changed back all the time; it is left alone for {} ms",
                            delay.as_millis()
                        ));
                    }
                }
                Outcome::Failed { .. } => {
                    self.backoff.failed(object, now);
                }
                Outcome::NotReached { .. } | Outcome::Cancelled => {}
            }
        }
    }

    /// Blocked and refused objects, once for each new state. `rests`: nothing was run.
    fn say_what_stands_still(&mut self, plan: &Plan, rests: bool) {
        let mut lines: Vec<String> = Vec::new();
        for action in &plan.actions {
            lines.extend(
                action.blockers.iter().map(|blocker| format!("! {}: {}", action.object, blocker.because)),
            );
        }
        if plan.is_refused() {
            for refusal in &plan.refusals {
                lines.push(format!("refused: {}", refusal.because));
            }
            lines.push(format!(
                "to allow exactly this: vmctl apply -f … --prune --approve {}",
                &plan.hash[..12]
            ));
        }
        if lines.is_empty() && (!rests || plan.actions.iter().any(|action| action.verb != Verb::NoOp)) {
            // It is at work, or waits for another try: both have been said.
            self.log.forget("host");
            return;
        }
        let state = if lines.is_empty() { "in sync".to_owned() } else { lines.join("\n") };
        self.log.state("host", &state);
    }

    fn refresh_watches(&mut self) {
        let pools: BTreeSet<PathBuf> = self
            .declared
            .iter()
            .flat_map(|(declaration, _)| declaration.desired.declared.objects.values())
            .filter_map(|spec| match spec {
                Spec::StoragePool(pool) => Some(pool.place.path()),
                _ => None,
            })
            .collect();
        self.watch.refresh(&pools);
    }

    /// Watches each declared VM that runs, so that what becomes of it is an event.
    fn watch_vms(&mut self) {
        let Some((declaration, _)) = &self.declared else { return };
        let declared: BTreeSet<&ObjectName> = declaration
            .desired
            .order
            .iter()
            .filter(|id| id.kind == Kind::VirtualMachine)
            .map(|id| &id.name)
            .collect();
        let heard = self.vms.refresh(self.host, &declared);
        self.services.refresh(self.host, &declaration.desired);
        self.hear(heard);
    }

    fn note_event(&mut self, now: Instant) {
        let began = self.due.burst.map_or(now, |(began, _)| began);
        self.due.burst = Some((began, now));
    }

    /// Takes in everything that has happened. True: something did.
    fn drain_events(&mut self) -> bool {
        let links = match self.links.drain() {
            Ok(drained) => drained.relevant,
            Err(error) => {
                self.log.say(&format!("read network events: {error}"));
                true
            }
        };
        let touched = self.watch.drain().unwrap_or(watch::Touched { source: true, pools: true });
        let heard = self.vms.drain();
        let vms = self.hear(heard) | self.services.drain();
        self.due.host |= links || touched.pools || vms;
        self.due.source |= touched.source;
        links || touched.pools || touched.source || vms
    }

    /// Until something is due.
    fn wait(&mut self) -> std::io::Result<()> {
        if self.due.source || self.due.host {
            self.note_event(Instant::now());
        }
        while !self.ends {
            let now = Instant::now();
            let paused = self.pause_until.filter(|until| *until > now);
            let quiet = self.due.burst.map(|(began, last)| (last + QUIET).min(began + QUIET_CAP));
            let quiet = quiet.map(|quiet| paused.map_or(quiet, |paused| paused.max(quiet)));
            if quiet.is_some_and(|quiet| now >= quiet) {
                (self.due.burst, self.pause_until) = (None, None);
                if self.due.source || self.due.host {
                    return Ok(());
                }
            }
            let resync = self.last_pass + self.options.resync;
            let retry = self.backoff.next_due(self.last_pass);
            if now >= resync || retry.is_some_and(|retry| now >= retry) {
                self.due.host = true;
                self.due.source |= now >= resync;
                return Ok(());
            }
            let balloons = self.move_balloons(now);
            let until = [Some(resync), retry, quiet, balloons].into_iter().flatten().min().unwrap_or(resync);
            self.poll(until.saturating_duration_since(now))?;
            match self.signals.next()? {
                Some(Signal::End) => self.ends = true,
                Some(Signal::Reload) => {
                    // A person asks: what failed is tried at once.
                    self.backoff.reset();
                    self.started.clear();
                    self.due = Due { source: true, host: true, burst: None };
                    return Ok(());
                }
                None => {}
            }
            if self.drain_events() {
                self.note_event(Instant::now());
            }
        }
        Ok(())
    }

    fn poll(&self, timeout: Duration) -> std::io::Result<()> {
        let mut fds = vec![
            PollFd::from_borrowed_fd(self.signals.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.links.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.watch.as_fd(), PollFlags::IN),
        ];
        fds.extend(self.links.tables_fd().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        fds.extend(self.services.fds().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        fds.extend(self.vms.poll_fds());
        // Rounded up, so as not to wake just before the time.
        let timeout = timeout + Duration::from_micros(500);
        let timeout =
            Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: i64::from(timeout.subsec_nanos()) };
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

fn short(fingerprint: Sha256) -> String {
    fingerprint.to_string()[..12].to_owned()
}
