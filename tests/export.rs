//! `vmctl export`: what leaves is what a guest sees, in every format, and whole or not there. `qemu-img` is the
//! judge.

mod storage;

use std::fs;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::Path;

use storage::*;
use vmctl::host::linux::storage::{Export, ExportFormat, open_disk};
use vmctl::host::step::{Container, ImageOrigin, ImageSource, NewVolumeContent, Step};
use vmctl::vmm::config::DiskFormat::{self, Qcow2, Raw};

const MIB: u64 = 1 << 20;

fn export(
    host: &Host,
    file: &str,
    volume_format: DiskFormat,
    to: &Path,
    format: ExportFormat,
) -> Result<u64, String> {
    let volume = host.path.join(file);
    let export = Export { volume: &volume, volume_format, to, format };
    host.storage.export(&export).map_err(|error| format!("{error}; {}", error.hint().unwrap_or_default()))
}

/// The export reads as the volume does, and `qemu-img` finds no fault in it.
fn judge(volume: &Path, volume_format: DiskFormat, to: &Path, format: ExportFormat, bytes: u64) {
    let name = match format {
        ExportFormat::Raw => "raw",
        ExportFormat::Qcow2 | ExportFormat::CompressedQcow2 => "qcow2",
        ExportFormat::Vmdk => "vmdk",
    };
    if name != "raw" {
        let said = run("qemu-img", &["check", "-f", name, text(to)]);
        assert!(said.contains("No errors were found"), "{said}");
    }
    qemu_img(&["compare", "-q", "-f", tag(volume_format), "-F", name, text(volume), text(to)]);
    let info = qemu_img(&["info", "--output=json", "-f", name, text(to)]);
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["virtual-size"], bytes);
    assert_eq!(info["backing-filename"], serde_json::Value::Null);
}

#[test]
fn every_format_holds_what_a_guest_sees() {
    let host = Host::new(&Ground::here());
    host.make_pool();
    // Text, which compresses, and noise, which doesn't; and more than one L2 table.
    let source = host.outside("source.raw");
    let file = fs::File::create(&source).unwrap();
    file.set_len(1100 * MIB).unwrap();
    let words: Vec<u8> =
        (0..2_000_000u32).flat_map(|i| format!("line {}\n", i % 977).into_bytes()).take(3_000_000).collect();
    for (at, bytes) in [
        (0, words.clone()),
        (5 * MIB + 77, random(300_000)),
        (530 * MIB, words),
        (1100 * MIB - 4096, random(4096)),
    ] {
        file.write_all_at(&bytes, at).unwrap();
    }
    let base = host.import(&source, Raw).unwrap();
    let packed = host.outside("source.qcow2");
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "-c", text(&source), text(&packed)]);
    let qcow2_base = host.import(&packed, Qcow2).unwrap();
    let volumes = [
        ("copy", Raw, NewVolumeContent::CopyOf(base.clone())),
        ("full", Qcow2, NewVolumeContent::CopyOf(qcow2_base.clone())),
        ("thin", Qcow2, NewVolumeContent::OverlayOn(base)),
        ("thinner", Qcow2, NewVolumeContent::OverlayOn(qcow2_base)),
        ("blank", Qcow2, NewVolumeContent::Blank),
    ];
    for (name, format, content) in volumes {
        let file = host.create(name, format, 1200 * MIB, content, false).unwrap();
        let volume = host.path.join(&file);
        if name.starts_with("thin") {
            run(
                "qemu-io",
                &["-f", "qcow2", "-c", "write -P 7 700M 200k", "-c", "write -z 0 64k", text(&volume)],
            );
        }
        for to_format in
            [ExportFormat::Raw, ExportFormat::Qcow2, ExportFormat::CompressedQcow2, ExportFormat::Vmdk]
        {
            let to = host.outside(&format!("{name}.{to_format:?}"));
            let length = export(&host, &file, format, &to, to_format).unwrap();
            assert_eq!(to.metadata().unwrap().len(), length);
            assert_eq!(to.metadata().unwrap().permissions().mode() & 0o7777, 0o600);
            judge(&volume, format, &to, to_format, 1200 * MIB);
            if matches!(to_format, ExportFormat::CompressedQcow2 | ExportFormat::Vmdk) {
                assert!(length < 3 * MIB, "{name} {to_format:?}: {length}");
            }
            // What we wrote for others we can read ourselves.
            if to_format == ExportFormat::Vmdk {
                let sha256 = sha256_of(&to);
                let image = host.image_file(&sha256.to_string(), Qcow2);
                let origin = ImageOrigin::Path(to.clone());
                let source = ImageSource { origin, compression: None, container: Container::Vmdk };
                host.run(&Step::ImportImage {
                    image: image.clone(),
                    source,
                    sha256,
                    mark: host.image_mark(),
                })
                .unwrap();
                same_content(&volume, format, &image.path(), Qcow2, 1200 * MIB);
            }
            fs::remove_file(&to).unwrap();
        }
    }
}

