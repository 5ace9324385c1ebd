//! The commands for VMs, on a real VM process: a small guest of our own runs on this host's KVM.

#[path = "support/guest.rs"]
#[allow(dead_code, reason = "other tests use the rest of it")]
mod guest;
#[path = "support/cli.rs"]
mod support;

use std::io::Write;
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use support::*;

const MANIFESTS: &str = "\
apiVersion: vmctl.dev/v1alpha1
kind: Bridge
metadata: {name: br0}
spec: {}
---
apiVersion: vmctl.dev/v1alpha1
kind: StoragePool
metadata: {name: default}
spec: {directory: {path: @/pool}}
---
apiVersion: vmctl.dev/v1alpha1
kind: Volume
metadata: {name: root}
spec: {pool: default, format: qcow2, capacity: 20Mi}
---
apiVersion: vmctl.dev/v1alpha1
kind: VirtualMachine
metadata: {name: web}
spec:
  memory: 32Mi
  boot: {kernel: @/kernel}
  disks: [{volume: root}]
  interfaces: [{bridge: br0}]
  shutdownTimeoutSeconds: 2
";

fn ground() -> Ground {
    let ground = Ground::new();
    std::fs::write(ground.path("kernel"), guest::kernel()).unwrap();
    ground.write("a.yaml", MANIFESTS);
    ground
}

fn running() -> Ground {
    let ground = ground();
    ground.expect(0, "apply -f a.yaml --wait --timeout 60s");
    ground
}

impl Ground {
    #[track_caller]
    fn status(&self) -> Value {
        self.json(0, "get vm/web -o json")["status"].take()
    }

    #[track_caller]
    fn pid(&self) -> i64 {
        self.status()["pid"].as_i64().expect("it runs")
    }

    #[track_caller]
    fn log_says(&self, text: &str) {
        until(text, || self.vmctl("logs web").out.contains(text).then_some(()));
    }
}

#[test]
fn a_vm_is_shown_stopped_started_and_restarted() {
    let ground = running();
    let status = ground.status();
    let pid = status["pid"].as_i64().unwrap();
    assert!(std::path::Path::new(&format!("/proc/{pid}")).exists());
    assert_eq!((status["phase"].as_str(), status["cpus"].as_u64()), (Some("Running"), Some(1)));
    assert_eq!(status["interfaces"][0]["bridge"], "br0");
    assert_eq!(status["interfaces"][0]["up"], true);
    ground.expect(0, "get vm").says("Running").says("32Mi").says(&pid.to_string());
    ground.expect(0, "get volume").says("VirtualMachine/web");
    ground.expect(0, "get bridge").says("web.net0");
    ground
        .expect(0, "describe vm/web")
        .says("/pool/root.qcow2 (qcow2, 20Mi, cache writeback, 1 queue)")
        .says("tap web.net0 (up), bridge br0");
    assert_eq!(ground.json(0, "get vol/root -o json")["status"]["running"], true);

    ground.expect(0, "start web").says("runs already");
    ground.expect(3, "stop web --set other").says("belongs to set default");
    assert_eq!(ground.pid(), pid, "another set's VM is left alone");

    ground.expect(0, "stop web --force");
    let status = ground.status();
    assert_eq!((status["phase"].as_str(), status["held"].as_bool()), (Some("Stopped"), Some(true)));
    assert!(!shell("ip -o link").contains("web.net0"), "nothing is behind the tap");
    assert_eq!(ground.json(0, "get vol/root -o json")["status"]["running"], false);
    // It was told to stay down: that is no drift.
    ground.expect(0, "diff -f a.yaml").says("held down by `vmctl stop`");
    ground.expect(0, "apply -f a.yaml");
    ground.expect(0, "stop web").says("stopped already");
    ground.expect(0, "get vm").says("Stopped (held)");

    ground.expect(0, "start vm/web").says("✓ VirtualMachine/web");
    let started = ground.pid();
    assert_ne!(started, pid);
    assert!(shell("ip -o link show web.net0").contains("master br0"));
    ground.expect(0, "diff -f a.yaml").says("No differences");

    ground.expect(0, "restart web --force").says("restarted");
    assert_ne!(ground.pid(), started);
    ground.expect(0, "diff -f a.yaml").says("No differences");
    ground.expect(0, "delete vm/web --timeout 0").says("VirtualMachine/web deleted");
    ground.expect(0, "get vm").complains("none");
    assert!(ground.path("pool/root.qcow2").exists());
}

