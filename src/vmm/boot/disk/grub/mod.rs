//! GRUB's configuration: the script is run, as far as it decides which entries there are and what they
//! boot. It sees this disk alone, as `hd0`, and nothing is ever written: `save_env` does nothing, and a
//! `next_entry` (from `grub-reboot`) is ignored, for it could never be taken back.

mod commands;
mod parse;
mod run;

use super::filesystem::FileSystem;
use super::menu::Menu;
use super::place::Place;
use super::read::ReadError;
use run::Run;

/// Where they are looked for, beside `EFI/*/grub.cfg`.
pub(super) const PATHS: &[&str] =
    &["/boot/grub/grub.cfg", "/boot/grub2/grub.cfg", "/grub/grub.cfg", "/grub2/grub.cfg"];
const EFI_DIRECTORY: &str = "/EFI";
const VENDORS_MAX: usize = 16;

/// The menu of the first configuration in this place. `None`: there is none.
pub(super) fn menu(places: &[Place], place: usize) -> Result<Option<Menu>, ReadError> {
    let Some(file_system) = places.get(place).and_then(Place::file_system) else { return Ok(None) };
    let Some(path) = find(file_system) else { return Ok(None) };
    let mut run = Run::new(places, place, &path);
    run.configuration(&path).map_err(|error| ReadError::Invalid(format!("{path}: {error}")))?;
    run.into_menu(path).map(Some).map_err(ReadError::Invalid)
}

fn find(file_system: &FileSystem) -> Option<String> {
    if let Some(path) = PATHS.iter().find(|path| file_system.has_file(path)) {
        return Some((*path).to_owned());
    }
    let vendors = file_system.list(EFI_DIRECTORY).ok()?;
    let vendors = vendors.iter().filter(|name| name.is_directory).take(VENDORS_MAX);
    vendors
        .map(|name| format!("{EFI_DIRECTORY}/{}/grub.cfg", name.name))
        .find(|path| file_system.has_file(path))
}

/// For fuzzing: parses and runs a script on a disk without places; gives the number of its entries.
#[doc(hidden)]
pub fn run_text(text: &str) -> usize {
    let mut run = Run::new(&[], 0, "/boot/grub/grub.cfg");
    match run.text(text) {
        Ok(()) => run.into_menu(String::new()).map_or(0, |menu| menu.entries.len()),
        Err(_) => 0,
    }
}

#[cfg(test)]
mod tests;
