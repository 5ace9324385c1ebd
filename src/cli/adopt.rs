//! `vmctl adopt`: manifests for what a host has already.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use clap::Args;

use super::args::SetArg;
use super::error::{CliError, Result};
use super::exit::Exit;
use super::session::Session;
use crate::adopt::{self, Adoption, Found, libvirt};
use crate::host::snapshot::{LvmPlace, PoolPlace};
use crate::host::{Host, Scope};
use crate::name::{Kind, LvmName, ObjectName};

/// One of libvirt's files. Domains with hundreds of devices take some tens of KiB.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Write manifests for what this host has already
///
/// Bridges with their ports and VLANs, VLAN devices, directories of disk images, volume groups, and libvirt's pools, networks and
/// domains. Bonds have no manifest: ports and VLANs name them. Nothing on the host is changed, and nothing is adopted before `vmctl apply` is run on these manifests:
/// then what already is as they say gets vmctl's mark.
///
/// They are compared with the host at once. What differs, and what a manifest can't say, stands field by field as
/// comments above each and on stderr. Exits 0 when `vmctl apply` would change nothing but marks, else 1.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  vmctl adopt                                         bridges and VLAN devices, to stdout
  vmctl adopt --pool /srv/images -o manifests/
  vmctl adopt --volume-group vg0 --volume-group vg0/thin0
  vmctl adopt --libvirt -o manifests/                 and all that /etc/libvirt describes
  vmctl adopt -o manifests/ && vmctl diff -f manifests/")]
pub struct Command {
    /// A directory of disk images, as a pool; may be repeated
    #[arg(long = "pool", value_name = "DIR", value_hint = clap::ValueHint::DirPath)]
    pools: Vec<PathBuf>,
    /// A volume group, or a thin pool in one, as a pool; may be repeated
    #[arg(long = "volume-group", value_name = "GROUP[/THINPOOL]", value_parser = parse_group)]
    groups: Vec<LvmPlace>,
    /// Read libvirt's files, too
    #[arg(long, value_name = "DIR", num_args = 0..=1, default_missing_value = "/etc/libvirt",
          value_hint = clap::ValueHint::DirPath)]
    libvirt: Option<PathBuf>,
    /// Write a file for each kind into this directory, which is made if it is not there; files are never replaced
    #[arg(short, long, value_name = "DIR", value_hint = clap::ValueHint::DirPath)]
    output: Option<PathBuf>,
    #[command(flatten)]
    set: SetArg,
}

impl Command {
    pub fn run(self, session: &Session) -> Result {
        let mut early = Adoption::default();
        let files = match &self.libvirt {
            Some(directory) => read_libvirt(directory)?,
            None => libvirt::Files::default(),
        };
        let pools = self.pools(libvirt::pool_places(&files, &mut early), &early)?;
        let names: Vec<ObjectName> = pools.iter().map(|(name, _)| name.clone()).collect();
        let host = session.host();
        let snapshot = host.snapshot(&Scope { pools, ..Scope::default() });
        let mut adoption = adopt::host(&snapshot, &names);
        libvirt::find(&files, &snapshot, &mut adoption);
        adoption.left_out.splice(0..0, early.left_out);
        let desired = adoption.declare(&self.set.set);
        let plan = adoption.compare(&desired, &host.snapshot(&desired.scope()));
        adoption.objects.sort_by(|a, b| a.id.cmp(&b.id));

        self.write(session, &adoption.objects)?;
        for found in &adoption.objects {
            for note in &found.notes {
                session.out.note(&format!("{}: {note}", found.id));
            }
        }
        for (what, why) in &adoption.left_out {
            session.out.note(&format!("left out: {what}: {why}"));
        }
        let same =
            plan.actions.iter().filter(|action| !action.is_difference() || action.only_marks()).count();
        session.out.note(&format!(
            "{} object{}: {same} as the host has it, {} that differ; {} left out",
            adoption.objects.len(),
            if adoption.objects.len() == 1 { "" } else { "s" },
            adoption.objects.len() - same,
            adoption.left_out.len()
        ));
        Ok(if same == adoption.objects.len() { Exit::Ok } else { Exit::Differs })
    }

