//! `vmctl adopt` on a host that others have made: bridges by `ip`, images by `qemu-img`, and libvirt's files as
//! Debian's packages have them. Nothing of it may be changed, and what is written must then be no difference.

#[path = "support/cli.rs"]
mod support;

use std::fs;

use support::*;

/// What the kernel says of links, without the clocks that run in it.
const LINKS: &str = "ip -d -o link | sed -E 's/[a-z_]*timer +[0-9.]+//g'";

#[test]
fn bridges_are_written_as_they_are_and_adopted() {
    let ground = Ground::new();
    shell(
        "ip link add br0 type bridge forward_delay 400 ageing_time 60000 mcast_snooping 0 && \
         ip link add BR_lan type bridge stp_state 1 && ip link add veth0 type veth peer name far0 && \
         ip tuntap add tap7 mode tap && ip link set veth0 master br0 && ip link set tap7 master br0 && \
         bridge link set dev veth0 isolated on && ip link set br0 mtu 1400 && \
         ip addr add 192.0.2.1/24 dev br0 && ip addr add 2001:db8::1/64 dev br0 nodad && \
         for link in br0 BR_lan veth0 tap7; do ip link set $link up; done",
    );
    // The bridge's own address is announced a while after it came up.
    std::thread::sleep(std::time::Duration::from_millis(300));
    let links = || shell(&format!("{LINKS}; ip -o addr"));
    let before = links();
    let adopted = ground.expect(0, "adopt -o manifests");
    assert_eq!(links(), before, "nothing was changed");
    assert!(!ground.path("state").exists());
    adopted
        .complains("2 objects: 2 as the host has it, 0 that differ; 0 left out")
        .complains("port tap7 is a tap");
    let text = fs::read_to_string(ground.path("manifests/bridge.yaml")).unwrap();
    assert!(!text.contains("differs"), "{text}");
    for line in [
        "name: br0",
        "name: br-lan",
        "interfaceName: BR_lan",
        "mtu: 1400",
        "forwardDelaySeconds: 4",
        "isolated: true",
        "ageingSeconds: 600",
        "multicastSnooping: false",
        "192.0.2.1/24",
        "2001:db8::1/64",
        "interface: veth0",
        "# port tap7",
    ] {
        assert!(text.contains(line), "no `{line}` in\n{text}");
    }
    ground
        .expect(0, "diff -f manifests")
        .says("No differences (2 objects). 2 to adopt: `apply` only marks what is there.");
    ground.expect(0, "apply -f manifests").says("Bridge/br0 adopted");
    ground.expect(0, "diff -f manifests").says("No differences");
    // What is vmctl's is not written a second time, and files are never replaced.
    assert_eq!(ground.expect(0, "adopt").out, "");
    shell("ip link add br1 type bridge && ip link set br1 up");
    ground.expect(3, "adopt -o manifests").complains("bridge.yaml").complains("never replaced");
    ground.expect(0, "adopt").says("name: br1\n");
}

#[test]
fn what_differs_is_told_field_by_field() {
    let ground = Ground::new();
    shell("ip link add br0 type bridge");
    let adopted = ground.expect(1, "adopt");
    adopted
        .complains("Bridge/br0: differs: up is false, `apply` makes it true (live)")
        .complains("Bridge/br0: blocked: br0 exists, is not vmctl's")
        .complains("1 object: 0 as the host has it, 1 that differ")
        .says("# differs: up is false");
}

#[test]
fn a_directory_of_images_becomes_a_pool() {
    let ground = Ground::new();
    let images = ground.path("images");
    fs::create_dir(&images).unwrap();
    let image = |arguments: &str| {
        shell(&format!("cd {} && qemu-img create -q {arguments}", images.display()));
    };
    image("-f qcow2 web.qcow2 20M");
    image("-f raw data.raw 3M");
    image("-f qcow2 -b web.qcow2 -F qcow2 over.qcow2 20M");
    image("-f qcow2 disk.img 20M");
    fs::write(images.join("notes.txt"), "not an image").unwrap();
    let before = fingerprint(&images);
    let adopted = ground.expect(0, &format!("adopt --pool {} -o manifests", images.display()));
    assert_eq!(fingerprint(&images), before, "nothing was changed");
    adopted
        .complains("4 objects: 4 as the host has it, 0 that differ; 2 left out")
        .complains("disk.img: the file of a qcow2 volume is named NAME.qcow2: rename it")
        .complains("notes.txt: the file of a raw volume is named NAME.raw")
        .complains("Volume/over: it is an overlay on");
    ground
        .expect(0, "diff -f manifests")
        .says("No differences (4 objects). 4 to adopt: `apply` only marks what is there.");
    ground.expect(0, "apply -f manifests").says("4 done");
    ground.expect(0, "diff -f manifests").says("No differences (4 objects).");
    ground.expect(2, "adopt --pool nothing-there").complains("is not a directory");
}

