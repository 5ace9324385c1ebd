//! Where images come from: compressed, from VMware, in archives, over HTTP; and from those who mean harm.
//! `qemu-img` made the good ones and is the judge of what we make of them.

mod storage;

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use storage::*;
use vmctl::host::Scope;
use vmctl::host::error::StepError;
use vmctl::host::snapshot::FileKind;
use vmctl::host::step::{Compression, Container, ImageFile, ImageOrigin, ImageSource, Step};
use vmctl::name::Sha256;
use vmctl::vmm::config::DiskFormat::{self, Qcow2, Raw};

const MIB: u64 = 1 << 20;

fn source(origin: ImageOrigin, compression: Option<Compression>, container: Container) -> ImageSource {
    ImageSource { origin, compression, container }
}

fn import(
    host: &Host,
    source: ImageSource,
    sha256: Sha256,
    format: DiskFormat,
) -> Result<ImageFile, StepError> {
    let image = host.image_file(&sha256.to_string(), format);
    let mark = host.image_mark();
    let step = Step::ImportImage { image: image.clone(), source, sha256, mark };
    host.run(&step)?;
    host.run(&step).expect("a step that finds its work done succeeds");
    check(&image.path(), format);
    assert!(host.leftovers().is_empty());
    Ok(image)
}

fn import_file(
    host: &Host,
    path: &Path,
    compression: Option<Compression>,
    container: Container,
    format: DiskFormat,
) -> Result<ImageFile, StepError> {
    let origin = ImageOrigin::Path(path.to_owned());
    import(host, source(origin, compression, container), sha256_of(path), format)
}

/// The reason, and that nothing is left of it.
fn refused(host: &Host, path: &Path, compression: Option<Compression>, container: Container) -> String {
    let error = import_file(host, path, compression, container, Qcow2).expect_err(text(path)).to_string();
    assert!(host.leftovers().is_empty() && host.directory().images.is_empty(), "{error}");
    error
}

fn ready() -> Host {
    let host = Host::new(&Ground::here());
    host.make_pool();
    host
}

#[test]
fn compressed_sources_become_what_was_compressed() {
    let host = ready();
    let raw = host.raw_source("disk.raw", 12 * MIB);
    let qcow2 = host.outside("disk.qcow2");
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", text(&raw), text(&qcow2)]);
    for (method, command, ending) in [
        (Compression::Gzip, "gzip -k", "gz"),
        (Compression::Xz, "xz -k -T2", "xz"),
        (Compression::Zstd, "zstd -q -k --long=27", "zst"),
    ] {
        for (path, format) in [(&raw, Raw), (&qcow2, Qcow2)] {
            run("sh", &["-c", &format!("{command} {}", text(path))]);
            let packed = PathBuf::from(format!("{}.{ending}", text(path)));
            let image = import_file(&host, &packed, Some(method), Container::Plain, format).unwrap();
            assert!(fs::read(image.path()).unwrap() == fs::read(path).unwrap(), "{method:?}");
            assert!(host.directory().images[&image.file].allocated_bytes < 2 * MIB, "holes stay holes");
            fs::remove_file(image.path()).unwrap();
            // Cut off: said as such, whatever its digest.
            let bytes = fs::read(&packed).unwrap();
            fs::write(&packed, &bytes[..bytes.len() / 2]).unwrap();
            let error = refused(&host, &packed, Some(method), Container::Plain);
            assert!(error.contains("can't be decompressed"), "{error}");
        }
    }
    // Two frames, as parallel compressors write them, and the digest of all of it.
    let two = host.outside("two.zst");
    let frame = fs::read(host.outside("disk.raw.zst")).unwrap();
    fs::remove_file(host.outside("disk.raw.zst")).unwrap();
    assert!(!frame.is_empty());
    run("sh", &["-c", &format!("(zstd -q -c {0}; zstd -q -c {0}) > {1}", text(&raw), text(&two))]);
    let image = import_file(&host, &two, Some(Compression::Zstd), Container::Plain, Raw).unwrap();
    assert_eq!(fs::metadata(image.path()).unwrap().len(), 24 * MIB);
}

