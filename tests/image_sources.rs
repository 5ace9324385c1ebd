//! What is planned for images of every source: what is refused before anything is read, and why.

#[path = "support/objects.rs"]
mod objects;

use expect_test::{Expect, expect};
use objects::*;
use serde_json::{Value, json};
use vmctl::execute::execute;
use vmctl::host::Host;
use vmctl::host::snapshot::{DiskFacts, FileFacts, FileKind, ImageHeader};
use vmctl::plan::Policy;
use vmctl::report::text::{self, Style};
use vmctl::vmm::config::DiskFormat;

fn disk(name: &str, gib: u64, unusable: Option<&str>) -> DiskFacts {
    DiskFacts { name: name.into(), capacity_bytes: gib << 30, unusable: unusable.map(str::to_owned) }
}

fn check(fields: Value, kind: FileKind, expected: Expect) {
    let host = host();
    let header = ImageHeader {
        format: DiskFormat::Raw,
        virtual_size_bytes: 1 << 20,
        backing: None,
        encrypted: false,
        unusable: None,
    };
    host.add_file("/src/a", FileFacts { size_bytes: 1 << 20, modified_unix_ns: 0, header, kind });
    let mut image = json!({"pool": "default", "source": {"path": "/src/a"}, "sha256": SHA});
    image.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    let objects = objects(&[
        ("StoragePool/default", json!({"directory": {"path": "/pool"}})),
        ("Image/a", image),
        ("Volume/v", json!({"pool": "default", "capacity": "2Gi", "source": {"image": "a"}})),
    ]);
    let desired = desire(&objects);
    let plan = || vmctl::plan::plan(&desired, &host.snapshot(&desired.scope()), &Policy::default());
    expected.assert_eq(&text::plan(&plan(), Style::default()));
    execute(&plan(), &host, &mut |_| {});
    if !text::plan(&plan(), Style::default()).contains('!') {
        assert!(plan().is_empty(), "{}", text::plan(&plan(), Style::default()));
    }
}

