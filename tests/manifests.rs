//! The corpus of manifests: what is wrong with each bad one, to the letter, and that good ones are good.
//!
//! `tests/manifests/bad/NAME.yaml` (or a directory `NAME/`) has its expected output in `NAME.expected`;
//! `UPDATE_EXPECT=1` writes it. Cases that can't be files of a repository are made in a temporary
//! directory by `tests/sources.rs`.

use std::fs;
use std::path::{Path, PathBuf};

use vmctl::load::{Diagnostic, Input, Options, load};
use vmctl::name::{ObjectId, SetName};
use vmctl::pipeline::{Invalid, declare};

const BAD: &str = "tests/manifests/bad";
const GOOD: &str = "tests/manifests/good";

/// What `vmctl validate` finds.
struct Found {
    /// Of single objects, then between objects.
    problems: Vec<Diagnostic>,
    good: Vec<ObjectId>,
    unusable: Vec<ObjectId>,
    complete: bool,
}

fn check(path: &Path) -> Found {
    let input = if path.is_dir() {
        Input::Directory { path: path.to_owned(), recursive: false }
    } else {
        Input::File(path.to_owned())
    };
    let loaded = load(&[input], &Options::default());
    let complete = loaded.complete;
    assert_eq!(complete, !loaded.problems.iter().any(Diagnostic::is_error), "{}", path.display());
    let good = loaded.manifests.iter().map(|manifest| manifest.id.clone()).collect();
    let unusable = loaded.unusable.iter().cloned().collect();
    let problems = match declare(SetName::parse("default").unwrap(), loaded) {
        Ok(declaration) => declaration.warnings,
        Err(Invalid(problems)) => problems,
    };
    Found { problems, good, unusable, complete }
}

fn cases(directory: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let mut cases: Vec<PathBuf> =
        entries.filter(|path| path.extension().is_none_or(|end| end != "expected")).collect();
    cases.sort();
    cases
}

fn render(found: &Found) -> String {
    let mut text = String::new();
    for problem in &found.problems {
        text.push_str(&format!("{problem}\n\n"));
    }
    let list = |ids: &[ObjectId]| match ids {
        [] => "none".to_owned(),
        ids => ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
    };
    text.push_str(&format!("good: {}\n", list(&found.good)));
    text.push_str(&format!("unusable: {}\n", list(&found.unusable)));
    text.push_str(&format!("complete: {}\n", found.complete));
    text.replace(&format!("{BAD}/"), "")
}

#[test]
fn bad_manifests_are_refused_as_expected() {
    let update = std::env::var_os("UPDATE_EXPECT").is_some_and(|value| value == "1");
    let cases = cases(BAD);
    assert!(cases.len() >= 60, "{} cases", cases.len());
    let mut wrong = Vec::new();
    for case in &cases {
        let found = check(case);
        let name = case.display();
        assert!(!found.problems.is_empty(), "{name}: no problem was found");
        let located = found.problems.iter().all(|problem| problem.location.is_some());
        assert!(
            located || case.is_dir() || name.to_string().contains("comments-only"),
            "{name}: a problem without a place"
        );
        let text = render(&found);
        let expected = case.with_extension("expected");
        if update {
            fs::write(&expected, &text).unwrap();
            continue;
        }
        let expected = fs::read_to_string(&expected).unwrap_or_default();
        if expected != text {
            let diff = similar::TextDiff::from_lines(&expected, &text);
            wrong.push(format!("{name}:\n{}", diff.unified_diff().header("expected", "found")));
        }
    }
    assert!(wrong.is_empty(), "UPDATE_EXPECT=1 accepts these:\n{}", wrong.join("\n"));
}

#[test]
fn every_expectation_belongs_to_a_case() {
    let known: Vec<PathBuf> = cases(BAD).iter().map(|case| case.with_extension("expected")).collect();
    for entry in fs::read_dir(BAD).unwrap() {
        let path = entry.unwrap().path();
        let stale = path.extension().is_some_and(|end| end == "expected") && !known.contains(&path);
        assert!(!stale, "{} belongs to no case", path.display());
    }
    let mut unique = known.clone();
    unique.dedup();
    assert_eq!(unique, known, "two cases share a name");
}

#[test]
fn good_manifests_are_accepted() {
    let examples = cases("examples").into_iter().filter(|path| path.is_dir());
    // What `vmctl init` writes.
    let defaults = std::iter::once(PathBuf::from("manifests"));
    for case in cases(GOOD).into_iter().chain(examples).chain(defaults) {
        let found = check(&case);
        let problems: Vec<String> = found.problems.iter().map(ToString::to_string).collect();
        assert!(problems.is_empty(), "{}", problems.join("\n"));
        assert!(found.complete && found.unusable.is_empty() && !found.good.is_empty());
    }
}
