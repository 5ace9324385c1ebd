//! Objects for tests, written as JSON specs, and a little world for them.

#![allow(dead_code)] // Each test binary uses its own part.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};
use vmctl::host::sim::SimHost;
use vmctl::host::snapshot::{FileFacts, ImageHeader, Link, LinkKind};
use vmctl::kinds::{Spec, decode};
use vmctl::name::{LinkName, ObjectId, SetName};
use vmctl::resolve::{Desired, resolve};
use vmctl::vmm::config::DiskFormat;

pub const SHA: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

pub fn set() -> SetName {
    "default".parse().unwrap()
}

pub fn id(text: &str) -> ObjectId {
    text.parse().unwrap()
}

pub fn link(text: &str) -> LinkName {
    text.parse().unwrap()
}

pub fn spec(id: &ObjectId, json: Value) -> Spec {
    decode(id.kind, json).unwrap_or_else(|problems| panic!("{id}: {problems:?}"))
}

pub type Objects = BTreeMap<ObjectId, Value>;

pub fn objects(list: &[(&str, Value)]) -> Objects {
    list.iter().map(|(name, json)| (id(name), json.clone())).collect()
}

pub fn desire(objects: &Objects) -> Desired {
    desire_in(set(), objects)
}

pub fn desire_in(set: SetName, objects: &Objects) -> Desired {
    let specs = objects.iter().map(|(id, json)| (id.clone(), spec(id, json.clone()))).collect();
    resolve(set, specs, &BTreeSet::new()).unwrap_or_else(|problems| panic!("{problems:#?}"))
}

/// The tutorial's picture: a trunk, two VLANs with a bridge each, three VMs, two volumes each.
pub fn tutorial() -> Objects {
    let mut list = objects(&[
        ("Bridge/brvlan10", json!({})),
        ("Bridge/brvlan20", json!({})),
        ("Vlan/eth0-10", json!({"parent": "eth0", "id": 10, "bridge": "brvlan10"})),
        ("Vlan/eth0-20", json!({"parent": "eth0", "id": 20, "bridge": "brvlan20"})),
        ("StoragePool/default", json!({"directory": {"path": "/pool"}})),
        (
            "Image/linux",
            json!({"pool": "default", "source": {"path": "/src/linux.qcow2"}, "sha256": SHA, "format": "qcow2"}),
        ),
    ]);
    for (vm, bridge) in [("vm1", "brvlan10"), ("vm2", "brvlan10"), ("vm3", "brvlan20")] {
        list.insert(
            id(&format!("Volume/{vm}-root")),
            json!({"pool": "default", "capacity": "2Gi", "backing": {"image": "linux"}}),
        );
        list.insert(
            id(&format!("Volume/{vm}-data")),
            json!({"pool": "default", "format": "raw", "capacity": "1Gi"}),
        );
        list.insert(id(&format!("VirtualMachine/{vm}")), vm_json(vm, bridge));
    }
    list
}

pub fn vm_json(vm: &str, bridge: &str) -> Value {
    json!({
        "memory": "256Mi",
        "boot": {"kernel": "/boot/vmlinux", "initrd": "/boot/initrd"},
        "disks": [{"volume": format!("{vm}-root")}, {"volume": format!("{vm}-data")}],
        "interfaces": [{"bridge": bridge}],
    })
}

/// A host with an uplink and the files that [`tutorial`] reads.
pub fn host() -> SimHost {
    let host = SimHost::new();
    host.edit(|world| {
        let links = world.links.as_mut().unwrap();
        links.insert(link("lo"), foreign_link("loopback"));
        links.insert(link("eth0"), foreign_link(""));
    });
    let header = |format, size| ImageHeader {
        format,
        virtual_size_bytes: size,
        backing: None,
        encrypted: false,
        unusable: None,
    };
    for (path, header) in [
        ("/src/linux.qcow2", header(DiskFormat::Qcow2, 1 << 30)),
        ("/boot/vmlinux", header(DiskFormat::Raw, 1 << 20)),
        ("/boot/initrd", header(DiskFormat::Raw, 1 << 20)),
    ] {
        host.add_file(
            path,
            FileFacts { size_bytes: 1 << 20, modified_unix_ns: 0, header, kind: Default::default() },
        );
    }
    host
}

pub fn foreign_link(kind: &str) -> Link {
    Link {
        mac_address: Some("52:54:00:00:00:01".parse().unwrap()),
        mtu: 1500,
        up: true,
        alias: None,
        master: None,
        parent: None,
        kind: LinkKind::Other(kind.to_owned()),
        port: None,
        addresses: BTreeSet::new(),
    }
}
