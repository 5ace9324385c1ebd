//! Properties of `load` over inputs that nobody wrote: it never panics, every problem has a place in
//! the text, and what is printed reads back as what it was.

use std::collections::BTreeMap;
use std::fs;

use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::{Value, json};
use vmctl::kinds;
use vmctl::load::{Input, Loaded, Options, load};
use vmctl::name::Kind;

fn load_bytes(bytes: &[u8]) -> Loaded {
    load(&[Input::Stdin(bytes.to_vec())], &Options::default())
}

/// What holds for every input.
fn check_sound(bytes: &[u8], loaded: &Loaded) -> Result<(), TestCaseError> {
    let lines = bytes.split(|&byte| byte == b'\n').count();
    prop_assert_eq!(loaded.complete, !loaded.problems.iter().any(|problem| problem.is_error()));
    prop_assert!(!loaded.complete || !loaded.manifests.is_empty(), "complete, but nothing is declared");
    for problem in &loaded.problems {
        let empty = problem.message.starts_with("no manifests in");
        prop_assert!(empty || problem.location.is_some(), "no place: {}", problem);
        if let (Some(location), Some(snippet)) = (&problem.location, &problem.snippet) {
            prop_assert!(location.line as usize <= lines && location.line > 0 && location.column > 0);
            prop_assert!(location.len > 0 && snippet.len > 0);
            prop_assert!(snippet.start as usize <= snippet.text.chars().count());
        }
        let shown = problem.to_string();
        prop_assert!(!shown.chars().any(|c| c.is_control() && c != '\n'), "{:?}", shown);
        prop_assert!(problem.related.iter().all(|related| related.location.line as usize <= lines));
    }
    for manifest in &loaded.manifests {
        prop_assert!(!loaded.unusable.contains(&manifest.id));
        let name = manifest.origin.at("/metadata/name");
        let spec = manifest.origin.at("/spec/there/is/none");
        prop_assert!(name.line as usize <= lines && spec.line as usize <= lines);
    }
    Ok(())
}

/// All good manifests of the corpus.
fn corpus() -> Vec<Vec<u8>> {
    let mut paths: Vec<_> =
        fs::read_dir("tests/manifests/good").unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

/// One thing that goes wrong with a file.
#[derive(Clone, Debug)]
enum Mutation {
    Insert(Index, &'static str),
    Remove(Index, usize),
    Byte(Index, u8),
    Twice(Index, usize),
    Truncate(Index),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let pieces = vec![
        "\t",
        " ",
        "  ",
        "\n",
        "\r\n",
        "- ",
        ": ",
        ":",
        "? ",
        "#",
        "'",
        "\"",
        "{",
        "}",
        "[",
        "]",
        ",",
        "&a ",
        "*a",
        "!!str ",
        "!",
        "|\n",
        ">\n",
        "---\n",
        "...\n",
        "%YAML 1.1\n",
        "<<: *a\n",
        "\u{feff}",
        "\u{85}",
        "\u{2028}",
        "é",
        "\0",
        "~",
        "null",
        "0x",
        "1e9",
        "\\",
        "@",
        "`",
        "yes",
    ];
    prop_oneof![
        4 => (any::<Index>(), proptest::sample::select(pieces)).prop_map(|(at, text)| Mutation::Insert(at, text)),
        3 => (any::<Index>(), 1usize..20).prop_map(|(at, count)| Mutation::Remove(at, count)),
        2 => (any::<Index>(), any::<u8>()).prop_map(|(at, byte)| Mutation::Byte(at, byte)),
        2 => (any::<Index>(), 1usize..80).prop_map(|(at, count)| Mutation::Twice(at, count)),
        1 => any::<Index>().prop_map(Mutation::Truncate),
    ]
}

fn mutate(bytes: &mut Vec<u8>, mutation: &Mutation) {
    if bytes.is_empty() {
        return;
    }
    match mutation {
        Mutation::Insert(at, text) => {
            let at = at.index(bytes.len());
            bytes.splice(at..at, text.bytes());
        }
        Mutation::Remove(at, count) => {
            let at = at.index(bytes.len());
            bytes.drain(at..(at + count).min(bytes.len()));
        }
        Mutation::Byte(at, byte) => {
            let at = at.index(bytes.len());
            bytes[at] = *byte;
        }
        Mutation::Twice(at, count) => {
            let at = at.index(bytes.len());
            let part = bytes[at..(at + count).min(bytes.len())].to_vec();
            bytes.splice(at..at, part);
        }
        Mutation::Truncate(at) => bytes.truncate(at.index(bytes.len())),
    }
}

fn name() -> impl Strategy<Value = String> {
    "[a-z][a-z0-9-]{0,10}[a-z0-9]".prop_filter("a word of YAML 1.1", |name| name != "no" && name != "on")
}

/// Any text that JSON can hold.
fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        Just(String::new()),
        "[ -~]{0,30}",
        "\\PC{0,20}",
        proptest::sample::select(vec![
            "yes",
            "no",
            "~",
            "null",
            "0x10",
            "1e3",
            "a: b",
            "# c",
            " x ",
            "- a",
            "\n\nx\n",
            "\t",
            "'",
            "\"",
            "\u{85}",
            "\u{2028}",
            "\u{1b}[2J"
        ])
        .prop_map(str::to_owned),
    ]
}

