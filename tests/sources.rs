//! Sources that can't be files of a repository: trees with links, pipes and devices, broken bytes,
//! sizes out of bounds, and directories that others write to.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use vmctl::load::source::read_stdin;
use vmctl::load::{Input, Limits, Loaded, Options, load};

/// A directory of its own, removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("vmctl-sources-{}-{count}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn path(&self, path: &str) -> PathBuf {
        self.0.join(path)
    }

    fn file(&self, path: &str, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn bridge(name: &str) -> String {
    format!("apiVersion: vmctl.dev/v1alpha1\nkind: Bridge\nmetadata:\n  name: {name}\nspec: {{}}\n")
}

fn load_file(path: impl AsRef<Path>) -> Loaded {
    load(&[Input::File(path.as_ref().to_owned())], &Options::default())
}

fn load_directory(path: impl AsRef<Path>, recursive: bool) -> Loaded {
    load(&[Input::Directory { path: path.as_ref().to_owned(), recursive }], &Options::default())
}

fn load_bytes(bytes: &[u8]) -> Loaded {
    load(&[Input::Stdin(bytes.to_vec())], &Options::default())
}

fn names(loaded: &Loaded) -> Vec<&str> {
    loaded.manifests.iter().map(|manifest| manifest.id.name.as_str()).collect()
}

fn text(loaded: &Loaded) -> String {
    loaded.problems.iter().map(|problem| format!("{problem}\n")).collect()
}

/// Nothing was taken, and the only problem says `expected`.
#[track_caller]
fn refused(loaded: &Loaded, expected: &str) {
    assert!(loaded.manifests.is_empty() && !loaded.complete, "{:?}", names(loaded));
    assert_eq!(loaded.problems.len(), 1, "{}", text(loaded));
    assert!(text(loaded).contains(expected), "{}", text(loaded));
}

#[test]
fn invalid_utf8_is_shown_with_its_place() {
    let mut bytes = bridge("br0").into_bytes();
    let at = bytes.windows(3).position(|three| three == b"br0").unwrap();
    bytes[at + 1] = 0xe9;
    let loaded = load_bytes(&bytes);
    refused(&loaded, "<stdin>:4:10: error: byte 63 (0xe9) is not UTF-8\n  4 |   name: b\u{fffd}0");
    let mut utf16 = vec![0xff, 0xfe];
    utf16.extend(bridge("br0").encode_utf16().flat_map(u16::to_le_bytes));
    refused(&load_bytes(&utf16), "UTF-16");
    refused(&load_bytes(b"\0\0\0"), "control character U+0000");
}

#[test]
fn documents_of_ten_megabytes_are_refused_and_the_next_one_is_read() {
    let mut big = bridge("big");
    big.push_str(&"# a comment of some length\n".repeat(400_000));
    assert!(big.len() > 10_000_000);
    let loaded = load_bytes(format!("{big}---\n{}", bridge("small")).as_bytes());
    assert_eq!(names(&loaded), ["small"]);
    assert!(!loaded.complete);
    assert!(text(&loaded).contains("<stdin>:1:1: error: the document has 108000"), "{}", text(&loaded));
}

#[test]
fn sizes_are_bounded() {
    let scratch = Scratch::new();
    let huge = scratch.file("huge.yaml", "");
    fs::File::options().write(true).open(&huge).unwrap().set_len(1 << 40).unwrap();
    refused(&load_file(&huge), "larger than 16777216 bytes");
    let limits = Limits { file_bytes: 1000, total_bytes: 250, files: 3, entries: 10, ..Limits::default() };
    let options = Options { limits };
    let two = [
        Input::Text { name: "a".into(), text: bridge("a") },
        Input::Text { name: "b".into(), text: bridge("b") },
    ];
    assert!(load(&two, &options).complete);
    let three = [&two[..], &[Input::Text { name: "c".into(), text: bridge("c").repeat(2) }]].concat();
    let loaded = load(&three, &options);
    assert!(!loaded.complete && text(&loaded).contains("c: all manifests together"), "{}", text(&loaded));
    let directory = Scratch::new();
    for index in 0..4 {
        directory.file(&format!("{index}.yaml"), "");
    }
    let input = [Input::Directory { path: directory.0.clone(), recursive: false }];
    let loaded = load(&input, &options);
    assert!(!loaded.complete && text(&loaded).contains("more than 3 manifest files"), "{}", text(&loaded));
    for index in 0..20 {
        directory.file(&format!("{index}.txt"), "");
    }
    let loaded = load(&input, &options);
    assert!(!loaded.complete && text(&loaded).contains("more than 10 entries"), "{}", text(&loaded));
}

#[test]
fn standard_input_is_cut_nowhere_in_silence() {
    let limits = Limits { file_bytes: 10, ..Limits::default() };
    let bytes = read_stdin(&b"0123456789abcdef"[..], &limits).unwrap();
    assert_eq!(bytes.len(), 11);
    refused(&load(&[Input::Stdin(bytes)], &Options { limits }), "<stdin>: larger than 10 bytes");
}

/// Each of these once took a YAML reader's memory or time.
#[test]
fn bombs_are_refused_quickly() {
    let quoted = |count: usize| format!("a: &a \"{}\"\n", "x".repeat(count));
    let mut chain = "a0: &a0 x\n".to_owned();
    (1..20_000).for_each(|index| chain.push_str(&format!("a{index}: &a{index} [*a{}]\n", index - 1)));
    let bombs = [
        ("nesting", "[".repeat(900_000)),
        ("mapping nesting", "{a: ".repeat(200_000)),
        ("block nesting", (0..1000).map(|depth| format!("{}- -\n", " ".repeat(depth))).collect()),
        ("one line of items", format!("[{}]", "a,".repeat(400_000))),
        ("anchors", "&a ".repeat(300_000)),
        ("long text", quoted(500_000) + "b: [*a, *a, *a, *a, *a]\n"),
        ("chain of aliases", chain),
        ("keys", (0..80_000).map(|index| format!("k{index}: 1\n")).collect()),
        ("one key", "k: 1\n".repeat(100_000)),
        ("tabs", format!("a:\n{}b", "\t".repeat(1_000_000))),
        ("question marks", "? ".repeat(400_000)),
        ("folded", format!("a: >\n{}", " x\n".repeat(300_000))),
        ("tags", format!("a: !{} x", "y".repeat(900_000))),
        ("many documents", "---\na: 1\n".repeat(100_000)),
    ];
    for (name, bomb) in bombs {
        let started = Instant::now();
        let loaded = load_bytes(bomb.as_bytes());
        assert!(!loaded.complete && loaded.manifests.is_empty(), "{name}");
        println!("{name}: {:?}", started.elapsed());
        assert!(started.elapsed() < Duration::from_secs(20), "{name}: {:?}", started.elapsed());
        assert!(loaded.problems.iter().all(|problem| problem.location.is_some()), "{name}");
    }
}

#[test]
fn what_is_no_regular_file_is_refused_without_waiting() {
    let scratch = Scratch::new();
    let fifo = scratch.path("pipe.yaml");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, rustix::fs::Mode::from(0o600), 0)
        .unwrap();
    refused(&load_file(&fifo), "this is a FIFO, not a file");
    refused(&load_directory(&scratch.0, false), "pipe.yaml: this is a FIFO, not a file");
    refused(&load_file("/dev/zero"), "this is a device");
    refused(&load_file(&scratch.0), "this is a directory");
    refused(&load_directory("/dev/zero", false), "not a directory");
    let _socket = std::os::unix::net::UnixListener::bind(scratch.path("socket.yaml")).unwrap();
    refused(&load_file(scratch.path("socket.yaml")), "this is a socket");
}

