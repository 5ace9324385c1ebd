//! What the set has on the host and declares no more: found by its marks, removed in an order that
//! nothing trips over, and never more than the marks allow.

use std::collections::BTreeSet;

use super::Removal;
use crate::host::Step;
use crate::host::snapshot::{LinkKind, LvmPlace, Pool, PoolFile, PoolPlace, TableId};
use crate::host::step::{LinkChange, LvmStep, StopHow};
use crate::kinds::Context;
use crate::kinds::action::{Action, Blocker, Impact, Verb};
use crate::kinds::host_policy;
use crate::kinds::image::compare::remove_step;
use crate::kinds::virtual_machine::compare::{SHUTDOWN_TIMEOUT_MS, owner};
use crate::name::{Kind, LinkName, Mark, ObjectId};

/// Every object of the set that the host has.
pub fn owned(context: &Context) -> BTreeSet<ObjectId> {
    let set = &context.declared.set;
    let snapshot = context.snapshot;
    let mut marks: Vec<Mark> = Vec::new();
    marks.extend(snapshot.links.iter().flatten().filter_map(|(_, link)| link.mark()));
    for pool in snapshot.pools.values().flatten() {
        marks.extend(pool.registered.clone());
        if let Some(directory) = &pool.directory {
            let files = directory.files.values().chain(directory.images.values());
            marks.extend(files.filter_map(|file| file.mark.clone()));
        }
    }
    marks.extend(snapshot.tables.iter().flatten().map(|(id, _)| id.owner.clone()));
    marks.extend(snapshot.forwarding.iter().flatten().flat_map(|(_, facts)| facts.users.clone()));
    let policy = snapshot.host.iter().filter_map(|host| host.policy.as_ref());
    marks.extend(policy.map(|policy| policy.mark.clone()));
    marks.extend(snapshot.services.iter().flatten().map(|(mark, _)| mark.clone()));
    marks.extend(snapshot.vms.iter().flatten().filter_map(|(_, vm)| owner(vm)));
    marks.into_iter().filter(|mark| mark.set == *set).map(|mark| mark.owner).collect()
}

/// The removals, one an object.
pub fn removals(context: &Context, removal: &Removal) -> Vec<Action> {
    let declared = &context.declared.objects;
    let goes = |id: &ObjectId| match removal {
        Removal::Keep | Removal::Frozen => false,
        Removal::Prune => !declared.contains_key(id),
        Removal::Only(ids) => ids.contains(id) && !declared.contains_key(id),
    };
    let going: BTreeSet<ObjectId> = owned(context).into_iter().filter(goes).collect();
    let finder = Finder { context, going: &going, taken: taken_over(context) };
    going.iter().filter_map(|id| finder.action(id)).collect()
}

/// Links of undeclared objects that a declared object takes over under another name.
fn taken_over(context: &Context) -> BTreeSet<LinkName> {
    let objects = context.declared.objects.iter();
    objects.filter_map(|(id, spec)| crate::kinds::link_of(id, spec, &context.declared.objects)).collect()
}

/// A logical volume has no trash to go to: it stays, or it goes for good.
fn remove_logical(action: &mut Action, place: &LvmPlace, id: &ObjectId, mark: &Mark, facts: &PoolFile) {
    let (place, volume, mark) = (place.clone(), id.name.clone(), mark.clone());
    if facts.half_made {
        action.verb(Verb::Delete, "declared no more, and its making was cut short");
        action.step(Step::Lvm(LvmStep::Remove { place, volume, mark, half_made: true }));
    } else if facts.reclaim_delete {
        let path = place.device(volume.as_str()).display().to_string();
        action.differs("data", Some(path), Some("gone for good".into()), Impact::DataLoss);
        action.verb(Verb::Delete, "declared no more, and its reclaimPolicy was Delete");
        action.step(Step::Lvm(LvmStep::Remove { place, volume, mark, half_made: false }));
    } else {
        action.verb(Verb::Retain, "declared no more; the data stays where it is");
        action.step(Step::Lvm(LvmStep::Retain { place, volume, mark }));
    }
}

struct Finder<'a> {
    context: &'a Context<'a>,
    going: &'a BTreeSet<ObjectId>,
    taken: BTreeSet<LinkName>,
}

