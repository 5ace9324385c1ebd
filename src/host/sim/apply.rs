//! What each step does to the simulated world, with the refusals that the real host has.

use std::collections::BTreeMap;
use std::path::Path;

use super::State;
use crate::host::snapshot::{
    BootFacts, Capability, FileKind, ImageHeader, Link, LinkKind, Pool, PoolDirectory, PoolFile, PortFacts,
    VlanFlags,
};
use crate::host::step::{
    Container, ImageFile, ImageOrigin, LinkChange, NewLink, NewLinkKind, NewVolume, NewVolumeContent,
};
use crate::host::{Step, StepError};
use crate::name::{LinkName, Mark, ObjectName, VlanId};
use crate::vmm::config::DiskFormat;

pub(super) type Done = Result<(), StepError>;

pub(super) fn failed<T>(what: impl ToString, why: impl ToString) -> Result<T, StepError> {
    Err(StepError::failed(what.to_string(), why))
}

pub(super) fn not_ours<T>(what: impl ToString, why: impl ToString) -> Result<T, StepError> {
    Err(StepError::NotOurs { what: what.to_string(), why: why.to_string() })
}

/// What a port begins with.
fn fresh_port() -> PortFacts {
    PortFacts { learning: true, unicast_flood: true, ..PortFacts::default() }
}

/// The size of the disk that is taken out of a file of another kind.
fn extracted_bytes(container: &Container, kind: &FileKind) -> Option<u64> {
    match (container, kind) {
        (Container::Vmdk, FileKind::Vmdk(disk)) => Some(disk.as_ref().ok()?.capacity_bytes),
        (Container::Ova { disk: wanted }, FileKind::Ova(disks)) => {
            let mut disks = disks.as_ref().ok()?.iter();
            let found = disks.find(|disk| wanted.as_ref().is_none_or(|wanted| *wanted == disk.name))?;
            Some(found.capacity_bytes)
        }
        _ => None,
    }
}

fn blank_header(virtual_size_bytes: u64) -> ImageHeader {
    let format = DiskFormat::Raw;
    ImageHeader { format, virtual_size_bytes, backing: None, encrypted: false, unusable: None }
}