fn vmdk(host: &Host, name: &str, kind: &str, raw: &Path) -> PathBuf {
    let path = host.outside(name);
    let option = format!("subformat={kind}");
    qemu_img(&["convert", "-f", "raw", "-O", "vmdk", "-o", &option, text(raw), text(&path)]);
    path
}

#[test]
fn vmdks_become_qcow2_images() {
    let host = ready();
    // The last grain is not a whole one.
    let raw = host.raw_source("disk.raw", 40 * MIB + 512);
    for kind in ["monolithicSparse", "streamOptimized"] {
        let path = vmdk(&host, &format!("{kind}.vmdk"), kind, &raw);
        let image = import_file(&host, &path, None, Container::Vmdk, Qcow2).unwrap();
        same_content(&raw, Raw, &image.path(), Qcow2, 40 * MIB + 512);
        let facts = host.storage.observe(&Scope { files: [path.clone()].into(), ..Scope::default() }).1;
        let FileKind::Vmdk(Ok(disk)) = &facts[&path].as_ref().unwrap().kind else { panic!("{facts:?}") };
        assert_eq!(disk.capacity_bytes, 40 * MIB + 512);
        fs::remove_file(image.path()).unwrap();
    }
    // More than a table and more than a piece of the directory.
    let large = host.outside("large.raw");
    let file = fs::File::create(&large).unwrap();
    file.set_len(200 << 30).unwrap();
    for at in [0, 33 * MIB, 150 << 30, (200 << 30) - 4096] {
        file.write_all_at(&random(4096), at).unwrap();
    }
    let path = vmdk(&host, "large.vmdk", "streamOptimized", &large);
    let image = import_file(&host, &path, None, Container::Vmdk, Qcow2).unwrap();
    same_content(&large, Raw, &image.path(), Qcow2, 200 << 30);
    fs::remove_file(image.path()).unwrap();

    for (kind, reason) in
        [("monolithicFlat", "descriptor alone"), ("twoGbMaxExtentSparse", "descriptor alone")]
    {
        let path = vmdk(&host, &format!("{kind}.vmdk"), kind, &raw);
        let error = refused(&host, &path, None, Container::Vmdk);
        assert!(error.contains(reason) && error.contains(kind), "{error}");
    }
    let base = host.outside("monolithicSparse.vmdk");
    let child = host.outside("child.vmdk");
    qemu_img(&["create", "-q", "-f", "vmdk", "-b", text(&base), "-F", "vmdk", text(&child)]);
    let error = refused(&host, &child, None, Container::Vmdk);
    assert!(error.contains("a difference to another disk"), "{error}");
    let whole = fs::read(host.outside("streamOptimized.vmdk")).unwrap();
    // `qemu-img` leaves a grain's room of zeroes at the end.
    fs::write(&child, &whole[..whole.len() - 70_000]).unwrap();
    let error = refused(&host, &child, None, Container::Vmdk);
    assert!(error.contains("it is cut off"), "{error}");
    // The directory at the end, and no footer there.
    let mut footless = whole.clone();
    footless[56..64].fill(0xff);
    fs::write(&child, footless).unwrap();
    let error = refused(&host, &child, None, Container::Vmdk);
    assert!(error.contains("is it cut off?"), "{error}");
}

/// A member of a tar archive.
fn member(name: &str, kind: u8, content: &[u8]) -> Vec<u8> {
    let mut block = vec![0; 512];
    block[..name.len()].copy_from_slice(name.as_bytes());
    block[124..135].copy_from_slice(format!("{:011o}", content.len()).as_bytes());
    block[156] = kind;
    block[257..263].copy_from_slice(b"ustar\0");
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    block.extend(content);
    block.resize(block.len().next_multiple_of(512), 0);
    block
}

