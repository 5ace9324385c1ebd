//! Directories of images, volume groups and thin pools, as pools with volumes.

use std::path::Path;

use serde_json::json;

use super::Adoption;
use crate::host::snapshot::{Pool, PoolFile, Snapshot};
use crate::name::{ByteSize, Kind, ObjectName};
use crate::vmm::config::DiskFormat;

/// A pool of the snapshot that was looked at under this name.
pub fn find(snapshot: &Snapshot, name: &ObjectName, adoption: &mut Adoption) {
    let pool = match snapshot.pools.get(name) {
        Some(Ok(pool)) => pool,
        Some(Err(error)) => return adoption.leave(format!("pool {name}"), error.to_string()),
        None => return adoption.leave(format!("pool {name}"), "it was not looked at"),
    };
    let what = pool.path.display().to_string();
    if let Some(mark) = &pool.registered {
        return adoption.leave(what, format!("it is {} of set {} already", mark.owner, mark.set));
    }
    let Some(directory) = &pool.directory else { return adoption.leave(what, "it is not there") };
    let spec = match &pool.lvm {
        None => json!({ "directory": { "path": pool.path } }),
        Some(lvm) => match &lvm.place.thin_pool {
            None => json!({ "lvm": { "volumeGroup": lvm.place.group.as_str() } }),
            Some(thin) => json!({
                "lvmThin": { "volumeGroup": lvm.place.group.as_str(), "thinPool": thin.as_str() }
            }),
        },
    };
    adoption.add(Kind::StoragePool, name.as_str(), spec, Vec::new());
    for (file, facts) in &directory.files {
        volume(name, pool, file, facts, adoption);
    }
}

fn volume(pool_name: &ObjectName, pool: &Pool, file: &str, facts: &PoolFile, adoption: &mut Adoption) {
    let what = pool.path.join(file).display().to_string();
    let leave = |adoption: &mut Adoption, why: &str| adoption.leave(what.clone(), why);
    if let Some(mark) = &facts.mark {
        return leave(adoption, &format!("it is {} of set {} already", mark.owner, mark.set));
    }
    let header = &facts.header;
    if header.encrypted {
        return leave(adoption, "it is encrypted, which vmctl can't serve");
    }
    if let Some(why) = &header.unusable {
        return leave(adoption, why);
    }
    if pool.lvm.is_some() {
        return logical_volume(pool_name, (&what, file), facts, adoption);
    }
    let stem = Path::new(file).file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    let name = match ObjectName::parse(stem) {
        Ok(name) if Pool::volume_file(&name, header.format) == *file => name,
        _ => {
            let format = format!("{:?}", header.format).to_lowercase();
            let wanted = format!("{}.{format}", super::label(stem));
            return leave(
                adoption,
                &format!(
                    "the file of a {format} volume is named NAME.{format}: rename it (and what refers to it), to {wanted} for one"
                ),
            );
        }
    };
    if adoption.objects.iter().any(|found| found.id.kind == Kind::Volume && found.id.name == name) {
        return leave(adoption, &format!("Volume/{name} is in another pool already"));
    }
    let mut notes = Vec::new();
    if let Some(backing) = &header.backing {
        notes.push(format!(
            "it is an overlay on {}, which must stay where it is; a manifest only says what a new volume is made from",
            backing.display()
        ));
    }
    let spec = json!({
        "pool": pool_name.as_str(),
        "format": match header.format {
            DiskFormat::Raw => json!("raw"),
            DiskFormat::Qcow2 => serde_json::Value::Null,
        },
        "capacity": ByteSize(header.virtual_size_bytes).to_string(),
    });
    adoption.add(Kind::Volume, name.as_str(), spec, notes);
}

fn logical_volume(pool: &ObjectName, (what, file): (&str, &str), facts: &PoolFile, adoption: &mut Adoption) {
    let taken = |name: &ObjectName| {
        adoption.objects.iter().any(|found| found.id.kind == Kind::Volume && found.id.name == *name)
    };
    let name = match ObjectName::parse(file) {
        Ok(name) if taken(&name) => {
            return adoption.leave(what, format!("Volume/{name} is in another pool already"));
        }
        Ok(name) => name,
        Err(error) => {
            let hint = format!("{error}; `lvrename` gives it another name, {} for one", super::label(file));
            return adoption.leave(what, hint);
        }
    };
    let mut notes = Vec::new();
    if facts.inactive {
        notes.push("it is not active: nothing can open it before `lvchange -ay`".to_owned());
    }
    let spec = json!({
        "pool": pool.as_str(),
        "format": "raw",
        "capacity": ByteSize(facts.header.virtual_size_bytes).to_string(),
    });
    adoption.add(Kind::Volume, name.as_str(), spec, notes);
}
