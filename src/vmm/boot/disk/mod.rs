//! Boot from the disk without firmware: finds the kernel, its initrd and its arguments in the guest's own
//! disk, as the boot loader that is installed there would.
//!
//! ```text
//!   ReadAt ─▶ table (GPT, MBR) ─▶ place: ext4 or FAT ─▶ menu (BLS, UKI, GRUB, extlinux) ─▶ entry ─▶ files
//! ```
//!
//! All of it is hostile: a guest wrote it. So nothing here trusts a size, a count or a link, nothing is
//! guessed, and nothing is ever written. It runs on a thread of its own in the sandboxed process (see
//! [`super::loader`]), never in the launcher. Where nothing bootable is found the error says what was
//! looked for, place by place, and what would help.

mod bls;
mod ext;
mod extlinux;
mod fat;
mod filesystem;
pub mod grub;
mod grubenv;
mod menu;
mod place;
mod read;
mod signature;
mod table;
#[cfg(test)]
mod tests;
mod uki;
mod version;

use self::filesystem::{FileReader, read_exact};
use self::menu::{Boot, Entry, Menu, Piece};
use self::place::{Opened, Place};
use self::read::{Disk, ReadError};

pub use self::read::{Limits, ReadAt};

/// Most bytes of a kernel: the largest that distributions ship has 15 MiB, debug builds ten times that.
const KERNEL_BYTES_MAX: u64 = 256 << 20;
const INITRDS_MAX: usize = 16;
/// Most entries that an error lists.
const TITLES_MAX: usize = 12;

/// What is wanted of the disk.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// An entry's title, id or version. Default: the one that the disk's configuration names.
    pub entry: Option<String>,
    /// Appended to the entry's arguments.
    pub append: String,
}

#[derive(Debug, thiserror::Error)]
pub enum NotBootable {
    #[error("its partition table is of no use: {0}")]
    Table(String),
    #[error("nothing bootable was found. {}; {remedy}", .looked.join("; "))]
    Nothing { looked: Vec<String>, remedy: String },
    #[error("it has no boot entry {wanted:?}, only {titles}")]
    NoSuchEntry { wanted: String, titles: String },
    #[error("the search was given up: {0}")]
    GaveUp(&'static str),
    #[error("read {file}: {reason}")]
    Read { file: String, reason: String },
}

/// A file, or a part of one, that is to be loaded.
pub struct FoundFile {
    /// To be shown: `/boot/vmlinuz on partition 1 (ext4)`.
    pub name: String,
    pub bytes: u64,
    offset: u64,
    reader: Box<dyn FileReader>,
}

/// What is to be booted.
pub struct Found {
    pub kernel: FoundFile,
    /// To be loaded one behind the other.
    pub initrds: Vec<FoundFile>,
    pub cmdline: String,
}

impl FoundFile {
    /// All of it, in pieces of at most this many bytes.
    pub fn each_piece(
        &mut self,
        piece_bytes: usize,
        mut take: impl FnMut(&[u8]) -> Result<(), String>,
    ) -> Result<(), NotBootable> {
        let name = &self.name;
        let failed = |reason: String| NotBootable::Read { file: name.clone(), reason };
        let reader = self.reader.as_mut();
        reader.seek(self.offset).map_err(|error| failed(error.to_string()))?;
        let mut buffer = vec![0; piece_bytes.min(self.bytes as usize)];
        let mut left = self.bytes;
        while left > 0 {
            let piece = &mut buffer[..left.min(piece_bytes as u64) as usize];
            read_exact(reader, piece).map_err(|error| failed(error.to_string()))?;
            take(piece).map_err(failed)?;
            left -= piece.len() as u64;
        }
        Ok(())
    }

