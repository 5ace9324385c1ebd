//! Tests that need what this kernel may lack run themselves again in the lab. They are never skipped.

use std::path::Path;
use std::process::Command;

use vmctl::host::linux::capability;
use vmctl::host::snapshot::Capability;

/// Set in the lab, so that a lab without the ability fails instead of starting a lab in the lab.
const IN_LAB: &str = "VMCTL_TEST_IN_LAB";

/// `true`: this host has all of these, go on. `false`: the calling test ran in the lab, and passed.
#[track_caller]
pub fn has_or_ran_in_lab(needed: &[Capability]) -> bool {
    let lacking: Vec<_> =
        needed.iter().filter_map(|&capability| Some((capability, capability::lacks(capability)?))).collect();
    if lacking.is_empty() {
        return true;
    }
    assert!(std::env::var_os(IN_LAB).is_none(), "the lab itself lacks {lacking:?}");
    let thread = std::thread::current();
    let test = thread.name().expect("the test harness names its threads");
    let program = std::env::current_exe().unwrap();
    let file = Path::new(program.file_name().unwrap());
    let run = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/lab/run");
    let lab_program = Path::new("/usr/local/bin").join(file);
    let output = Command::new(&run)
        .arg("--with")
        .arg(&program)
        .args(["--env", &format!("{IN_LAB}=1"), "--timeout", "300", "--"])
        .arg(&lab_program)
        .args(["--exact", test, "--nocapture"])
        .output()
        .unwrap_or_else(|error| panic!("start {}: {error}", run.display()));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (said, errors) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "in the lab, for want of {lacking:?} here:\n{said}\n{errors}");
    assert!(said.contains("1 passed"), "the lab ran nothing: {said}\n{errors}");
    false
}
