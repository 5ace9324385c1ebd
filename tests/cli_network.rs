//! Networks on the command line: the manifests that a host starts from, applied by the built program.

#[path = "support/cli.rs"]
mod support;

use support::*;

#[test]
fn a_host_starts_from_what_init_writes() {
    let ground = Ground::new();
    ground.expect(0, "init host").says("default-network.yaml written").says("default-pool.yaml written");
    ground.expect(0, "validate -f host").says("Valid: 2 objects");
    // What is there stays, changed or not.
    let edited = std::fs::read_to_string(ground.path("host/default-network.yaml")).unwrap() + "# mine\n";
    ground.write("host/default-network.yaml", &edited);
    ground.expect(0, "init host").says("default-network.yaml is there, and stays");
    assert_eq!(std::fs::read_to_string(ground.path("host/default-network.yaml")).unwrap(), edited);
    let names = std::fs::read_dir(ground.path("host")).unwrap().count();
    assert_eq!(names, 2, "nothing else is left there");
    ground.expect(0, "init --print").says("kind: Network").says("---").says("kind: StoragePool");

    // The network, by one process after the other: its service outlives each.
    ground.expect(0, "apply -f host/default-network.yaml").says("Network/default created");
    ground.expect(0, "diff -f host/default-network.yaml").says("No differences");
    ground.expect(0, "get net").says("vmbr0").says("192.168.123.1/24").says("LEASES");
    ground.expect(0, "describe net/default").says("dnsmasq, pid").says("Forwarding:").says("IPv4");
    let json: serde_json::Value =
        serde_json::from_str(&ground.expect(0, "get net/default -o json").out).unwrap();
    assert_eq!(json["status"]["service"]["running"], true);
    let pid = json["status"]["service"]["pid"].as_i64().unwrap();
    ground.expect(0, "get leases");
    let leases: serde_json::Value =
        serde_json::from_str(&ground.expect(0, "get leases -o json").out).unwrap();
    assert_eq!(leases, serde_json::json!([]));
    // As a guest's: `vmctl get leases` reads what dnsmasq wrote.
    let file = ground.path("state/networks/services/default.default/leases");
    std::fs::write(
        &file,
        "0 52:54:00:12:34:56 192.168.123.105 web *\n4102444800 52:54:00:12:34:57 192.168.123.106 * *\n",
    )
    .unwrap();
    ground.expect(0, "get leases").says("192.168.123.105   web").says("never").says("192.168.123.106   -");
    ground.expect(0, "delete net/default").says("Network/default");
    // (Its parent is gone: where nobody reaps, an empty shell of it stays.)
    let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    assert!(arguments.is_empty(), "it runs on");
    ground.expect(0, "get net").says("");
}