impl State {
    pub(super) fn apply(&mut self, step: &Step) -> Done {
        match step {
            Step::CreateLink(new) => self.create_link(new),
            Step::DeleteLink { link, mark } => self.delete_link(link, mark),
            Step::MarkLink { link, mark } => {
                let have = self.link(link)?;
                match have.mark() {
                    Some(found) if found == *mark => Ok(()),
                    _ if have.alias.is_some() => not_ours(step, "it carries an alias"),
                    _ => {
                        have.alias = Some(mark.to_string());
                        Ok(())
                    }
                }
            }
            Step::UnmarkLink { link, mark } => {
                if let Ok(have) = self.link(link)
                    && have.mark().as_ref() == Some(mark)
                {
                    have.alias = None;
                }
                Ok(())
            }
            Step::SetLink { link, change } => self.set_link(link, change),
            Step::AddAddress { link, address } => {
                let have = self.link(link)?;
                if have.mark().is_none() {
                    return not_ours(step, "it carries no mark");
                }
                have.addresses.insert(*address);
                Ok(())
            }
            Step::RemoveAddress { link, address } => {
                let Ok(have) = self.link(link) else { return Ok(()) };
                if have.mark().is_none() {
                    return not_ours(step, "it carries no mark");
                }
                have.addresses.remove(address);
                Ok(())
            }
            Step::CreatePool { name, path, mark } => self.create_pool(name, path, mark),
            Step::ForgetPool { name, mark, .. } => self.forget_pool(name, mark),
            Step::ImportImage { image, source, sha256, mark } => {
                let (size_bytes, header) = match &source.origin {
                    ImageOrigin::Path(path) => match self.files.get(path) {
                        Some(facts) => {
                            let capacity_bytes = extracted_bytes(&source.container, &facts.kind);
                            let size = capacity_bytes.unwrap_or(facts.header.virtual_size_bytes);
                            let header = ImageHeader { virtual_size_bytes: size, ..facts.header.clone() };
                            (facts.size_bytes, header)
                        }
                        None => return failed(step, "no such file"),
                    },
                    ImageOrigin::Url(_) => (1 << 20, blank_header(1 << 20)),
                };
                // What it was made from may have been another thing; what it is has this format.
                let header = ImageHeader { format: image.format, ..header };
                let file = PoolFile {
                    mark: Some(mark.clone()),
                    retained: None,
                    size_bytes,
                    allocated_bytes: size_bytes,
                    header,
                    reclaim_delete: false,
                    sha256: Some(sha256.to_string()),
                    boot: None,
                    half_made: false,
                    inactive: false,
                };
                self.directory(&image.pool_path)?.images.insert(image.file.clone(), file);
                Ok(())
            }
            Step::DeleteImage { image, mark } => {
                if self.marked_image(image, mark)?.is_some() {
                    self.directory(&image.pool_path)?.images.remove(&image.file);
                }
                Ok(())
            }
            Step::RetainImage { image, mark } => {
                if let Some(file) = self.marked_image(image, mark)? {
                    file.retained = file.mark.take();
                }
                Ok(())
            }
            Step::CreateVolume(new) => self.create_volume(new),
            Step::GrowVolume { pool_path, file, capacity_bytes, mark, .. } => {
                let Some(have) = self.marked_file(pool_path, file, mark)? else {
                    return failed(step, "no such file");
                };
                grow(have, *capacity_bytes)
            }
            Step::SetReclaim { pool_path, file, mark, delete } => {
                let Some(have) = self.marked_file(pool_path, file, mark)? else {
                    return failed(step, "no such file");
                };
                have.reclaim_delete = *delete;
                Ok(())
            }
            Step::AdoptVolume { pool_path, file, mark, reclaim_delete } => {
                let directory = self.directory(pool_path)?;
                let Some(have) = directory.files.get_mut(file) else { return failed(step, "no such file") };
                if have.mark.as_ref().is_some_and(|found| found != mark) {
                    return not_ours(step, "it carries another mark");
                }
                have.mark = Some(mark.clone());
                have.retained = None;
                have.reclaim_delete = *reclaim_delete;
                Ok(())
            }
            Step::RetainVolume { pool_path, file, mark } => {
                let have = self.directory(pool_path)?.files.get(file);
                if have.is_some_and(|have| have.mark.is_none() && have.retained.as_ref() == Some(mark)) {
                    return Ok(());
                }
                if let Some(have) = self.marked_file(pool_path, file, mark)? {
                    have.retained = have.mark.take();
                }
                Ok(())
            }
            Step::TrashVolume { pool_path, file, mark } => {
                if self.marked_file(pool_path, file, mark)?.is_some() {
                    self.directory(pool_path)?.files.remove(file);
                }
                Ok(())
            }
            Step::Lvm(step) => self.apply_to_lvm(step),
            Step::SetTable { .. }
            | Step::DeleteTable { .. }
            | Step::SetService { .. }
            | Step::RemoveService { .. }
            | Step::RequireForwarding { .. }
            | Step::ReleaseForwarding { .. } => self.apply_to_network(step),
            other => self.apply_to_host(other),
        }
    }

    /// The file or logical volume that a VM's disk is.
    pub(super) fn disk_file(&mut self, path: &Path) -> Result<&mut PoolFile, StepError> {
        if path.starts_with("/dev") {
            return match self.lvm.file(path) {
                Some(file) if !file.inactive => Ok(file),
                _ => failed(path.display(), "no such device"),
            };
        }
        let (Some(pool), Some(file)) = (path.parent(), path.file_name().and_then(|file| file.to_str()))
        else {
            return failed(path.display(), "no such file");
        };
        match self.directory(pool)?.files.get_mut(file) {
            Some(have) => Ok(have),
            None => failed(path.display(), "no such file"),
        }
    }

    fn links(&mut self) -> Result<&mut BTreeMap<LinkName, Link>, StepError> {
        match &mut self.world.links {
            Ok(links) => Ok(links),
            Err(error) => failed("links", error),
        }
    }

    pub(super) fn link(&mut self, name: &LinkName) -> Result<&mut Link, StepError> {
        match self.links()?.get_mut(name) {
            Some(link) => Ok(link),
            None => failed(name, "no such device"),
        }
    }

