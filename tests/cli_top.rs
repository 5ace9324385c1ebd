//! `vmctl top`, on real VM processes: a small guest of our own runs on this host's KVM.

#[path = "support/guest.rs"]
#[allow(dead_code, reason = "other tests use the rest of it")]
mod guest;
#[path = "support/cli.rs"]
mod support;

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use support::*;

const VM: &str = "\
apiVersion: vmctl.dev/v1alpha1
kind: VirtualMachine
metadata: {name: NAME}
spec: {memory: 32Mi, boot: {kernel: @/kernel}, shutdownTimeoutSeconds: 1}
";

fn running(names: &[&str]) -> Ground {
    let ground = Ground::new();
    std::fs::write(ground.path("kernel"), guest::kernel()).unwrap();
    let manifests: Vec<String> = names.iter().map(|name| VM.replace("NAME", name)).collect();
    ground.write("a.yaml", &manifests.join("---\n"));
    ground.expect(0, "apply -f a.yaml --wait --timeout 60s");
    ground
}

#[test]
fn a_line_for_each_vm_says_what_it_uses() {
    let ground = running(&["web", "db"]);
    let top = ground.json(0, "top -o json --interval 500ms --sort name");
    let items = top["items"].as_array().unwrap();
    assert_eq!(items.iter().map(|item| item["name"].as_str().unwrap()).collect::<Vec<_>>(), ["db", "web"]);
    for item in items {
        // The guest asks its serial port for input again and again.
        assert!(item["cpuPercent"].as_f64().unwrap() > 1.0, "{item}");
        assert!(item["stealPercent"].as_f64().is_some(), "{item}");
        assert!(item["exitsPerSecond"].as_u64().unwrap() > 10, "{item}");
        assert_eq!(item["memoryBytes"].as_u64(), Some(32 << 20));
        let resident = item["residentBytes"].as_u64().unwrap();
        assert!((1 << 20..64 << 20).contains(&resident), "{item}");
        assert_eq!(item["diskReadBytesPerSecond"].as_u64(), Some(0));
        assert!(item["diskP99Us"].is_null(), "nothing was read: {item}");
    }
    let table = ground.expect(0, "top web --once --interval 200ms");
    let lines: Vec<&str> = table.out.lines().collect();
    assert!(lines[0].starts_with("NAME") && lines[0].contains("CPU%"), "{}", table.out);
    assert!(lines.len() == 2 && lines[1].starts_with("web "), "{}", table.out);

    ground.expect(0, "stop db --force");
    ground.expect(3, "top db --once").complains("VM db does not run");
    ground.expect(3, "top nobody --once").complains("there is no VM nobody");
    ground.expect(2, "top --interval 1ms").complains("at least 100ms");
}

#[test]
fn vms_that_do_not_answer_hold_nobody_up() {
    let ground = running(&["web"]);
    let hung: Vec<OwnedFd> = (0..60)
        .map(|number| {
            let directory = ground.path(&format!("run/vms/hung{number}"));
            std::fs::create_dir_all(&directory).unwrap();
            let socket = rustix::net::socket_with(
                AddressFamily::UNIX,
                SocketType::SEQPACKET,
                SocketFlags::CLOEXEC,
                None,
            )
            .unwrap();
            let address = SocketAddrUnix::new(directory.join("control.sock")).unwrap();
            rustix::net::bind(&socket, &address).unwrap();
            rustix::net::listen(&socket, 10).unwrap();
            socket
        })
        .collect();
    let begun = Instant::now();
    let top = ground.expect(3, "top --once --interval 100ms");
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    assert!(top.out.lines().any(|line| line.starts_with("web ")), "{}", top.out);
    assert_eq!(top.err.matches("ask the process of the VM hung").count(), 60, "{}", top.err);
    drop(hung);
    std::fs::read_dir(ground.path("run/vms"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with("hung"))
        .for_each(|path| std::fs::remove_dir_all(path).unwrap());
    ground.expect(0, "top --once --interval 100ms").says("web");
}