    /// The content of a kernel.
    pub fn read_kernel(&mut self) -> Result<Vec<u8>, NotBootable> {
        let mut data = Vec::with_capacity(self.bytes.min(KERNEL_BYTES_MAX) as usize);
        self.each_piece(1 << 20, |piece| {
            data.extend_from_slice(piece);
            Ok(())
        })?;
        Ok(data)
    }
}

/// Finds what the disk would boot.
pub fn find(source: Box<dyn ReadAt>, request: &Request, limits: Limits) -> Result<Found, NotBootable> {
    let disk = Disk::new(source, limits);
    let given_up = |disk: &Disk| match disk.check() {
        Err(ReadError::Exhausted(why)) => Some(NotBootable::GaveUp(why)),
        _ => None,
    };
    let partitions = match table::partitions(&disk) {
        Ok(partitions) => partitions,
        Err(error) => return Err(given_up(&disk).unwrap_or(NotBootable::Table(error.to_string()))),
    };
    let places: Vec<Place> = partitions.into_iter().map(Place::open).collect();
    Search::new(&places).run(request).map_err(|error| given_up(&disk).unwrap_or(error))
}

type MenuOf = fn(&[Place], usize) -> Result<Option<Menu>, ReadError>;

/// In the order in which they are believed, and what to say where they are absent.
const LOADERS: &[(MenuOf, &str)] = &[
    (bls_menu, "no loader/entries, no EFI/Linux"),
    (grub::menu, "no boot/grub/grub.cfg, grub2/grub.cfg or EFI/*/grub.cfg"),
    (extlinux_menu, "no extlinux.conf or syslinux.cfg"),
];

fn bls_menu(places: &[Place], place: usize) -> Result<Option<Menu>, ReadError> {
    places[place].file_system().map_or(Ok(None), |file_system| bls::menu(place, file_system))
}

fn extlinux_menu(places: &[Place], place: usize) -> Result<Option<Menu>, ReadError> {
    places[place].file_system().map_or(Ok(None), |file_system| extlinux::menu(place, file_system))
}

struct Search<'p> {
    places: &'p [Place],
    /// By place: what was looked for and not found, or found and of no use.
    misses: Vec<Vec<String>>,
    titles: Vec<String>,
}

impl<'p> Search<'p> {
    fn new(places: &'p [Place]) -> Self {
        Self { places, misses: vec![Vec::new(); places.len()], titles: Vec::new() }
    }

    fn run(mut self, request: &Request) -> Result<Found, NotBootable> {
        // Firmware starts at the EFI system partition.
        let mut order: Vec<usize> = (0..self.places.len()).collect();
        order.sort_by_key(|&place| !self.places[place].partition.is_esp);
        for (menu_of, absent) in LOADERS {
            for &place in order.iter().filter(|&&place| self.places[place].file_system().is_some()) {
                match menu_of(self.places, place) {
                    Ok(Some(menu)) => {
                        if let Some(found) = self.pick(place, &menu, request) {
                            return Ok(found);
                        }
                    }
                    Ok(None) => self.misses[place].push((*absent).to_owned()),
                    Err(error) => self.misses[place].push(error.to_string()),
                }
            }
        }
        if let Some(found) = order.iter().find_map(|&place| self.plain(place, request)) {
            return Ok(found);
        }
        match &request.entry {
            Some(wanted) if !self.titles.is_empty() => {
                let titles = self.titles.join(", ");
                Err(NotBootable::NoSuchEntry { wanted: wanted.clone(), titles })
            }
            _ => Err(NotBootable::Nothing { looked: self.report(), remedy: self.remedy() }),
        }
    }

    fn pick(&mut self, place: usize, menu: &Menu, request: &Request) -> Option<Found> {
        let source = &menu.source;
        let Some(entry) = menu.pick(request.entry.as_deref()) else {
            let titles = menu.entries.iter().map(|entry| format!("{:?}", entry.title));
            self.titles.extend(titles.take(TITLES_MAX.saturating_sub(self.titles.len())));
            self.misses[place].push(match menu.entries.is_empty() {
                true => format!("{source} has no entry"),
                false => format!("{source} has no such entry"),
            });
            return None;
        };
        match self.open(entry, request) {
            Ok(found) => Some(found),
            Err(reason) => {
                self.misses[place].push(format!("{source}, entry {:?}: {reason}", entry.title));
                None
            }
        }
    }

