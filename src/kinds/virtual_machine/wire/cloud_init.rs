//! `cloudInit`, and the fields of a NIC that only cloud-init acts on, in the YAML form.

use std::collections::BTreeSet;
use std::net::IpAddr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::super::{CloudInit as Inner, GuestNetwork};
use crate::host::snapshot::{SEED_DISK, UserData};
use crate::kinds::storage_pool::wire::parse_path;
use crate::kinds::{Problems, SpecProblem};
use crate::name::IpPrefix;

/// What cloud-init finds. The names of NICs and hosts come with it, without a word of user data.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CloudInit {
    /// What cloud-init knows this guest by: with another one it does all again that it does once, such as
    /// making host keys. Default: made from the set's and the VM's names, and so always the same.
    pub instance_id: Option<String>,
    /// The guest's name, perhaps with its domain. Default: the VM's name.
    pub hostname: Option<String>,
    /// Public SSH keys that the guest's default user is reached with, a line each.
    pub ssh_authorized_keys: Option<Vec<String>>,
    /// User data, such as a text that begins with `#cloud-config` or `#!`. Plans and definitions show it:
    /// secrets belong into `userDataFile`.
    pub user_data: Option<String>,
    /// An absolute path of a file of the host with the user data. It is read when the guest starts, and what
    /// is in it is never shown.
    pub user_data_file: Option<String>,
}

/// A NIC's network as cloud-init sets it up in the guest, without DHCP.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct StaticNetwork {
    /// Its addresses, such as `10.0.0.5/24`.
    pub addresses: Vec<String>,
    /// The default gateways, at most one for IPv4 and one for IPv6. Default: none.
    pub gateways: Option<Vec<String>>,
    /// The guest's name servers on this NIC. Default: none.
    pub nameservers: Option<Vec<String>>,
}

/// What user data may begin with; cloud-init ignores everything else but for a line in its log.
const USER_DATA_BEGINS: [&str; 10] = [
    "#cloud-config",
    "#!",
    "#include",
    "#cloud-boothook",
    "#part-handler",
    "## template: jinja",
    "Content-Type:",
    "MIME-Version:",
    "#upstart-job",
    "#cloud-config-archive",
];

/// What `cloudInit: {}` says to the guest.
const NO_USER_DATA: &str = "#cloud-config\n{}\n";

const PUBLIC_KEY_BEGINS: [&str; 5] = ["ssh-", "ecdsa-sha2-", "sk-ssh-", "sk-ecdsa-", "cert-authority "];

impl CloudInit {
    pub(super) fn decode(self, disks: &BTreeSet<String>, problems: &mut Problems) -> Option<Inner> {
        if disks.contains(SEED_DISK) {
            let message =
                format!("a disk or an interface of this VM is named `{SEED_DISK}`, as the seed's disk is");
            problems.add(SpecProblem::new("/cloudInit", message).hint("give the other one another name"));
        }
        if let Some(id) = &self.instance_id
            && (id.is_empty() || id.len() > 128 || !id.bytes().all(|byte| byte.is_ascii_graphic()))
        {
            let message = format!("`{id}`: an instance id is 1 to 128 visible ASCII characters");
            problems.add(SpecProblem::new("/cloudInit/instanceId", message));
        }
        if let Some(hostname) = &self.hostname
            && !is_hostname(hostname)
        {
            let message =
                format!("`{hostname}` is not a host's name: letters, digits, `-`, and `.` between labels");
            problems.add(SpecProblem::new("/cloudInit/hostname", message));
        }
        let keys = self.ssh_authorized_keys.unwrap_or_default();
        for (index, key) in keys.iter().enumerate() {
            if let Some(problem) = public_key_problem(key) {
                problems.add(SpecProblem::new(format!("/cloudInit/sshAuthorizedKeys/{index}"), problem));
            }
        }
        let user_data = match (self.user_data, self.user_data_file) {
            (None, None) => Some(UserData::Text(NO_USER_DATA.to_owned())),
            (Some(text), None) => {
                if !USER_DATA_BEGINS.iter().any(|begin| text.starts_with(begin)) {
                    let message =
                        "it begins with none of the words that cloud-init knows, and would be ignored";
                    let hint =
                        "`#cloud-config` in the first line says that it is YAML, `#!` that it is a script";
                    problems.add(SpecProblem::new("/cloudInit/userData", message).hint(hint));
                }
                Some(UserData::Text(text))
            }
            (None, Some(path)) => {
                problems.take("/cloudInit/userDataFile", parse_path(&path)).map(UserData::File)
            }
            (Some(_), Some(_)) => {
                let message = "`userData` and `userDataFile` are both given; the user data is one of them";
                problems.add(SpecProblem::new("/cloudInit", message));
                None
            }
        };
        Some(Inner {
            instance_id: self.instance_id,
            hostname: self.hostname,
            ssh_authorized_keys: keys,
            user_data: user_data?,
        })
    }
}

