//! A pool's trash: where deleted volumes wait, and leave after their time.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::directory::{self, Entry, Place, PoolDirectory};
use super::image;
use super::owner::Marks;
use super::volume::Target;
use crate::host::error::StepError;

/// How many deletions of one name a second may bring.
const NAMES_TRIED_MAX: u64 = 1000;

fn now_unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Moves a volume that nobody uses to the trash. A file that is gone already is fine.
pub fn volume(target: &Target<'_>) -> Result<(), StepError> {
    let what = format!("delete {}", target.pool_path.join(target.file).display());
    let pool = target.pool(&what)?;
    let Some(mut entry) = pool.entry(Place::Volumes, target.file, true)? else { return Ok(()) };
    entry.must_be(target.mark, "delete")?;
    entry.must_be_unused("delete")?;
    let now = now_unix_seconds();
    for seconds in now..now + NAMES_TRIED_MAX {
        // The owner's mark stays until the move is done: after a crash before it, the next run
        // still finds the volume as ours.
        let marks = Marks {
            retained: Some(target.mark.clone()),
            trashed_unix_seconds: Some(now),
            ..entry.marks.clone()
        };
        if entry.move_to(Place::Trash, &format!("{}.{seconds}", target.file), marks)?.is_some() {
            let marks = Marks { owner: None, ..entry.marks.clone() };
            return entry.write_marks(marks);
        }
    }
    Err(StepError::failed(what, "the trash holds too many files of its name"))
}

/// Removes what has been in the trash for at least `ttl`, and images that nothing needs any more
/// but for which that was awaited. What carries no mark of ours stays.
pub fn expire(pool_path: &Path, ttl: Duration) -> Result<Vec<String>, StepError> {
    let what = format!("empty the trash of {}", pool_path.display());
    let pool = PoolDirectory::open(pool_path)?;
    pool.clean_leftovers().map_err(|errno| StepError::failed(&what, errno))?;
    pool.clean_sidecars().map_err(|errno| StepError::failed(&what, errno))?;
    let now = now_unix_seconds();
    let mut removed = Vec::new();
    for name in names(&pool, Place::Trash, &what)? {
        let Some(entry) = pool.entry(Place::Trash, &name, true)? else { continue };
        // Without the time that we recorded, it is not from here.
        let Some(deleted) = entry.marks.trashed_unix_seconds else { continue };
        let old = now.checked_sub(deleted).is_some_and(|age| age >= ttl.as_secs());
        if !old || entry.marks.retained.is_none() {
            continue;
        }
        // Somebody looks at it: not now.
        if entry.must_be_unused("remove from the trash").is_ok() {
            entry.remove()?;
            removed.push(name);
        }
    }
    for name in names(&pool, Place::Images, &what)? {
        let Some(entry) = pool.entry(Place::Images, &name, true)? else { continue };
        let awaited =
            entry.marks.owner.is_none() && entry.marks.retained.is_some() && entry.marks.reclaim_delete;
        if awaited && entry.must_be_unused("remove").is_ok() && !is_needed(&pool, &name, &entry)? {
            entry.remove()?;
            removed.push(name);
        }
    }
    Ok(removed)
}

fn names(pool: &PoolDirectory, place: Place, what: &str) -> Result<Vec<String>, StepError> {
    let names = pool.place(place).and_then(|directory| directory::regular_names(&directory));
    let names = names.map_err(|errno| StepError::failed(what, errno))?;
    Ok(names.into_iter().filter(|name| directory::is_plain(name)).collect())
}

fn is_needed(pool: &PoolDirectory, name: &str, image: &Entry<'_>) -> Result<bool, StepError> {
    for place in [Place::Volumes, Place::Trash] {
        if !image::overlays_on(pool, place, name, image)?.is_empty() {
            return Ok(true);
        }
    }
    Ok(false)
}