fn bridge() -> impl Strategy<Value = Value> {
    let port = (any::<bool>(), 1u16..4095, any::<bool>()).prop_map(|(isolated, pvid, flood)| {
        json!({"interface": format!("eth{pvid}"), "isolated": isolated, "flood": flood, "pvid": pvid})
    });
    (68u32..=65535, any::<bool>(), vec(port, 0..4), proptest::option::of(0u32..1_000_000)).prop_map(
        |(mtu, stp, ports, ageing)| {
            json!({"mtu": mtu, "stp": stp, "vlanFiltering": true, "ports": ports, "ageingSeconds": ageing})
        },
    )
}

fn volume() -> impl Strategy<Value = Value> {
    (name(), 1u32..1000, any::<bool>(), any::<bool>()).prop_map(|(pool, size, raw, delete)| {
        json!({
            "pool": pool,
            "capacity": format!("{size}Gi"),
            "format": if raw { "raw" } else { "qcow2" },
            "reclaimPolicy": if delete { "Delete" } else { "Retain" },
        })
    })
}

fn machine() -> impl Strategy<Value = Value> {
    let cmdline = text().prop_filter("NUL", |text| !text.contains('\0'));
    (1u8..=16, 16u32..4096, cmdline, vec(name(), 0..4), vec(name(), 0..4)).prop_map(
        |(cpus, memory, cmdline, volumes, bridges)| {
            json!({
                "cpus": cpus,
                "memory": format!("{memory}Mi"),
                "boot": {"kernel": "/boot/vmlinux", "cmdline": cmdline},
                "disks": volumes.iter().map(|volume| json!({"volume": volume})).collect::<Vec<_>>(),
                "interfaces": bridges.iter().map(|bridge| json!({"bridge": bridge})).collect::<Vec<_>>(),
            })
        },
    )
}

fn spec() -> impl Strategy<Value = (Kind, Value)> {
    prop_oneof![
        bridge().prop_map(|spec| (Kind::Bridge, spec)),
        volume().prop_map(|spec| (Kind::Volume, spec)),
        machine().prop_map(|spec| (Kind::VirtualMachine, spec)),
    ]
}

/// JSON with more white space, with tabs, or with each escapable character escaped.
fn as_ascii(value: &Value) -> String {
    let plain = value.to_string();
    let mut units = [0; 2];
    let escape = |c: char| match c {
        c if c.is_ascii() => c.to_string(),
        c => c.encode_utf16(&mut units).iter().map(|unit| format!("\\u{unit:04x}")).collect(),
    };
    plain.chars().map(escape).collect()
}

proptest! {
    #[test]
    fn random_bytes_are_survived(bytes in vec(any::<u8>(), 0..400)) {
        check_sound(&bytes, &load_bytes(&bytes))?;
    }

    #[test]
    fn random_punctuation_is_survived(text in "[-:?,\\[\\]{}#&*!|>'\"%@` \t\na-c0-9~<]{0,120}") {
        check_sound(text.as_bytes(), &load_bytes(text.as_bytes()))?;
    }

    #[test]
    fn damaged_manifests_are_survived(file in any::<Index>(), damage in vec(mutation(), 1..8)) {
        let corpus = corpus();
        let mut bytes = corpus[file.index(corpus.len())].clone();
        damage.iter().for_each(|mutation| mutate(&mut bytes, mutation));
        check_sound(&bytes, &load_bytes(&bytes))?;
    }

    #[test]
    fn what_is_printed_reads_back(
        (kind, spec) in spec(),
        name in name(),
        annotations in btree_map("[a-z]{1,8}", text(), 0..4),
        labels in btree_map("[a-z]{1,8}", "[a-z]{3,8}", 0..4),
    ) {
        let expected = kinds::decode(kind, spec.clone()).unwrap();
        let manifest = json!({
            "apiVersion": "vmctl.dev/v1alpha1",
            "kind": kind.as_str(),
            "metadata": {"name": name, "labels": labels, "annotations": annotations},
            "spec": spec,
        });
        let list = json!({"apiVersion": "v1", "kind": "List", "items": [manifest.clone()]});
        let forms = [
            manifest.to_string(),
            format!("{manifest:#}"),
            format!("{manifest:#}").replace("\n  ", "\n\t"),
            as_ascii(&manifest),
            list.to_string(),
        ];
        for form in &forms {
            let loaded = load_bytes(form.as_bytes());
            prop_assert!(loaded.complete, "{}\n{}", loaded.problems[0], form);
            prop_assert_eq!(loaded.manifests.len(), 1);
            let found = &loaded.manifests[0];
            prop_assert_eq!(&found.spec, &expected);
            prop_assert_eq!(found.id.name.as_str(), &name);
            prop_assert_eq!(&found.annotations, &annotations);
            let plain: BTreeMap<String, String> = labels.clone();
            prop_assert_eq!(&found.labels, &plain);
        }
    }
}
