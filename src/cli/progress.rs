//! What a run looks like while it runs: a line for each object that came to its end and, on a terminal, one
//! line below that says what takes long.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::output::Output;
use crate::execute::Progress;
use crate::name::ObjectId;
use crate::report::text;

/// How often the seconds are drawn anew.
const REDRAW: Duration = Duration::from_millis(250);
/// What ends sooner is not shown as running.
const SHOWN_AFTER: Duration = Duration::from_millis(400);

/// Names the hook of the tests that kill a run at every step boundary: with `N` in this variable the process
/// ends itself by SIGKILL right before the N-th step of the run begins.
const CRASH_BEFORE_STEP: &str = "VMCTL_CRASH_BEFORE_STEP";

pub struct Live<'a> {
    out: &'a Output,
    /// JSON was asked for, or silence.
    silent: bool,
    running: Arc<(Mutex<Running>, Condvar)>,
    crash_before: Option<usize>,
    /// Steps that began, over all rounds.
    begun: usize,
}

#[derive(Default)]
struct Running {
    steps: BTreeMap<ObjectId, (String, Instant)>,
    /// The line below is on the screen.
    drawn: bool,
    over: bool,
}

fn lock(running: &Mutex<Running>) -> MutexGuard<'_, Running> {
    // Only plain data is in there; a panic elsewhere leaves it whole.
    running.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `work` with progress lines.
pub fn with_live<T>(out: &Output, silent: bool, work: impl FnOnce(&mut Live<'_>) -> T) -> T {
    let running = Arc::new((Mutex::new(Running::default()), Condvar::new()));
    let crash_before = std::env::var(CRASH_BEFORE_STEP).ok().and_then(|number| number.parse().ok());
    let mut live = Live { out, silent, running: Arc::clone(&running), crash_before, begun: 0 };
    if silent || out.quiet || !out.is_terminal {
        return work(&mut live);
    }
    std::thread::scope(|scope| {
        scope.spawn(|| redraw(out, &running));
        let result = work(&mut live);
        let mut state = lock(&running.0);
        state.erase(out);
        state.over = true;
        running.1.notify_all();
        result
    })
}

fn redraw(out: &Output, running: &(Mutex<Running>, Condvar)) {
    let mut state = lock(&running.0);
    while !state.over {
        state.draw(out);
        state = running.1.wait_timeout(state, REDRAW).unwrap_or_else(PoisonError::into_inner).0;
    }
}

impl Running {
    fn draw(&mut self, out: &Output) {
        let slow = |(_, since): &&(String, Instant)| since.elapsed() >= SHOWN_AFTER;
        let copied = out.copied();
        let line = match (self.steps.values().filter(slow).min_by_key(|(_, since)| *since), copied) {
            (Some((step, since)), copied) => {
                let others = self.steps.values().filter(slow).count() - 1;
                let others = if others > 0 { format!(", and {others} more") } else { String::new() };
                let copied = copied.map(|copied| format!("; {copied}")).unwrap_or_default();
                format!("… {step} ({} s{others}{copied})", since.elapsed().as_secs())
            }
            (None, Some(copied)) => format!("… {copied}"),
            (None, None) => return self.erase(out),
        };
        let width = out.style.width.unwrap_or(80).saturating_sub(1);
        let line: String = line.chars().take(width).collect();
        out.print(&format!("\r\x1b[K{}", out.style.dim(&line)));
        self.drawn = true;
    }

    fn erase(&mut self, out: &Output) {
        if std::mem::take(&mut self.drawn) {
            out.print("\r\x1b[K");
        }
    }
}

impl Live<'_> {
    pub fn hear(&mut self, progress: Progress<'_>) {
        let running = Arc::clone(&self.running);
        let mut state = lock(&running.0);
        match progress {
            Progress::Begins { object, step, .. } => {
                self.begun += 1;
                if self.crash_before == Some(self.begun) {
                    crash();
                }
                state.steps.insert(object.clone(), (step.to_string(), Instant::now()));
                if self.out.verbose > 0 && !self.silent {
                    state.erase(self.out);
                    self.out.print(&format!("  {}\n", self.out.style.dim(&step.to_string())));
                }
            }
            Progress::Ended { object, verb, outcome } => {
                state.steps.remove(object);
                if !self.silent && (!self.out.quiet || !outcome.is_done()) {
                    state.erase(self.out);
                    self.out.print(&text::outcome(object, verb, outcome, self.out.style));
                }
            }
        }
    }
}

fn crash() {
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    // The signal takes effect before we are back in user space, or it could not be sent.
    std::process::abort();
}
