//! Pools in volume groups: adopted as they are, or made on blank devices that the manifest names.

use super::StoragePool;
use super::compare::claim;
use crate::host::Step;
use crate::host::snapshot::{DeviceFacts, GroupFacts, LvmPlace, Pool};
use crate::host::step::{LvmStep, NewLvmPool};
use crate::kinds::action::{Action, Blocker, Impact, Verb};
use crate::kinds::{Context, Spec};
use crate::name::{ByteSize, Mark, ObjectId};

pub(super) fn compare(
    mut action: Action,
    id: &ObjectId,
    want: &StoragePool,
    place: &LvmPlace,
    have: &Pool,
    mark: &Mark,
    context: &Context,
) -> Action {
    let create = |devices: bool, thin_pool: bool| {
        Step::Lvm(LvmStep::CreatePool(NewLvmPool {
            name: id.name.clone(),
            place: place.clone(),
            devices: if devices { want.devices.clone() } else { Vec::new() },
            thin_pool_bytes: want.thin_pool_size.filter(|_| thin_pool).map(|size| size.0),
            mark: mark.clone(),
        }))
    };
    let Some(group) = have.lvm.as_ref().and_then(|lvm| lvm.group.as_ref()) else {
        return match check_devices(id, want, place, have, context) {
            Err(blocker) => action.blocked(blocker),
            Ok(used) => {
                let devices: Vec<String> =
                    want.devices.iter().map(|path| path.display().to_string()).collect();
                action.differs(
                    "devices",
                    Some(if used { "no signature, but not empty" } else { "blank" }.to_owned()),
                    Some(format!("volume group {}", place.group)),
                    Impact::DataLoss,
                );
                let because =
                    format!("the volume group {} is written to {}", place.group, devices.join(", "));
                action.verb(Verb::Create, because);
                action.step(create(true, place.thin_pool.is_some()));
                action.finish()
            }
        };
    };
    if let Some(why) = &group.unusable {
        return action.blocked(Blocker::new(format!("volume group {}: {why}", place.group)));
    }
    let Some(directory) = &have.directory else {
        return match check_thin_pool(want, place, group) {
            Err(blocker) => action.blocked(blocker),
            Ok(()) => {
                action.verb(Verb::Create, format!("the {place} is not there"));
                action.step(create(false, true));
                action.finish()
            }
        };
    };
    if let Some(thin) = &group.thin {
        if !thin.zeroes {
            return action.blocked(
                Blocker::new(format!(
                    "the {place} doesn't zero new blocks: a guest could read another's data"
                ))
                .hint(format!("`lvchange --zero y {}/{}`", place.group, name_of(place))),
            );
        }
        if let Some(why) = &thin.failing {
            action.note(format!("PoolFailing: the {place} is {why}"));
        }
        if let Some(how) = thin.nearly_full() {
            action.note(format!(
                "PoolNearlyFull: {how}; `lvextend -L +10G {}/{}` gives it more",
                place.group,
                name_of(place)
            ));
        }
    }
    let registered = have.registered.as_ref();
    claim(action, &place.to_string(), directory, registered, mark, context, create(false, false))
}

fn name_of(place: &LvmPlace) -> &str {
    place.thin_pool.as_ref().map_or("", |name| name.as_str())
}

/// Whether the devices may be taken, and whether one of them holds something that nothing recognises.
fn check_devices(
    id: &ObjectId,
    want: &StoragePool,
    place: &LvmPlace,
    have: &Pool,
    context: &Context,
) -> Result<bool, Blocker> {
    if want.devices.is_empty() {
        let other = context.declared.objects.iter().find(|(other, spec)| {
            let Spec::StoragePool(pool) = spec else { return false };
            *other != id && !pool.devices.is_empty() && pool.place.path() == place.directory()
        });
        if let Some((other, _)) = other {
            return Err(Blocker::new(format!("there is no volume group {} yet", place.group))
                .hint(format!("{other} makes it; then apply again")));
        }
        return Err(Blocker::new(format!("there is no volume group {}", place.group)).hint(format!(
            "`vgcreate {} DEVICE`, or declare the blank `devices` that vmctl may make it on",
            place.group
        )));
    }
    let seen = have.lvm.as_ref().map(|lvm| &lvm.devices);
    let mut used = false;
    let mut room_bytes = 0;
    for path in &want.devices {
        match seen.and_then(|devices| devices.get(path)) {
            None => return Err(Blocker::new(format!("{} is not there", path.display()))),
            Some(Err(error)) => return Err(Blocker::unseen(error)),
            Some(Ok(facts)) => {
                check_device(facts).map_err(|why| {
                    Blocker::new(format!("{}: {why}", path.display())).hint(
                        "vmctl never writes over what it finds: declare another device, or empty this one yourself",
                    )
                })?;
                used |= !facts.starts_empty;
                room_bytes += facts.size_bytes;
            }
        }
    }
    match want.thin_pool_size {
        Some(size) if size.0 >= room_bytes => Err(Blocker::new(format!(
            "a thin pool of {size} doesn't fit on devices of {} and its metadata",
            ByteSize(room_bytes)
        ))),
        _ => Ok(used),
    }
}

fn check_device(facts: &DeviceFacts) -> Result<(), String> {
    if let Some(user) = &facts.in_use {
        return Err(format!("it is in use: {user}"));
    }
    match facts.signatures.as_slice() {
        [] => Ok(()),
        found => Err(format!("it carries the signature of {}", found.join(", "))),
    }
}

fn check_thin_pool(want: &StoragePool, place: &LvmPlace, group: &GroupFacts) -> Result<(), Blocker> {
    let name = name_of(place);
    if group.other_names.contains(name) {
        return Err(Blocker::new(format!("{}/{name} is a logical volume, not a thin pool", place.group)));
    }
    let Some(size) = want.thin_pool_size else {
        return Err(Blocker::new(format!("there is no thin pool {}/{name}", place.group))
            .hint("declare its `size`, or make it with `lvcreate --type thin-pool`"));
    };
    if group.round_up(size.0) > group.free_bytes {
        return Err(Blocker::new(format!(
            "a thin pool of {size} doesn't fit: {} has {} left",
            place.group,
            ByteSize(group.free_bytes)
        )));
    }
    Ok(())
}