#[test]
fn what_is_missing_is_not_empty() {
    let scratch = Scratch::new();
    refused(&load_file(scratch.path("none.yaml")), "no such file or directory");
    refused(&load_directory(scratch.path("none"), true), "no such file or directory");
    symlink("nowhere", scratch.path("dangling")).unwrap();
    refused(&load_directory(scratch.path("dangling"), false), "no such file or directory");
    symlink("loop", scratch.path("loop")).unwrap();
    refused(&load_directory(scratch.path("loop"), false), "a loop of symbolic links");
    fs::create_dir(scratch.path("empty")).unwrap();
    refused(&load_directory(scratch.path("empty"), true), "no manifests in");
    let inside = Scratch::new();
    inside.file("a.yaml", bridge("a"));
    symlink("gone.yaml", inside.path("b.yaml")).unwrap();
    let loaded = load_directory(&inside.0, false);
    assert!(
        !loaded.complete && text(&loaded).contains("changes while it is read")
            || text(&loaded).contains("b.yaml: no such file"),
        "{}",
        text(&loaded)
    );
}

#[test]
fn links_out_of_the_directory_are_refused() {
    let scratch = Scratch::new();
    scratch.file("secret.yaml", bridge("secret"));
    scratch.file("live/good.yaml", bridge("good"));
    for (name, target) in [("relative", "../secret.yaml".into()), ("absolute", scratch.path("secret.yaml"))] {
        let link = scratch.path("live/link.yaml");
        symlink(&target, &link).unwrap();
        let loaded = load_directory(scratch.path("live"), false);
        assert_eq!(names(&loaded), ["good"], "{name}");
        assert!(!loaded.complete, "{name}");
        assert!(text(&loaded).contains("link.yaml: a symbolic link to"), "{}", text(&loaded));
        fs::remove_file(link).unwrap();
    }
    symlink("..", scratch.path("live/up")).unwrap();
    let loaded = load_directory(scratch.path("live"), true);
    assert!(
        !loaded.complete && text(&loaded).contains("a symbolic link to `..` leaves"),
        "{}",
        text(&loaded)
    );
    assert!(load_directory(scratch.path("live"), false).complete, "not asked to look there");
    // A link that the user names is the user's business.
    symlink(scratch.path("secret.yaml"), scratch.path("named.yaml")).unwrap();
    assert_eq!(names(&load_file(scratch.path("named.yaml"))), ["secret"]);
}

