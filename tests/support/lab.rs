//! Tests that need what this kernel may lack run themselves again in the lab. They are never skipped.

use std::path::Path;
use std::process::Command;

use vmctl::host::linux::capability;
use vmctl::host::snapshot::Capability;

/// Set by the lab.
const IN_LAB: &str = "VMCTL_IN_LAB";

pub fn in_lab() -> bool {
    std::env::var_os(IN_LAB).is_some()
}

/// `true`: this host has all of these, go on. `false`: the calling test ran in the lab, and passed.
#[track_caller]
pub fn has_or_ran_in_lab(needed: &[Capability]) -> bool {
    let lacking: Vec<_> =
        needed.iter().filter_map(|&capability| Some((capability, capability::lacks(capability)?))).collect();
    if lacking.is_empty() {
        return true;
    }
    // A lab without the ability fails: no lab in the lab.
    assert!(!in_lab(), "the lab itself lacks {lacking:?}");
    run_in_lab(&[]);
    false
}

/// Runs the calling test again in the lab, with these programs in its PATH, and fails as it does there.
#[track_caller]
pub fn run_in_lab(programs: &[&str]) {
    let thread = std::thread::current();
    let test = thread.name().expect("the test harness names its threads");
    let program = std::env::current_exe().unwrap();
    let run = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/lab/run");
    let mut command = Command::new(&run);
    command.arg("--with").arg(&program).args(["--timeout", "300", "--env", "VMCTL_SECCOMP"]);
    for other in programs {
        command.args(["--with", other]);
    }
    let output = command
        .arg("--")
        .arg(program.file_name().unwrap())
        .args(["--exact", test, "--nocapture"])
        .output()
        .unwrap_or_else(|error| panic!("start {}: {error}", run.display()));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (said, errors) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "in the lab:\n{said}\n{errors}");
    assert!(said.contains("1 passed"), "the lab ran nothing: {said}\n{errors}");
}