impl Finder<'_> {
    fn action(&self, id: &ObjectId) -> Option<Action> {
        match id.kind {
            Kind::HostPolicy => self.host_policy(id),
            Kind::Bridge | Kind::Vlan => self.link(id),
            Kind::Network => self.network(id),
            Kind::StoragePool => self.pool(id),
            Kind::Image => self.image(id),
            Kind::Volume => self.volume(id),
            Kind::VirtualMachine => self.vm(id),
        }
    }

    fn mark(&self, id: &ObjectId) -> Mark {
        Mark::new(self.context.declared.set.clone(), id.clone())
    }

    fn host_policy(&self, id: &ObjectId) -> Option<Action> {
        let mut action = Action::new(id, "removed from the manifests");
        let host = match &self.context.snapshot.host {
            Ok(host) => host,
            Err(error) => return Some(action.blocked(Blocker::unseen(error))),
        };
        let mark = self.mark(id);
        // A policy under another name takes it over.
        if host.policy.as_ref().is_none_or(|policy| policy.mark != mark)
            || self.context.declared.objects.keys().any(|id| id.kind == Kind::HostPolicy)
        {
            return None;
        }
        action.verb(Verb::Delete, "declared no more");
        host_policy::compare::restore(&mut action, None, host, &mark);
        action.step(Step::ForgetHostPolicy { mark });
        Some(action.finish())
    }

    fn link(&self, id: &ObjectId) -> Option<Action> {
        let mut action = Action::new(id, "removed from the manifests");
        let mut found: Vec<_> = self.context.links_of(id).iter().collect();
        // The whole before its parts: a bridge goes, then its former ports are let go of.
        found.sort_by_key(|(_, _, mark)| mark.part.is_some());
        for (name, link, mark) in found {
            if self.taken.contains(*name) {
                continue;
            }
            if mark.part.is_some() {
                if link.master.is_some() {
                    action.step(Step::SetLink { link: (*name).clone(), change: LinkChange::Master(None) });
                }
                action.step(Step::UnmarkLink { link: (*name).clone(), mark: mark.clone() });
                continue;
            }
            if let Some(blocker) = self.others_on(name, &mut action) {
                return Some(action.blocked(blocker));
            }
            action.step(Step::DeleteLink { link: (*name).clone(), mark: mark.clone() });
        }
        if action.steps.is_empty() {
            return None;
        }
        action.verb(Verb::Delete, "carries the set's mark and is declared no more");
        Some(action.finish())
    }

    /// Its bridge goes before what guards it, and forwarding last.
    fn network(&self, id: &ObjectId) -> Option<Action> {
        let mut action = self.link(id).unwrap_or_else(|| Action::new(id, "removed from the manifests"));
        if action.verb == Verb::Blocked {
            return Some(action);
        }
        let mark = self.mark(id);
        if self.context.snapshot.services.as_ref().is_ok_and(|services| services.contains_key(&mark)) {
            action.steps.insert(0, Step::RemoveService { mark: mark.clone() });
        }
        for id in [TableId::of_network(&mark), TableId::of_guards(&mark)] {
            if self.context.snapshot.tables.as_ref().is_ok_and(|tables| tables.contains_key(&id)) {
                action.step(Step::DeleteTable { id });
            }
        }
        for (family, facts) in self.context.snapshot.forwarding.iter().flatten() {
            if facts.users.contains(&mark) {
                action.step(Step::ReleaseForwarding { family: *family, mark: mark.clone() });
            }
        }
        if action.steps.is_empty() {
            return None;
        }
        action.verb(Verb::Delete, "carries the set's mark and is declared no more");
        Some(action.finish())
    }

    /// Links on top of this one: ours go or move first, others' block.
    fn others_on(&self, name: &LinkName, action: &mut Action) -> Option<Blocker> {
        for (upper, link) in self.context.uppers(name) {
            match link.mark() {
                Some(mark) if mark.set == self.context.declared.set => {
                    if mark.owner != action.object {
                        action.after.push(mark.owner);
                    }
                }
                _ => {
                    return Some(
                        Blocker::new(format!("{upper} is on {name} and is not this set's"))
                            .hint(format!("`ip link set {upper} nomaster`, or remove {upper}")),
                    );
                }
            }
        }
        None
    }

    fn pool(&self, id: &ObjectId) -> Option<Action> {
        let pool = match self.context.snapshot.pools.get(&id.name)? {
            Ok(pool) => pool,
            Err(error) => {
                return Some(Action::new(id, "removed from the manifests").blocked(Blocker::unseen(error)));
            }
        };
        let mark = self.mark(id);
        let place = pool.place();
        let what = if place.lvm().is_some() { "volumes" } else { "files" };
        let mut action = Action::new(id, format!("{place}, its {what} stay"));
        action.verb(Verb::Retain, "declared no more");
        let name = id.name.clone();
        action.step(match place {
            PoolPlace::Directory(path) => Step::ForgetPool { name, path, mark },
            PoolPlace::Lvm(place) => Step::Lvm(LvmStep::ForgetPool { name, place, mark }),
        });
        for file in pool
            .directory
            .iter()
            .flat_map(|directory| directory.files.values().chain(directory.images.values()))
        {
            if let Some(mark) = &file.mark {
                if mark.set != self.context.declared.set || !self.going.contains(&mark.owner) {
                    return Some(action.blocked(Blocker::new(format!("it still holds {}", mark.owner))));
                }
                action.after.push(mark.owner.clone());
            }
        }
        Some(action.finish())
    }

    fn files_of<'b>(
        &'b self,
        mark: &'b Mark,
        images: bool,
    ) -> impl Iterator<Item = (&'b Pool, &'b String, &'b PoolFile)> {
        self.context.snapshot.pools.values().flatten().flat_map(move |pool| {
            let directory = pool.directory.iter();
            directory
                .flat_map(move |directory| if images { &directory.images } else { &directory.files })
                .filter(move |(_, file)| file.mark.as_ref() == Some(mark))
                .map(move |(name, file)| (pool, name, file))
        })
    }

    fn image(&self, id: &ObjectId) -> Option<Action> {
        let mark = self.mark(id);
        let mut action = Action::new(id, "a cached image");
        let mut kept = false;
        for (pool, file, facts) in self.files_of(&mark, true) {
            let step = remove_step(&pool.path, file, facts.header.format, &mark, self.context);
            kept |= matches!(step, Step::RetainImage { .. });
            action.step(step);
            let path = Pool::image_directory(&pool.path).join(file);
            action.after.extend(self.overlays_on(&path));
        }
        if kept {
            action.verb(Verb::Retain, "declared no more; the content stays, for overlays are on it");
        } else {
            action.verb(Verb::Delete, "declared no more");
        }
        Some(action.finish())
    }

    fn overlays_on(&self, path: &std::path::Path) -> Vec<ObjectId> {
        let pools = self.context.snapshot.pools.values().flatten();
        pools
            .flat_map(|pool| pool.directory.iter().flat_map(|directory| directory.files.values()))
            .filter(|file| file.header.backing.as_deref() == Some(path))
            .filter_map(|file| Some(file.mark.as_ref()?.owner.clone()))
            .collect()
    }

    fn volume(&self, id: &ObjectId) -> Option<Action> {
        let mark = self.mark(id);
        let mut action = Action::new(id, "removed from the manifests");
        for (pool, file, facts) in self.files_of(&mark, false) {
            let path = pool.path.join(file);
            action.summary = path.display().to_string();
            if let Some((vm, _, _)) = self.context.running_disk(&path) {
                let vm = ObjectId::new(Kind::VirtualMachine, vm);
                if !self.going.contains(&vm) && !self.context.declared.objects.contains_key(&vm) {
                    return Some(action.blocked(Blocker::new(format!("{vm} runs on it"))));
                }
                action.after.push(vm);
            }
            if let Some(lvm) = &pool.lvm {
                remove_logical(&mut action, &lvm.place, id, &mark, facts);
            } else if facts.reclaim_delete {
                action.differs(
                    "data",
                    Some(path.display().to_string()),
                    Some("the pool's trash".into()),
                    Impact::DataLoss,
                );
                action.verb(Verb::Delete, "declared no more, and its reclaimPolicy was Delete");
                action.step(Step::TrashVolume {
                    pool_path: pool.path.clone(),
                    file: file.clone(),
                    mark: mark.clone(),
                });
            } else {
                action.verb(Verb::Retain, "declared no more; the data stays where it is");
                action.step(Step::RetainVolume {
                    pool_path: pool.path.clone(),
                    file: file.clone(),
                    mark: mark.clone(),
                });
            }
        }
        Some(action.finish())
    }

    fn vm(&self, id: &ObjectId) -> Option<Action> {
        let vms = match &self.context.snapshot.vms {
            Ok(vms) => vms,
            Err(error) => {
                return Some(Action::new(id, "removed from the manifests").blocked(Blocker::unseen(error)));
            }
        };
        let mark = self.mark(id);
        let mut action = Action::new(id, "removed from the manifests");
        action.verb(Verb::Delete, "declared no more; its volumes are objects of their own");
        if let Some(vm) = vms.get(&id.name).filter(|vm| owner(vm).as_ref() == Some(&mark)) {
            match &vm.process {
                Some(Err(error)) => {
                    let blocker = Blocker::new(format!("its process doesn't answer: {error}"))
                        .hint(format!("`vmctl stop --force {}` ends it", id.name));
                    return Some(action.blocked(blocker));
                }
                Some(Ok(process)) => {
                    action.summary = format!("runs as pid {}", process.pid);
                    let how = StopHow::Graceful { timeout_ms: SHUTDOWN_TIMEOUT_MS };
                    action.step(Step::StopVm { vm: id.name.clone(), mark: mark.clone(), how });
                }
                None => action.summary = "halted".to_owned(),
            }
            self.remove_taps(id, &mut action);
            action.step(Step::UndefineVm { vm: id.name.clone(), mark });
        } else {
            self.remove_taps(id, &mut action);
        }
        Some(action.finish())
    }

    fn remove_taps(&self, id: &ObjectId, action: &mut Action) {
        for (name, link, mark) in self.context.links_of(id) {
            if matches!(link.kind, LinkKind::Tap { .. }) {
                action.step(Step::DeleteLink { link: (*name).clone(), mark: mark.clone() });
            }
        }
    }
}
