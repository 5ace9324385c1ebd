//! Runs a plan: ready actions in parallel along the graph, each action's steps one after the other. A
//! failed step stops its own action and what waits for it, and nothing else. There is no journal: after
//! any failure or crash the answer is to look again.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;

use serde::Serialize;

use crate::host::{Host, Lane, Step, StepError};
use crate::kinds::action::Verb;
use crate::name::ObjectId;
use crate::plan::Plan;

/// How many slow steps run at once: enough to overlap waits for guests and disks, few enough that
/// copies don't fight over one disk.
const SLOW_STEPS_MAX: usize = 16;

/// What became of an object's action.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase", tag = "result")]
pub enum Outcome {
    /// All of its steps succeeded.
    Done { steps: usize },
    /// A step failed; those after it did not run.
    Failed { step: String, error: String, hint: Option<String> },
    /// It waited for this object, which failed.
    NotReached { because: ObjectId },
    /// The run was told to stop before all of its steps had begun.
    Cancelled,
}

impl Outcome {
    pub fn is_done(&self) -> bool {
        matches!(self, Self::Done { .. })
    }
}

/// What a caller is told while a plan runs.
#[derive(Debug)]
pub enum Progress<'a> {
    /// A step is about to run. `number` counts from 1 over the whole run, in order of start.
    Begins {
        number: usize,
        object: &'a ObjectId,
        step: &'a Step,
    },
    Ended {
        object: &'a ObjectId,
        verb: Verb,
        outcome: &'a Outcome,
    },
}

pub type Outcomes = BTreeMap<ObjectId, Outcome>;

/// One action on its way.
struct Work {
    next_step: usize,
    waits_for: usize,
}

struct Run<'a, 'p> {
    plan: &'p Plan,
    work: Vec<Work>,
    dependents: Vec<Vec<usize>>,
    ready: VecDeque<usize>,
    outcomes: HashMap<usize, Outcome>,
    begun: usize,
    progress: &'a mut dyn FnMut(Progress<'_>),
}

