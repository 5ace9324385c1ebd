//! All documents of all sources: on all processors, in a fixed order, and no object twice.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::diagnostic::Diagnostic;
use super::document::{self, Problem};
use super::envelope::{self, has_error};
use super::source::Sources;
use super::text::{Origin, SourceFile};
use super::{Loaded, Manifest, Options};
use crate::name::ObjectId;

/// All that came of one document.
#[derive(Default)]
pub(super) struct Outcome {
    pub manifests: Vec<Manifest>,
    pub problems: Vec<Diagnostic>,
    /// Every object that is declared, good or not, in the order of the text.
    pub declared: Vec<(ObjectId, Origin)>,
}

pub fn load_sources(sources: Sources, options: &Options) -> Loaded {
    let mut jobs: Vec<(Arc<SourceFile>, Range<usize>)> = Vec::new();
    for file in &sources.files {
        jobs.extend(document::split(file.text()).into_iter().map(|range| (Arc::clone(file), range)));
    }
    let outcomes = run_all(&jobs, options);
    let mut loaded = Loaded {
        manifests: Vec::with_capacity(outcomes.len()),
        problems: sources.problems,
        unusable: BTreeSet::new(),
        complete: true,
        fingerprint: sources.fingerprint,
    };
    let mut declared = Vec::with_capacity(outcomes.len());
    for outcome in outcomes {
        loaded.manifests.extend(outcome.manifests);
        loaded.problems.extend(outcome.problems);
        declared.extend(outcome.declared);
    }
    refuse_duplicates(&declared, &mut loaded);
    if declared.len() != loaded.manifests.len() {
        let good: BTreeSet<&ObjectId> = loaded.manifests.iter().map(|manifest| &manifest.id).collect();
        loaded.unusable =
            declared.iter().map(|(id, _)| id).filter(|id| !good.contains(id)).cloned().collect();
    }
    if declared.is_empty() && loaded.problems.is_empty() {
        loaded.problems.push(nothing_declared(&sources.files));
    }
    loaded.complete = !loaded.problems.iter().any(Diagnostic::is_error);
    let more = loaded.problems.len().saturating_sub(options.limits.problems_total);
    if more > 0 {
        loaded.problems.truncate(options.limits.problems_total);
        let mut last = Diagnostic::error(format!("{more} more problems from here on"));
        last.location = loaded.problems.last().and_then(|problem| problem.location.clone());
        loaded.problems.push(last);
    }
    loaded
}

/// An input without a single object is a mistake, or a generator that failed: it must never read as
/// "remove everything".
fn nothing_declared(files: &[Arc<SourceFile>]) -> Diagnostic {
    let place = match files {
        [] => "nothing to read".to_owned(),
        [one] => format!("no manifests in {}", one.name()),
        [first, rest @ ..] => format!("no manifests in {} and {} more files", first.name(), rest.len()),
    };
    Diagnostic::error(place).hint("to remove objects, name them with `vmctl delete`")
}

/// Documents up to which threads cost more than they save.
const FEW_DOCUMENTS: usize = 64;
/// Documents that a thread takes at a time.
const BATCH: usize = 32;

/// Loads each document, on all processors where that pays; outcomes are in the order of `jobs`.
fn run_all(jobs: &[(Arc<SourceFile>, Range<usize>)], options: &Options) -> Vec<Outcome> {
    let run = |job: &(Arc<SourceFile>, Range<usize>)| load_document(&job.0, job.1.clone(), options);
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(8);
    if jobs.len() <= FEW_DOCUMENTS || threads == 1 {
        return jobs.iter().map(run).collect();
    }
    let batches: Vec<_> = jobs.chunks(BATCH).collect();
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(batch) = batches.get(index) else { return done };
            done.push((index, batch.iter().map(run).collect::<Vec<_>>()));
        }
    };
    let mut done: Vec<(usize, Vec<Outcome>)> = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mut done = work();
        for thread in others {
            match thread.join() {
                Ok(part) => done.extend(part),
                // A bug in here must not be taken for an empty source.
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        done
    });
    done.sort_unstable_by_key(|(index, _)| *index);
    done.into_iter().flat_map(|(_, outcomes)| outcomes).collect()
}

/// Two manifests of one object: neither is taken, since nobody can say which was meant.
fn refuse_duplicates(declared: &[(ObjectId, Origin)], loaded: &mut Loaded) {
    let mut first: HashMap<&ObjectId, &Origin> = HashMap::with_capacity(declared.len());
    let mut twice: BTreeSet<&ObjectId> = BTreeSet::new();
    for (id, origin) in declared {
        let Some(before) = first.get(id) else {
            first.insert(id, origin);
            continue;
        };
        twice.insert(id);
        let problem = origin
            .error("/metadata/name", format!("{id} is declared twice"))
            .hint("rename one or remove it; until then neither is used")
            .related(before.at("/metadata/name"), "declared first here");
        loaded.problems.push(problem);
    }
    if !twice.is_empty() {
        loaded.manifests.retain(|manifest| !twice.contains(&manifest.id));
    }
}

fn load_document(file: &Arc<SourceFile>, range: Range<usize>, options: &Options) -> Outcome {
    let mut outcome = Outcome::default();
    let parsed = document::parse(file.text(), range.clone(), &options.limits);
    let mut problems = parsed.problems;
    let sound = !has_error(&problems);
    if let Some(root) = &parsed.root {
        envelope::read(file, range, root, &mut problems, &mut outcome);
    }
    // Of a key that stands twice the first value is kept, to find more problems; it can't be trusted.
    if !sound {
        outcome.manifests.clear();
    }
    report(file, problems, options.limits.problems, &mut outcome);
    outcome
}

/// Sorts a document's problems by place, drops what aliases repeat, and bounds their number.
fn report(file: &SourceFile, mut problems: Vec<Problem>, max: usize, outcome: &mut Outcome) {
    problems.sort_by_key(|problem| problem.span);
    problems.dedup();
    let more = problems.len().saturating_sub(max);
    for problem in problems.into_iter().take(max) {
        let mut diagnostic = Diagnostic { severity: problem.severity, ..Diagnostic::error(problem.message) }
            .hint_maybe(problem.hint)
            .at(file.place(problem.span));
        for (span, message) in problem.related {
            diagnostic = diagnostic.related(file.place(span).location, message);
        }
        outcome.problems.push(diagnostic);
    }
    if more > 0
        && let Some(last) = outcome.problems.last()
    {
        let mut diagnostic = Diagnostic::error(format!("{more} more problems in this document"));
        diagnostic.location = last.location.clone();
        outcome.problems.push(diagnostic);
    }
}