    /// The pools to look at, by the names that their objects will have.
    fn pools(
        &self,
        of_libvirt: Vec<(String, PoolPlace)>,
        names: &Adoption,
    ) -> Result<Vec<(ObjectName, PoolPlace)>> {
        let mut pools: Vec<(ObjectName, PoolPlace)> = Vec::new();
        if let Some(path) = self.pools.iter().find(|path| !path.is_dir()) {
            return Err(CliError::usage(format!("{} is not a directory", path.display())));
        }
        let directories = self.pools.iter().map(|path| {
            let path: PathBuf = std::path::absolute(path).unwrap_or_else(|_| path.clone());
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            (name, PoolPlace::Directory(path))
        });
        let groups = self.groups.iter().map(|place| {
            let thin = place.thin_pool.iter().map(|thin| format!("-{thin}")).collect::<String>();
            (format!("{}{thin}", place.group), PoolPlace::Lvm(place.clone()))
        });
        // libvirt's names first: they are what people know the pools by.
        for (name, place) in of_libvirt.into_iter().chain(directories).chain(groups) {
            let place = match place {
                PoolPlace::Directory(path) => PoolPlace::Directory(path.components().collect()),
                group => group,
            };
            if pools.iter().any(|(_, known)| *known == place) {
                continue;
            }
            let taken = |name: &ObjectName| pools.iter().any(|(known, _)| known == name);
            let mut free = names.free_name(Kind::StoragePool, &name);
            for number in 2.. {
                if !taken(&free) {
                    break;
                }
                free = names.free_name(Kind::StoragePool, &format!("{name}-{number}"));
            }
            pools.push((free, place));
        }
        Ok(pools)
    }

    fn write(&self, session: &Session, objects: &[Found]) -> Result<()> {
        let mut texts: BTreeMap<Kind, String> = BTreeMap::new();
        for found in objects {
            let yaml = serde_saphyr::to_string(&adopt::manifest(found))
                .map_err(|error| CliError::failed(format!("write YAML: {error}")))?;
            texts.entry(found.id.kind).or_default().push_str(&adopt::document(found, &yaml));
        }
        let Some(directory) = &self.output else {
            session.out.print(&texts.into_values().collect::<String>());
            return Ok(());
        };
        let failed = |path: &Path, error: io::Error| {
            let failed = CliError::failed(format!("write {}: {error}", path.display()));
            match error.kind() {
                io::ErrorKind::AlreadyExists => {
                    failed.hint("name another directory: what is there is never replaced")
                }
                _ => failed,
            }
        };
        fs::create_dir_all(directory).map_err(|error| failed(directory, error))?;
        let path = |kind: &Kind| directory.join(format!("{}.yaml", kind.as_str().to_lowercase()));
        // All or nothing, as far as names go.
        if let Some(there) = texts.keys().map(path).find(|path| path.symlink_metadata().is_ok()) {
            return Err(failed(&there, io::ErrorKind::AlreadyExists.into()));
        }
        for (kind, text) in &texts {
            let path = path(kind);
            let file = fs::File::options().write(true).create_new(true).open(&path);
            file.and_then(|mut file| file.write_all(text.as_bytes()))
                .map_err(|error| failed(&path, error))?;
            session.out.note(&format!("wrote {}", path.display()));
        }
        Ok(())
    }
}

/// The files where Debian's packages (and libvirt itself) have them, each kind by name. `autostart` has links to
/// the same files.
fn read_libvirt(directory: &Path) -> Result<libvirt::Files> {
    if !directory.is_dir() {
        return Err(CliError::usage(format!("{} is not a directory", directory.display()))
            .hint("libvirt's files are in /etc/libvirt; `--libvirt DIR` names another place"));
    }
    let mut files = libvirt::Files::default();
    let kinds =
        [("storage", &mut files.pools), ("qemu/networks", &mut files.networks), ("qemu", &mut files.domains)];
    for (place, texts) in kinds {
        let place = directory.join(place);
        *texts = read_xml(&place)?;
        let starts = |file: &&PathBuf| {
            file.file_name().is_some_and(|name| place.join("autostart").join(name).symlink_metadata().is_ok())
        };
        files.autostart.extend(texts.iter().map(|(file, _)| file).filter(starts).cloned());
    }
    Ok(files)
}

fn read_xml(directory: &Path) -> Result<Vec<(PathBuf, String)>> {
    let failed =
        |path: &Path, error: io::Error| CliError::failed(format!("read {}: {error}", path.display()));
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(directory, error)),
    };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "xml"));
    paths.sort();
    let mut files = Vec::new();
    for path in paths {
        let size = path.metadata().map_err(|error| failed(&path, error))?;
        if !size.is_file() {
            continue;
        }
        if size.len() > FILE_BYTES_MAX {
            return Err(CliError::failed(format!("{} has more than {FILE_BYTES_MAX} bytes", path.display())));
        }
        let text = fs::read_to_string(&path).map_err(|error| failed(&path, error))?;
        files.push((path, text));
    }
    Ok(files)
}

/// `vg0` or `vg0/thin0`.
fn parse_group(text: &str) -> std::result::Result<LvmPlace, String> {
    let (group, thin_pool) = match text.split_once('/') {
        Some((group, thin_pool)) => (group, Some(thin_pool)),
        None => (text, None),
    };
    let name = |text: &str| LvmName::parse(text).map_err(|error| error.to_string());
    Ok(LvmPlace { group: name(group)?, thin_pool: thin_pool.map(name).transpose()? })
}