#[test]
fn nothing_is_replaced_or_left_half_made() {
    let host = Host::new(&Ground::here());
    host.make_pool();
    let file = host.create("data", Qcow2, 8 * MIB, NewVolumeContent::Blank, false).unwrap();
    let to = host.outside("there.qcow2");
    fs::write(&to, "precious").unwrap();
    let error = export(&host, &file, Qcow2, &to, ExportFormat::Qcow2).unwrap_err();
    assert!(error.contains("is there already"), "{error}");
    assert_eq!(fs::read_to_string(&to).unwrap(), "precious");
    // A VM writes to it: refused, with what to do.
    let writer = open_disk(&host.path.join(&file), false).unwrap();
    let other = host.outside("other.qcow2");
    let error = export(&host, &file, Qcow2, &other, ExportFormat::Qcow2).unwrap_err();
    assert!(error.contains("stop its VM first"), "{error}");
    drop(writer);
    // No room: nothing is left behind.
    in_mount_namespace(|| {
        let small = Ground::tmpfs("1m");
        let full = Host::new(&small);
        let to = full.outside("out.raw");
        let source = host.raw_source("noise.raw", 8 * MIB);
        let image = host.import(&source, Raw).unwrap();
        let noisy = host.create("noise", Raw, 8 * MIB, NewVolumeContent::CopyOf(image), false).unwrap();
        fs::File::options()
            .write(true)
            .open(host.path.join(&noisy))
            .unwrap()
            .write_all_at(&random(4 << 20), 0)
            .unwrap();
        export(&host, &noisy, Raw, &to, ExportFormat::Raw).unwrap_err();
        assert_eq!(fs::read_dir(to.parent().unwrap()).unwrap().count(), 0);
    });
    export(&host, &file, Qcow2, &other, ExportFormat::Qcow2).unwrap();
    assert_eq!(fs::read_dir(host.outside("")).unwrap().count(), 3, "the two, and the noise");
}

#[test]
fn the_command_names_a_volume_and_a_file() {
    let base = Host::new(&Ground::here());
    let (pool, manifest) = (base.base.join("cli-pool"), base.outside("m.yaml"));
    let text_of = format!(
        "apiVersion: vmctl.dev/v1alpha1\nkind: StoragePool\nmetadata: {{name: default}}\nspec: {{directory: {{path: {}}}}}\n---\n\
         apiVersion: vmctl.dev/v1alpha1\nkind: Volume\nmetadata: {{name: web}}\nspec: {{pool: default, capacity: 64Mi}}\n",
        pool.display()
    );
    fs::write(&manifest, text_of).unwrap();
    let vmctl = |arguments: &[&str]| {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_vmctl"))
            .args(["--state-dir", text(&base.outside("state")), "--run-dir", text(&base.outside("run"))])
            .args(arguments)
            .output()
            .unwrap();
        let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
        (output.status.code().unwrap(), said)
    };
    let (status, said) = vmctl(&["apply", "-f", text(&manifest)]);
    assert_eq!(status, 0, "{said}");
    let to = base.outside("web.vmdk");
    let (status, said) = vmctl(&["export", "volume/web", text(&to)]);
    assert!(status == 0 && said.contains("Volume/web of 64Mi"), "{said}");
    judge(&pool.join("web.qcow2"), Qcow2, &to, ExportFormat::Vmdk, 64 * MIB);
    let (status, said) = vmctl(&["export", "volume", "web", text(&base.outside("web.qcow2")), "--compress"]);
    assert_eq!(status, 0, "{said}");
    for (arguments, code, reason) in [
        (vec!["export", "volume/web", text(&to)], 3, "is there already"),
        (vec!["export", "volume/none", "/nonexistent/x"], 3, "there is no Volume/none"),
        (vec!["export", "vm/web", "/nonexistent/x"], 2, "only volumes are exported"),
        (vec!["export", "volume/web", "x.raw", "--compress"], 2, "can't be compressed"),
        (vec!["export", "volume/web", "/nonexistent/x"], 3, "No such file"),
    ] {
        let (status, said) = vmctl(&arguments);
        assert!(status == code && said.contains(reason), "{arguments:?}: {status} {said}");
    }
}
