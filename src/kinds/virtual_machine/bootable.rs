//! Whether the disk that a VM would boot from can hold anything to boot: told before it is started, whatever
//! pool its volume is in. A logical volume boots as any other disk does, if there is something on it.

use super::{Boot, VirtualMachine};
use crate::kinds::Context;
use crate::kinds::action::Blocker;
use crate::kinds::storage_pool::compare::resolve;
use crate::kinds::volume::Content;

pub(super) fn check(want: &VirtualMachine, context: &Context) -> Result<(), Blocker> {
    let Boot::Disk(boot) = &want.boot else { return Ok(()) };
    let Some(disk) = want.disks.iter().find(|disk| disk.name == boot.disk) else { return Ok(()) };
    let Some(volume) = context.declared.volume(&disk.volume) else { return Ok(()) };
    let pool = resolve(&volume.pool, context)?;
    let file = volume.file(&disk.volume, pool.place);
    let have = pool.directory.and_then(|directory| directory.files.get(&file)).filter(|have| !have.half_made);
    let is_blank = match have {
        Some(have) => have.boot.is_some_and(|boot| !boot.is_bootable()),
        None => volume.content == Content::Blank,
    };
    match is_blank {
        false => Ok(()),
        true => Err(Blocker::new(format!(
            "NotBootable: Volume/{} has no partition table, boot sector or file system to boot from",
            disk.volume
        ))
        .hint("make the volume from a bootable `source`, or give the VM a `boot.kernel`")),
    }
}