#[test]
fn a_guest_that_does_not_hear_the_power_button_is_stopped_in_the_end() {
    let ground = running();
    let begin = std::time::Instant::now();
    ground.expect(0, "stop web --timeout 1s");
    assert!((1..20).contains(&begin.elapsed().as_secs()), "{:?}", begin.elapsed());
    ground.expect(0, "start web");
    // On a terminal a line says what takes long, and is wiped in the end.
    let (state, run) = (ground.path("state"), ground.path("run"));
    let stop = format!(
        "{PROGRAM} stop web --timeout 2s --state-dir {} --run-dir {} --color never",
        state.display(),
        run.display()
    );
    let shown = shell(&format!("TERM=xterm script -qec '{stop}' /dev/null"));
    assert!(shown.contains("… shut down VM web (1 s)"), "{shown:?}");
    assert!(shown.ends_with("\r\x1b[K✓ VirtualMachine/web updated\r\n"), "{shown:?}");
    ground.expect(0, "start web");
    ground.expect(2, "stop web --force --timeout 1s").complains("cannot be used with");
    // A halted one can't be started past its manifest.
    ground.write("a.yaml", &format!("{MANIFESTS}  runStrategy: Halted\n"));
    ground.expect(0, "apply -f a.yaml");
    assert_eq!(ground.status()["phase"], "Stopped");
    ground.expect(3, "start web").says("runStrategy is Halted");
    ground.write("a.yaml", &format!("{MANIFESTS}  runStrategy: Manual\n"));
    ground.expect(0, "apply -f a.yaml");
    assert_eq!(ground.status()["phase"], "Stopped");
    ground.expect(0, "start web");
    ground.expect(0, "diff -f a.yaml");
    ground.expect(0, "stop web --force");
    ground.expect(0, "diff -f a.yaml");
}

#[test]
fn the_console_is_read_and_typed_through_pipes() {
    let ground = running();
    ground.log_says("boot1");
    let said = ground.with_stdin("console web --timeout 500ms", "abd").code(0);
    assert!(said.out.contains("boot1") && said.out.contains("abd"), "{said:?}");
    let said = ground.with_stdin("console web --replay 0 --timeout 500ms", "xyz").code(0);
    assert_eq!(said.out, "xyz");
    // Typed until the guest powers off: the end of the VM is the end of the console.
    let mut child = ground.spawn("console web --replay 0");
    child.stdin.as_mut().unwrap().write_all(b"q").unwrap();
    let stdin = child.stdin.take();
    let said = Said::new("console", child.wait_with_output().unwrap()).code(0);
    drop(stdin);
    assert!(said.err.contains("has ended"), "{said:?}");
    // The log outlives the process.
    ground.expect(0, "logs web").says("xyz");
    assert_eq!(ground.expect(0, "logs web --tail 1").out.lines().count(), 1);
    ground.expect(3, "console web").complains("does not run").complains("vmctl start web");
}

#[test]
fn logs_follow_the_guest() {
    let ground = running();
    ground.log_says("boot1");
    // It ends with its reader, whatever becomes of this test.
    let follow = ground.spawn("logs web -f");
    ground.with_stdin("console web --timeout 0", "wild").code(0);
    ground.log_says("wild");
    std::thread::sleep(Duration::from_millis(400));
    shell(&format!("kill -INT {}", follow.id()));
    let said = Said::new("logs web -f", follow.wait_with_output().unwrap()).code(0);
    assert!(said.out.contains("boot1\n") && said.out.ends_with("wild"), "{said:?}");
    // A reader that goes away ends it, even if nothing more is printed.
    let mut follow = ground.spawn("logs web -f");
    std::thread::sleep(Duration::from_millis(300));
    assert!(follow.try_wait().unwrap().is_none());
    drop(follow.stdout.take());
    until("it ends with its reader", || follow.try_wait().unwrap());
}