fn ovf(disks: &[&str]) -> String {
    let files = disks
        .iter()
        .enumerate()
        .map(|(i, href)| format!("<File ovf:id=\"file{i}\" ovf:href=\"{href}\" ovf:size=\"1\"/>"));
    let list = (0..disks.len()).map(|i| format!("<Disk ovf:diskId=\"d{i}\" ovf:fileRef=\"file{i}\"/>"));
    format!(
        "<?xml version=\"1.0\"?><Envelope xmlns=\"http://schemas.dmtf.org/ovf/envelope/1\" \
         xmlns:ovf=\"http://schemas.dmtf.org/ovf/envelope/1\"><References>{}</References>\
         <DiskSection>{}</DiskSection></Envelope>",
        files.collect::<String>(),
        list.collect::<String>()
    )
}

fn ova(host: &Host, members: &[(&str, u8, &[u8])]) -> PathBuf {
    let path = host.outside("machine.ova");
    let mut bytes: Vec<u8> =
        members.iter().flat_map(|(name, kind, content)| member(name, *kind, content)).collect();
    bytes.extend([0; 1024]);
    fs::write(&path, bytes).unwrap();
    path
}

fn any_disk() -> Container {
    Container::Ova { disk: None }
}

#[test]
fn the_disk_that_an_ova_names_is_taken_and_nothing_is_unpacked() {
    let host = ready();
    let raw = host.raw_source("disk.raw", 8 * MIB);
    let other = host.raw_source("other.raw", 4 * MIB);
    let disk = fs::read(vmdk(&host, "disk.vmdk", "streamOptimized", &raw)).unwrap();
    let second = fs::read(vmdk(&host, "other.vmdk", "streamOptimized", &other)).unwrap();
    let (one, two) = (ovf(&["disk.vmdk"]), ovf(&["disk.vmdk", "other.vmdk"]));
    let path =
        ova(&host, &[("m.ovf", b'0', one.as_bytes()), ("m.mf", b'0', b"x"), ("disk.vmdk", b'0', &disk)]);
    let image = import_file(&host, &path, None, any_disk(), Qcow2).unwrap();
    same_content(&raw, Raw, &image.path(), Qcow2, 8 * MIB);
    fs::remove_file(image.path()).unwrap();
    // As a real tar writes it, compressed besides.
    let directory = host.outside("unpacked");
    fs::create_dir(&directory).unwrap();
    fs::write(directory.join("m.ovf"), &two).unwrap();
    fs::write(directory.join("disk.vmdk"), &disk).unwrap();
    fs::write(directory.join("other.vmdk"), &second).unwrap();
    let path = host.outside("real.ova");
    run("tar", &["-C", text(&directory), "-cf", text(&path), "m.ovf", "disk.vmdk", "other.vmdk"]);
    let error = refused(&host, &path, None, any_disk());
    assert!(error.contains("several disks (disk.vmdk, other.vmdk); say which by `disk`"), "{error}");
    run("gzip", &["-k", text(&path)]);
    let packed = host.outside("real.ova.gz");
    let named = Container::Ova { disk: Some("other.vmdk".to_owned()) };
    let image = import_file(&host, &packed, Some(Compression::Gzip), named, Qcow2).unwrap();
    same_content(&other, Raw, &image.path(), Qcow2, 4 * MIB);
    fs::remove_file(image.path()).unwrap();

    let named = one.as_bytes();
    for (members, reason) in [
        (vec![("../m.ovf", b'0', named)], "has a path"),
        (vec![("/etc/m.ovf", b'0', named)], "has a path"),
        (vec![("m.ovf", b'0', named), ("link", b'2', b"")], "something else than files"),
        (vec![("m.ovf", b'0', named)], "`disk.vmdk` is not in it"),
        (vec![("disk.vmdk", b'0', &disk[..])], "no OVF description"),
        (vec![("m.ovf", b'0', named), ("m.ovf", b'0', named)], "twice"),
        (vec![("m.ovf", b'0', ovf(&["../../etc/shadow"]).leak().as_bytes())], "a file elsewhere"),
        (vec![("m.ovf", b'0', ovf(&["/etc/shadow"]).leak().as_bytes())], "a file elsewhere"),
        (vec![("m.ovf", b'0', ovf(&[]).leak().as_bytes())], "no disk"),
        (vec![("m.ovf", b'0', b"<!DOCTYPE a [<!ENTITY b \"c\">]><a>&b;</a>")], "no good XML"),
        (vec![("m.ovf", b'0', named), ("disk.vmdk", b'0', b"raw")], "it is cut off"),
    ] {
        let path = ova(&host, &members);
        let error = refused(&host, &path, None, any_disk());
        assert!(error.contains(reason), "{reason}: {error}");
    }
}

