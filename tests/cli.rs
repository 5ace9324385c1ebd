//! The command line, as people use it: the built program on bridges, pools and volumes that are real, in a
//! network namespace and folders of each test's own.

#[path = "support/cli.rs"]
mod support;

use std::io::Read;
use std::process::Stdio;

use expect_test::expect;
use support::*;

const MANIFESTS: &str = "\
apiVersion: vmctl.dev/v1alpha1
kind: Bridge
metadata: {name: br0, labels: {tier: net}}
spec: {mtu: 1400}
---
apiVersion: vmctl.dev/v1alpha1
kind: StoragePool
metadata: {name: default, labels: {tier: disk}}
spec: {directory: {path: @/pool}}
---
apiVersion: vmctl.dev/v1alpha1
kind: Volume
metadata: {name: data, labels: {tier: disk}}
spec: {pool: default, format: qcow2, capacity: 20Mi}
";

fn bridge(name: &str) -> String {
    format!("---\n{{apiVersion: vmctl.dev/v1alpha1, kind: Bridge, metadata: {{name: {name}}}, spec: {{}}}}\n")
}

fn ground() -> Ground {
    let ground = Ground::new();
    ground.write("a.yaml", MANIFESTS);
    ground
}

#[test]
fn apply_makes_it_so_and_then_there_is_no_difference() {
    let ground = ground();
    ground
        .expect(0, "validate -f a.yaml")
        .says("Valid: 3 objects in 1 file (1 Bridge, 1 StoragePool, 1 Volume).");
    let diff = ground.expect(1, "diff -f a.yaml");
    expect![[r#"
        + Bridge/br0           bridge, mtu 1400
        + StoragePool/default  directory @/pool
        + Volume/data          qcow2 20Mi in pool default, blank
        Plan: 3 to create. Downtime: none.
    "#]]
    .assert_eq(&diff.out.replace(ground.directory.to_str().unwrap(), "@"));
    assert!(!ground.path("state").exists(), "diff and validate write nothing");
    let applied = ground.expect(0, "apply -f a.yaml");
    let mut lines: Vec<&str> = applied.out.lines().collect();
    lines.sort();
    assert_eq!(
        lines,
        [
            "Applied: 3 done.",
            "✓ Bridge/br0 created",
            "✓ StoragePool/default created",
            "✓ Volume/data created"
        ]
    );
    assert!(shell("ip -d link show br0").contains("mtu 1400"));
    assert!(shell(&format!("qemu-img info {}", ground.path("pool/data.qcow2").display())).contains("20 MiB"));
    ground.expect(0, "diff -f a.yaml").says("No differences (3 objects).");
    ground.expect(0, "plan -f a.yaml -q");
    shell("ip link set br0 mtu 1300");
    let diff = ground.expect(1, "diff -f a.yaml");
    expect![[r#"
        ~ Bridge/br0  bridge, mtu 1400
              mtu  1300 → 1400  live
        Plan: 1 to update live. Downtime: none.
    "#]]
    .assert_eq(&diff.out);
    ground.expect(1, "diff -f a.yaml -o yaml-diff").says("-mtu: 1300\n+mtu: 1400\n");
    let report = ground.json(1, "diff -f a.yaml -o json");
    assert_eq!(report["summary"]["update"], 1);
    let report = ground.json(0, "apply -f a.yaml -o json");
    assert_eq!(report["outcomes"]["Bridge/br0"]["result"], "done");
    assert_eq!(report["exitCode"], 0);
    assert!(report.get("remaining").is_none());
}

/// Observed, not assumed: the files' inodes and times, the kernel's own event stream, and the system calls.
#[test]
fn an_apply_without_differences_writes_nothing() {
    let ground = ground();
    ground.expect(0, "apply -f a.yaml");
    let before = fingerprint(&ground.directory);
    // Beside the directory, for it is a write, too.
    let trace = ground.directory.with_extension("trace");
    let mut monitor =
        std::process::Command::new("ip").args(["monitor", "all"]).stdout(Stdio::piped()).spawn().unwrap();
    // The bridge's own address is announced a while after it came up.
    std::thread::sleep(std::time::Duration::from_millis(300));
    shell("ip link add mark0 type bridge");
    let command = ground.command("apply -f a.yaml --prune");
    let traced = std::process::Command::new("strace")
        .args(["-f", "-o", trace.to_str().unwrap(), "-e", "trace=file,process,sendto,sendmsg"])
        .arg(command.get_program())
        .args(command.get_args())
        .envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))))
        .current_dir(&ground.directory)
        .output()
        .unwrap();
    Said::new("apply", traced).code(0).says("No differences (3 objects).");
    shell("ip link add mark1 type bridge");
    std::thread::sleep(std::time::Duration::from_millis(300));
    monitor.kill().unwrap();
    let mut events = String::new();
    monitor.stdout.take().unwrap().read_to_string(&mut events).unwrap();
    monitor.wait().unwrap();
    let between = events.split("mark0").last().unwrap().split("mark1").next().unwrap();
    assert!(events.contains("mark0") && events.contains("mark1"), "the monitor heard: {events}");
    assert!(!between.contains("br0"), "{events}");

    let trace_text = std::fs::read_to_string(&trace).unwrap();
    std::fs::remove_file(&trace).unwrap();
    let offences: Vec<&str> = trace_text
        .lines()
        .filter(|line| {
            let writes = ["O_WRONLY", "O_RDWR", "O_CREAT"].iter().any(|mode| line.contains(mode));
            let device =
                ["/dev/null", "/dev/kvm", "/dev/net/tun", "/dev/tty"].iter().any(|path| line.contains(path));
            let changes = ["mkdir", "rename", "unlink", "symlink", "chmod", "chown", "setxattr"];
            let changes = changes
                .iter()
                .any(|call| line.contains(&format!("{call}(")) || line.contains(&format!("{call}at(")));
            let process = line.contains("fork(")
                || (line.contains("execve(") && !line.contains("bin/") && !line.contains("vmctl"));
            (writes && !device) || changes || process
        })
        .collect();
    assert!(offences.is_empty(), "{offences:#?}");
    assert_eq!(before, fingerprint(&ground.directory), "no file and no time has changed");
}

