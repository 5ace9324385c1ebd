//! cloud-init from the manifest to the disk that the guest's process holds: what is planned, what is in the
//! seed, and where the secrets are not.

#[path = "support/guest.rs"]
#[allow(dead_code, reason = "other tests use the rest of it")]
mod guest;
#[path = "support/objects.rs"]
mod objects;

use std::fs;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use expect_test::{Expect, expect};
use objects::*;
use serde_json::{Value, json};
use vmctl::execute::execute;
use vmctl::host::linux::LinuxHost;
use vmctl::host::sim::SimHost;
use vmctl::host::snapshot::{FileFacts, ImageHeader};
use vmctl::host::{Host, Step};
use vmctl::plan::{Plan, Policy};
use vmctl::report::text::{self, Style};
use vmctl::vmm::config::DiskFormat;

const SECRET: &str = "correct-horse-battery-staple";

fn with_cloud_init(cloud_init: Value) -> Objects {
    let mut list = tutorial();
    let mut vm = vm_json("vm1", "brvlan10");
    vm["cloudInit"] = cloud_init;
    list.insert(id("VirtualMachine/vm1"), vm);
    list
}

fn plan(objects: &Objects, host: &dyn Host) -> Plan {
    let desired = desire(objects);
    vmctl::plan::plan(&desired, &host.snapshot(&desired.scope()), &Policy::default())
}

fn apply(objects: &Objects, host: &dyn Host) {
    let outcomes = execute(&plan(objects, host), host, &mut |_| {});
    assert!(outcomes.values().all(|outcome| outcome.is_done()), "{outcomes:#?}");
    let again = plan(objects, host);
    assert!(again.is_empty(), "{}", text::plan(&again, Style::default()));
}

fn check(objects: &Objects, host: &dyn Host, expected: Expect) {
    expected.assert_eq(&text::plan(&plan(objects, host), Style::default()));
}

fn user_data_file(host: &SimHost, modified_unix_ns: i128) {
    let header = ImageHeader {
        format: DiskFormat::Raw,
        virtual_size_bytes: 100,
        backing: None,
        encrypted: false,
        unusable: None,
    };
    host.add_file(
        "/secret/user-data",
        FileFacts { size_bytes: 100, modified_unix_ns, header, kind: Default::default() },
    );
}

