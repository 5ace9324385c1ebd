//! Where cgroups of ours are: found in what the kernel says is mounted, and where we and others are.

use std::io;
use std::path::{Path, PathBuf};

use super::{named, write_value};

/// What a VM's cgroup needs of the kernel.
const CONTROLLERS: [&str; 3] = ["memory", "cpu", "pids"];
/// The directory that holds all VMs' cgroups.
const OURS: &str = "vmctl";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    One,
    Two,
}

/// One tree of cgroups, and our place in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchy {
    pub version: Version,
    pub controllers: Vec<&'static str>,
    /// The cgroup below which ours is.
    pub parent: PathBuf,
    /// The directory of all VMs' cgroups.
    pub base: PathBuf,
}

impl Hierarchy {
    /// Makes the place, with its controllers. May be repeated.
    pub fn prepare(&self) -> io::Result<()> {
        std::fs::create_dir_all(&self.base).map_err(|error| named(&self.base, error))?;
        if self.version == Version::Two {
            for directory in [&self.parent, &self.base] {
                let file = directory.join("cgroup.subtree_control");
                let enabled = std::fs::read_to_string(&file).map_err(|error| named(&file, error))?;
                for controller in &self.controllers {
                    if !enabled.split_whitespace().any(|word| word == *controller) {
                        write_value(&file, &format!("+{controller}"))?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// A mounted tree of cgroups.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mount {
    version: Version,
    /// The part of the tree that is mounted.
    root: String,
    at: PathBuf,
    options: String,
}

/// The trees that have the controllers: one of version 2, or those of version 1. An error: there are none.
pub fn hierarchies() -> io::Result<Vec<Hierarchy>> {
    let mounts = mounts(&std::fs::read_to_string("/proc/self/mountinfo")?);
    let ours = std::fs::read_to_string("/proc/self/cgroup")?;
    let available =
        |mount: &Mount| std::fs::read_to_string(mount.at.join("cgroup.controllers")).unwrap_or_default();
    let found = choose(&mounts, &ours, available);
    let missing: Vec<&str> = CONTROLLERS
        .into_iter()
        .filter(|controller| !found.iter().any(|hierarchy| hierarchy.controllers.contains(controller)))
        .collect();
    if missing.is_empty() {
        Ok(found)
    } else {
        Err(io::Error::other(format!("no cgroups are mounted that control {}", missing.join(", "))))
    }
}

/// The cgroup of ours by which this controller has hold of the process.
pub fn of(pid: i32, controller: &str) -> io::Result<Option<(PathBuf, Version)>> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    for hierarchy in hierarchies().unwrap_or_default() {
        if !hierarchy.controllers.contains(&controller) {
            continue;
        }
        let Some(path) = path_in(&text, hierarchy.version, controller) else { continue };
        let name = Path::new(path).file_name();
        let above = Path::new(path).parent().and_then(Path::file_name);
        if let (Some(name), Some(above)) = (name, above)
            && above == OURS
        {
            let directory = hierarchy.base.join(name);
            return Ok(directory.is_dir().then_some((directory, hierarchy.version)));
        }
    }
    Ok(None)
}

fn choose(mounts: &[Mount], ours: &str, available: impl Fn(&Mount) -> String) -> Vec<Hierarchy> {
    let place = |mount: &Mount, controllers: Vec<&'static str>, path: Option<&str>| {
        let parent = mount.at.join(below_systemd(path.unwrap_or("/"), &mount.root));
        Hierarchy { version: mount.version, controllers, base: parent.join(OURS), parent }
    };
    if let Some(mount) = mounts.iter().find(|mount| mount.version == Version::Two) {
        let text = available(mount);
        let has = |controller: &&str| text.split_whitespace().any(|word| word == *controller);
        let controllers: Vec<_> = CONTROLLERS.into_iter().filter(has).collect();
        if !controllers.is_empty() {
            return vec![place(mount, controllers, path_in(ours, Version::Two, ""))];
        }
    }
    let mut found = Vec::new();
    for mount in mounts.iter().filter(|mount| mount.version == Version::One) {
        let has = |controller: &&str| mount.options.split(',').any(|word| word == *controller);
        let controllers: Vec<_> = CONTROLLERS.into_iter().filter(has).collect();
        if let Some(first) = controllers.first() {
            let path = path_in(ours, Version::One, first);
            found.push(place(mount, controllers, path));
        }
    }
    found
}

/// Where to go from the mounted root, relative: to the root itself, unless we live in a container's cgroup.
fn below_systemd(path: &str, mounted_root: &str) -> PathBuf {
    let of_systemd = |part: &str| [".slice", ".scope", ".service"].iter().any(|end| part.ends_with(end));
    let visible = path.strip_prefix(mounted_root.trim_end_matches('/')).unwrap_or("/");
    let mut parts = visible.split('/').filter(|part| !part.is_empty()).peekable();
    match parts.peek() {
        Some(first) if !of_systemd(first) && *first != OURS => parts.collect(),
        _ => PathBuf::new(),
    }
}

/// A process's path in one hierarchy, from its `/proc/<pid>/cgroup`.
fn path_in<'a>(text: &'a str, version: Version, controller: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (number, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        let found = match version {
            Version::Two => number == "0",
            Version::One => controllers.split(',').any(|word| word == controller),
        };
        found.then_some(path)
    })
}

fn mounts(mountinfo: &str) -> Vec<Mount> {
    let mount = |line: &str| {
        let (before, after) = line.split_once(" - ")?;
        let mut after = after.split(' ');
        let version = match after.next()? {
            "cgroup2" => Version::Two,
            "cgroup" => Version::One,
            _ => return None,
        };
        let mut before = before.split(' ').skip(3);
        let (root, at) = (before.next()?.to_owned(), PathBuf::from(before.next()?));
        Some(Mount { version, root, at, options: after.nth(1)?.to_owned() })
    };
    mountinfo.lines().filter_map(mount).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(mountinfo: &str, ours: &str, controllers: &str, expected: &[(&str, &str)]) {
        let found = choose(&mounts(mountinfo), ours, |_| controllers.to_owned());
        let found: Vec<_> =
            found.iter().map(|one| (one.controllers.join(","), one.base.to_str().unwrap())).collect();
        let found: Vec<_> = found.iter().map(|(controllers, base)| (controllers.as_str(), *base)).collect();
        assert_eq!(found, expected);
    }

    const TWO: &str = "25 20 0:22 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate";
    const ONE: &str = "\
        30 25 0:26 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n\
        31 25 0:27 / /sys/fs/cgroup/cpu,cpuacct rw shared:10 - cgroup cgroup rw,cpu,cpuacct\n\
        32 25 0:28 / /sys/fs/cgroup/pids rw shared:11 - cgroup cgroup rw,pids\n\
        33 25 0:29 / /sys/fs/cgroup/unified rw shared:12 - cgroup2 cgroup2 rw\n\
        34 20 0:30 / /tmp rw - tmpfs tmpfs rw";

    #[test]
    fn the_place_is_beside_systemds_or_in_the_container() {
        let all = "cpuset cpu io memory pids";
        let root = [("memory,cpu,pids", "/sys/fs/cgroup/vmctl")];
        check(TWO, "0::/", all, &root);
        check(TWO, "0::/system.slice/vmctl.service", all, &root);
        check(TWO, "0::/user.slice/user-0.slice/session-3.scope", all, &root);
        check(TWO, "0::/init.scope", all, &root);
        check(TWO, "0::/docker/1234", all, &[("memory,cpu,pids", "/sys/fs/cgroup/docker/1234/vmctl")]);
        let part = TWO.replace("0:22 / ", "0:22 /docker/1234 ");
        check(&part, "0::/docker/1234", all, &root);
        check(&part, "0::/docker/1234/inner", all, &[("memory,cpu,pids", "/sys/fs/cgroup/inner/vmctl")]);
    }

    #[test]
    fn version_1_is_used_where_version_2_controls_nothing() {
        let ours = "5:memory:/agents/7\n4:cpu,cpuacct:/\n3:pids:/system.slice/x.service\n0::/";
        check(
            ONE,
            ours,
            "",
            &[
                ("memory", "/sys/fs/cgroup/memory/agents/7/vmctl"),
                ("cpu", "/sys/fs/cgroup/cpu,cpuacct/vmctl"),
                ("pids", "/sys/fs/cgroup/pids/vmctl"),
            ],
        );
        check("34 20 0:30 / /tmp rw - tmpfs tmpfs rw", "", "", &[]);
    }
}
