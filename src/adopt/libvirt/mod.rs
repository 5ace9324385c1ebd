//! libvirt's own files (`/etc/libvirt`), as Debian's packages have them: pools, networks, domains.
//!
//! What they say and a manifest can't is a note, field by field. They are read as XML without a DTD, so nothing
//! in them can grow or reach elsewhere.

mod domain;
mod network;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use roxmltree::{Document, Node};

use super::Adoption;
use crate::host::snapshot::{LvmPlace, PoolPlace, Snapshot};
use crate::name::{Kind, LvmName, ObjectName};

/// The files' texts, each with the path to be named in reasons.
#[derive(Clone, Debug, Default)]
pub struct Files {
    pub pools: Vec<(PathBuf, String)>,
    pub networks: Vec<(PathBuf, String)>,
    pub domains: Vec<(PathBuf, String)>,
    /// The files, of all kinds, of what libvirt starts by itself.
    pub autostart: BTreeSet<PathBuf>,
}

/// Where the pools are that can be adopted, with libvirt's names for them.
pub fn pool_places(files: &Files, adoption: &mut Adoption) -> Vec<(String, PoolPlace)> {
    let mut found = Vec::new();
    for (file, text) in &files.pools {
        let Some(document) = parse(file, text, adoption) else { continue };
        let root = document.root_element();
        let name = text_of(root, "name").unwrap_or_default();
        let what = format!("libvirt's pool {name} ({})", file.display());
        let path = root.descendants().find(|node| node.has_tag_name("target"));
        let path = path.and_then(|target| text_of(target, "path"));
        match (root.attribute("type"), path) {
            (Some("dir"), Some(path)) => {
                found.push((name.to_owned(), PoolPlace::Directory(PathBuf::from(path))))
            }
            (Some("logical"), _) => {
                let source = child(root, "source").and_then(|source| text_of(source, "name"));
                match LvmName::parse(source.unwrap_or(name)) {
                    Ok(group) => {
                        let place = LvmPlace { group, thin_pool: None };
                        found.push((name.to_owned(), PoolPlace::Lvm(place)));
                    }
                    Err(error) => adoption.leave(what, error.to_string()),
                }
            }
            (Some("dir"), None) => adoption.leave(what, "it says no path"),
            (kind, _) => {
                let kind = kind.unwrap_or("without a type");
                adoption.leave(
                    what,
                    format!("pools of type {kind} are not read yet; directories and volume groups are"),
                );
            }
        }
    }
    found
}

/// Networks and domains, after the host's bridges and pools: these are what they refer to.
pub fn find(files: &Files, snapshot: &Snapshot, adoption: &mut Adoption) {
    let mut networks = network::Networks::default();
    for (file, text) in &files.networks {
        if let Some(document) = parse(file, text, adoption) {
            let autostart = files.autostart.contains(file);
            networks.read((file, document.root_element()), autostart, snapshot, adoption);
        }
    }
    for (file, text) in &files.domains {
        if let Some(document) = parse(file, text, adoption) {
            let autostart = files.autostart.contains(file);
            domain::read((file, document.root_element()), autostart, &networks, adoption);
        }
    }
}

fn parse<'a>(file: &Path, text: &'a str, adoption: &mut Adoption) -> Option<Document<'a>> {
    match Document::parse(text) {
        Ok(document) => Some(document),
        Err(error) => {
            adoption.leave(file.display().to_string(), format!("it can't be read as XML: {error}"));
            None
        }
    }
}

fn child<'a, 'i>(node: Node<'a, 'i>, name: &str) -> Option<Node<'a, 'i>> {
    node.children().find(|child| child.has_tag_name(name))
}

fn children<'a, 'i>(node: Node<'a, 'i>, name: &'static str) -> impl Iterator<Item = Node<'a, 'i>> {
    node.children().filter(move |child| child.has_tag_name(name))
}

fn text_of<'a>(node: Node<'a, '_>, name: &str) -> Option<&'a str> {
    Some(child(node, name)?.text()?.trim()).filter(|text| !text.is_empty())
}

/// The Bridge object whose link this is, of those that are adopted.
fn bridge_of_link(adoption: &Adoption, link: &str) -> Option<ObjectName> {
    let bridges = adoption.objects.iter().filter(|found| found.id.kind == Kind::Bridge);
    bridges
        .filter(|found| {
            let named = found.spec.get("interfaceName").and_then(|name| name.as_str());
            named.unwrap_or(found.id.name.as_str()) == link
        })
        .map(|found| found.id.name.clone())
        .next()
}

/// The elements below a node, but for those that are dealt with.
fn children_besides(node: Node, known: &[&str]) -> Vec<String> {
    let elements = node.children().filter(Node::is_element).map(|child| child.tag_name().name());
    elements.filter(|name| !known.contains(name)).map(str::to_owned).collect()
}

/// `/dev/GROUP/VOLUME` of a `/dev/mapper/GROUP-VOLUME`, in which the names' own hyphens are doubled.
fn logical_volume(path: &Path) -> Option<PathBuf> {
    let name = path.strip_prefix("/dev/mapper").ok()?.to_str()?;
    let whole = name.replace("--", "\0");
    let (group, volume) = whole.split_once('-')?;
    Some(PathBuf::from(format!("/dev/{group}/{volume}").replace('\0', "-")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_mapper_s_names_are_those_of_logical_volumes() {
        for (path, volume) in [
            ("/dev/mapper/vg0-web", Some("/dev/vg0/web")),
            ("/dev/mapper/my--vg-web--1--data", Some("/dev/my-vg/web-1-data")),
            ("/dev/mapper/control", None),
            ("/dev/vg0/web", None),
        ] {
            assert_eq!(logical_volume(Path::new(path)), volume.map(PathBuf::from), "{path}");
        }
    }
}
