//! Image: differences to steps.

use super::{Format, Image};
use crate::host::Step;
use crate::host::snapshot::{DiskFacts, FileFacts, FileKind, ImageHeader};
use crate::host::step::Compression;
use crate::kinds::Context;
use crate::kinds::action::{Action, Blocker, Impact, Verb};
use crate::kinds::storage_pool::compare::resolve;
use crate::name::{ByteSize, Mark, ObjectId};
use crate::vmm::config::DiskFormat;

pub fn compare(id: &ObjectId, want: &Image, context: &Context) -> Action {
    let mut action = Action::new(id, summary(want));
    let pool = match resolve(&want.pool, context) {
        Ok(found) => found,
        Err(blocker) => return action.blocked(blocker),
    };
    let (image, directory) = (want.cached(&pool.path), pool.directory);
    let mark = Mark::new(context.declared.set.clone(), id.clone());
    let cached = directory.and_then(|directory| directory.images.get(&image.file));
    if let Some(cached) = cached {
        match &cached.mark {
            Some(found) if *found == mark => {
                action.usable = true;
                return stale(action, id, &image.file, &mark, context).finish();
            }
            Some(found) if found.set != mark.set => {
                return action.blocked(Blocker::new(format!(
                    "this content is in the pool as {} of set {}",
                    found.owner, found.set
                )));
            }
            // Ours under another name, or nobody's: importing again verifies the content and marks it.
            _ => {
                action.verb(Verb::Adopt, "the content is in the cache already; it is verified again");
            }
        }
    } else {
        action.verb(Verb::Create, "not in the pool's cache");
    }
    if let Err(blocker) = check_source(want, context) {
        return action.blocked(blocker);
    }
    action.step(Step::ImportImage {
        image: image.clone(),
        source: want.source(),
        sha256: want.sha256,
        mark: mark.clone(),
    });
    stale(action, id, &image.file, &mark, context).finish()
}

fn summary(want: &Image) -> String {
    let format = want.describe();
    let digest = want.sha256.to_string();
    format!("{format} from {}, sha256 {}…", want.source(), &digest[..12])
}

pub(crate) fn describe(format: DiskFormat) -> &'static str {
    match format {
        DiskFormat::Raw => "raw",
        DiskFormat::Qcow2 => "qcow2",
    }
}

/// What the source's first bytes say against what is declared. The checksum is checked while copying, and what
/// comes from elsewhere once it is here.
fn check_source(want: &Image, context: &Context) -> Result<(), Blocker> {
    let Some(source) = want.source_path() else { return Ok(()) };
    let path = source.display();
    match context.snapshot.files.get(source) {
        None => Err(Blocker::new(format!("its source {path} is not there"))
            .hint("put the file there, or correct `source.path`")),
        Some(Err(error)) => Err(Blocker::unseen(error)),
        Some(Ok(facts)) => {
            check_facts(want, facts).map_err(|because| Blocker::new(format!("{path}: {because}")))
        }
    }
}

impl Image {
    fn describe(&self) -> String {
        let format = match &self.format {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
            Format::Vmdk => "vmdk",
            Format::Ova { .. } => "ova",
        };
        match self.compression {
            None => format.to_owned(),
            Some(method) => format!("{format} ({})", compression_word(method)),
        }
    }
}

fn compression_word(method: Compression) -> &'static str {
    match method {
        Compression::Gzip => "gzip",
        Compression::Xz => "xz",
        Compression::Zstd => "zstd",
    }
}

fn check_facts(want: &Image, facts: &FileFacts) -> Result<(), String> {
    let found = match &facts.kind {
        FileKind::Gzip => Some(Compression::Gzip),
        FileKind::Xz => Some(Compression::Xz),
        FileKind::Zstd => Some(Compression::Zstd),
        FileKind::Plain | FileKind::Vmdk(_) | FileKind::Ova(_) => None,
    };
    match (want.compression, found) {
        // What is in it shows when it is decompressed.
        (Some(declared), Some(found)) if declared == found => return Ok(()),
        (Some(declared), _) => {
            let declared = compression_word(declared);
            return Err(format!("declared as compressed by {declared}, and its first bytes don't say so"));
        }
        (None, Some(found)) => {
            let found = compression_word(found);
            return Err(format!("it is compressed by {found}; declare `compression: {found}`"));
        }
        (None, None) => {}
    }
    let unlike = |found: &str| {
        Err(format!(
            "declared as {}, but its first bytes say {found}; declare `format: {found}` if that is what you mean",
            want.describe()
        ))
    };
    match (&want.format, &facts.kind) {
        (Format::Vmdk, FileKind::Vmdk(Ok(_))) => Ok(()),
        (Format::Vmdk, FileKind::Vmdk(Err(why))) => Err(format!("the image can't be used: {why}")),
        (Format::Ova { disk }, FileKind::Ova(Ok(disks))) => check_disks(disks, disk.as_deref()),
        (Format::Ova { .. }, FileKind::Ova(Err(why))) => Err(format!("the OVA can't be used: {why}")),
        (_, FileKind::Vmdk(_)) => unlike("vmdk"),
        (_, FileKind::Ova(_)) => unlike("ova"),
        (Format::Vmdk | Format::Ova { .. }, _) => unlike(describe(facts.header.format)),
        (Format::Raw, _) => check_header(DiskFormat::Raw, &facts.header),
        (Format::Qcow2, _) => check_header(DiskFormat::Qcow2, &facts.header),
    }
}