#[test]
fn a_saved_plan_runs_once_and_only_on_the_host_that_it_was_made_for() {
    let ground = ground();
    ground.expect(1, "diff -f a.yaml --out plan.json").complains("apply --plan plan.json");
    assert!(!ground.path("state").exists());
    ground.expect(0, "apply --plan plan.json").says("Applied: 3 done.");
    ground.expect(6, "apply --plan plan.json").complains("the host has changed since the plan was saved");
    shell("ip link set br0 mtu 1300");
    ground.expect(1, "diff -f a.yaml --out plan.json");
    shell("ip link set br0 mtu 1200");
    ground.expect(6, "apply --plan plan.json");
    assert!(shell("ip link show br0").contains("mtu 1200"), "nothing was done");
    shell("ip link set br0 mtu 1300");
    ground.expect(0, "apply --plan plan.json --dry-run").says("1300 → 1400");
    ground.expect(0, "apply --plan plan.json");
    assert!(shell("ip link show br0").contains("mtu 1400"));

    let text = std::fs::read_to_string(ground.path("plan.json")).unwrap();
    ground.write("edited.json", &text.replacen("1400", "9000", 1));
    ground.expect(2, "apply --plan edited.json").complains("edited or damaged");
    ground.write("half.json", &text[..text.len() / 2]);
    ground.expect(2, "apply --plan half.json").complains("half.json");
    ground.expect(2, "apply --plan none.json").complains("No such file");
    ground.expect(2, "apply --plan plan.json -f a.yaml").complains("cannot be used with");
}