    fn create_link(&mut self, new: &NewLink) -> Done {
        let what = Step::CreateLink(new.clone()).to_string();
        let needs = match &new.kind {
            NewLinkKind::Bridge(_) => Capability::Bridge,
            NewLinkKind::Vlan { .. } => Capability::Vlan,
            NewLinkKind::Tap { .. } => Capability::Tun,
        };
        if self.lacks.contains(&needs) {
            return Err(StepError::Lacks { what, capability: needs });
        }
        if let Some(have) = self.links()?.get(&new.name)
            && have.mark().as_ref() != Some(&new.mark)
        {
            return not_ours(what, "a link of this name exists and is not ours");
        }
        if let Some(master) = &new.master {
            self.link(master)?;
        }
        let mut inherited = 1500;
        let (kind, parent) = match &new.kind {
            NewLinkKind::Bridge(facts) => (LinkKind::Bridge(facts.clone()), None),
            NewLinkKind::Vlan { parent, id, protocol } => {
                inherited = self.link(parent)?.mtu;
                if new.mtu.is_some_and(|mtu| mtu > inherited) {
                    return failed(what, "the MTU is above its parent's");
                }
                (LinkKind::Vlan { id: *id, protocol: *protocol }, Some(parent.clone()))
            }
            NewLinkKind::Tap { multi_queue } => (LinkKind::Tap { multi_queue: *multi_queue }, None),
        };
        let port = new.master.as_ref().map(|_| new.port.clone().unwrap_or_else(fresh_port));
        let link = Link {
            mac_address: new.mac_address,
            mtu: new.mtu.unwrap_or(inherited),
            up: new.up,
            alias: Some(new.mark.to_string()),
            master: new.master.clone(),
            parent,
            kind,
            port,
            addresses: self.links()?.get(&new.name).map(|have| have.addresses.clone()).unwrap_or_default(),
        };
        self.links()?.insert(new.name.clone(), link);
        Ok(())
    }

    fn delete_link(&mut self, name: &LinkName, mark: &Mark) -> Done {
        let links = self.links()?;
        match links.get(name).map(Link::mark) {
            None => return Ok(()),
            Some(found) if found.as_ref() != Some(mark) => {
                return not_ours(name, "it carries another mark, or none");
            }
            Some(_) => {}
        }
        links.remove(name);
        // A device takes its sub-devices with it, and frees its ports.
        let children: Vec<LinkName> = links
            .iter()
            .filter(|(_, link)| link.parent.as_ref() == Some(name))
            .map(|(child, _)| child.clone())
            .collect();
        for child in children {
            links.remove(&child);
        }
        for link in links.values_mut().filter(|link| link.master.as_ref() == Some(name)) {
            link.master = None;
            link.port = None;
        }
        self.lose_bridge(name);
        Ok(())
    }

    fn set_link(&mut self, name: &LinkName, change: &LinkChange) -> Done {
        let mut port = fresh_port();
        if let LinkChange::Master(Some(master)) = change
            && let LinkKind::Bridge(bridge) = &self.link(master)?.kind
            && bridge.vlan_filtering
        {
            let id = VlanId::new(bridge.default_pvid.into()).ok();
            port.vlans = id.map(|id| (id, VlanFlags { pvid: true, untagged: true })).into_iter().collect();
        }
        let link = self.link(name)?;
        if link.mark().is_none() {
            return not_ours(name, "it carries no mark");
        }
        match change {
            LinkChange::Mtu(mtu) => link.mtu = *mtu,
            LinkChange::Up(up) => link.up = *up,
            LinkChange::Master(master) => {
                link.port = master.as_ref().map(|_| port);
                link.master = master.clone();
            }
            LinkChange::MacAddress(mac) => link.mac_address = Some(*mac),
            LinkChange::PortFlags(want) => match &mut link.port {
                Some(port) => *port = PortFacts { vlans: port.vlans.clone(), ..want.clone() },
                None => return failed(name, "not a port"),
            },
            LinkChange::PortVlans(want) => match &mut link.port {
                Some(port) => port.vlans = want.vlans.clone(),
                None => return failed(name, "not a port"),
            },
            _ => {
                let LinkKind::Bridge(bridge) = &mut link.kind else { return failed(name, "not a bridge") };
                match change {
                    LinkChange::Stp(on) => bridge.stp = *on,
                    LinkChange::ForwardDelaySeconds(seconds) => bridge.forward_delay_seconds = *seconds,
                    LinkChange::AgeingSeconds(seconds) => bridge.ageing_seconds = *seconds,
                    LinkChange::VlanFiltering(on) => bridge.vlan_filtering = *on,
                    LinkChange::DefaultPvid(id) => bridge.default_pvid = *id,
                    LinkChange::MulticastSnooping(on) => bridge.multicast_snooping = *on,
                    _ => unreachable!("every other change is handled above"),
                }
            }
        }
        Ok(())
    }

    fn pool(&mut self, path: &Path) -> Option<&mut Pool> {
        self.world.pools.values_mut().flatten().find(|pool| pool.path == path && pool.lvm.is_none())
    }

