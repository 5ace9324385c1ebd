//! Logical volumes: compared after rounding to extents, grown from below a running guest, removed for good.

use super::compare::check_fits;
use super::{Content, Volume};
use crate::host::Step;
use crate::host::snapshot::{GroupFacts, LvmPlace, PoolFile};
use crate::host::step::{LogicalContent, LvmStep, NewLogicalVolume};
use crate::kinds::Context;
use crate::kinds::action::{Action, Blocker, Impact, Verb};
use crate::kinds::storage_pool::compare::PoolView;
use crate::name::{ByteSize, Mark, ObjectId};

pub(super) fn compare(
    action: &mut Action,
    id: &ObjectId,
    want: &Volume,
    place: &LvmPlace,
    pool: &PoolView,
    mark: &Mark,
    context: &Context,
) {
    let have = pool.directory.and_then(|directory| directory.files.get(id.name.as_str()));
    let volume = Logical { id, want, place, group: pool.group, mark, context };
    if let Some(why) = pool.group.and_then(|group| group.unusable.as_ref()) {
        action.block(Blocker::new(format!("volume group {}: {why}", place.group)));
        return;
    }
    match have {
        None => volume.absent(action, pool),
        Some(have) => volume.present(action, pool, have),
    }
}

struct Logical<'a> {
    id: &'a ObjectId,
    want: &'a Volume,
    place: &'a LvmPlace,
    group: Option<&'a GroupFacts>,
    mark: &'a Mark,
    context: &'a Context<'a>,
}