#[test]
fn published_layouts_are_read() {
    let git_sync = Scratch::new();
    git_sync.file(".worktrees/abc/hosts/a.yaml", bridge("a"));
    symlink(".worktrees/abc", git_sync.path("current")).unwrap();
    assert_eq!(names(&load_directory(git_sync.path("current/hosts"), false)), ["a"]);
    assert_eq!(names(&load_directory(git_sync.path("current"), true)), ["a"]);
    let atomic = Scratch::new();
    atomic.file("..2026_11_22/a.yaml", bridge("a"));
    atomic.file("..2026_11_22/sub/b.yaml", bridge("b"));
    symlink("..2026_11_22", atomic.path("..data")).unwrap();
    symlink("..data/a.yaml", atomic.path("a.yaml")).unwrap();
    symlink("..data/sub", atomic.path("sub")).unwrap();
    assert_eq!(names(&load_directory(&atomic.0, false)), ["a"]);
    let loaded = load_directory(&atomic.0, true);
    assert_eq!(names(&loaded), ["a", "b"]);
    assert!(loaded.complete);
}

#[test]
fn directories_are_read_in_order_and_without_what_editors_leave() {
    let scratch = Scratch::new();
    for (path, name) in [
        ("20-b.yml", "b"),
        ("10-a.yaml", "a"),
        ("30-c.json", "c"),
        (".hidden.yaml", "hidden"),
        (".#10-a.yaml", "lock"),
        ("10-a.yaml~", "backup"),
        ("#10-a.yaml#", "autosave"),
        ("10-a.yaml.swp", "swap"),
        ("notes.txt", "notes"),
        (".git/config.yaml", "git"),
        ("below/d.yaml", "d"),
        ("below/deeper/e.yaml", "e"),
    ] {
        scratch.file(path, bridge(name));
    }
    let loaded = load_directory(&scratch.0, false);
    assert_eq!(names(&loaded), ["a", "b", "c"]);
    assert!(loaded.complete);
    // A loop of links shows nothing twice.
    symlink("../below", scratch.path("below/again")).unwrap();
    symlink("10-a.yaml", scratch.path("40-same.yaml")).unwrap();
    let loaded = load_directory(&scratch.0, true);
    assert_eq!(names(&loaded), ["a", "b", "c", "d", "e"], "{}", text(&loaded));
    assert!(loaded.complete);
    let both = [
        Input::Directory { path: scratch.0.clone(), recursive: false },
        Input::File(scratch.path("10-a.yaml")),
    ];
    assert_eq!(names(&load(&both, &Options::default())), ["a", "b", "c"], "named twice, read once");
    let odd = Scratch::new();
    fs::write(odd.0.join(OsStr::new("caf\u{e9}.yaml")), bridge("cafe")).unwrap();
    assert_eq!(names(&load_directory(&odd.0, false)), ["cafe"]);
}