fn check_disks(disks: &[DiskFacts], wanted: Option<&str>) -> Result<(), String> {
    let names = || disks.iter().map(|disk| disk.name.as_str()).collect::<Vec<_>>().join(", ");
    let disk = match (wanted, disks) {
        (None, [disk]) => disk,
        (None, []) => return Err("the OVA has no disk".to_owned()),
        (None, _) => return Err(format!("the OVA has several disks ({}); say which by `disk`", names())),
        (Some(wanted), _) => disks
            .iter()
            .find(|disk| disk.name == wanted)
            .ok_or_else(|| format!("the OVA has no disk `{wanted}`; its disks are: {}", names()))?,
    };
    match &disk.unusable {
        Some(why) => Err(format!("the disk {} in it can't be used: {why}", disk.name)),
        None => Ok(()),
    }
}

/// Why an image with this header can't be used as `format`.
pub(crate) fn check_header(format: DiskFormat, header: &ImageHeader) -> Result<(), String> {
    if header.format != format {
        return Err(format!(
            "declared as {}, but its first bytes say {}; declare `format: {}` if that is what you mean",
            describe(format),
            describe(header.format),
            describe(header.format)
        ));
    }
    if header.encrypted {
        return Err(
            "the image is encrypted, which vmctl can't serve; decrypt it with `qemu-img convert`".into()
        );
    }
    if let Some(why) = &header.unusable {
        return Err(format!("the image can't be used: {why}"));
    }
    if let Some(backing) = &header.backing {
        return Err(format!(
            "the image has a backing file ({}) that nothing declares; flatten it with `qemu-img convert -O qcow2`",
            backing.display()
        ));
    }
    Ok(())
}

/// Older contents of this image: removed, unless an overlay needs them.
fn stale(mut action: Action, id: &ObjectId, current: &str, mark: &Mark, context: &Context) -> Action {
    for pool in context.snapshot.pools.values().flatten() {
        let Some(directory) = &pool.directory else { continue };
        for (file, facts) in &directory.images {
            let Some(step) = (facts.mark.as_ref() == Some(mark) && file != current)
                .then(|| remove_step(&pool.path, file, facts.header.format, mark, context))
            else {
                continue;
            };
            let size = ByteSize(facts.size_bytes);
            let kept = matches!(step, Step::RetainImage { .. });
            let to = kept.then(|| "kept for the overlays on it".to_owned());
            action.differs(
                "content",
                Some(format!("{}… ({size})", &file[..12.min(file.len())])),
                to,
                Impact::Live,
            );
            action.after.extend(overlay_owners(&pool.path, file, context).filter(|owner| owner != id));
            action.step(step);
        }
    }
    action
}

/// Deletes a cached image, or lets go of it where an overlay needs it.
pub(crate) fn remove_step(
    pool_path: &std::path::Path,
    file: &str,
    format: DiskFormat,
    mark: &Mark,
    context: &Context,
) -> Step {
    let image =
        crate::host::step::ImageFile { pool_path: pool_path.to_owned(), file: file.to_owned(), format };
    let path = image.path();
    let needed = context.is_backing_file(&path);
    // A pool that could not be looked at may hold an overlay too.
    let unseen = context.snapshot.pools.values().any(Result::is_err);
    if needed || unseen {
        Step::RetainImage { image, mark: mark.clone() }
    } else {
        Step::DeleteImage { image, mark: mark.clone() }
    }
}

fn overlay_owners<'a>(
    pool_path: &std::path::Path,
    file: &str,
    context: &'a Context,
) -> impl Iterator<Item = ObjectId> + 'a {
    let path = crate::host::snapshot::Pool::image_directory(pool_path).join(file);
    context
        .snapshot
        .pools
        .values()
        .flatten()
        .filter_map(|pool| pool.directory.as_ref())
        .flat_map(|directory| directory.files.values())
        .filter(move |volume| volume.header.backing.as_ref() == Some(&path))
        .filter_map(|volume| volume.mark.as_ref())
        .map(|mark| mark.owner.clone())
}
