//! Volume: differences to steps. Nothing here destroys data without saying so.

use std::path::Path;

use super::{Content, Volume, lvm};
use crate::host::Step;
use crate::host::snapshot::{Pool, PoolDirectory, PoolFile, PoolPlace};
use crate::host::step::{ImageFile, NewVolume, NewVolumeContent};
use crate::kinds::Context;
use crate::kinds::action::{Action, Blocker, Impact, Verb};
use crate::kinds::image::Image;
use crate::kinds::image::compare::describe;
use crate::kinds::storage_pool::compare::resolve;
use crate::name::{ByteSize, Mark, ObjectId, ObjectName};
use crate::vmm::config::DiskFormat;

pub fn compare(id: &ObjectId, want: &Volume, context: &Context) -> Action {
    let mut action = Action::new(id, summary(want));
    let pool = match resolve(&want.pool, context) {
        Ok(found) => found,
        Err(blocker) => return action.blocked(blocker),
    };
    let mark = Mark::new(context.declared.set.clone(), id.clone());
    let file = want.file(&id.name, pool.place);
    if let Some(elsewhere) = context.other_pool_of(id, &want.pool) {
        return action.blocked(
            Blocker::new(format!(
                "its data is in pool {elsewhere}; vmctl doesn't move volumes between pools yet"
            ))
            .hint(format!("declare `pool: {elsewhere}`, or a volume of another name")),
        );
    }
    if let PoolPlace::Lvm(place) = pool.place {
        lvm::compare(&mut action, id, want, place, &pool, &mark, context);
        return action.finish();
    }
    let (pool_path, directory) = (pool.path.as_path(), pool.directory);
    match directory.and_then(|directory| directory.files.get(&file)) {
        Some(have) => compare_file(&mut action, want, &file, pool_path, have, &mark, context),
        None => absent(&mut action, id, want, &file, pool_path, directory, &mark, context),
    }
    action.finish()
}

fn summary(want: &Volume) -> String {
    let content = match &want.content {
        Content::Blank => "blank".to_owned(),
        Content::CopyOf(image) => format!("from image {image}"),
        Content::OverlayOn(image) => format!("overlay on image {image}"),
        Content::SnapshotOf(volume) => format!("snapshot of volume {volume}"),
    };
    format!("{} {} in pool {}, {content}", describe(want.format), want.capacity, want.pool)
}

#[allow(clippy::too_many_arguments)] // Each is a fact of its own; a struct for one call would only rename them.
fn absent(
    action: &mut Action,
    id: &ObjectId,
    want: &Volume,
    file: &str,
    pool_path: &Path,
    directory: Option<&PoolDirectory>,
    mark: &Mark,
    context: &Context,
) {
    let path = pool_path.join(file);
    if let Some((vm, _, _)) = context.running_disk(&path) {
        action.block(
            Blocker::new(format!(
                "{} is gone, but VirtualMachine/{vm} still runs on the deleted file",
                path.display()
            ))
            .hint(format!("save the data from inside the guest, then `vmctl stop {vm}` and apply again")),
        );
        return;
    }
    let content = match new_content(want, pool_path, context) {
        Ok(content) => content,
        Err(blocker) => {
            action.block(blocker);
            return;
        }
    };
    // The same volume in the other format: what is there would be lost.
    let other_format = match want.format {
        DiskFormat::Raw => DiskFormat::Qcow2,
        DiskFormat::Qcow2 => DiskFormat::Raw,
    };
    let other_file = Pool::volume_file(&id.name, other_format);
    let other = directory
        .and_then(|directory| directory.files.get(&other_file))
        .filter(|other| other.mark.as_ref() == Some(mark));
    if other.is_some() {
        let other_path = pool_path.join(&other_file);
        if let Some((vm, ..)) = context.running_disk(&other_path) {
            action.block(
                Blocker::new(format!("VirtualMachine/{vm} runs on {}", other_path.display()))
                    .hint(format!("take the disk from {vm} first, or `vmctl stop {vm}`")),
            );
            return;
        }
        let from = describe(other_format);
        let to = describe(want.format);
        action.differs("format", Some(from.into()), Some(to.into()), Impact::DataLoss);
        action.verb(Verb::Replace, format!("format {from} → {to}"));
        action.step(Step::TrashVolume {
            pool_path: pool_path.to_owned(),
            file: other_file,
            mark: mark.clone(),
        });
    } else {
        action.verb(Verb::Create, format!("{} is not there", path.display()));
    }
    action.step(Step::CreateVolume(NewVolume {
        pool_path: pool_path.to_owned(),
        file: file.to_owned(),
        format: want.format,
        capacity_bytes: want.capacity.0,
        content,
        preallocate: want.preallocate,
        mark: mark.clone(),
        reclaim_delete: want.reclaim_delete,
    }));
}

fn new_content(want: &Volume, pool_path: &Path, context: &Context) -> Result<NewVolumeContent, Blocker> {
    let (name, overlay) = match &want.content {
        Content::Blank => return Ok(NewVolumeContent::Blank),
        Content::CopyOf(name) => (name, false),
        Content::OverlayOn(name) => (name, true),
        // Held to be in a thin pool by the rules between objects.
        Content::SnapshotOf(name) => {
            return Err(Blocker::new(format!("Volume/{name} is in no thin pool")));
        }
    };
    let Some(image) = context.declared.image(name) else {
        return Err(Blocker::new(format!("Image/{name} is not declared")));
    };
    let cached = image.cached(pool_path);
    check_fits(want, name, image, &cached, context)?;
    Ok(if overlay { NewVolumeContent::OverlayOn(cached) } else { NewVolumeContent::CopyOf(cached) })
}

