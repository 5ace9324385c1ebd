//! `vmctl` by a user who is not root and may open `/dev/kvm`: VMs without NICs run as processes of that user,
//! in what is left of the sandbox, and it is said what is missing. What takes root is refused before anything
//! is done. On this host's KVM, with a small guest of our own.

#[path = "support/guest.rs"]
#[allow(dead_code, reason = "other tests use the rest of it")]
mod guest;

use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

const USER: u32 = 54_321;

const MANIFESTS: &str = "\
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
  shutdownTimeoutSeconds: 2
";

const BRIDGE: &str = "\
apiVersion: vmctl.dev/v1alpha1
kind: Bridge
metadata: {name: vmctl-unpriv}
spec: {}
";

/// In a mount namespace of its own, where everybody may open `/dev/kvm`; then as the user.
const ENTER: &str = "\
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs \"$1/dev\"
mknod -m 666 \"$1/dev/kvm\" c 10 232
mount --bind \"$1/dev/kvm\" /dev/kvm
cd \"$1/home\"
user=$2
shift 2
exec setpriv --reuid \"$user\" --regid \"$user\" --clear-groups --bounding-set=-all -- \"$@\"
";

/// A home of the user; what runs in it ends with it.
struct Home(PathBuf);

impl Home {
    fn new() -> Self {
        assert!(rustix::process::geteuid().is_root(), "only root can become another user");
        let home = Self(std::env::temp_dir().join(format!("vmctl-unprivileged-{}", std::process::id())));
        for directory in ["dev", "home"] {
            std::fs::create_dir_all(home.0.join(directory)).unwrap();
        }
        std::fs::set_permissions(&home.0, std::fs::Permissions::from_mode(0o755)).unwrap();
        // The user can't come to where cargo leaves them.
        for program in [env!("CARGO_BIN_EXE_vmctl"), env!("CARGO_BIN_EXE_vmctl-vmm")] {
            let name = Path::new(program).file_name().unwrap();
            std::fs::copy(program, home.0.join(name)).unwrap();
        }
        chown(home.0.join("home"), Some(USER), Some(USER)).unwrap();
        std::fs::write(home.0.join("home/kernel"), guest::kernel()).unwrap();
        home.write("a.yaml", MANIFESTS);
        home.write("bridge.yaml", BRIDGE);
        home
    }

    fn write(&self, name: &str, text: &str) {
        let home = self.0.join("home");
        std::fs::write(home.join(name), text.replace('@', home.to_str().unwrap())).unwrap();
    }

    /// Without a choice of folders, as a user would first try it, if not `own`.
    fn vmctl(&self, own: bool, arguments: &str) -> (i32, String) {
        let mut command = Command::new("unshare");
        command.args(["-m", "sh", "-c", ENTER, "sh"]).arg(&self.0).arg(USER.to_string());
        command.arg(self.0.join("vmctl")).args(arguments.split(' '));
        command.env("VMCTL_VMM", self.0.join("vmctl-vmm"));
        if own {
            command.env("VMCTL_STATE_DIR", self.0.join("home/state"));
            command.env("VMCTL_RUN_DIR", self.0.join("home/run"));
        }
        let output = command.output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.code().unwrap(), String::from_utf8(text).unwrap())
    }

    #[track_caller]
    fn expect(&self, code: i32, own: bool, arguments: &str) -> String {
        let (got, said) = self.vmctl(own, arguments);
        println!("$ vmctl {arguments}\n{said}[{got}]");
        assert_eq!(got, code, "vmctl {arguments}: {said}");
        said
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let _ = self.vmctl(true, "stop web --force");
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn a_user_with_kvm_runs_vms_and_is_told_what_is_missing() {
    let home = Home::new();
    // Root's folders are not the user's.
    let said = home.expect(3, false, "apply -f a.yaml");
    assert!(said.contains("Permission denied") && said.contains("--state-dir"), "{said}");

    home.expect(0, true, "apply -f a.yaml --wait --timeout 60s");
    let said = home.expect(0, true, "diff -f a.yaml");
    assert!(said.contains("No differences (3 objects)."), "{said}");
    assert!(said.contains("note: a user and a cgroup of its own: only root can give them"), "{said}");
    let said = home.expect(0, true, "describe vm/web");
    assert!(said.contains("SandboxIncomplete"), "{said}");
    let pid = said.lines().find_map(|line| line.strip_prefix("Process:")).unwrap().trim();
    let pid = pid.trim_start_matches("pid ");
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = |field: &str| status.lines().find(|line| line.starts_with(field)).unwrap().to_owned();
    // The user's own process, with no way to more, and the filters in place.
    assert_eq!(line("Uid:"), format!("Uid:\t{USER}\t{USER}\t{USER}\t{USER}"));
    assert_eq!(line("CapBnd:"), "CapBnd:\t0000000000000000");
    assert_eq!((line("NoNewPrivs:").as_str(), line("Seccomp:").as_str()), ("NoNewPrivs:\t1", "Seccomp:\t2"));

    // What takes root is refused before anything is done, and with what helps.
    let said = home.expect(3, true, "apply -f bridge.yaml");
    assert!(said.contains("this user may not make links of the kind `bridge`"), "{said}");
    assert!(said.contains("hint: run vmctl as root"), "{said}");
    assert!(said.contains("1 blocked"), "{said}");
    let said = home.expect(3, true, "check");
    assert!(said.contains("rights  not root"), "{said}");
    assert!(!said.contains("modprobe"), "{said}");

    home.expect(0, true, "stop web --force");
    home.expect(0, true, "delete -f a.yaml");
    assert!(home.expect(1, true, "diff -f a.yaml").contains("1 to create, 2 to adopt"));
}