#[test]
fn pruning_is_guarded_and_approved_by_the_hash() {
    let ground = ground();
    let many: String = (1..=6).map(|number| bridge(&format!("many{number}"))).collect();
    ground.write("many.yaml", &format!("{MANIFESTS}{many}"));
    ground.expect(0, "apply -f many.yaml");
    ground.expect(0, "apply -f a.yaml").says("No differences");
    let refused = ground.expect(5, "apply -f a.yaml --prune").says("Refused: 6 of the set's 9 objects");
    assert_eq!(shell("ip -br link").matches("many").count(), 6, "nothing was removed");
    let hash = refused.out.split("--approve ").nth(1).unwrap().split_whitespace().next().unwrap().to_owned();
    ground.expect(5, "apply -f a.yaml --prune --approve 0123456789ab");
    assert_eq!(ground.json(5, "apply -f a.yaml --prune -o json")["exitCode"], 5);
    ground.expect(1, "diff -f a.yaml --prune").says("6 refused");
    ground.expect(0, &format!("apply -f a.yaml --prune --approve {hash}")).says("6 done");
    assert_eq!(shell("ip -br link").matches("many").count(), 0);
    ground.expect(2, "apply -f a.yaml --prune --approve xyz").complains("8 hexadecimal digits");

    // One at a time is everyday work, and the volume's data stays.
    let (bridge_only, _) = MANIFESTS.split_once("---").unwrap();
    ground.write("a.yaml", bridge_only);
    ground.expect(0, "apply -f a.yaml --prune").says("Volume/data retained");
    assert!(ground.path("pool/data.qcow2").exists());
}

#[test]
fn two_runs_at_once_are_told_of_one_another() {
    let ground = ground();
    let fifo = ground.path("fifo");
    shell(&format!("mkfifo {0}", fifo.display()));
    // The holder: an OFD lock as a run takes it.
    let lock = vmctl::host::linux::HostLock::acquire(
        &ground.path("state"),
        "the other one",
        std::time::Duration::ZERO,
    )
    .unwrap();
    ground
        .expect(8, "apply -f a.yaml")
        .complains("the other one")
        .complains(&format!("pid {}", std::process::id()));
    ground.expect(8, "apply -f a.yaml --lock-timeout 200ms");
    ground.expect(1, "diff -f a.yaml");
    ground.expect(0, "apply -f a.yaml --dry-run").says("3 to create");
    assert!(!shell("ip -o link").contains("br0"));
    let waiting = ground.spawn("apply -f a.yaml --lock-timeout 30s");
    std::thread::sleep(std::time::Duration::from_millis(200));
    drop(lock);
    Said::new("waiting", waiting.wait_with_output().unwrap()).code(0).says("3 done");
    // Without anything to do nobody asks for the lock.
    let _lock =
        vmctl::host::linux::HostLock::acquire(&ground.path("state"), "x", std::time::Duration::ZERO).unwrap();
    ground.expect(0, "apply -f a.yaml").says("No differences");
}

#[test]
fn a_run_that_is_killed_before_any_step_is_completed_by_the_next() {
    let ground = ground();
    ground.write("b.yaml", &format!("{MANIFESTS}{}", bridge("br1")));
    let mut killed = 0;
    for step in 1..20 {
        let output = ground
            .command("apply -f b.yaml")
            .env("VMCTL_CRASH_BEFORE_STEP", step.to_string())
            .output()
            .unwrap();
        if output.status.success() {
            break;
        }
        assert_eq!(output.status.to_string(), "signal: 9 (SIGKILL)");
        killed += 1;
        // The lock of the dead is free.
        ground.expect(0, "apply -f b.yaml");
        ground.expect(0, "diff -f b.yaml --prune");
        ground.expect(0, "delete -f b.yaml");
        shell(&format!("rm -rf {}", ground.path("pool").display()));
    }
    assert!(killed >= 4, "killed at {killed} steps");
}