/// On a terminal: raw while it lasts, and as it was afterwards, whatever ends it.
#[test]
fn the_terminal_is_given_back_as_it_was() {
    let ground = running();
    ground.log_says("boot1");
    let script = |act: &dyn Fn(&mut std::process::Child)| {
        let inner = format!("{PROGRAM} console web; echo code=$?; stty -a");
        let mut command = ground.command("");
        let environment: Vec<_> =
            command.get_envs().map(|(k, v)| (k.to_owned(), v.map(ToOwned::to_owned))).collect();
        command = std::process::Command::new("script");
        for (name, value) in environment {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command.args(["-qec", &inner, "/dev/null"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(700));
        act(&mut child);
        let output = child.wait_with_output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let check = |said: &str, code: &str| {
        assert!(said.contains(code), "{said}");
        assert!(said.contains("isig icanon") && said.contains(" echo "), "{said}");
    };
    let said = script(&|child| {
        // Ctrl-C belongs to the guest, which echoes it.
        child.stdin.as_mut().unwrap().write_all(b"wild\x03\x1d").unwrap();
        std::thread::sleep(Duration::from_millis(700));
    });
    assert!(said.contains("Ctrl-] detaches") && said.contains("Detached"), "{said}");
    check(&said, "code=0");
    ground.log_says("wild\x03");

    let console_pid = || shell(&format!("pgrep -f '^{PROGRAM} console web$'")).trim().to_owned();
    let said = script(&|_| drop(shell(&format!("kill -TERM {}", console_pid()))));
    check(&said, "code=0");
    let said = script(&|_| drop(shell(&format!("kill -9 {}", ground.pid()))));
    assert!(said.contains("has ended"), "{said}");
    check(&said, "code=0");
}

#[test]
fn ctrl_c_finishes_what_runs_and_begins_nothing() {
    let ground = running();
    let pid = ground.pid();
    // A restart: shut down (2 s, for this guest doesn't hear the button), then start.
    ground.write("a.yaml", &format!("{}  restartPolicy: Allowed\n", MANIFESTS.replace("32Mi", "64Mi")));
    let child = ground.spawn("apply -f a.yaml");
    std::thread::sleep(Duration::from_millis(1000));
    shell(&format!("kill -INT {}", child.id()));
    let said = Said::new("apply", child.wait_with_output().unwrap()).code(130);
    assert!(said.out.contains("interrupted") && said.err.contains("goes on from here"), "{said:?}");
    assert!(!std::path::Path::new(&format!("/proc/{pid}/fd/0")).exists(), "the step that ran was finished");
    assert_eq!(ground.status()["phase"], "Stopped");
    ground.expect(0, "apply -f a.yaml");
    assert_eq!(ground.status()["memoryBytes"], 64 << 20);
}

#[test]
fn a_staged_change_takes_effect_at_the_next_start() {
    let ground = running();
    let pid = ground.pid();
    ground.write("a.yaml", &MANIFESTS.replace("32Mi", "64Mi"));
    ground.expect(1, "diff -f a.yaml").says("memory  32Mi → 64Mi  staged");
    ground.expect(0, "apply -f a.yaml");
    assert_eq!(ground.pid(), pid);
    ground.expect(0, "get vm").says("Running (staged)");
    ground.expect(0, "restart web --force");
    assert_eq!(ground.status()["memoryBytes"], 64 << 20);
    ground.expect(0, "diff -f a.yaml").says("No differences");
}

#[test]
fn a_paused_vm_stays_paused_and_a_stop_lets_it_go_on() {
    let ground = running();
    let pid = ground.pid();
    ground.expect(0, "pause web").says("VirtualMachine/web");
    ground.expect(0, "get vm").says("Paused");
    ground.expect(0, "pause web").says("is paused already");
    ground.expect(0, "apply -f a.yaml").says("paused; `vmctl resume web` lets it go on");
    assert_eq!(ground.status()["phase"], "Paused");
    ground.expect(0, "resume vm/web");
    ground.expect(0, "resume web").says("is running already");
    assert_eq!((ground.status()["phase"].as_str(), ground.pid()), (Some("Running"), pid));
    ground.expect(0, "pause web");
    ground.expect(0, "stop web --timeout 1s");
    ground.expect(3, "pause web").says("it does not run");
}
