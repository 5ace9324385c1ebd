//! For tests of which every one belongs in the lab.

#![allow(dead_code)] // Each test binary uses its own part.

use std::path::Path;
use std::process::{Command, Stdio};

/// How long one test may take in the lab, in seconds.
const TIMEOUT_S: &str = "900";

/// `false`: this is the lab, go on. `true`: the calling test ran in the lab, and passed.
#[track_caller]
pub fn ran_in_lab() -> bool {
    if std::env::var_os("VMCTL_IN_LAB").is_some() {
        return false;
    }
    let thread = std::thread::current();
    let test = thread.name().expect("the test harness names its threads");
    let program = std::env::current_exe().unwrap();
    let file = Path::new(program.file_name().unwrap());
    let output = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/lab/run"))
        .args(["--memory", "3G", "--timeout", TIMEOUT_S, "--with"])
        .arg(&program)
        .arg("--")
        .arg(Path::new("/usr/local/bin").join(file))
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .stdin(Stdio::null())
        .output()
        .expect("tests/lab/run is there");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (said, errors) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "in the lab ({}):\n{said}\n{errors}", output.status);
    assert!(said.contains("1 passed"), "the lab ran nothing:\n{said}\n{errors}");
    print!("{said}");
    true
}