#[test]
fn selectors_choose_a_part_and_never_prune() {
    let ground = ground();
    ground.expect(0, "apply -f a.yaml -l tier=net").says("1 done");
    ground.expect(0, "diff -f a.yaml -l tier=net");
    ground.expect(1, "diff -f a.yaml -l tier!=net").says("2 to create");
    ground.expect(2, "apply -f a.yaml -l tier=none").complains("none of the 3 declared objects");
    ground.expect(2, "apply -f a.yaml -l tier=net --prune").complains("cannot be used with");
    ground.expect(2, "apply -f a.yaml -l a=b=c").complains("a=b=c");
    ground.expect(0, "apply -f a.yaml -l tier").says("2 done");
}

#[test]
fn invalid_manifests_touch_nothing_and_all_problems_are_told() {
    let ground = ground();
    ground.write("bad/a.yaml", &MANIFESTS.replace("mtu: 1400", "mtuu: 1400"));
    ground.write("bad/b.yaml", &bridge("br1").replace("name: br1", "name: BR1"));
    for command in ["apply -f bad", "diff -f bad", "validate -f bad", "apply --prune -f bad"] {
        let said = ground.expect(2, command).complains("bad/a.yaml:4:8: error:").complains("mtu");
        assert!(said.err.contains("bad/b.yaml:2:") && said.out.is_empty(), "{}", said.err);
    }
    let report = ground.json(2, "validate -f bad -o json");
    assert_eq!(report["valid"], false);
    assert_eq!(report["problems"][0]["location"]["file"], "bad/a.yaml");
    let said = ground.expect(2, "apply -f bad -o json");
    let error: serde_json::Value = serde_json::from_str(&said.err).unwrap();
    assert_eq!(error["error"]["exitCode"], 2);
    assert!(said.out.is_empty(), "stdout holds results alone: {}", said.out);

    // A reference between documents is resolved, with its place.
    ground.write("c.yaml", &MANIFESTS.replace("pool: default", "pool: defalt"));
    ground
        .expect(2, "validate -f c.yaml")
        .complains("c.yaml:14:14: error:")
        .complains("did you mean `default`?");
    std::fs::create_dir(ground.path("empty")).unwrap();
    ground.expect(2, "apply -f empty").complains("no manifests");
    ground.expect(2, "apply -f gone.yaml").complains("gone.yaml");
    ground.with_stdin("apply -f -", "# nothing\n").code(2).complains("no manifests");
    ground.expect(2, "apply").complains("-f FILE");
    ground.expect(2, "apply -f - -f -").complains("only once");
    assert!(!ground.path("state").exists() && !shell("ip -br link").contains("br"));
    ground.with_stdin("apply -f - -q", &bridge("br7")).code(0);
    shell("ip link show br7");
}

#[test]
fn a_failed_step_is_told_and_what_does_not_need_it_is_done() {
    let ground = ground();
    ground.write("pool", "a file where the directory should be");
    let said = ground.vmctl("apply -f a.yaml");
    assert_eq!(said.code, Some(3), "{}{}", said.out, said.err);
    shell("ip link show br0");
    assert!(!said.out.contains("Volume/data created"), "{}", said.out);
    let report = ground.json(3, "apply -f a.yaml -o json");
    assert_eq!(report["exitCode"], 3);
    assert!(report["remaining"].is_object());
    std::fs::remove_file(ground.path("pool")).unwrap();
    ground.expect(0, "apply -f a.yaml");
}

#[test]
fn waiting_ends_in_time() {
    let ground = ground();
    ground.expect(0, "apply -f a.yaml --wait").says("3 done");
    ground.expect(0, "apply -f a.yaml --wait");
    // A port that isn't there: blocked until somebody plugs it in.
    let port = "spec: {mtu: 1400, ports: [{interface: nic0}]}";
    ground.write("a.yaml", &MANIFESTS.replace("spec: {mtu: 1400}", port));
    ground.expect(3, "apply -f a.yaml").says("nic0");
    ground.expect(4, "apply -f a.yaml --wait --timeout 300ms").complains("timed out");
    let waiting = ground.spawn("apply -f a.yaml --wait --timeout 30s");
    std::thread::sleep(std::time::Duration::from_millis(300));
    shell("ip link add nic0 type veth peer name nic1 && ip link set nic0 mtu 1400");
    Said::new("wait", waiting.wait_with_output().unwrap()).code(0);
    assert!(shell("ip -o link show nic0").contains("master br0"));
    ground.expect(2, "apply -f a.yaml --wait --timeout 5").complains("no unit");
}

