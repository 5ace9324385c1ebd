//! StoragePool: differences to steps.

use super::StoragePool;
use crate::host::Step;
use crate::host::snapshot::{Pool, PoolDirectory};
use crate::kinds::Context;
use crate::kinds::action::{Action, Blocker, Impact, Verb};
use crate::name::{Mark, ObjectId, ObjectName};

pub fn compare(id: &ObjectId, want: &StoragePool, context: &Context) -> Action {
    let mut action = Action::new(id, format!("directory {}", want.path.display()));
    let have = match context.snapshot.pools.get(&id.name) {
        Some(Ok(pool)) => pool,
        Some(Err(error)) => return action.blocked(Blocker::unseen(error)),
        None => return action.blocked(Blocker::new("the pool was not looked at")),
    };
    let mark = Mark::new(context.declared.set.clone(), id.clone());
    let registered = have.registered.as_ref();
    if let Some(other) = registered.filter(|other| other.set != mark.set) {
        return action.blocked(Blocker::new(format!("pool {} belongs to set {}", id.name, other.set)));
    }
    let create = Step::CreatePool { name: id.name.clone(), path: want.path.clone(), mark: mark.clone() };
    if have.path != want.path {
        // The snapshot looks where the pool is registered; moving volumes is the user's to do.
        return action.blocked(
            Blocker::new(format!(
                "the pool lives in {}; a pool's directory can't be changed",
                have.path.display()
            ))
            .hint("declare a second pool, or remove this one first (its files stay)"),
        );
    }
    match &have.directory {
        None => {
            action.verb(Verb::Create, format!("{} is not there", want.path.display()));
            action.step(create);
        }
        Some(directory) => match &directory.mark {
            Some(found) if *found == mark && registered == Some(&mark) => action.usable = true,
            Some(found) if found.set != mark.set => {
                return action.blocked(Blocker::new(format!(
                    "{} belongs to {} of set {}",
                    want.path.display(),
                    found.owner,
                    found.set
                )));
            }
            Some(found) if *found != mark && context.declared.objects.contains_key(&found.owner) => {
                return action.blocked(Blocker::new(format!(
                    "{} belongs to {}",
                    want.path.display(),
                    found.owner
                )));
            }
            Some(found) if *found != mark => {
                action.differs(
                    "metadata.name",
                    Some(found.owner.to_string()),
                    Some(id.to_string()),
                    Impact::Live,
                );
                action.step(create);
            }
            _ => {
                action
                    .verb(Verb::Adopt, format!("{} exists; its files stay as they are", want.path.display()));
                action.step(create);
            }
        },
    }
    action.finish()
}

/// The pool as the kinds that live in it see it: where it is, and what is in it (`None`: not made yet).
pub(crate) fn resolve<'a>(
    name: &ObjectName,
    context: &Context<'a>,
) -> Result<(&'a std::path::Path, Option<&'a PoolDirectory>), Blocker> {
    let Some(declared) = context.declared.pool(name) else {
        return Err(Blocker::new(format!("StoragePool/{name} is not declared")));
    };
    match context.snapshot.pools.get(name) {
        Some(Ok(Pool { path, directory, .. })) if *path == declared.path => {
            Ok((declared.path.as_path(), directory.as_ref()))
        }
        Some(Ok(Pool { path, .. })) => {
            Err(Blocker::new(format!("StoragePool/{name} still lives in {}", path.display())))
        }
        Some(Err(error)) => Err(Blocker::unseen(error)),
        None => Err(Blocker::new(format!("StoragePool/{name} was not looked at"))),
    }
}