/// What the server does with a request.
#[derive(Clone, Copy)]
enum Serve {
    /// So many bytes, and the connection ends.
    Cut(usize),
    Whole,
    /// As if it knew no ranges.
    WithoutRanges,
    Status(u16),
}

/// The file, its tag, and what is done with the next requests.
type Served = (Vec<u8>, String, Vec<Serve>);

/// A server of one file on a loopback of its own; answers requests as they are listed, then as the last.
struct Server {
    url: String,
    /// `range` and `if-range` of each request.
    asked: Arc<Mutex<Vec<(String, String)>>>,
    state: Arc<Mutex<Served>>,
}

impl Server {
    fn new(content: Vec<u8>, plan: &[Serve]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/images/disk.img", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let state = Arc::new(Mutex::new((content, "\"one\"".to_owned(), plan.to_vec())));
        let (log, shared) = (asked.clone(), state.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let _ = answer(stream.unwrap(), &log, &shared);
            }
        });
        Self { url, asked, state }
    }

    fn plan(&self, plan: &[Serve]) {
        self.state.lock().unwrap().2 = plan.to_vec();
    }

    fn asked(&self) -> Vec<(String, String)> {
        std::mem::take(&mut *self.asked.lock().unwrap())
    }
}

fn answer(
    mut stream: TcpStream,
    log: &Mutex<Vec<(String, String)>>,
    state: &Mutex<Served>,
) -> std::io::Result<()> {
    let (mut range, mut condition) = (String::new(), String::new());
    for line in BufReader::new(stream.try_clone()?).lines() {
        let line = line?.to_lowercase();
        match line.split_once(": ") {
            Some(("range", value)) => range = value.to_owned(),
            Some(("if-range", value)) => condition = value.to_owned(),
            _ if line.is_empty() => break,
            _ => {}
        }
    }
    log.lock().unwrap().push((range.clone(), condition.clone()));
    let (content, tag, serve) = {
        let mut state = state.lock().unwrap();
        let serve = if state.2.len() > 1 { state.2.remove(0) } else { state.2[0] };
        (state.0.clone(), state.1.clone(), serve)
    };
    let from =
        range.strip_prefix("bytes=").and_then(|range| range.strip_suffix('-')).and_then(|at| at.parse().ok());
    let fresh = condition.is_empty() || condition == tag;
    let from: Option<usize> = from.filter(|_| fresh && !matches!(serve, Serve::WithoutRanges));
    let (status, body) = match (serve, from) {
        (Serve::Status(code), _) => (format!("{code} No"), &[][..]),
        (_, Some(at)) if at >= content.len() => ("416 No".to_owned(), &[][..]),
        (_, Some(at)) => ("206 Partial Content".to_owned(), &content[at..]),
        (_, None) => ("200 OK".to_owned(), &content[..]),
    };
    let place = match from {
        Some(at) => format!("content-range: bytes {at}-{}/{}\r\n", content.len() - 1, content.len()),
        None => String::new(),
    };
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 {status}\r\netag: {tag}\r\ncontent-length: {length}\r\n{place}connection: close\r\n\r\n"
    )?;
    let sent = if let Serve::Cut(bytes) = serve { bytes.min(length) } else { length };
    stream.write_all(&body[..sent])
}

