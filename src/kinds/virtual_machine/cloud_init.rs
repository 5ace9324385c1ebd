//! What cloud-init finds in the guest: the texts of a NoCloud seed, made from what is declared.
//!
//! User data may hold secrets. Those are in a file, which is read only when a seed is made: a plan and a
//! definition know its path, its length and its time of change, and not even a hash of its content, for a
//! short password is found by trying.

use std::fmt::Write as _;
use std::path::PathBuf;

use serde::Serialize;
use sha2::Digest as _;

use super::{GuestNetwork, Interface};
use crate::host::snapshot::{SEED_DISK, SEED_PATH, Seed, Snapshot, UserData};
use crate::name::{ObjectName, SetName};
use crate::vmm::config::{DiskConfig, DiskFormat, NicConfig};

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CloudInit {
    /// `None`: made from the set's and the VM's names, and so never another one by accident.
    pub instance_id: Option<String>,
    /// `None`: the VM's name.
    pub hostname: Option<String>,
    pub ssh_authorized_keys: Vec<String>,
    pub user_data: UserData,
}

impl CloudInit {
    /// The file that the user data is in.
    pub fn file(&self) -> Option<&PathBuf> {
        match &self.user_data {
            UserData::File(path) => Some(path),
            UserData::Text(_) => None,
        }
    }

    /// `nics` are those of `interfaces`, in the same order.
    pub(super) fn seed(
        &self,
        set: &SetName,
        vm: &ObjectName,
        interfaces: &[Interface],
        nics: &[NicConfig],
    ) -> Seed {
        let default_id = || format!("vmctl-{set}-{vm}");
        let instance_id = self.instance_id.clone().unwrap_or_else(default_id);
        let hostname = self.hostname.as_deref().unwrap_or(vm.as_str());
        let mut meta_data =
            format!("instance-id: {}\nlocal-hostname: {}\n", quoted(&instance_id), quoted(hostname));
        if !self.ssh_authorized_keys.is_empty() {
            meta_data.push_str("public-keys:\n");
            for key in &self.ssh_authorized_keys {
                let _ = writeln!(meta_data, "  - {}", quoted(key));
            }
        }
        let network_config = (!nics.is_empty()).then(|| network_config(interfaces, nics));
        Seed { meta_data, network_config, user_data: self.user_data.clone() }
    }
}

/// A text as YAML reads it whatever is in it: JSON's form of it is YAML too.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// Version 2, which is Netplan's form. NICs are found by their addresses, whatever the guest calls them.
fn network_config(interfaces: &[Interface], nics: &[NicConfig]) -> String {
    let mut text = String::from("version: 2\nethernets:\n");
    for (interface, nic) in interfaces.iter().zip(nics) {
        let _ = write!(
            text,
            "  {}:\n    match:\n      macaddress: {}\n",
            quoted(&nic.name),
            quoted(&nic.mac_address)
        );
        guest_network(&interface.guest_network, &mut text);
    }
    text
}

fn guest_network(network: &GuestNetwork, text: &mut String) {
    let GuestNetwork { addresses, gateways, nameservers } = network;
    if addresses.is_empty() {
        text.push_str("    dhcp4: true\n");
        // A guest may be far from its network still: its boot doesn't wait for an answer.
        text.push_str("    optional: true\n");
    } else {
        text.push_str("    dhcp4: false\n    addresses:\n");
        for address in addresses {
            let _ = writeln!(text, "      - {}", quoted(&address.to_string()));
        }
    }
    if !gateways.is_empty() {
        text.push_str("    routes:\n");
    }
    for gateway in gateways {
        // Spelt out: not every renderer of cloud-init knows the word `default`.
        let to = if gateway.is_ipv4() { "0.0.0.0/0" } else { "::/0" };
        let _ = writeln!(text, "      - to: {}\n        via: {}", quoted(to), quoted(&gateway.to_string()));
    }
    if !nameservers.is_empty() {
        text.push_str("    nameservers:\n      addresses:\n");
        for nameserver in nameservers {
            let _ = writeln!(text, "        - {}", quoted(&nameserver.to_string()));
        }
    }
}