    /// Debian's links to the newest kernel. They say nothing about arguments, and these are not guessed.
    fn plain(&mut self, place: usize, request: &Request) -> Option<Found> {
        let file_system = self.places[place].file_system()?;
        let find = |names: [&'static str; 2]| names.into_iter().find(|&name| file_system.has_file(name));
        let kernel = find(["/vmlinuz", "/boot/vmlinuz"])?;
        if !request.append.split_whitespace().any(|word| word.starts_with("root=")) {
            let miss = format!(
                "there is {kernel}, but nothing says its arguments: give them, with root=, in boot.append"
            );
            self.misses[place].push(miss);
            return None;
        }
        let piece = |path: &str| Piece { place, path: path.to_owned(), part: None };
        let initrds = find(["/initrd.img", "/boot/initrd.img"]).map(piece).into_iter().collect();
        let boot = Boot { kernel: piece(kernel), initrds, cmdline: String::new() };
        let (title, id, version) = (kernel.to_owned(), String::new(), String::new());
        let entry = Entry { title, id, version, boot: Ok(boot) };
        match self.open(&entry, request) {
            Ok(found) => Some(found),
            Err(reason) => {
                self.misses[place].push(reason);
                None
            }
        }
    }

    fn open(&self, entry: &Entry, request: &Request) -> Result<Found, String> {
        let boot = entry.boot.as_ref().map_err(String::clone)?;
        if boot.initrds.len() > INITRDS_MAX {
            return Err("it has too many initrds".to_owned());
        }
        let kernel = self.open_piece(&boot.kernel)?;
        if kernel.bytes > KERNEL_BYTES_MAX {
            return Err(format!("{}: {} bytes are too much for a kernel", kernel.name, kernel.bytes));
        }
        let initrds = boot.initrds.iter().map(|piece| self.open_piece(piece)).collect::<Result<_, _>>()?;
        let arguments = [boot.cmdline.as_str(), &request.append];
        let arguments = arguments.map(str::trim).into_iter().filter(|part| !part.is_empty());
        Ok(Found { kernel, initrds, cmdline: arguments.collect::<Vec<_>>().join(" ") })
    }

    fn open_piece(&self, piece: &Piece) -> Result<FoundFile, String> {
        let place = self.places.get(piece.place).ok_or("it lies nowhere")?;
        let name = format!("{} on {}", piece.path, place.describe());
        let file_system = place.file_system().ok_or_else(|| format!("{name}: not read here"))?;
        let reader = file_system.open(&piece.path).map_err(|error| format!("{name}: {error}"))?;
        let (offset, bytes) = piece.part.unwrap_or((0, reader.size_bytes()));
        match offset.checked_add(bytes) {
            Some(end) if end <= reader.size_bytes() => Ok(FoundFile { name, bytes, offset, reader }),
            _ => Err(format!("{name}: it ends too early")),
        }
    }

    fn report(&self) -> Vec<String> {
        if self.places.is_empty() {
            return vec!["its partition table is empty".to_owned()];
        }
        let places = self.places.iter().zip(&self.misses);
        let line = |(place, misses): (&Place, &Vec<String>)| match &place.content {
            Opened::FileSystem(_) => format!("{}: {}", place.describe(), misses.join(", ")),
            Opened::Refused { reason, .. } => format!("{}: {reason}", place.describe()),
            Opened::Nothing => format!("{}: no file system that is known", place.partition.name()),
        };
        places.map(line).collect()
    }

    fn remedy(&self) -> String {
        let foreign = self.places.iter().find_map(|place| match &place.content {
            Opened::Refused { kind, .. } if !matches!(*kind, "swap" | "ext4" | "vfat") => Some(*kind),
            _ => None,
        });
        match foreign {
            Some(kind) => format!(
                "{kind} is not read here: put /boot on a partition of its own with ext4 or FAT, or name a kernel file of the host in boot.kernel"
            ),
            None => "install a kernel with a boot loader's configuration on it, or name a kernel file of the host in boot.kernel".to_owned(),
        }
    }
}

/// For fuzzing: all of the search over these bytes, and what it finds read to its end.
#[doc(hidden)]
pub fn search_bytes(image: &[u8]) -> Result<u64, String> {
    let limits = Limits { bytes: 64 << 20, time: std::time::Duration::from_secs(10) };
    let found = find(Box::new(image.to_vec()), &Request::default(), limits);
    let mut found = found.map_err(|error| error.to_string())?;
    let mut bytes = 0;
    for file in std::iter::once(&mut found.kernel).chain(&mut found.initrds) {
        let count = |piece: &[u8]| {
            bytes += piece.len() as u64;
            Ok(())
        };
        file.each_piece(1 << 16, count).map_err(|error| error.to_string())?;
    }
    Ok(bytes)
}