impl Logical<'_> {
    fn device(&self) -> std::path::PathBuf {
        self.place.device(self.id.name.as_str())
    }

    /// What it is to have, in whole extents.
    fn capacity_bytes(&self) -> u64 {
        let declared = self.want.capacity.0;
        self.group.map_or(declared, |group| group.round_up(declared))
    }

    fn absent(&self, action: &mut Action, pool: &PoolView) {
        let path = self.device();
        if self.group.is_some_and(|group| group.other_names.contains(self.id.name.as_str())) {
            action.block(
                Blocker::new(format!("{} is a logical volume outside of the {}", path.display(), self.place))
                    .hint("give the Volume another name, or declare the pool that it is in"),
            );
            return;
        }
        self.create(action, pool, format!("{} is not there", path.display()));
    }

    fn create(&self, action: &mut Action, pool: &PoolView, because: String) {
        let path = self.device();
        if let Some((vm, ..)) = self.context.running_disk(&path) {
            action.block(
                Blocker::new(format!("{} is gone, but VirtualMachine/{vm} still runs on it", path.display()))
                    .hint(format!("`vmctl stop {vm}`, then apply again")),
            );
            return;
        }
        let content = match self.content(pool) {
            Ok(content) => content,
            Err(blocker) => {
                action.block(blocker);
                return;
            }
        };
        if let (None, Some(group)) = (&self.place.thin_pool, self.group)
            && self.capacity_bytes() > group.free_bytes
        {
            action.block(
                Blocker::new(format!(
                    "{} doesn't fit: the {} has {} left",
                    ByteSize(self.capacity_bytes()),
                    self.place,
                    ByteSize(group.free_bytes)
                ))
                .hint("`vgextend` it by another device, or declare a smaller capacity"),
            );
            return;
        }
        action.verb(Verb::Create, because);
        action.step(Step::Lvm(LvmStep::Create(NewLogicalVolume {
            place: self.place.clone(),
            volume: self.id.name.clone(),
            capacity_bytes: self.want.capacity.0,
            content,
            mark: self.mark.clone(),
            reclaim_delete: self.want.reclaim_delete,
        })));
    }

    fn content(&self, pool: &PoolView) -> Result<LogicalContent, Blocker> {
        match &self.want.content {
            Content::Blank => Ok(LogicalContent::Blank),
            Content::CopyOf(name) | Content::OverlayOn(name) => {
                let Some(image) = self.context.declared.image(name) else {
                    return Err(Blocker::new(format!("Image/{name} is not declared")));
                };
                let Some(cache) = self.context.declared.pool(&image.pool) else {
                    return Err(Blocker::new(format!("StoragePool/{} is not declared", image.pool)));
                };
                let cached = image.cached(&cache.place.path());
                check_fits(self.want, name, image, &cached, self.context)?;
                Ok(LogicalContent::CopyOf(cached))
            }
            Content::SnapshotOf(name) => {
                let origin = pool.directory.and_then(|directory| directory.files.get(name.as_str()));
                match origin {
                    Some(origin) if origin.size_bytes > self.capacity_bytes() => Err(Blocker::new(format!(
                        "capacity {} is less than the {} of Volume/{name}",
                        self.want.capacity,
                        ByteSize(origin.size_bytes)
                    ))
                    .hint(format!("declare a capacity of at least {}", ByteSize(origin.size_bytes)))),
                    _ => Ok(LogicalContent::SnapshotOf(name.clone())),
                }
            }
        }
    }

    fn present(&self, action: &mut Action, pool: &PoolView, have: &PoolFile) {
        let path = self.device();
        if let Some(other) = have.mark.as_ref().filter(|found| *found != self.mark) {
            action.block(Blocker::new(format!(
                "{} belongs to {} of set {}",
                path.display(),
                other.owner,
                other.set
            )));
            return;
        }
        if let Some(why) = &have.header.unusable {
            action.block(Blocker::new(format!("{} can't be used: {why}", path.display())));
            return;
        }
        let (place, volume, mark) = (self.place.clone(), self.id.name.clone(), self.mark.clone());
        if have.mark.is_none() {
            let returns = have.retained.as_ref() == Some(self.mark);
            if have.size_bytes != self.capacity_bytes()
                && !(returns && have.size_bytes < self.capacity_bytes())
            {
                action.block(
                    Blocker::new(format!(
                        "{} exists, is not vmctl's, and holds {} where {} is declared",
                        path.display(),
                        ByteSize(have.size_bytes),
                        self.want.capacity
                    ))
                    .hint(format!("declare `capacity: {}` to adopt it as it is", ByteSize(have.size_bytes))),
                );
                return;
            }
            let how = if returns { "was retained" } else { "exists and already is what is declared" };
            action.verb(Verb::Adopt, format!("{} {how}", path.display()));
            let reclaim_delete = self.want.reclaim_delete;
            action.step(Step::Lvm(LvmStep::Adopt { place, volume, mark, reclaim_delete }));
        } else if have.half_made {
            self.create(action, pool, format!("the making of {} was cut short", path.display()));
            return;
        } else {
            // Without a device nothing can use it as it is.
            action.usable = !have.inactive;
        }
        if have.inactive {
            let state = |text: &str| Some(text.to_owned());
            action.differs("status.device", state("inactive"), state("active"), Impact::Live);
            action.step(Step::Lvm(LvmStep::Activate {
                place: self.place.clone(),
                volume: self.id.name.clone(),
                mark: self.mark.clone(),
            }));
        }
        self.capacity(action, have);
        if have.mark.is_some() && have.reclaim_delete != self.want.reclaim_delete {
            let text = |delete: bool| Some(if delete { "Delete" } else { "Retain" }.to_owned());
            let delete = self.want.reclaim_delete;
            action.differs("reclaimPolicy", text(have.reclaim_delete), text(delete), Impact::Live);
            let (place, volume, mark) = (self.place.clone(), self.id.name.clone(), self.mark.clone());
            action.step(Step::Lvm(LvmStep::SetReclaim { place, volume, mark, delete }));
        }
    }

    /// The logical volume first, then the guest that runs on it: it can't grow a device itself.
    fn capacity(&self, action: &mut Action, have: &PoolFile) {
        let (have_bytes, want_bytes) = (have.size_bytes, self.capacity_bytes());
        if have_bytes > want_bytes {
            let size = ByteSize(have_bytes);
            let to = Some(self.want.capacity.to_string());
            action.differs("capacity", Some(size.to_string()), to, Impact::DataLoss);
            action.block(
                Blocker::new(format!(
                    "capacity {size} → {}: a volume never shrinks, for what lies beyond would be lost",
                    self.want.capacity
                ))
                .hint(format!("declare `capacity: {size}`, or copy the data to a new volume")),
            );
            return;
        }
        let path = self.device();
        let guest_bytes = self.context.running_capacity_bytes(&path).filter(|bytes| *bytes < want_bytes);
        if have_bytes < want_bytes || guest_bytes.is_some() {
            let from = ByteSize(guest_bytes.unwrap_or(have_bytes).min(have_bytes));
            let to = ByteSize(want_bytes);
            action.differs("capacity", Some(from.to_string()), Some(to.to_string()), Impact::Live);
        }
        if have_bytes < want_bytes {
            action.step(Step::Lvm(LvmStep::Grow {
                place: self.place.clone(),
                volume: self.id.name.clone(),
                capacity_bytes: self.want.capacity.0,
                mark: self.mark.clone(),
            }));
        }
        if guest_bytes.is_some()
            && let Some((vm, mark, disk)) = self.context.running_disk(&path)
        {
            action.step(Step::ResizeDisk { vm, mark, disk, capacity_bytes: want_bytes });
        }
    }
}