    pub(super) fn directory(&mut self, path: &Path) -> Result<&mut PoolDirectory, StepError> {
        match self.pool(path).and_then(|pool| pool.directory.as_mut()) {
            Some(directory) => Ok(directory),
            None => failed(path.display(), "no such directory"),
        }
    }

    fn create_pool(&mut self, name: &ObjectName, path: &Path, mark: &Mark) -> Done {
        let mut directory = self.directory_at(path).unwrap_or(PoolDirectory {
            mark: None,
            capacity_bytes: 1 << 40,
            available_bytes: 1 << 40,
            files: BTreeMap::new(),
            images: BTreeMap::new(),
        });
        if directory.mark.as_ref().is_some_and(|found| found.set != mark.set) {
            return not_ours(path.display(), "it carries another set's mark");
        }
        directory.mark = Some(mark.clone());
        self.world
            .pools
            .retain(|_, pool| !matches!(pool, Ok(pool) if pool.path == path && pool.lvm.is_none()));
        let registered = Some(mark.clone());
        let pool = Pool { path: path.to_owned(), directory: Some(directory), registered, lvm: None };
        self.world.pools.insert(name.clone(), Ok(pool));
        Ok(())
    }

    fn forget_pool(&mut self, name: &ObjectName, mark: &Mark) -> Done {
        if let Some(Ok(pool)) = self.world.pools.get_mut(name)
            && pool.registered.as_ref() == Some(mark)
        {
            pool.registered = None;
            if let Some(directory) = &mut pool.directory {
                directory.mark = None;
            }
        }
        Ok(())
    }

    fn marked_image(&mut self, image: &ImageFile, mark: &Mark) -> Result<Option<&mut PoolFile>, StepError> {
        match self.directory(&image.pool_path)?.images.get_mut(&image.file) {
            Some(file) if file.mark.as_ref() != Some(mark) => {
                not_ours(&image.file, "it carries another mark")
            }
            file => Ok(file),
        }
    }

    fn marked_file(
        &mut self,
        pool: &Path,
        file: &str,
        mark: &Mark,
    ) -> Result<Option<&mut PoolFile>, StepError> {
        match self.directory(pool)?.files.get_mut(file) {
            Some(have) if have.mark.as_ref() != Some(mark) => {
                not_ours(file, "it carries another mark, or none")
            }
            have => Ok(have),
        }
    }

    fn create_volume(&mut self, new: &NewVolume) -> Done {
        let backing = match &new.content {
            NewVolumeContent::Blank => None,
            NewVolumeContent::CopyOf(image) | NewVolumeContent::OverlayOn(image) => {
                if !self.directory(&image.pool_path)?.images.contains_key(&image.file) {
                    return failed(image.path().display(), "no such file");
                }
                matches!(new.content, NewVolumeContent::OverlayOn(_)).then(|| image.path())
            }
        };
        let directory = self.directory(&new.pool_path)?;
        match directory.files.get(&new.file) {
            Some(have) if have.mark.as_ref() == Some(&new.mark) => {
                let header = &have.header;
                return match (header.format, header.virtual_size_bytes) == (new.format, new.capacity_bytes) {
                    true => Ok(()),
                    false => failed(&new.file, "it exists already, of another size"),
                };
            }
            Some(_) => return not_ours(&new.file, "a file of this name exists and is not ours"),
            None => {}
        }
        let file = PoolFile {
            mark: Some(new.mark.clone()),
            retained: None,
            size_bytes: if new.format == DiskFormat::Raw { new.capacity_bytes } else { 262_144 },
            allocated_bytes: 0,
            header: ImageHeader {
                format: new.format,
                virtual_size_bytes: new.capacity_bytes,
                backing,
                encrypted: false,
                unusable: None,
            },
            reclaim_delete: new.reclaim_delete,
            sha256: None,
            boot: (new.content == NewVolumeContent::Blank).then_some(BootFacts::BLANK),
            half_made: false,
            inactive: false,
        };
        directory.files.insert(new.file.clone(), file);
        Ok(())
    }
}

pub(super) fn grow(file: &mut PoolFile, capacity_bytes: u64) -> Done {
    if file.header.virtual_size_bytes > capacity_bytes {
        return failed("grow", "a volume never shrinks");
    }
    file.header.virtual_size_bytes = capacity_bytes;
    if file.header.format == DiskFormat::Raw {
        file.size_bytes = capacity_bytes;
    }
    Ok(())
}