/// The image's own size against the volume's: from the cache, or from its source before it is imported.
pub(super) fn check_fits(
    want: &Volume,
    name: &ObjectName,
    image: &Image,
    cached: &ImageFile,
    context: &Context,
) -> Result<(), Blocker> {
    let in_cache = context.snapshot.pools.get(&image.pool).and_then(|pool| {
        let directory = pool.as_ref().ok()?.directory.as_ref()?;
        Some(directory.images.get(&cached.file)?.header.virtual_size_bytes)
    });
    let in_source = || {
        let facts = context.snapshot.files.get(image.source_path()?)?.as_ref().ok()?;
        image.size_bytes(facts)
    };
    match in_cache.or_else(in_source) {
        Some(size_bytes) if size_bytes > want.capacity.0 => Err(Blocker::new(format!(
            "capacity {} is less than the {} of Image/{name}",
            want.capacity,
            ByteSize(size_bytes)
        ))
        .hint(format!("declare a capacity of at least {}", ByteSize(size_bytes)))),
        _ => Ok(()),
    }
}

#[allow(clippy::too_many_arguments)] // As above.
fn compare_file(
    action: &mut Action,
    want: &Volume,
    file: &str,
    pool_path: &Path,
    have: &PoolFile,
    mark: &Mark,
    context: &Context,
) {
    let path = pool_path.join(file);
    if let Some(other) = have.mark.as_ref().filter(|found| *found != mark) {
        action.block(Blocker::new(format!(
            "{} belongs to {} of set {}",
            path.display(),
            other.owner,
            other.set
        )));
        return;
    }
    if let Err(because) = check_format(want.format, have) {
        action.block(Blocker::new(format!("{}: {because}", path.display())));
        return;
    }
    let capacity_bytes = capacity_bytes(want.format, have);
    if have.mark.is_none() {
        // What was ours before may be grown on its return; what never was is taken as it is or not at all.
        let returns = have.retained.as_ref() == Some(mark);
        if capacity_bytes == want.capacity.0 || (returns && capacity_bytes < want.capacity.0) {
            let retained = if returns { "was retained" } else { "exists and already is what is declared" };
            action.verb(Verb::Adopt, format!("{} {retained}", path.display()));
            action.step(Step::AdoptVolume {
                pool_path: pool_path.to_owned(),
                file: file.to_owned(),
                mark: mark.clone(),
                reclaim_delete: want.reclaim_delete,
            });
            compare_capacity(action, want, file, pool_path, capacity_bytes, mark, context);
        } else {
            action.block(
                Blocker::new(format!(
                    "{} exists, is not vmctl's, and holds {} where {} is declared",
                    path.display(),
                    ByteSize(capacity_bytes),
                    want.capacity
                ))
                .hint(format!("declare `capacity: {}` to adopt it as it is", ByteSize(capacity_bytes))),
            );
        }
        return;
    }
    action.usable = true;
    compare_capacity(action, want, file, pool_path, capacity_bytes, mark, context);
    if have.reclaim_delete != want.reclaim_delete {
        let text = |delete: bool| Some(if delete { "Delete" } else { "Retain" }.to_owned());
        action.differs("reclaimPolicy", text(have.reclaim_delete), text(want.reclaim_delete), Impact::Live);
        action.step(Step::SetReclaim {
            pool_path: pool_path.to_owned(),
            file: file.to_owned(),
            mark: mark.clone(),
            delete: want.reclaim_delete,
        });
    }
}

#[allow(clippy::too_many_arguments)] // As above.
fn compare_capacity(
    action: &mut Action,
    want: &Volume,
    file: &str,
    pool_path: &Path,
    have_bytes: u64,
    mark: &Mark,
    context: &Context,
) {
    if have_bytes == want.capacity.0 {
        return;
    }
    let from = Some(ByteSize(have_bytes).to_string());
    let to = Some(want.capacity.to_string());
    if have_bytes > want.capacity.0 {
        action.differs("capacity", from, to, Impact::DataLoss);
        action.block(
            Blocker::new(format!(
                "capacity {} → {}: a volume never shrinks, for what lies beyond would be lost",
                ByteSize(have_bytes),
                want.capacity
            ))
            .hint(format!("declare `capacity: {}`, or copy the data to a new volume", ByteSize(have_bytes))),
        );
        return;
    }
    action.differs("capacity", from, to, Impact::Live);
    let path = pool_path.join(file);
    let step = match context.running_disk(&path) {
        Some((vm, vm_mark, disk)) => {
            Step::ResizeDisk { vm: vm.clone(), mark: vm_mark, disk, capacity_bytes: want.capacity.0 }
        }
        None => Step::GrowVolume {
            pool_path: pool_path.to_owned(),
            file: file.to_owned(),
            format: want.format,
            capacity_bytes: want.capacity.0,
            mark: mark.clone(),
        },
    };
    action.step(step);
}

/// The guest-visible size. A raw volume's content is the guest's: it is never read as a header, or a guest
/// that writes a qcow2 header to its raw disk would be believed.
pub fn capacity_bytes(format: DiskFormat, have: &PoolFile) -> u64 {
    match format {
        DiskFormat::Raw => have.size_bytes,
        DiskFormat::Qcow2 => have.header.virtual_size_bytes,
    }
}

fn check_format(format: DiskFormat, have: &PoolFile) -> Result<(), String> {
    if format == DiskFormat::Raw {
        return Ok(());
    }
    if have.header.format != DiskFormat::Qcow2 {
        return Err("not a qcow2 image (its header is damaged)".into());
    }
    if have.header.encrypted {
        return Err("the image is encrypted, which vmctl can't serve".into());
    }
    match &have.header.unusable {
        Some(why) => Err(format!("the image can't be used: {why}")),
        None => Ok(()),
    }
}