#[test]
fn another_seed_waits_for_the_next_start_even_where_a_restart_is_allowed() {
    let host = host();
    user_data_file(&host, 1);
    let mut objects = with_cloud_init(json!({"userDataFile": "/secret/user-data"}));
    objects.get_mut(&id("VirtualMachine/vm1")).unwrap()["restartPolicy"] = json!("Allowed");
    apply(&objects, &host);
    user_data_file(&host, 2);
    check(
        &objects,
        &host,
        expect![[r#"
            ~ VirtualMachine/vm1  staged: cloud-init acts when a guest boots
                  cloudInit  b23ad2f3e4cf → 2e9c84b1d6d2  staged
            Plan: 1 staged. Downtime: none.
        "#]],
    );
    apply(&objects, &host);
    let steps = host.log();
    let starts = steps.iter().filter(|step| matches!(step, Step::StartVm { .. }));
    assert_eq!(starts.count(), 3, "one start for each of the tutorial's VMs");
    assert!(!steps.iter().any(|step| matches!(step, Step::StopVm { .. } | Step::RemoveDevice { .. })));
    // It takes effect with the restart that something else needs.
    objects.get_mut(&id("VirtualMachine/vm1")).unwrap()["cpus"] = json!(2);
    check(
        &objects,
        &host,
        expect![[r#"
            ~ VirtualMachine/vm1  the guest must restart for this, and restartPolicy allows it
                  cpus                 1 → 2                        restart
                  disks[disk0].queues  1 → 2                        restart
                  disks[disk1].queues  1 → 2                        restart
                  cloudInit            b23ad2f3e4cf → 2e9c84b1d6d2  restart
            Plan: 1 to restart. Downtime: vm1 restart.
        "#]],
    );
}

#[test]
fn a_seed_that_comes_or_goes_is_staged_and_moves_no_disk() {
    let host = host();
    apply(&tutorial(), &host);
    let objects = with_cloud_init(json!({}));
    check(
        &objects,
        &host,
        expect![[r#"
            ~ VirtualMachine/vm1  staged: cloud-init acts when a guest boots
                  cloudInit  none → dd653d5f5534  staged
            Plan: 1 staged. Downtime: none.
        "#]],
    );
    apply(&objects, &host);
    check(
        &tutorial(),
        &host,
        expect![[r#"
            ~ VirtualMachine/vm1  1 vCPU, 256Mi, 2 disks, 1 NIC
                  cloudInit  dd653d5f5534 → none  live
            Plan: 1 to update live. Downtime: none.
        "#]],
    );
}

#[test]
fn a_file_that_is_not_there_is_said_at_plan_time() {
    check(
        &with_cloud_init(json!({"userDataFile": "/secret/user-data"})),
        &{
            let host = host();
            apply(&tutorial(), &host);
            host.edit(|world| {
                let vm = world.vms.as_mut().unwrap().get_mut("vm1").unwrap();
                vm.process = None;
            });
            host
        },
        expect![[r#"
            ! VirtualMachine/vm1  blocked: cloudInit.userDataFile: /secret/user-data is not there
                  hint: put the file there, or correct the path
            Plan: 1 blocked. Downtime: none.
        "#]],
    );
}

/// A host of its own, with this machine's KVM, the small guest, and a secret.
struct Ground {
    directory: PathBuf,
    host: LinuxHost,
}

impl Ground {
    fn new() -> Self {
        let directory = std::env::temp_dir().join(format!("vmctl-cloud-init-{}", std::process::id()));
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join("kernel"), guest::kernel()).unwrap();
        let program = env!("CARGO_BIN_EXE_vmctl-vmm");
        let host = LinuxHost::new(directory.join("state"), directory.join("run"), program);
        Self { directory, host }
    }

    fn objects(&self) -> Objects {
        objects(&[(
            "VirtualMachine/seeded",
            json!({
                "memory": "32Mi",
                "boot": {"kernel": self.directory.join("kernel")},
                "cloudInit": {
                    "hostname": "web.example.org",
                    "sshAuthorizedKeys": ["ssh-ed25519 AAAAC3Nz me@home"],
                    "userDataFile": self.directory.join("user-data"),
                },
            }),
        )])
    }

    fn seed(&self) -> PathBuf {
        self.directory.join("run/vms/seeded/seed.img")
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        if let Ok(vms) = self.host.snapshot(&Default::default()).vms {
            for (vm, seen) in vms {
                let mark = seen.definition.unwrap().mark;
                let how = vmctl::host::step::StopHow::Forced;
                let _ = self.host.run(&[&Step::StopVm { vm, mark, how }]);
            }
        }
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// A file of the seed, read by mtools: a reader that shares nothing with our writer.
fn read(image: &Path, file: &str) -> String {
    let output = Command::new("mtype").arg("-i").arg(image).arg(format!("::/{file}")).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// All files below a directory that hold the secret.
fn holders(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let kind = path.symlink_metadata().unwrap().file_type();
        if kind.is_dir() {
            found.extend(holders(&path));
        } else if kind.is_file() && String::from_utf8_lossy(&fs::read(&path).unwrap()).contains(SECRET) {
            found.push(path);
        }
    }
    found.sort();
    found
}

#[test]
fn a_guest_is_given_its_seed_and_nobody_else_the_secret() {
    let ground = Ground::new();
    let user_data = ground.directory.join("user-data");
    fs::write(&user_data, format!("#cloud-config\npassword: {SECRET}\n")).unwrap();
    let objects = ground.objects();
    let planned = serde_json::to_string(&plan(&objects, &ground.host)).unwrap();
    assert!(!planned.contains(SECRET) && planned.contains("user-data"), "{planned}");
    apply(&objects, &ground.host);

    let seed = ground.seed();
    assert_eq!(read(&seed, "user-data"), format!("#cloud-config\npassword: {SECRET}\n"));
    assert_eq!(
        read(&seed, "meta-data"),
        "instance-id: \"vmctl-default-seeded\"\nlocal-hostname: \"web.example.org\"\npublic-keys:\n  - \"ssh-ed25519 AAAAC3Nz me@home\"\n"
    );
    let facts = fs::metadata(&seed).unwrap();
    assert_eq!((facts.mode() & 0o7777, facts.uid()), (0o600, 0));
    assert_eq!(holders(&ground.directory), [seed.clone(), user_data.clone()]);
    let blkid = Command::new("blkid").args(["-p", "-o", "value", "-s", "LABEL"]).arg(&seed).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&blkid.stdout).trim(), "CIDATA");

    // What the process holds is that file, read-only, and its arguments and environment say nothing.
    let snapshot = ground.host.snapshot(&Default::default());
    let seen = &snapshot.vms.as_ref().unwrap()["seeded"];
    let process = seen.process.as_ref().unwrap().as_ref().unwrap();
    let proc = PathBuf::from(format!("/proc/{}", process.pid));
    let held = fs::read_dir(proc.join("fd")).unwrap().map(|fd| fd.unwrap().path());
    let held: Vec<PathBuf> =
        held.filter(|fd| fs::metadata(fd).is_ok_and(|held| held.ino() == facts.ino())).collect();
    assert!(!held.is_empty(), "the process doesn't hold the seed");
    for fd in held {
        let number = fd.file_name().unwrap().to_str().unwrap();
        let flags = fs::read_to_string(proc.join("fdinfo").join(number)).unwrap();
        let flags = flags.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim().to_owned();
        assert_eq!(u32::from_str_radix(&flags, 8).unwrap() & 0o3, 0, "read-only: {flags}");
    }
    for file in ["cmdline", "environ"] {
        assert!(!String::from_utf8_lossy(&fs::read(proc.join(file)).unwrap()).contains(SECRET), "{file}");
    }
    assert!(!serde_json::to_string(&snapshot).unwrap().contains(SECRET));

    // Another content: the guest goes on with the seed that it has, and the next start takes the new one.
    fs::write(&user_data, "#!/bin/sh\necho other\n").unwrap();
    let staged = text::plan(&plan(&objects, &ground.host), Style::default());
    assert!(staged.contains("cloudInit") && staged.contains("1 staged"), "{staged}");
    apply(&objects, &ground.host);
    assert!(read(&seed, "user-data").contains(SECRET));
    let definition = Box::new(seen.definition.clone().unwrap());
    let (vm, mark) = (definition.mark.owner.name.clone(), definition.mark.clone());
    let stop = Step::StopVm { vm, mark, how: vmctl::host::step::StopHow::Forced };
    ground.host.run(&[&stop]).remove(0).unwrap();
    assert!(!seed.exists(), "a VM that doesn't run leaves no secrets in the run directory");
    apply(&objects, &ground.host);
    assert_eq!(read(&seed, "user-data"), "#!/bin/sh\necho other\n");
    // The same texts are the same bytes.
    let mut first = vec![0; 512 << 10];
    fs::File::open(&seed).unwrap().read_exact_at(&mut first, 0).unwrap();
    ground.host.run(&[&stop]).remove(0).unwrap();
    apply(&objects, &ground.host);
    assert!(fs::read(&seed).unwrap() == first);
}
