//! What is generated from the types and committed: `schemas/` and `docs/manifests.md`. They must be in
//! step; `UPDATE_SCHEMAS=1` writes them.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use expect_test::expect;
use vmctl::load::explain::{FieldDoc, description, explain, spec_fields};
use vmctl::load::schema;
use vmctl::load::{Input, Options, load};
use vmctl::name::Kind;

/// Compares a file with what it should hold, or writes it.
fn in_step(path: &Path, expected: &str) {
    if std::env::var_os("UPDATE_SCHEMAS").is_some_and(|value| value == "1") {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, expected).unwrap();
        return;
    }
    let found = fs::read_to_string(path).unwrap_or_default();
    let diff = similar::TextDiff::from_lines(found.as_str(), expected);
    let diff = diff.unified_diff().header("committed", "generated").to_string();
    assert!(diff.is_empty(), "{} is out of step; UPDATE_SCHEMAS=1 writes it:\n{diff}", path.display());
}

#[test]
fn schemas_are_in_step_with_the_types() {
    let files = schema::files();
    for (name, text) in &files {
        in_step(&Path::new("schemas").join(name), text);
    }
    for entry in fs::read_dir("schemas").unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(files.iter().any(|(known, _)| *known == name), "schemas/{name} is generated from nothing");
    }
}

#[test]
fn references_in_schemas_lead_somewhere() {
    fn check(root: &serde_json::Value, here: &serde_json::Value) {
        if let Some(reference) = here.get("$ref").and_then(|value| value.as_str()) {
            let pointer = reference.strip_prefix('#').unwrap();
            assert!(root.pointer(pointer).is_some(), "{reference}");
        }
        match here {
            serde_json::Value::Object(object) => object.values().for_each(|value| check(root, value)),
            serde_json::Value::Array(list) => list.iter().for_each(|value| check(root, value)),
            _ => {}
        }
    }
    for (_, text) in schema::files() {
        let schema: serde_json::Value = serde_json::from_str(&text).unwrap();
        check(&schema, &schema);
    }
}

#[test]
fn every_kind_and_field_says_what_it_is() {
    for kind in Kind::ALL {
        assert!(description(kind).len() > 5, "{kind}");
        for field in spec_fields(kind) {
            let said = !field.description.is_empty() || field.default.is_some();
            assert!(said, "{kind}: `{}` has no description", field.name);
            assert_ne!(field.type_name, "any", "{kind}: `{}`", field.name);
        }
    }
}

#[test]
fn the_reference_is_in_step_with_the_types() {
    in_step(Path::new("docs/manifests.md"), &reference());
}

#[test]
fn examples_of_the_reference_are_good() {
    for kind in Kind::ALL {
        let text = example(kind);
        let loaded = load(&[Input::Text { name: kind.to_string(), text }], &Options::default());
        assert!(loaded.complete, "{}", loaded.problems[0]);
        assert_eq!(loaded.manifests[0].id.kind, kind);
    }
}

const INTRODUCTION: &str = "\
<!-- Generated from the types by tests/schemas.rs: UPDATE_SCHEMAS=1 cargo test --test schemas -->

# Manifests

A manifest says what the host shall have. It is YAML 1.2 or JSON; a file may hold several, separated by
`---` lines, or a `kind: List` with `items`.

```yaml
apiVersion: vmctl.dev/v1alpha1
kind: Bridge            # one of the kinds below
metadata:
  name: br0             # lower-case letters, digits and `-`; unique among its kind
  labels: {tier: front} # to select objects by: -l tier=front
  annotations: {}       # texts for people and tools
spec: {}                # what the host shall have
```

`status` is ignored, so that what `vmctl get -o yaml` prints can be applied. Anything else is an error.

- A field that is left out, empty or `null` has its default.
- Sizes are binary quantities in text: `512Mi`, `20Gi`, `1Ti`, or a number of bytes in quotes. `2G` is an
  error, for it means something else to half of its readers.
- Times and the like carry their unit in the field's name.
- References name an object of the kind that the field says.
- What YAML 1.1 and YAML 1.2 read differently is an error, not a surprise: `yes`, `no`, `on` and `off`
  without quotes where a text or a boolean belongs, integers such as `010`. Text that looks like a number
  must be quoted.
- Aliases (`*name`) are fine within bounds; merge keys (`<<`), tags of your own and keys that stand twice
  are errors.
- Files are UTF-8. A document has at most 1 MiB and a file 16 MiB.
- All problems are reported in one run, each with its place. As long as there is one, nothing is removed
  from the host.

`vmctl explain KIND.field` shows the same in a terminal. For editors there are JSON Schemas in `schemas/`:
put `# yaml-language-server: $schema=…/schemas/vmctl.json` on a file's first line.
";