/// Runs a test in a network of its own, with nothing but a loopback.
fn in_private_network(test: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: takes no pointers; only this thread, and those that it starts, change their network.
            let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
            assert_eq!(result, 0, "these tests need root");
            run("ip", &["link", "set", "lo", "up"]);
            test();
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

fn fetch(host: &Host, server: &Server, sha256: Sha256) -> Result<ImageFile, StepError> {
    let origin = ImageOrigin::Url(server.url.clone());
    import(host, source(origin, None, Container::Plain), sha256, Raw)
}

fn downloads(host: &Host) -> Vec<u64> {
    let entries = fs::read_dir(host.path.join(".vmctl/downloads")).into_iter().flatten();
    let parts = entries.map(|entry| entry.unwrap().path()).filter(|path| text(path).ends_with(".part"));
    parts.map(|path| path.metadata().unwrap().len()).collect()
}

#[test]
fn a_fetch_goes_on_where_it_ended() {
    in_private_network(|| {
        let host = ready();
        let raw = host.raw_source("disk.raw", 3 * MIB);
        let (content, sha256) = (fs::read(&raw).unwrap(), sha256_of(&raw));
        // Within a run: the connection breaks twice.
        let server =
            Server::new(content.clone(), &[Serve::Cut(1_000_000), Serve::Cut(500_000), Serve::Whole]);
        let image = fetch(&host, &server, sha256).unwrap();
        assert!(fs::read(image.path()).unwrap() == content);
        let tag = "\"one\"".to_owned();
        let expected = [
            (String::new(), String::new()),
            ("bytes=1000000-".to_owned(), tag.clone()),
            ("bytes=1500000-".to_owned(), tag.clone()),
        ];
        assert_eq!(server.asked(), expected);
        assert!(downloads(&host).is_empty());
        // Done is done: no request.
        fetch(&host, &server, sha256).unwrap();
        assert!(server.asked().is_empty());
        fs::remove_file(image.path()).unwrap();

        // Between runs.
        server.plan(&[Serve::Cut(2_000_000), Serve::Status(503)]);
        let error = fetch(&host, &server, sha256).unwrap_err();
        assert!(error.to_string().contains("503"), "{error}");
        assert!(error.hint().unwrap().contains("2000000 bytes that have come"), "{error:?}");
        assert_eq!(downloads(&host), [2_000_000]);
        server.asked();
        server.plan(&[Serve::Whole]);
        let image = fetch(&host, &server, sha256).unwrap();
        assert!(fs::read(image.path()).unwrap() == content);
        assert_eq!(server.asked(), [("bytes=2000000-".to_owned(), tag)]);
        fs::remove_file(image.path()).unwrap();

        // A server without ranges begins anew; so does one whose file is another by now.
        for plan in [[Serve::Cut(1_000_000), Serve::WithoutRanges], [Serve::Cut(1_000_000), Serve::Whole]] {
            server.plan(&plan);
            if matches!(plan[1], Serve::Whole) {
                server.state.lock().unwrap().1 = "\"two\"".to_owned();
            }
            fetch(&host, &server, sha256).unwrap();
            fs::remove_file(host.image_file(&sha256.to_string(), Raw).path()).unwrap();
        }
    });
}

#[test]
fn what_was_fetched_counts_only_with_its_digest() {
    in_private_network(|| {
        let host = ready();
        let raw = host.raw_source("disk.raw", MIB);
        let sha256 = sha256_of(&raw);
        let mut content = fs::read(&raw).unwrap();
        content[1000] ^= 1;
        let server = Server::new(content.clone(), &[Serve::Whole]);
        let error = fetch(&host, &server, sha256).unwrap_err().to_string();
        assert!(error.contains("SHA-256"), "{error}");
        assert!(host.directory().images.is_empty() && host.leftovers().is_empty());
        // A part of another version, which no validator tells of: it is fetched again as a whole.
        server.plan(&[Serve::Cut(500_000), Serve::Status(503)]);
        fetch(&host, &server, sha256).unwrap_err();
        assert_eq!(downloads(&host), [500_000]);
        server.state.lock().unwrap().0 = fs::read(&raw).unwrap();
        server.plan(&[Serve::Whole]);
        fetch(&host, &server, sha256).unwrap();
        server.plan(&[Serve::Status(404)]);
        server.asked();
        let error = fetch(&host, &server, Sha256([7; 32])).unwrap_err().to_string();
        assert!(error.contains("404"), "{error}");
        assert_eq!(server.asked().len(), 1, "who says no is not asked again");
    });
}

// ---- those who mean harm ------------------------------------------------------------------------------

/// Values for a field of a header that no honest image has.
fn hostile_header(kind: usize) -> &'static [(usize, &'static [u8])] {
    const HUGE: &[u8] = &[0xff; 8];
    match kind {
        // qcow2: version, cluster bits, size, encryption, L1 size and place, refcounts, features, lengths.
        0 => &[
            (4, &[0, 0, 0, 9]),
            (20, &[0, 0, 0, 63]),
            (20, &[0, 0, 0, 2]),
            (24, HUGE),
            (32, &[0, 0, 0, 1]),
            (32, &[0, 0, 0, 2]),
            (36, HUGE),
            (40, HUGE),
            (48, HUGE),
            (56, HUGE),
            (60, HUGE),
            (72, HUGE),
            (79, &[1]),
            (79, &[2]),
            (79, &[4]),
            (100, HUGE),
            (8, &[0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 11]),
        ],
        // vmdk: version, flags, capacity, grains, descriptor, tables, directory, unclean, line ends, method.
        1 => &[
            (4, HUGE),
            (8, &[0xff; 4]),
            (12, HUGE),
            (12, &[0; 8]),
            (20, HUGE),
            (20, &[3, 0, 0, 0, 0, 0, 0, 0]),
            (20, &[0; 8]),
            (28, HUGE),
            (28, &[0; 8]),
            (36, HUGE),
            (36, &[0; 8]),
            (44, HUGE),
            (44, &[0; 4]),
            (56, &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00]),
            (72, &[1]),
            (73, b"\r\n\r\n"),
            (77, &[7, 0]),
        ],
        // tar: name, size, kind, sum.
        _ => &[
            (0, b"../x"),
            (0, b"/etc/"),
            (0, &[0xff; 8]),
            (124, &[0xff; 8]),
            (124, b"77777777777"),
            (124, b"zzz"),
            (148, b"7777777"),
            (156, b"2"),
            (156, b"5"),
            (257, b"other"),
        ],
    }
}