#[test]
fn what_fits_is_planned() {
    let vmdk = FileKind::Vmdk(Ok(disk("", 1, None)));
    check(
        json!({"format": "vmdk"}),
        vmdk,
        expect![[r#"
        + StoragePool/default  directory /pool
        + Image/a              vmdk from /src/a, sha256 001122334455…
        + Volume/v             qcow2 2Gi in pool default, from image a
        Plan: 3 to create. Downtime: none.
    "#]],
    );
    check(
        json!({"format": "raw", "compression": "zstd"}),
        FileKind::Zstd,
        expect![[r#"
        + StoragePool/default  directory /pool
        + Image/a              raw (zstd) from /src/a, sha256 001122334455…
        + Volume/v             qcow2 2Gi in pool default, from image a
        Plan: 3 to create. Downtime: none.
    "#]],
    );
    let two = FileKind::Ova(Ok(vec![disk("a.vmdk", 1, None), disk("b.vmdk", 9, Some("it is encrypted"))]));
    check(
        json!({"format": "ova", "disk": "a.vmdk"}),
        two,
        expect![[r#"
        + StoragePool/default  directory /pool
        + Image/a              ova from /src/a, sha256 001122334455…
        + Volume/v             qcow2 2Gi in pool default, from image a
        Plan: 3 to create. Downtime: none.
    "#]],
    );
    let url = json!({"format": "qcow2", "source": {"url": "https://example.org/a.qcow2"}});
    check(
        url,
        FileKind::Plain,
        expect![[r#"
        + StoragePool/default  directory /pool
        + Image/a              qcow2 from https://example.org/a.qcow2, sha256 001122334455…
        + Volume/v             qcow2 2Gi in pool default, from image a
        Plan: 3 to create. Downtime: none.
    "#]],
    );
}

#[test]
fn what_does_not_is_refused_with_the_reason() {
    check(
        json!({"format": "raw"}),
        FileKind::Xz,
        expect![[r#"
        + StoragePool/default  directory /pool
        ! Image/a              blocked: not in the pool's cache
              blocked: /src/a: it is compressed by xz; declare `compression: xz`
        ! Volume/v             blocked: /pool/v.qcow2 is not there
              blocked: waits for Image/a, which is blocked
        Plan: 1 to create, 2 blocked. Downtime: none.
    "#]],
    );
    check(
        json!({"format": "raw", "compression": "gzip"}),
        FileKind::Xz,
        expect![[r#"
        + StoragePool/default  directory /pool
        ! Image/a              blocked: not in the pool's cache
              blocked: /src/a: declared as compressed by gzip, and its first bytes don't say so
        ! Volume/v             blocked: /pool/v.qcow2 is not there
              blocked: waits for Image/a, which is blocked
        Plan: 1 to create, 2 blocked. Downtime: none.
    "#]],
    );
    check(
        json!({"format": "qcow2"}),
        FileKind::Vmdk(Ok(disk("", 1, None))),
        expect![[r#"
        + StoragePool/default  directory /pool
        ! Image/a              blocked: not in the pool's cache
              blocked: /src/a: declared as qcow2, but its first bytes say vmdk; declare `format: vmdk` if that is what you mean
        ! Volume/v             blocked: /pool/v.qcow2 is not there
              blocked: waits for Image/a, which is blocked
        Plan: 1 to create, 2 blocked. Downtime: none.
    "#]],
    );
    check(
        json!({"format": "vmdk"}),
        FileKind::Plain,
        expect![[r#"
        + StoragePool/default  directory /pool
        ! Image/a              blocked: not in the pool's cache
              blocked: /src/a: declared as vmdk, but its first bytes say raw; declare `format: raw` if that is what you mean
        ! Volume/v             blocked: /pool/v.qcow2 is not there
              blocked: waits for Image/a, which is blocked
        Plan: 1 to create, 2 blocked. Downtime: none.
    "#]],
    );
    let chained = FileKind::Vmdk(Err("it is a difference to another disk (base.vmdk)".into()));
    check(
        json!({"format": "vmdk"}),
        chained,
        expect![[r#"
        + StoragePool/default  directory /pool
        ! Image/a              blocked: not in the pool's cache
              blocked: /src/a: the image can't be used: it is a difference to another disk (base.vmdk)
        ! Volume/v             blocked: /pool/v.qcow2 is not there
              blocked: waits for Image/a, which is blocked
        Plan: 1 to create, 2 blocked. Downtime: none.
    "#]],
    );
    let two = || FileKind::Ova(Ok(vec![disk("a.vmdk", 1, None), disk("b.vmdk", 9, Some("it is encrypted"))]));
    check(
        json!({"format": "ova"}),
        two(),
        expect![[r#"
        + StoragePool/default  directory /pool
        ! Image/a              blocked: not in the pool's cache
              blocked: /src/a: the OVA has several disks (a.vmdk, b.vmdk); say which by `disk`
        ! Volume/v             blocked: /pool/v.qcow2 is not there
              blocked: waits for Image/a, which is blocked
        Plan: 1 to create, 2 blocked. Downtime: none.
    "#]],
    );
    check(
        json!({"format": "ova", "disk": "b.vmdk"}),
        two(),
        expect![[r#"
        + StoragePool/default  directory /pool
        ! Image/a              blocked: not in the pool's cache
              blocked: /src/a: the disk b.vmdk in it can't be used: it is encrypted
        ! Volume/v             blocked: capacity 2Gi is less than the 9Gi of Image/a
              hint: declare a capacity of at least 9Gi
        Plan: 1 to create, 2 blocked. Downtime: none.
    "#]],
    );
    check(
        json!({"format": "ova", "disk": "c.vmdk"}),
        two(),
        expect![[r#"
        + StoragePool/default  directory /pool
        ! Image/a              blocked: not in the pool's cache
              blocked: /src/a: the OVA has no disk `c.vmdk`; its disks are: a.vmdk, b.vmdk
        ! Volume/v             blocked: /pool/v.qcow2 is not there
              blocked: waits for Image/a, which is blocked
        Plan: 1 to create, 2 blocked. Downtime: none.
    "#]],
    );
    // The volume is smaller than the disk in the file.
    check(
        json!({"format": "vmdk"}),
        FileKind::Vmdk(Ok(disk("", 3, None))),
        expect![[r#"
        + StoragePool/default  directory /pool
        + Image/a              vmdk from /src/a, sha256 001122334455…
        ! Volume/v             blocked: capacity 2Gi is less than the 3Gi of Image/a
              hint: declare a capacity of at least 3Gi
        Plan: 2 to create, 1 blocked. Downtime: none.
    "#]],
    );
}