fn is_hostname(text: &str) -> bool {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    text.len() <= 253 && text.split('.').all(label)
}

fn public_key_problem(key: &str) -> Option<String> {
    if key.contains("PRIVATE KEY") {
        // Not repeated: it is a secret that has come to a wrong place.
        return Some("it is a private key; a guest gets the public one (`.pub`)".to_owned());
    }
    if key.contains(['\n', '\r']) {
        return Some("a public key is one line".to_owned());
    }
    let known = PUBLIC_KEY_BEGINS.iter().any(|begin| key.starts_with(begin)) && key.contains(' ');
    (!known).then(|| format!("`{key}` is not a public SSH key such as `ssh-ed25519 AAAA… name`"))
}

/// The addresses, gateways and name servers of a NIC.
pub(super) fn guest_network(
    declared: Option<StaticNetwork>,
    has_cloud_init: bool,
    pointer: &str,
    problems: &mut Problems,
) -> GuestNetwork {
    let Some(declared) = declared else { return GuestNetwork::default() };
    let pointer = format!("{pointer}/staticNetwork");
    if !has_cloud_init {
        let message = "it has a meaning only with `cloudInit`, which gives it to the guest";
        problems.add(SpecProblem::new(&pointer, message).hint("`cloudInit: {}` suffices"));
    }
    if declared.addresses.is_empty() {
        let message = "no address; without one the guest asks by DHCP, and this is left out";
        problems.add(SpecProblem::new(format!("{pointer}/addresses"), message));
    }
    let addresses: Vec<IpPrefix> =
        parse_all(Some(declared.addresses), &format!("{pointer}/addresses"), problems);
    let gateways: Vec<IpAddr> = parse_all(declared.gateways, &format!("{pointer}/gateways"), problems);
    let nameservers = parse_all(declared.nameservers, &format!("{pointer}/nameservers"), problems);
    for (index, gateway) in gateways.iter().enumerate() {
        let pointer = format!("{pointer}/gateways/{index}");
        if gateways[..index].iter().any(|other| other.is_ipv4() == gateway.is_ipv4()) {
            problems.add(SpecProblem::new(&pointer, format!("{gateway} is the second one of its family")));
        }
        if !is_link_local(gateway) && !addresses.iter().any(|address| contains(address, gateway)) {
            let message = format!("{gateway} is in none of the networks of `addresses`: it can't be reached");
            problems.add(SpecProblem::new(&pointer, message));
        }
    }
    GuestNetwork { addresses, gateways, nameservers }
}

fn parse_all<T: std::str::FromStr<Err: ToString>>(
    texts: Option<Vec<String>>,
    pointer: &str,
    problems: &mut Problems,
) -> Vec<T> {
    let mut values = Vec::new();
    for (index, text) in texts.unwrap_or_default().iter().enumerate() {
        let parsed = text.parse::<T>().map_err(|error| format!("`{text}`: {}", error.to_string()));
        values.extend(problems.take(&format!("{pointer}/{index}"), parsed));
    }
    values
}

fn is_link_local(address: &IpAddr) -> bool {
    matches!(address, IpAddr::V6(address) if address.is_unicast_link_local())
}

fn contains(network: &IpPrefix, address: &IpAddr) -> bool {
    let shifted = |bits: u128, width: u8| {
        bits.checked_shr(u32::from(width - network.prefix_len.min(width))).unwrap_or(0)
    };
    match (network.address, address) {
        (IpAddr::V4(network), IpAddr::V4(address)) => {
            shifted(u32::from(network).into(), 32) == shifted(u32::from(*address).into(), 32)
        }
        (IpAddr::V6(network), IpAddr::V6(address)) => {
            shifted(u128::from(network), 128) == shifted(u128::from(*address), 128)
        }
        _ => false,
    }
}