const POOL: &str = "<!--
WARNING: THIS IS AN AUTO-GENERATED FILE.
-->

<pool type='dir'>
  <name>default</name>
  <uuid>3b8c1f6e-8f7d-4a3e-9d7e-0f6f1d7e2a11</uuid>
  <capacity unit='bytes'>0</capacity>
  <source>
  </source>
  <target>
    <path>@/images</path>
  </target>
</pool>
";
const FAR: &str = "<pool type='netfs'><name>far</name><target><path>/far</path></target></pool>";
/// As Debian's libvirt-daemon-config-network installs it.
const NETWORK: &str = "<network>
  <name>default</name>
  <bridge name='virbr0'/>
  <forward/>
  <ip address='192.168.122.1' netmask='255.255.255.0'>
    <dhcp>
      <range start='192.168.122.2' end='192.168.122.254'/>
    </dhcp>
  </ip>
</network>
";
/// As `virsh net-define` writes one.
const OFFICE: &str = "<network>
  <name>office</name>
  <uuid>8a6f8e5a-56a1-4fb4-9f9e-5d9d3d7b0c1e</uuid>
  <forward mode='nat'><nat><port start='1024' end='65535'/></nat></forward>
  <bridge name='virbr1' stp='on' delay='0'/>
  <mac address='52:54:00:ab:cd:ef'/>
  <domain name='office.internal' localOnly='yes'/>
  <dns><forwarder addr='192.0.2.53'/><host ip='10.9.0.2'><hostname>printer</hostname></host></dns>
  <ip address='10.9.0.1' netmask='255.255.255.0'>
    <dhcp>
      <range start='10.9.0.100' end='10.9.0.200'/>
      <host mac='52:54:00:AA:00:04' name='web' ip='10.9.0.10'/>
    </dhcp>
  </ip>
  <ip family='ipv6' address='fd00:9::1' prefix='64'/>
</network>
";
const HOST_BRIDGE: &str = "<network><name>lan</name><forward mode='bridge'/><bridge name='br0'/></network>";
const DOMAIN: &str = "<domain type='kvm'>
  <name>Web_01</name>
  <uuid>11111111-2222-3333-4444-555555555555</uuid>
  <metadata><x:y xmlns:x='http://libosinfo.org/xmlns/libvirt/domain/1.0'/></metadata>
  <memory unit='KiB'>1048576</memory>
  <currentMemory unit='KiB'>524288</currentMemory>
  <vcpu placement='static'>2</vcpu>
  <cputune><vcpupin vcpu='0' cpuset='0'/><vcpupin vcpu='1' cpuset='0-1'/><shares>2048</shares></cputune>
  <os firmware='efi'><type arch='x86_64' machine='pc-q35-7.2'>hvm</type><boot dev='hd'/></os>
  <features><acpi/><apic/><vmport state='off'/><smm state='on'/></features>
  <cpu mode='host-passthrough'><topology sockets='1' dies='1' cores='2' threads='1'/></cpu>
  <clock offset='localtime'/>
  <on_poweroff>destroy</on_poweroff><on_reboot>restart</on_reboot><on_crash>destroy</on_crash>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' cache='none' discard='unmap'/>
      <source file='@/images/web.qcow2'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <disk type='volume' device='disk'>
      <driver name='qemu' type='raw'/>
      <source pool='default' volume='data.raw'/>
      <target dev='sda' bus='sata'/><readonly/>
    </disk>
    <disk type='file' device='cdrom'><target dev='sdb' bus='sata'/><readonly/></disk>
    <interface type='network'>
      <mac address='52:54:00:AA:00:01'/><source network='default'/><model type='virtio'/>
    </interface>
    <interface type='bridge'>
      <mac address='52:54:00:aa:00:02'/><source bridge='br0'/><model type='e1000e'/><link state='down'/>
    </interface>
    <interface type='network'>
      <mac address='52:54:00:aa:00:03'/><source network='lan'/><model type='virtio'/>
    </interface>
    <interface type='network'>
      <mac address='52:54:00:aa:00:04'/><source network='office'/><model type='virtio'/>
    </interface>
    <tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>
    <serial type='pty'/><console type='pty'/><channel type='unix'/>
    <graphics type='spice' autoport='yes'/><video><model type='qxl'/></video>
    <memballoon model='virtio'/><rng model='virtio'/><vsock model='virtio'><cid auto='no' address='7'/></vsock>
  </devices>