#[test]
fn the_fingerprint_is_of_names_and_bytes() {
    let scratch = Scratch::new();
    scratch.file("a.yaml", bridge("a"));
    let fingerprint = || load_directory(&scratch.0, false).fingerprint;
    let first = fingerprint();
    scratch.file("a.yaml", bridge("a"));
    assert_eq!(fingerprint(), first, "written again, but the same");
    scratch.file("a.yaml", bridge("b"));
    let second = fingerprint();
    assert_ne!(second, first);
    fs::rename(scratch.path("a.yaml"), scratch.path("b.yaml")).unwrap();
    assert_ne!(fingerprint(), second);
    fs::remove_file(scratch.path("b.yaml")).unwrap();
    assert_ne!(fingerprint(), second);
}

/// While `write` is called over and over by another thread, every load is whole or says that it isn't.
fn while_written(path: &Path, count: usize, write: impl Fn(u32) + Sync) {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut round = 0;
            while !stop.load(Ordering::Relaxed) {
                write(round);
                round += 1;
            }
        });
        let (mut whole, mut broken) = (0, 0);
        for _ in 0..300 {
            let loaded = load_directory(path, false);
            if !loaded.complete {
                broken += 1;
                continue;
            }
            whole += 1;
            let revisions: std::collections::BTreeSet<&str> = loaded
                .manifests
                .iter()
                .filter_map(|manifest| manifest.labels.get("revision"))
                .map(String::as_str)
                .collect();
            if loaded.manifests.len() != count || revisions.len() != 1 {
                stop.store(true, Ordering::Relaxed);
                panic!(
                    "{} of {count} objects, revisions {revisions:?}, and no word of it",
                    loaded.manifests.len()
                );
            }
        }
        stop.store(true, Ordering::Relaxed);
        assert!(whole + broken == 300);
    });
}

fn revision(scratch: &Scratch, directory: &str, revision: u32) {
    for index in 0..8 {
        let text = bridge(&format!("b{index}"))
            .replace("spec:", &format!("  labels: {{revision: r{revision}}}\nspec:"));
        scratch.file(&format!("{directory}/{index}.yaml"), text);
    }
}

#[test]
fn a_link_that_is_swapped_all_the_time_never_shows_two_revisions() {
    let scratch = Scratch::new();
    revision(&scratch, "r0", 0);
    symlink("r0", scratch.path("current")).unwrap();
    while_written(&scratch.path("current"), 8, |round| {
        let (next, last) = (format!("r{}", round + 1), format!("r{round}"));
        revision(&scratch, &next, round + 1);
        symlink(&next, scratch.path("tmp")).unwrap();
        fs::rename(scratch.path("tmp"), scratch.path("current")).unwrap();
        // As git-sync does: the old tree goes while somebody may still read it.
        fs::remove_dir_all(scratch.path(&last)).unwrap();
    });
}

#[test]
fn an_atomic_writer_never_shows_two_revisions() {
    let scratch = Scratch::new();
    revision(&scratch, "live/..r0", 0);
    symlink("..r0", scratch.path("live/..data")).unwrap();
    for index in 0..8 {
        symlink(format!("..data/{index}.yaml"), scratch.path(&format!("live/{index}.yaml"))).unwrap();
    }
    while_written(&scratch.path("live"), 8, |round| {
        revision(&scratch, &format!("live/..r{}", round + 1), round + 1);
        symlink(format!("..r{}", round + 1), scratch.path("live/..tmp")).unwrap();
        fs::rename(scratch.path("live/..tmp"), scratch.path("live/..data")).unwrap();
        fs::remove_dir_all(scratch.path(&format!("live/..r{round}"))).unwrap();
    });
}

#[test]
fn a_directory_that_comes_and_goes_is_whole_or_incomplete() {
    let scratch = Scratch::new();
    revision(&scratch, "live", 0);
    while_written(&scratch.path("live"), 8, |round| {
        revision(&scratch, "next", round + 1);
        fs::rename(scratch.path("live"), scratch.path("old")).unwrap();
        fs::remove_dir_all(scratch.path("old")).unwrap();
        fs::rename(scratch.path("next"), scratch.path("live")).unwrap();
    });
}
