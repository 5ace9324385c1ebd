//! StoragePool: differences to steps.

use std::path::PathBuf;

use super::{StoragePool, lvm};
use crate::host::Step;
use crate::host::snapshot::{GroupFacts, PoolDirectory, PoolPlace};
use crate::kinds::Context;
use crate::kinds::action::{Action, Blocker, Impact, Verb};
use crate::name::{Mark, ObjectId, ObjectName};

pub fn compare(id: &ObjectId, want: &StoragePool, context: &Context) -> Action {
    let action = Action::new(id, want.place.to_string());
    let have = match context.snapshot.pools.get(&id.name) {
        Some(Ok(pool)) => pool,
        Some(Err(error)) => return action.blocked(Blocker::unseen(error)),
        None => return action.blocked(Blocker::new("the pool was not looked at")),
    };
    let mark = Mark::new(context.declared.set.clone(), id.clone());
    if let Some(other) = have.registered.as_ref().filter(|other| other.set != mark.set) {
        return action.blocked(Blocker::new(format!("pool {} belongs to set {}", id.name, other.set)));
    }
    if have.place() != want.place {
        // The snapshot looks where the pool is registered; moving volumes is the user's to do.
        return action.blocked(
            Blocker::new(format!("the pool lives in the {}; a pool's place can't be changed", have.place()))
                .hint("declare a second pool, or remove this one first (its files stay)"),
        );
    }
    match &want.place {
        PoolPlace::Lvm(place) => lvm::compare(action, id, want, place, have, &mark, context),
        PoolPlace::Directory(path) => {
            let (path, name) = (path.clone(), id.name.clone());
            let create = Step::CreatePool { name, path: path.clone(), mark: mark.clone() };
            match &have.directory {
                None => {
                    let mut action = action;
                    action.verb(Verb::Create, format!("{} is not there", path.display()));
                    action.step(create);
                    action.finish()
                }
                Some(directory) => claim(
                    action,
                    &path.display().to_string(),
                    directory,
                    have.registered.as_ref(),
                    &mark,
                    context,
                    create,
                ),
            }
        }
    }
}

/// What is there becomes the pool's, or is not ours to have.
pub(super) fn claim(
    mut action: Action,
    place: &str,
    directory: &PoolDirectory,
    registered: Option<&Mark>,
    mark: &Mark,
    context: &Context,
    create: Step,
) -> Action {
    match &directory.mark {
        Some(found) if found == mark && registered == Some(mark) => action.usable = true,
        Some(found) if found.set != mark.set => {
            return action
                .blocked(Blocker::new(format!("{place} belongs to {} of set {}", found.owner, found.set)));
        }
        Some(found) if found != mark && context.declared.objects.contains_key(&found.owner) => {
            return action.blocked(Blocker::new(format!("{place} belongs to {}", found.owner)));
        }
        Some(found) if found != mark => {
            action.differs(
                "metadata.name",
                Some(found.owner.to_string()),
                Some(mark.owner.to_string()),
                Impact::Live,
            );
            action.step(create);
        }
        _ => {
            action.verb(Verb::Adopt, format!("{place} exists; what is in it stays as it is"));
            action.step(create);
        }
    }
    action.finish()
}

/// The pool as the kinds that live in it see it.
pub(crate) struct PoolView<'a> {
    pub place: &'a PoolPlace,
    /// Where its volumes have their paths.
    pub path: PathBuf,
    /// What is in it. `None`: not made yet.
    pub directory: Option<&'a PoolDirectory>,
    /// `None`: a directory, or a volume group that is not made yet.
    pub group: Option<&'a GroupFacts>,
}

pub(crate) fn resolve<'a>(name: &ObjectName, context: &Context<'a>) -> Result<PoolView<'a>, Blocker> {
    let Some(declared) = context.declared.pool(name) else {
        return Err(Blocker::new(format!("StoragePool/{name} is not declared")));
    };
    match context.snapshot.pools.get(name) {
        Some(Ok(pool)) if pool.place() == declared.place => Ok(PoolView {
            place: &declared.place,
            path: declared.place.path(),
            directory: pool.directory.as_ref(),
            group: pool.lvm.as_ref().and_then(|lvm| lvm.group.as_ref()),
        }),
        Some(Ok(pool)) => {
            Err(Blocker::new(format!("StoragePool/{name} still lives in the {}", pool.place())))
        }
        Some(Err(error)) => Err(Blocker::unseen(error)),
        None => Err(Blocker::new(format!("StoragePool/{name} was not looked at"))),
    }
}