/// Runs what the plan left with steps. `progress` hears of each step before it begins.
pub fn execute(plan: &Plan, host: &dyn Host, progress: &mut dyn FnMut(Progress<'_>)) -> Outcomes {
    execute_until(plan, host, &AtomicBool::new(false), progress)
}

/// The same; as soon as `cancel` is set, steps that run are finished and no others begin.
pub fn execute_until(
    plan: &Plan,
    host: &dyn Host,
    cancel: &AtomicBool,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Outcomes {
    let mut run = Run::new(plan, progress);
    std::thread::scope(|scope| {
        let (sender, results) = mpsc::channel::<(usize, Result<(), StepError>)>();
        let mut slow_running = 0;
        let mut slow_waiting: VecDeque<usize> = VecDeque::new();
        loop {
            if cancel.load(Ordering::Relaxed) {
                run.ready.clear();
                slow_waiting.clear();
            }
            let mut fast = Vec::new();
            while let Some(index) = run.ready.pop_front() {
                match run.step(index).lane() {
                    Lane::Fast => fast.push(index),
                    Lane::Slow => slow_waiting.push_back(index),
                }
            }
            while slow_running < SLOW_STEPS_MAX
                && let Some(index) = slow_waiting.pop_front()
            {
                let step = run.begin(index);
                let sender = sender.clone();
                slow_running += 1;
                scope.spawn(move || {
                    let result = host.run(&[step]).pop().unwrap_or(Ok(()));
                    // The receiver lives as long as this scope.
                    let _ = sender.send((index, result));
                });
            }
            if !fast.is_empty() {
                let batch: Vec<&Step> = fast.iter().map(|&index| run.begin(index)).collect();
                for (index, result) in fast.into_iter().zip(host.run(&batch)) {
                    run.end(index, result);
                }
            } else if slow_running > 0 {
                let Ok((index, result)) = results.recv() else { break };
                slow_running -= 1;
                run.end(index, result);
            } else if run.ready.is_empty() {
                break;
            }
            while let Ok((index, result)) = results.try_recv() {
                slow_running -= 1;
                run.end(index, result);
            }
        }
    });
    if cancel.load(Ordering::Relaxed) {
        run.cancel_rest();
    }
    run.finish()
}

impl<'a, 'p> Run<'a, 'p> {
    fn new(plan: &'p Plan, progress: &'a mut dyn FnMut(Progress<'_>)) -> Self {
        let actions = &plan.actions;
        let position: HashMap<&ObjectId, usize> =
            actions.iter().enumerate().map(|(index, action)| (&action.object, index)).collect();
        let mut dependents = vec![Vec::new(); actions.len()];
        let mut work = Vec::with_capacity(actions.len());
        for (index, action) in actions.iter().enumerate() {
            // What has no steps has nothing to wait for.
            let waits: Vec<usize> = action
                .after
                .iter()
                .filter_map(|id| position.get(id).copied())
                .filter(|other| !actions[*other].steps.is_empty())
                .collect();
            for other in &waits {
                dependents[*other].push(index);
            }
            work.push(Work { next_step: 0, waits_for: waits.len() });
        }
        let ready = (0..actions.len())
            .filter(|index| work[*index].waits_for == 0 && !actions[*index].steps.is_empty())
            .collect();
        Self { plan, work, dependents, ready, outcomes: HashMap::new(), begun: 0, progress }
    }

    fn step(&self, index: usize) -> &'p Step {
        &self.plan.actions[index].steps[self.work[index].next_step]
    }

    fn begin(&mut self, index: usize) -> &'p Step {
        let step = self.step(index);
        self.begun += 1;
        (self.progress)(Progress::Begins {
            number: self.begun,
            object: &self.plan.actions[index].object,
            step,
        });
        step
    }

    fn end(&mut self, index: usize, result: Result<(), StepError>) {
        let action = &self.plan.actions[index];
        match result {
            Ok(()) => {
                self.work[index].next_step += 1;
                if self.work[index].next_step < action.steps.len() {
                    self.ready.push_back(index);
                    return;
                }
                self.settle(index, Outcome::Done { steps: action.steps.len() });
                for dependent in std::mem::take(&mut self.dependents[index]) {
                    self.work[dependent].waits_for -= 1;
                    let has_steps = !self.plan.actions[dependent].steps.is_empty();
                    if self.work[dependent].waits_for == 0
                        && has_steps
                        && !self.outcomes.contains_key(&dependent)
                    {
                        self.ready.push_back(dependent);
                    }
                }
            }
            Err(error) => {
                let step = self.step(index).to_string();
                let (error, hint) = (error.to_string(), error.hint());
                self.settle(index, Outcome::Failed { step, error, hint });
                self.abandon(index);
            }
        }
    }

    /// Everything that waits for a failed action is not reached.
    fn abandon(&mut self, failed: usize) {
        let mut queue = VecDeque::from([failed]);
        while let Some(index) = queue.pop_front() {
            for dependent in std::mem::take(&mut self.dependents[index]) {
                if !self.outcomes.contains_key(&dependent) && !self.plan.actions[dependent].steps.is_empty() {
                    let because = self.plan.actions[failed].object.clone();
                    self.settle(dependent, Outcome::NotReached { because });
                    queue.push_back(dependent);
                }
            }
        }
    }

    fn cancel_rest(&mut self) {
        for index in 0..self.plan.actions.len() {
            if !self.plan.actions[index].steps.is_empty() && !self.outcomes.contains_key(&index) {
                self.settle(index, Outcome::Cancelled);
            }
        }
    }

    fn settle(&mut self, index: usize, outcome: Outcome) {
        let action = &self.plan.actions[index];
        (self.progress)(Progress::Ended { object: &action.object, verb: action.verb, outcome: &outcome });
        self.outcomes.insert(index, outcome);
    }

    fn finish(self) -> Outcomes {
        let object = |index: usize| self.plan.actions[index].object.clone();
        self.outcomes.into_iter().map(|(index, outcome)| (object(index), outcome)).collect()
    }
}
