//! For tests of which every one belongs in the lab.

#![allow(dead_code)] // Each test binary uses its own part.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

/// How long one test may take in the lab, in seconds.
const TIMEOUT_S: &str = "900";

/// `false`: this is the lab, go on. `true`: the calling test ran in the lab, and passed.
#[track_caller]
pub fn ran_in_lab() -> bool {
    ran_in_lab_with(&["--memory", "3G", "--timeout", TIMEOUT_S])
}

/// The same in a lab that is started with these options of `tests/lab/run`.
#[track_caller]
pub fn ran_in_lab_with(options: &[&str]) -> bool {
    if std::env::var_os("VMCTL_IN_LAB").is_some() {
        return false;
    }
    let thread = std::thread::current();
    let test = thread.name().expect("the test harness names its threads");
    let (mut success, mut said) = attempt(test, options);
    // The emulation loses a guest now and then ("Lost guests" in tests/lab/README.md): a test is tried once more
    // then, where that does not happen, and no second time.
    if !success {
        // Said past the harness, which keeps what a passing test prints to itself.
        let _ = writeln!(std::io::stderr(), "RETRIED {test}: it failed in the emulated lab\n{said}");
        (success, said) = attempt(test, &[options, &["--thread", "single"]].concat());
    }
    assert!(success, "in the lab:\n{said}");
    assert!(said.contains("1 passed"), "the lab ran nothing:\n{said}");
    print!("{said}");
    true
}

/// Whether the test passed in a lab of its own, and what was said.
fn attempt(test: &str, options: &[&str]) -> (bool, String) {
    let program = std::env::current_exe().unwrap();
    let file = Path::new(program.file_name().unwrap());
    let output = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/lab/run"))
        .args(options)
        .args(["--env", "VMCTL_SECCOMP", "--with"])
        .arg(&program)
        .arg("--")
        .arg(Path::new("/usr/local/bin").join(file))
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .stdin(Stdio::null())
        .output()
        .expect("tests/lab/run is there");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.success(), format!("{}\n{}", text(&output.stdout), text(&output.stderr)))
}
