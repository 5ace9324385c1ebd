//! What happens while a tree is read, at exactly the wrong moment.

use std::cell::Cell;
use std::fs;
use std::os::unix::fs::symlink;

use super::*;

/// A directory of its own, removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("vmctl-source-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, path: &str, text: &str) {
        let path = self.0.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Reads `path` as a directory; `disturb` is called with the count of files opened so far.
fn read_disturbed(path: &Path, disturb: &dyn Fn(usize)) -> Sources {
    let limits = Limits::default();
    let count = Cell::new(0);
    let hook = |_: &Path| {
        disturb(count.get());
        count.set(count.get() + 1);
    };
    let mut reader = Reader {
        limits: &limits,
        files: Vec::new(),
        problems: Vec::new(),
        seen: BTreeSet::new(),
        bytes: 0,
        before_open: Some(&hook),
    };
    reader.inputs(&[Input::Directory { path: path.to_owned(), recursive: false }]);
    reader.finish()
}

fn messages(sources: &Sources) -> String {
    sources.problems.iter().map(|problem| problem.message.as_str()).collect::<Vec<_>>().join("\n")
}

fn texts(sources: &Sources) -> Vec<&str> {
    sources.files.iter().map(|file| file.text()).collect()
}

#[test]
fn a_directory_that_vanishes_while_it_is_read_is_a_problem() {
    let scratch = Scratch::new("vanish");
    let directory = scratch.0.join("live");
    scratch.file("live/a.yaml", "a");
    scratch.file("live/b.yaml", "b");
    let sources = read_disturbed(&directory, &|opened| {
        if opened == 1 {
            fs::remove_dir_all(&directory).unwrap();
        }
    });
    assert!(sources.files.is_empty(), "a part of a directory is worse than nothing");
    assert!(messages(&sources).contains("no such file or directory"), "{}", messages(&sources));
}

#[test]
fn a_directory_that_is_emptied_while_it_is_read_is_not_an_empty_one() {
    let scratch = Scratch::new("emptied");
    scratch.file("a.yaml", "a");
    scratch.file("b.yaml", "b");
    let sources = read_disturbed(&scratch.0, &|opened| {
        if opened == 0 {
            fs::remove_file(scratch.0.join("b.yaml")).unwrap();
        }
    });
    // The second reading sees one steady file: that is what the directory now is.
    assert_eq!(texts(&sources), ["a"]);
    assert!(sources.problems.is_empty());
}

#[test]
fn a_file_that_changes_at_every_reading_is_a_problem() {
    let scratch = Scratch::new("restless");
    scratch.file("a.yaml", "a");
    scratch.file("b.yaml", "b");
    let sources = read_disturbed(&scratch.0, &|opened| {
        // Replaces the file that was read before this one.
        scratch.file("new", &format!("{opened}"));
        fs::rename(scratch.0.join("new"), scratch.0.join("a.yaml")).unwrap();
    });
    assert!(messages(&sources).contains("changes while it is read"), "{}", messages(&sources));
}

#[test]
fn a_published_link_that_is_swapped_gives_one_revision() {
    let scratch = Scratch::new("swap");
    for revision in ["one", "two"] {
        scratch.file(&format!("{revision}/a.yaml"), revision);
        scratch.file(&format!("{revision}/b.yaml"), revision);
    }
    let link = scratch.0.join("current");
    symlink("one", &link).unwrap();
    let sources = read_disturbed(&link, &|opened| {
        if opened == 1 {
            symlink("two", scratch.0.join("next")).unwrap();
            fs::rename(scratch.0.join("next"), &link).unwrap();
        }
    });
    assert_eq!(texts(&sources), ["two", "two"], "what is published now, and all of it");
    assert!(sources.problems.is_empty());
}

#[test]
fn an_atomic_writer_that_swaps_its_data_gives_one_revision() {
    let scratch = Scratch::new("atomic");
    for revision in ["one", "two"] {
        scratch.file(&format!("..{revision}/a.yaml"), revision);
        scratch.file(&format!("..{revision}/b.yaml"), revision);
    }
    symlink("..one", scratch.0.join("..data")).unwrap();
    for name in ["a.yaml", "b.yaml"] {
        symlink(format!("..data/{name}"), scratch.0.join(name)).unwrap();
    }
    let sources = read_disturbed(&scratch.0, &|opened| {
        if opened == 1 {
            symlink("..two", scratch.0.join("..data_tmp")).unwrap();
            fs::rename(scratch.0.join("..data_tmp"), scratch.0.join("..data")).unwrap();
        }
    });
    assert_eq!(texts(&sources), ["two", "two"], "{}", messages(&sources));
    assert!(sources.problems.is_empty());
}

#[test]
fn a_file_that_becomes_a_fifo_is_refused_without_waiting() {
    let scratch = Scratch::new("fifo");
    scratch.file("a.yaml", "a");
    let path = scratch.0.join("a.yaml");
    let sources = read_disturbed(&scratch.0, &|opened| {
        if opened == 0 {
            fs::remove_file(&path).unwrap();
            rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::Fifo, Mode::from(0o600), 0).unwrap();
        }
    });
    assert!(sources.files.is_empty());
    assert!(messages(&sources).contains("a FIFO"), "{}", messages(&sources));
}
