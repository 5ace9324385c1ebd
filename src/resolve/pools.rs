//! Rules of storage pools: no two in one place, and what can't live in a volume group.

use std::collections::BTreeMap;

use super::Problem;
use super::rules::Objects;
use crate::kinds::volume::{Content, Volume};
use crate::kinds::{Spec, storage_pool::StoragePool};
use crate::name::{Kind, ObjectId, ObjectName};

pub fn check(objects: &Objects, problems: &mut Vec<Problem>) {
    places(objects, problems);
    for (id, spec) in objects {
        match spec {
            Spec::Image(image) if is_lvm(objects, &image.pool) => problems.push(
                Problem::new(
                    id,
                    "/pool",
                    format!("pool {} is a volume group, which holds no files", image.pool),
                )
                .hint("declare a directory pool for images; logical volumes can be made from them"),
            ),
            Spec::Volume(volume) if is_lvm(objects, &volume.pool) => logical(id, volume, objects, problems),
            Spec::Volume(volume) => {
                if let Content::SnapshotOf(_) = volume.content {
                    problems.push(
                        Problem::new(
                            id,
                            "/source/volume",
                            format!("pool {} is no thin pool: it has no snapshots", volume.pool),
                        )
                        .hint("use `source: {image: …}`, or a pool with `lvmThin`"),
                    );
                }
            }
            _ => {}
        }
    }
}

fn pool<'a>(objects: &'a Objects, name: &ObjectName) -> Option<&'a StoragePool> {
    match objects.get(&ObjectId::new(Kind::StoragePool, name.clone())) {
        Some(Spec::StoragePool(pool)) => Some(pool),
        _ => None,
    }
}

pub fn is_lvm(objects: &Objects, name: &ObjectName) -> bool {
    pool(objects, name).is_some_and(|pool| pool.place.lvm().is_some())
}

fn places(objects: &Objects, problems: &mut Vec<Problem>) {
    let mut seen = BTreeMap::new();
    for (id, spec) in objects {
        let Spec::StoragePool(pool) = spec else { continue };
        let pointer = match pool.place.lvm() {
            None => "/directory/path",
            Some(place) if place.thin_pool.is_some() => "/lvmThin/thinPool",
            Some(_) => "/lvm/volumeGroup",
        };
        let place = match pool.place.lvm() {
            None => pool.place.path().display().to_string(),
            Some(place) => format!("the {place}"),
        };
        if let Some((other, at)) = seen.insert(&pool.place, (id, pointer)) {
            problems.push(Problem::new(id, pointer, format!("{place} is already {other}")).related(
                other,
                at,
                "first used here",
            ));
        }
    }
}

/// Beginnings of names that LVM keeps for itself.
const RESERVED: [&str; 2] = ["snapshot", "pvmove"];

fn logical(id: &ObjectId, volume: &Volume, objects: &Objects, problems: &mut Vec<Problem>) {
    let mut add = |pointer: &str, message: String, hint: &str| {
        problems.push(Problem::new(id, pointer, message).hint(hint));
    };
    if !volume.is_raw() {
        add(
            "/pool",
            format!("pool {} is a volume group, whose volumes are raw", volume.pool),
            "add `format: raw`",
        );
    }
    if volume.preallocate {
        let why = "a linear logical volume has all its space anyway, a thin one can't have it".to_owned();
        add("/preallocation", why, "leave `preallocation` out");
    }
    if RESERVED.iter().any(|reserved| id.name.as_str().starts_with(reserved)) {
        add(
            "/pool",
            format!("LVM keeps names that begin with {} for itself", RESERVED.join(" or ")),
            "give the Volume another name",
        );
    }
    let thin = pool(objects, &volume.pool).and_then(|pool| pool.place.lvm()?.thin_pool.as_ref());
    match &volume.content {
        Content::Blank | Content::CopyOf(_) => {}
        Content::OverlayOn(_) => {
            add(
                "/backing",
                "a logical volume has no backing file".to_owned(),
                "use `source` for a full copy",
            );
        }
        Content::SnapshotOf(_) if thin.is_none() => add(
            "/source/volume",
            format!("pool {} is no thin pool: it has no snapshots", volume.pool),
            "use a pool with `lvmThin`",
        ),
        Content::SnapshotOf(name) => {
            let origin = ObjectId::new(Kind::Volume, name.clone());
            if let Some(Spec::Volume(other)) = objects.get(&origin)
                && other.pool != volume.pool
            {
                let why = format!("Volume/{name} is in pool {}, this volume in {}", other.pool, volume.pool);
                add("/source/volume", why, "a snapshot and what it is of live in one thin pool");
            }
        }
    }
}