/// Resident memory at its highest, in bytes.
fn peak_memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

/// A good image of each kind, and how it is declared.
fn honest(host: &Host) -> [(Vec<u8>, Container); 3] {
    let raw = host.raw_source("disk.raw", 2 * MIB);
    let qcow2 = host.outside("disk.qcow2");
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", text(&raw), text(&qcow2)]);
    let sparse = fs::read(vmdk(host, "disk.vmdk", "streamOptimized", &raw)).unwrap();
    let one = ovf(&["disk.vmdk"]);
    let archive = ova(host, &[("m.ovf", b'0', one.as_bytes()), ("disk.vmdk", b'0', &sparse)]);
    [
        (fs::read(qcow2).unwrap(), Container::Plain),
        (sparse, Container::Vmdk),
        (fs::read(archive).unwrap(), any_disk()),
    ]
}

/// One import of mutated bytes, within its time.
fn try_import(host: &Host, bytes: &[u8], container: &Container) -> Result<ImageFile, String> {
    let path = host.outside("hostile");
    fs::write(&path, bytes).unwrap();
    let begin = Instant::now();
    let result = import_file(host, &path, None, container.clone(), Qcow2).map_err(|error| error.to_string());
    assert!(begin.elapsed() < Duration::from_secs(5), "it took {:?}", begin.elapsed());
    result
}

