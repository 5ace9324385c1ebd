//! The serial console before stock Linux: whatever a guest prints arrives, while its kernel prints between. In the
//! lab (`tests/lab/`). `VMCTL_LAB_SERIAL_LINES=200000` prints for longer.

#[path = "support/in_lab.rs"]
mod in_lab;
#[path = "support/lost.rs"]
mod lost;
mod support;

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use in_lab::ran_in_lab_with;
use support::{RunningVm, Session, Vm};

const PROGRAM: &str = "/usr/local/bin/vmctl-vmm";
const LINES: usize = 2_000;
/// What is said by the kernel's own console, at any place of what the shell prints.
const NOISE: &str = "<noise>\r\n";
/// A guest in the emulated lab takes its time, but never so long for a line.
const SILENCE: Duration = Duration::from_secs(40);

fn lines() -> usize {
    std::env::var("VMCTL_LAB_SERIAL_LINES").map_or(LINES, |text| text.parse().expect("a number"))
}

fn line(number: usize) -> String {
    format!("{number} abcdefghijklmnopqrstuvwxyz\r\n")
}

/// Reads until the shell has printed this, and gives all that it printed before, without the noise. The noise goes on where
/// the shell's output stands still: it is no sign of life.
fn read_all(vm: &RunningVm, console: &Session, end: &str) -> String {
    let (mut text, mut fresh, mut heard) = (String::new(), String::new(), Instant::now());
    let mut buffer = [0; 4096];
    loop {
        match console.console.read(&mut buffer, Duration::from_secs(1)).unwrap() {
            Some(0) => panic!("the console ended"),
            Some(length) => fresh += &String::from_utf8_lossy(&buffer[..length]),
            None => {}
        }
        // As far as the noise in it is whole.
        let whole: String = fresh.drain(..fresh.rfind("\r\n").map_or(0, |at| at + 2)).collect();
        let said = whole.replace(NOISE, "");
        if !said.is_empty() {
            let looked_at = text.len().saturating_sub(end.len());
            text += &said;
            heard = Instant::now();
            if let Some(at) = text.get(looked_at..).and_then(|tail| tail.find(end)) {
                text.truncate(looked_at + at);
                return text;
            }
        }
        assert!(
            heard.elapsed() < SILENCE,
            "the shell has stopped after {:?}, {fresh:?}: {}",
            text.lines().next_back(),
            lost::judge(&vm.control_path(), &vm.log(), 0).evidence
        );
    }
}

#[test]
fn all_that_a_guest_prints_arrives() {
    let timeout = (300 + lines() / 50).to_string();
    if ran_in_lab_with(&["--memory", "2G", "--timeout", &timeout, "--env", "VMCTL_LAB_SERIAL_LINES"]) {
        return;
    }
    let cmdline = "console=ttyS0 loglevel=5 printk.time=0 panic=-1 mitigations=off tsc=reliable";
    let vm = Vm::new(File::open("/guest/vmlinux").unwrap(), cmdline)
        .memory_bytes(256 << 20)
        .initrd(File::open("/guest/initrd").unwrap())
        .launch(Path::new(PROGRAM))
        .unwrap();
    let mut console = vm.console();
    console.expect_within("guest# ", Duration::from_secs(90));
    let (count, begin) = (lines(), Instant::now());
    console.type_in(
        "stty -echo; (while usleep 20000 && [ ! -e /quiet ]; do echo '<1><noise>' >/dev/kmsg; done) & echo REA''DY\n",
    );
    console.expect_within("READY\r\n", SILENCE);
    console.type_in(&format!(
        "n=0; while [ $n -lt {count} ]; do echo $n abcdefghijklmnopqrstuvwxyz; n=$((n+1)); done; touch /quiet; wait; \
         echo DO''NE\n"
    ));
    let said = read_all(&vm, &console, "DONE");
    println!("{} bytes in {} ms", said.len(), begin.elapsed().as_millis());
    let mut expected = String::new();
    (0..count).for_each(|number| expected += &line(number));
    let at = said.find("0 abc").expect("the first line");
    assert!(said[at..] == expected, "not what was printed:\n{}", &said[at..]);
    assert_eq!(vm.control().state().unwrap().reboots, 0);
}
