//! Who has which disk before and after a plan: a file is one running guest's at a time.

use std::collections::BTreeMap;
use std::path::Path;

use crate::host::Step;
use crate::host::snapshot::Snapshot;
use crate::host::step::LvmStep;
use crate::kinds::Context;
use crate::kinds::action::{Action, Blocker};
use crate::name::{Kind, ObjectId};
use crate::vmm::config::{DiskConfig, VmConfig};

/// Orders actions by the disks that they free and take: a VM that is removed, stopped or unplugged lets go
/// of a disk before another VM takes it (a rename, a move). What nothing in the plan frees blocks whoever
/// wants it.
pub fn settle(context: &Context, actions: &mut [Action], removals: &mut [Action]) {
    let mut freed: BTreeMap<String, ObjectId> = BTreeMap::new();
    for action in removals.iter().chain(&*actions) {
        for disk in freed_disks(action, context.snapshot) {
            freed.insert(disk.path.clone(), action.object.clone());
        }
    }
    for action in actions {
        let mut in_use = None;
        for disk in taken_disks(action) {
            match freed.get(&disk.path) {
                Some(by) if *by != action.object => action.after.push(by.clone()),
                Some(_) => {}
                None => in_use = in_use.or_else(|| user(context, action, &disk)),
            }
        }
        if let Some((path, user)) = in_use {
            block(
                action,
                &user,
                &format!("{path} is a disk of {user}, which runs on it until its next start"),
            );
        }
    }
    // A volume whose data is to go must not be a running guest's disk any more.
    for action in removals {
        let user = action.steps.iter().find_map(|step| match step {
            Step::TrashVolume { pool_path, file, .. } => still_used(context, &freed, &pool_path.join(file)),
            Step::Lvm(LvmStep::Remove { place, volume, .. }) => {
                still_used(context, &freed, &place.device(volume.as_str()))
            }
            _ => None,
        });
        if let Some(user) = user {
            block(action, &user, &format!("{user} runs on it until its next start"));
        }
    }
}

fn still_used(context: &Context, freed: &BTreeMap<String, ObjectId>, path: &Path) -> Option<ObjectId> {
    let (vm, ..) = context.running_disk(path)?;
    (!freed.contains_key(path.to_str()?)).then(|| ObjectId::new(Kind::VirtualMachine, vm))
}

fn block(action: &mut Action, user: &ObjectId, because: &str) {
    let taken = std::mem::replace(action, Action::new(&action.object, ""));
    let hint = format!("`vmctl restart {}`, then apply again", user.name);
    *action = taken.blocked(Blocker::new(because).hint(hint));
}

/// Another VM that runs on this disk, unless both only read.
fn user(context: &Context, action: &Action, disk: &DiskConfig) -> Option<(String, ObjectId)> {
    let (vm, _, name) = context.running_disk(Path::new(&disk.path))?;
    let id = ObjectId::new(Kind::VirtualMachine, vm);
    let used = running_config(context.snapshot, &id)?.disks.iter().find(|used| used.name == name)?;
    (id != action.object && !(used.read_only && disk.read_only)).then(|| (disk.path.clone(), id))
}

fn running_config<'a>(snapshot: &'a Snapshot, vm: &ObjectId) -> Option<&'a VmConfig> {
    if vm.kind != Kind::VirtualMachine {
        return None;
    }
    let vm = snapshot.vms.as_ref().ok()?.get(&vm.name)?;
    Some(&vm.process.as_ref()?.as_ref().ok()?.config)
}

/// The disks that a VM has before these steps and not after them.
fn freed_disks<'a>(action: &Action, snapshot: &'a Snapshot) -> Vec<&'a DiskConfig> {
    let Some(config) = running_config(snapshot, &action.object) else { return Vec::new() };
    let stops = action.steps.iter().any(|step| matches!(step, Step::StopVm { .. }));
    let unplugs = |name: &str| {
        action.steps.iter().any(|step| matches!(step, Step::RemoveDevice { device, .. } if device == name))
    };
    let taken = taken_disks(action);
    let freed = config.disks.iter().filter(|disk| stops || unplugs(&disk.name));
    freed.filter(|disk| !taken.iter().any(|taken| taken.path == disk.path)).collect()
}

/// The disks that these steps open for a VM.
fn taken_disks(action: &Action) -> Vec<DiskConfig> {
    let mut disks = Vec::new();
    for step in &action.steps {
        match step {
            Step::StartVm { definition, .. } => disks.extend(definition.config.disks.iter().cloned()),
            Step::AddDisk { disk, .. } => disks.push((**disk).clone()),
            _ => {}
        }
    }
    disks
}