</domain>
";
const BROKEN: &str = "<domain type='kvm'><name>old</name><memory>1</memory><devices>
  <disk type='file' device='disk'><source file='/elsewhere/old.img'/><target dev='hda' bus='ide'/></disk>
  <interface type='direct'><source dev='eth0' mode='bridge'/></interface></devices></domain>";
/// What can't be the same machine here, each for its own reason.
const OTHERS: [(&str, &str, &str); 4] = [
    ("arm", "<os><type arch='aarch64'>hvm</type></os>", "its guest is of aarch64"),
    ("luks", "<devices>DISK<encryption format='luks'/></disk></devices>", "its disk vda is encrypted"),
    ("once", "<devices>DISK<transient/></disk></devices>", "its disk vda forgets what is written to it"),
    (
        "usb",
        "<devices>DISK</disk><interface type='hostdev'/></devices>",
        "NICs of type hostdev have no bridge",
    ),
];

#[test]
fn libvirts_files_become_manifests_with_what_they_cannot_say() {
    let ground = Ground::new();
    ground.write("libvirt/storage/default.xml", POOL);
    ground.write("libvirt/storage/far.xml", FAR);
    ground.write("libvirt/qemu/networks/default.xml", NETWORK);
    ground.write("libvirt/qemu/networks/office.xml", OFFICE);
    ground.write("libvirt/qemu/networks/lan.xml", HOST_BRIDGE);
    for file in ["qemu/networks/autostart/office.xml", "qemu/autostart/Web_01.xml"] {
        let link = ground.path("libvirt").join(file);
        fs::create_dir_all(link.parent().unwrap()).unwrap();
        std::os::unix::fs::symlink("../target-of-libvirt.xml", link).unwrap();
    }
    ground.write("libvirt/qemu/Web_01.xml", DOMAIN);
    ground.write("libvirt/qemu/old.xml", BROKEN);
    for (name, inside, _) in OTHERS {
        let disk = format!(
            "<disk type='file'><source file='{}/web.qcow2'/><target dev='vda'/>",
            ground.path("images").display()
        );
        let domain = format!(
            "<domain type='kvm'><name>{name}</name><memory>262144</memory>{}</domain>",
            inside.replace("DISK", &disk)
        );
        ground.write(&format!("libvirt/qemu/{name}.xml"), &domain);
    }
    ground.write("libvirt/qemu/bomb.xml", "<!DOCTYPE x [<!ENTITY a 'aaaa'>]><domain>&a;</domain>");
    fs::create_dir(ground.path("images")).unwrap();
    shell(&format!(
        "cd {} && qemu-img create -q -f qcow2 web.qcow2 20M && qemu-img create -q -f raw data.raw 3M",
        ground.path("images").display()
    ));
    shell("ip link add br0 type bridge && ip link set br0 up");
    std::thread::sleep(std::time::Duration::from_millis(300));
    let look = || {
        format!(
            "{}{}{}",
            shell(LINKS),
            fingerprint(&ground.path("images")),
            fingerprint(&ground.path("libvirt"))
        )
    };
    let before = look();
    let adopted = ground.expect(1, "adopt --libvirt libvirt -o manifests");
    assert_eq!(look(), before, "nothing was changed");
    for said in [
        "left out: libvirt's pool far (libvirt/storage/far.xml): pools of type netfs are not read yet",
        "bomb.xml: it can't be read as XML",
        "libvirt's domain old (libvirt/qemu/old.xml): its disk hda (/elsewhere/old.img) is no volume that is adopted here",
        "libvirt's domain old (libvirt/qemu/old.xml): its NIC 0: NICs of type direct have no bridge",
        "Network/office: its bridge has STP there and none here",
        "Network/office: its bridge's MAC address 52:54:00:ab:cd:ef is not kept",
        "Network/office: <forward><nat><port>: not declared",
        "Network/office: <dns><host>: not declared",
        "Network/office: 10.9.0.10 is reserved for 52:54:00:AA:00:04",
        "Network/office: libvirt starts it together with its daemon: `virsh net-autostart --disable office`",
        "VirtualMachine/web-01: libvirt starts it together with its daemon: `virsh autostart --disable Web_01`",
        "VirtualMachine/web-01: sda is on sata there and on virtio here",
        "VirtualMachine/web-01: sdb is a cdrom: not declared",
        "VirtualMachine/web-01: NIC 1 is a e1000e there",
        "VirtualMachine/web-01: devices that a VM of vmctl doesn't have: channel, graphics, tpm, video",
        "VirtualMachine/web-01: its firmware",
        "VirtualMachine/web-01: its clock is localtime there",
        "VirtualMachine/web-01: <features><smm>: not declared",
        "VirtualMachine/web-01: <cputune><shares>: not declared",
        "VirtualMachine/web-01: its UUID 11111111",
        "VirtualMachine/web-01: differs: not defined on this host",
        "Network/default: differs: ",
    ] {
        assert!(adopted.err.contains(said), "no `{said}` in\n{}", adopted.err);
    }
    for (name, _, why) in OTHERS {
        let said = format!("left out: libvirt's domain {name} (libvirt/qemu/{name}.xml): ");
        let line = adopted.err.lines().find(|line| line.contains(&said) && line.contains(why));
        assert!(line.is_some(), "{name}: no `{why}` in\n{}", adopted.err);
    }
    let text = fs::read_to_string(ground.path("manifests/virtualmachine.yaml")).unwrap();
    assert!(text.contains("# its clock is localtime there"), "{text}");
    assert!(!adopted.err.contains("Network/default: <"), "{}", adopted.err);
    assert!(!adopted.err.contains("autostart --disable default"), "{}", adopted.err);
    let networks = fs::read_to_string(ground.path("manifests/network.yaml")).unwrap();
    for line in [
        "start: \"192.168.122.2\"\n",
        "end: \"192.168.122.254\"\n",
        "domain: office.internal",
        "192.0.2.53",
        "routerAdvertisements: true",
        // libvirt's `nat` is IPv4's alone.
        "nat: false",
    ] {
        assert!(networks.contains(line), "no `{line}` in\n{networks}");
    }
    assert!(text.contains("10.9.0.10"), "{text}");
    ground.expect(0, "validate -f manifests").says("Valid: 7 objects");
    let diff = ground.expect(1, "diff -f manifests");
    diff.says("+ Network/default").says("+ VirtualMachine/web-01").says("3 to create, 4 to adopt");
    // What libvirt's files said is what the host gets; the guest doesn't run.
    ground.expect(0, "apply -f manifests");
    ground.expect(0, "diff -f manifests").says("No differences (7 objects).");
    assert!(shell("ip -d addr show virbr0").contains("192.168.122.1/24"));
    let vm = ground.json(0, "get vm/web-01 -o json")["status"].take();
    assert_eq!((vm["phase"].as_str(), vm["cpus"].as_u64()), (Some("Stopped"), Some(2)));
    assert_eq!(vm["memoryBytes"], 1u64 << 30);
    assert_eq!(
        vm["balloon"]["target_bytes"].as_u64().or(vm["balloon"]["targetBytes"].as_u64()),
        Some(512 << 20)
    );
    let disks: Vec<(&str, bool)> = vm["disks"]
        .as_array()
        .unwrap()
        .iter()
        .map(|disk| (disk["name"].as_str().unwrap(), disk["readOnly"].as_bool().unwrap()))
        .collect();
    assert_eq!(disks, [("vda", false), ("sda", true)]);
    assert_eq!(vm["disks"][0]["cache"], "direct");
    assert_eq!(vm["vsockCid"], 7);
    let nics: Vec<(&str, &str, bool)> = vm["interfaces"]
        .as_array()
        .unwrap()
        .iter()
        .map(|nic| {
            (
                nic["macAddress"].as_str().unwrap(),
                nic["bridge"].as_str().unwrap(),
                nic["linkUp"].as_bool().unwrap(),
            )
        })
        .collect();
    assert_eq!(
        nics,
        [
            ("52:54:00:aa:00:01", "virbr0", true),
            ("52:54:00:aa:00:02", "br0", false),
            ("52:54:00:aa:00:03", "br0", true),
            ("52:54:00:aa:00:04", "virbr1", true),
        ]
    );
    // The dnsmasq of each network would outlive the test.
    ground.expect(0, "delete vm/web-01 net/default net/office");
    ground.expect(2, "adopt --libvirt nothing-there").complains("is not a directory");
}