/// The disk that carries it. Its path says whether its content is another one.
pub(super) fn disk(seed: &Seed, snapshot: &Snapshot) -> DiskConfig {
    let mut digest = sha2::Sha256::new();
    let mut add = |part: &str| {
        digest.update((part.len() as u64).to_le_bytes());
        digest.update(part.as_bytes());
    };
    add(&seed.meta_data);
    add(seed.network_config.as_deref().unwrap_or_default());
    match &seed.user_data {
        UserData::Text(text) => add(text),
        UserData::File(path) => {
            add(&path.to_string_lossy());
            if let Some(Ok(facts)) = snapshot.files.get(path) {
                add(&format!("{} {}", facts.size_bytes, facts.modified_unix_ns));
            }
        }
    }
    let digest: String = digest.finalize()[..6].iter().map(|byte| format!("{byte:02x}")).collect();
    DiskConfig {
        read_only: true,
        ..DiskConfig::new(SEED_DISK, format!("{SEED_PATH}{digest}"), DiskFormat::Raw)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Attachment;
    use super::*;

    #[test]
    fn texts_survive_whatever_they_hold() {
        let cloud_init = CloudInit {
            instance_id: None,
            hostname: Some("a\"b: #c\n".to_owned()),
            ssh_authorized_keys: vec!["ssh-ed25519 AAAA me@home # 'x'".to_owned()],
            user_data: UserData::Text(String::new()),
        };
        let name = ObjectName::parse("web").unwrap();
        let seed = cloud_init.seed(&"default".parse().unwrap(), &name, &[], &[]);
        let read: serde_json::Value = serde_saphyr::from_str(&seed.meta_data).unwrap();
        assert_eq!(read["instance-id"], "vmctl-default-web");
        assert_eq!(read["local-hostname"], "a\"b: #c\n");
        assert_eq!(read["public-keys"][0], "ssh-ed25519 AAAA me@home # 'x'");
        assert_eq!(seed.network_config, None);
    }

    #[test]
    fn nics_are_found_by_their_addresses() {
        let network = GuestNetwork {
            addresses: vec!["10.0.0.5/24".parse().unwrap(), "fd00::5/64".parse().unwrap()],
            gateways: vec!["10.0.0.1".parse().unwrap(), "fe80::1".parse().unwrap()],
            nameservers: vec!["10.0.0.1".parse().unwrap()],
        };
        let interface = |guest_network| Interface {
            name: String::new(),
            attachment: Attachment::Bridge(ObjectName::parse("br0").unwrap()),
            addresses: Default::default(),
            mac_address: None,
            vlans: None,
            queues: 1,
            link_up: true,
            receive_limits: Default::default(),
            transmit_limits: Default::default(),
            anti_spoofing: Default::default(),
            guest_network,
        };
        let nics = ["net0", "net1"].map(|name| NicConfig::new(name, "tap", "52:54:00:00:00:01"));
        let text = network_config(&[interface(network), interface(GuestNetwork::default())], &nics);
        expect_test::expect![[r#"
            version: 2
            ethernets:
              "net0":
                match:
                  macaddress: "52:54:00:00:00:01"
                dhcp4: false
                addresses:
                  - "10.0.0.5/24"
                  - "fd00::5/64"
                routes:
                  - to: "0.0.0.0/0"
                    via: "10.0.0.1"
                  - to: "::/0"
                    via: "fe80::1"
                nameservers:
                  addresses:
                    - "10.0.0.1"
              "net1":
                match:
                  macaddress: "52:54:00:00:00:01"
                dhcp4: true
                optional: true
        "#]]
        .assert_eq(&text);
    }
}