#[test]
fn two_hundred_hostile_images_are_refused_with_a_reason() {
    let host = ready();
    let images = honest(&host);
    for (bytes, container) in &images {
        fs::remove_file(try_import(&host, bytes, container).expect("the honest one").path()).unwrap();
    }
    let before = peak_memory();
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 200,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let noise = prop::collection::vec((512usize..65_536, any::<u8>()), 0..8);
    let strategy = (0usize..3, any::<prop::sample::Index>(), noise, 0usize..4);
    let reasons = Mutex::new(std::collections::BTreeSet::new());
    runner
        .run(&strategy, |(kind, which, noise, cut)| {
            let (honest, container) = &images[kind];
            let mut bytes = honest.clone();
            let (at, value) = which.get(hostile_header(kind));
            bytes[*at..at + value.len()].copy_from_slice(value);
            for (at, value) in noise {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= value;
                }
            }
            if cut == 0 {
                bytes.truncate(bytes.len() * 2 / 3);
            }
            let why = try_import(&host, &bytes, container).expect_err("a hostile image");
            let reason = why.rsplit(": ").next().unwrap().to_owned();
            prop_assert!(reason.len() > 8 && why.len() < 4096, "{why}");
            prop_assert!(host.leftovers().is_empty() && host.directory().images.is_empty());
            reasons.lock().unwrap().insert(reason);
            Ok(())
        })
        .unwrap();
    let reasons = reasons.into_inner().unwrap();
    assert!(reasons.len() >= 15, "{reasons:#?}");
    let grown = peak_memory().saturating_sub(before);
    assert!(grown < 64 * MIB, "memory grew by {} MiB", grown / MIB);
}

#[test]
fn any_bytes_end_in_an_image_or_a_reason() {
    let host = ready();
    let images = honest(&host);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 150,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let edits = prop::collection::vec((0usize..70_000, any::<u8>()), 1..12);
    runner
        .run(&(1usize..3, edits), |(kind, edits)| {
            let (honest, container) = &images[kind];
            let mut bytes = honest.clone();
            let length = bytes.len();
            edits.iter().for_each(|(at, value)| bytes[at % length] ^= value);
            // `import` has `qemu-img check` look at what is taken.
            if let Ok(image) = try_import(&host, &bytes, container) {
                fs::remove_file(image.path()).unwrap();
            }
            prop_assert!(host.leftovers().is_empty());
            Ok(())
        })
        .unwrap();
}

/// A file of a few kilobytes that claims to hold the same grain everywhere.
#[test]
fn a_small_file_never_becomes_a_large_disk() {
    let host = ready();
    let raw = host.outside("blank.raw");
    fs::File::create(&raw).unwrap().set_len(64 << 30).unwrap();
    fs::File::options().write(true).open(&raw).unwrap().write_all_at(&random(65_536), 0).unwrap();
    let path = vmdk(&host, "bomb.vmdk", "monolithicSparse", &raw);
    let mut bytes = fs::read(&path).unwrap();
    let directory = u64::from_le_bytes(bytes[56..64].try_into().unwrap()) as usize * 512;
    let table: [u8; 4] = bytes[directory..directory + 4].try_into().unwrap();
    let first = u32::from_le_bytes(table) as usize * 512;
    let grain: [u8; 4] = bytes[first..first + 4].try_into().unwrap();
    (0..512).for_each(|entry| bytes[first + entry * 4..first + entry * 4 + 4].copy_from_slice(&grain));
    (0..2048)
        .for_each(|entry| bytes[directory + entry * 4..directory + entry * 4 + 4].copy_from_slice(&table));
    let why = try_import(&host, &bytes, &Container::Vmdk).unwrap_err();
    assert!(why.contains("more grains than it has room for"), "{why}");
    let mut unused = Vec::new();
    fs::File::open(&path).unwrap().read_to_end(&mut unused).unwrap();
    assert!(Command::new("qemu-img").arg("--version").output().is_ok());
}