/// `StoragePool` as the name of its example: `storage-pool`.
fn file_stem(kind: Kind) -> String {
    let mut stem = String::new();
    for (index, c) in kind.as_str().chars().enumerate() {
        if c.is_ascii_uppercase() && index > 0 {
            stem.push('-');
        }
        stem.push(c.to_ascii_lowercase());
    }
    stem
}

/// The document of that kind in `tests/manifests/good/`.
fn example(kind: Kind) -> String {
    let path = format!("tests/manifests/good/{}.yaml", file_stem(kind));
    let text = fs::read_to_string(&path).unwrap();
    let wanted = format!("\nkind: {kind}\n");
    let document = text.split("---\n").find(|document| format!("\n{document}").contains(&wanted));
    document.unwrap_or_else(|| panic!("{path} shows no {kind}")).to_owned()
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

fn row(field: &FieldDoc) -> String {
    let default = match (&field.default, field.required) {
        (_, true) => "required".to_owned(),
        (Some(default), _) => cell(default),
        (None, false) => String::new(),
    };
    let mut text = cell(&field.description);
    if !field.choices.is_empty() {
        let choices: Vec<String> = field.choices.iter().map(|choice| format!("`{choice}`")).collect();
        let joint = if text.is_empty() { "" } else { " " };
        text = format!("{text}{joint}One of {}.", choices.join(", "));
    }
    format!("| `{}` | {} | {default} | {text} |\n", field.name, field.type_name.replace("[]", "list of "))
}

fn reference() -> String {
    let mut out = INTRODUCTION.to_owned();
    for kind in Kind::ALL {
        writeln!(out, "\n## {kind}\n\n{}\n", description(kind)).unwrap();
        let short: Vec<String> = kind.aliases().iter().map(|alias| format!("`{alias}`")).collect();
        writeln!(out, "On the command line: {}.\n\n```yaml\n{}```\n", short.join(", "), example(kind))
            .unwrap();
        out.push_str("| Field of `spec` | Type | Default | |\n|---|---|---|---|\n");
        for field in spec_fields(kind) {
            out.push_str(&row(&field));
        }
    }
    out
}

#[test]
fn explain_prints_fields_as_kubectl_does() {
    expect![[r#"
        KIND:     VirtualMachine
        VERSION:  vmctl.dev/v1alpha1

        FIELD:    disks <[]object>

        DESCRIPTION:
            Disks, in the order in which the guest finds them (`/dev/vda`,
            `/dev/vdb`…). Those that are added while it runs come last until its next
            start.

        FIELDS:
          volume	<string> -required-
            The Volume.

          cache	<string>
            Where written data may linger. `writeback`: in the host's page cache until
            the guest flushes. `direct`: past the host's page cache. `writethrough`:
            each write is on the disk before the guest hears of it. `unsafe`: flushes
            are ignored, for data that a crash of the host may take.
            One of: writeback, direct, writethrough, unsafe.
            Default: writeback; on a volume of a thin pool direct, so that a full pool
            holds the guest up and loses nothing.

          limits	<object>
            The most that it may do; changes live.
            Default: no limits.

          name	<string>
            The disk's name in the VM and its serial number in the guest, at most 20
            bytes.
            Default: `disk<index>`.

          queues	<integer>
            Queues, 1 to 8.
            Default: with machine pci one for each vCPU, at most 4; with machine micro
            1.

          readOnly	<boolean>
            Default: false."#]]
    .assert_eq(&explain("vm.disks").unwrap().to_string());
    expect![[r#"
        KIND:     Volume
        VERSION:  vmctl.dev/v1alpha1

        FIELD:    format <string>

        DESCRIPTION:
            The disk image's format. A logical volume (pools `lvm` and `lvmThin`) is
            always raw.
            One of: raw, qcow2.
            Default: qcow2."#]]
    .assert_eq(&explain("Volume.spec.format").unwrap().to_string());
    let short = explain("br").unwrap().to_string();
    assert!(short.contains("KIND:     Bridge") && short.contains("  spec\t<object> -required-"), "{short}");
    assert_eq!(explain("vm.spec.boot"), explain("virtualmachines.boot"));
    let error = explain("vm.dsks").unwrap_err();
    expect![[r#"
        VirtualMachine has no field `dsks` there
        did you mean `disks`? The fields are `boot`, `memory`, `balloon`, `cloudInit`, `cpu`, `cpus`, `disks`, `entropy`, `interfaces`, `machine`, `memoryBacking`, `restartPolicy`, `runStrategy`, `shutdownTimeoutSeconds` and `vsock`"#]]
    .assert_eq(&format!("{error}\n{}", error.hint));
    let error = explain("virtualmachin").unwrap_err();
    expect![[r#"
        unknown kind `virtualmachin`
        did you mean `VirtualMachine`? The kinds are `HostPolicy`, `Bridge`, `Vlan`, `Network`, `StoragePool`, `Image`, `Volume` and `VirtualMachine`"#]].assert_eq(&format!("{error}\n{}", error.hint));
}