#[test]
fn what_is_there_is_shown_in_every_form() {
    let ground = ground();
    ground.expect(0, "get all").complains("none");
    ground.expect(0, "apply -f a.yaml");
    let table = ground.expect(0, "get all").out;
    for part in ["Bridge/br0", "StoragePool/default", "Volume/data", "1400", "qcow2", "20Mi"] {
        assert!(table.contains(part), "no {part} in:\n{table}");
    }
    assert_eq!(ground.expect(0, "get all -o name").out, "Bridge/br0\nStoragePool/default\nVolume/data\n");
    for words in ["volume", "vol/data", "vol data", "VOLUMES"] {
        ground.expect(0, &format!("get {words}")).says("20Mi");
    }
    let list = ground.json(0, "get all -o json");
    assert_eq!(list["kind"], "List");
    assert_eq!(list["items"].as_array().unwrap().len(), 3);
    let one = ground.json(0, "get bridge/br0 -o json");
    assert_eq!((one["kind"].as_str(), one["status"]["mtu"].as_u64()), (Some("Bridge"), Some(1400)));
    ground.expect(0, "get bridge/br0 -o yaml").says("  mtu: 1400\n");
    ground.expect(0, "get vol -o wide").says("/pool/data.qcow2");
    ground.expect(0, "get all --set other").complains("none");
    ground.expect(3, "get bridge/none").complains("there is no Bridge/none");
    ground.expect(2, "get brigde").complains("did you mean Bridge?");
    ground.expect(0, "describe vol/data").says("Reclaim policy: Retain");
    ground.expect(3, "describe vol/none");
    // Sets don't see one another's objects, but people see all.
    ground.with_stdin("apply --set other -f -", &bridge("br9")).code(0);
    ground.expect(0, "get bridge").says("other");
    ground.expect(0, "apply -f a.yaml --prune").says("No differences");
    ground.expect(3, "delete bridge/br9").complains("set default has no Bridge/br9");
    ground.expect(0, "delete bridge/br9 --set other");
}

#[test]
fn deleting_takes_what_is_named_and_keeps_data() {
    let ground = ground();
    ground.expect(0, "apply -f a.yaml");
    ground.expect(0, "delete br/br0 vol/data --dry-run").says("1 to delete, 1 retained");
    ground.expect(3, "delete br/br0 br/br1").complains("nothing was removed");
    shell("ip link show br0");
    ground.expect(0, "delete br/br0 br/br1 --ignore-not-found").complains("Not there: Bridge/br1");
    assert!(!shell("ip -o link").contains("br0"));
    ground.expect(2, "delete all").complains("can't be deleted");
    ground.expect(2, "delete bridge").complains("can't be deleted");
    ground.expect(2, "delete").complains("required");

    // Data goes only by a policy that was applied earlier, and with consent.
    ground.write("a.yaml", &MANIFESTS.replace("capacity: 20Mi", "capacity: 20Mi, reclaimPolicy: Delete"));
    ground.expect(0, "apply -f a.yaml");
    let refused = ground.expect(5, "delete vol/data").says("data would be lost");
    assert!(ground.path("pool/data.qcow2").exists());
    let hash = refused.out.split("--approve ").nth(1).unwrap().split_whitespace().next().unwrap().to_owned();
    ground.expect(0, &format!("delete vol/data --approve {hash}"));
    assert!(!ground.path("pool/data.qcow2").exists());
    ground.expect(0, "delete -f a.yaml");
    ground.expect(0, "delete -f a.yaml").complains("Not there");
    ground.expect(0, "get all").complains("none");
}

#[test]
fn the_small_commands() {
    let ground = ground();
    ground.expect(0, "version").says(env!("CARGO_PKG_VERSION"));
    assert_eq!(ground.json(0, "version -o json")["apiVersion"], "vmctl.dev/v1alpha1");
    for shell in ["bash", "zsh", "fish", "elvish"] {
        ground.expect(0, &format!("completion {shell}")).says("validate");
    }
    ground.expect(2, "completion tcsh").complains("possible values");
    ground.expect(0, "explain vm.disks").says("readOnly");
    ground.expect(0, "explain bridge.spec.ports.pvid").says("1 to 4094");
    ground.expect(2, "explain vm.dsk").complains("disks");
    assert_eq!(ground.json(0, "explain vm -o json")["kind"], "VirtualMachine");
    assert!(ground.json(0, "schema vm")["properties"]["spec"].is_object());
    assert!(ground.json(0, "schema").is_object());
    ground.expect(2, "schema vmm").complains("did you mean VirtualMachine?");
    let check = ground.vmctl("check -o json").json();
    assert!(
        check["checks"]
            .as_array()
            .unwrap()
            .iter()
            .all(|check| check["ok"] == true || check["remedy"].is_string())
    );
    let missing = ground.command("check --vmm /nonexistent").output().unwrap();
    Said::new("check", missing).code(3).says("--vmm");
    assert!(!ground.path("state").exists(), "checking leaves no trace");
    ground.expect(2, "aply").complains("apply");
    ground.expect(2, "apply --sett x -f a.yaml").complains("--set");
    ground.expect(2, "diff -f a.yaml --set Bad_Name").complains("Bad_Name");
    let said = ground.expect(2, "apply --sett x -o json");
    let error: serde_json::Value = serde_json::from_str(&said.err).unwrap();
    assert_eq!(error["error"]["exitCode"], 2);
    ground.expect(0, "--help").says("another run holds the lock");
    for vm in ["start x", "stop x", "restart x", "logs x", "console x"] {
        let said = ground.expect(3, vm);
        assert!(format!("{}{}", said.out, said.err).contains("there is no"), "{said:?}");
    }
    ground.expect(2, "start bridge/x").complains("is not a VM");
}

#[test]
fn colour_is_asked_for_and_a_closed_pipe_is_no_error() {
    let ground = ground();
    let coloured = |mut command: std::process::Command| {
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        output.stdout.contains(&0x1b)
    };
    assert!(!coloured(ground.command("diff -f a.yaml")), "a pipe is not coloured");
    assert!(coloured(ground.command("diff -f a.yaml --color always")));
    assert!(!coloured(ground.command("diff -f a.yaml --color never")));
    // On a terminal, which `script` is: coloured, unless NO_COLOR says no.
    let on_terminal = |set: &str| {
        let directory = ground.directory.display();
        let command =
            format!("cd {directory} && {set} TERM=xterm {PROGRAM} diff --state-dir s --run-dir r -f a.yaml");
        shell(&format!("script -qec '{command}' /dev/null || true"))
    };
    assert!(on_terminal("").contains("\x1b[32m"), "{}", on_terminal(""));
    assert!(!on_terminal("NO_COLOR=1").contains("\x1b["));

    let many: String = (0..2000).map(|number| bridge(&format!("b{number}"))).collect();
    ground.write("many.yaml", &many);
    for command in ["diff -f many.yaml", "completion bash", "schema", "get all", "apply -f a.yaml"] {
        let mut child = ground.spawn(command);
        drop(child.stdout.take());
        let said = Said::new(command, child.wait_with_output().unwrap());
        assert!(said.code.is_some_and(|code| code < 2), "{said:?}");
        assert!(!said.err.contains("panicked"), "{}", said.err);
    }
    // Nobody was there to read, but the work was done.
    ground.expect(0, "diff -f a.yaml");
}
