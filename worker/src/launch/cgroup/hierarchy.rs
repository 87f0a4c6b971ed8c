//! Where the hierarchies of control groups are mounted, and where in each of them this process is.

use std::path::{Path, PathBuf};

use nix::unistd::{AccessFlags, access};

/// Name of the group that systemd puts a service itself into (`DelegateSubgroup=`), so that the service's own group
/// is free to hand on controllers.
const DAEMON_SUBGROUP: &str = "daemon";

/// Every hierarchy, by the names of its controllers; that of version 2 has none.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Hierarchies(Vec<Hierarchy>);

#[derive(Debug, PartialEq, Eq)]
struct Hierarchy {
    controllers: Vec<String>,
    /// Our own group's directory; None if no mount shows it.
    own: Option<PathBuf>,
}

impl Hierarchies {
    /// Of /proc/self/mountinfo and /proc/self/cgroup.
    pub fn parse(mountinfo: &str, own_groups: &str) -> Self {
        let mounts: Vec<Mount> = mountinfo.lines().filter_map(Mount::parse).collect();
        let hierarchy = |line: &str| {
            let (_, rest) = line.split_once(':')?;
            let (controllers, group) = rest.split_once(':')?;
            let controllers: Vec<String> =
                controllers.split(',').filter(|c| !c.is_empty()).map(str::to_owned).collect();
            let mut ours = mounts.iter().filter(|mount| match controllers.first() {
                None => mount.version == 2,
                Some(first) => mount.version == 1 && mount.options.iter().any(|option| option == first),
            });
            Some(Hierarchy { own: ours.find_map(|mount| mount.directory(group)), controllers })
        };
        Self(own_groups.lines().filter_map(hierarchy).collect())
    }

    /// Where groups can be made in version 2, or why not.
    pub fn v2(&self) -> Result<PathBuf, String> {
        let hierarchy = self.0.iter().find(|hierarchy| hierarchy.controllers.is_empty());
        base(hierarchy, "control groups of version 2")
    }

    /// Where groups can be made in that hierarchy of version 1, or why not.
    pub fn v1(&self, controller: &str) -> Result<PathBuf, String> {
        let hierarchy = self.0.iter().find(|h| h.controllers.iter().any(|name| name == controller));
        base(hierarchy, &format!("control groups of version 1 for {controller}"))
    }
}

fn base(hierarchy: Option<&Hierarchy>, what: &str) -> Result<PathBuf, String> {
    let own = hierarchy.and_then(|hierarchy| hierarchy.own.as_deref());
    let own = own.ok_or_else(|| format!("{what} are not mounted"))?;
    let base = match own.parent() {
        Some(parent) if own.file_name().is_some_and(|name| name == DAEMON_SUBGROUP) => parent,
        _ => own,
    };
    for path in [base, &base.join("cgroup.procs")] {
        access(path, AccessFlags::W_OK).map_err(|error| {
            format!(
                "{} is not ours to change: {}; run as root, or with Delegate=yes",
                path.display(),
                error.desc()
            )
        })?;
    }
    Ok(base.to_owned())
}

#[derive(Debug)]
struct Mount {
    version: u8,
    /// The group that is seen at the mount point.
    root: String,
    point: PathBuf,
    /// Of version 1: its controllers, among others.
    options: Vec<String>,
}

impl Mount {
    fn parse(line: &str) -> Option<Self> {
        // 38 31 0:37 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory
        let (before, after) = line.split_once(" - ")?;
        let mut before = before.split(' ').skip(3);
        let (root, point) = (unescape(before.next()?), unescape(before.next()?));
        let mut after = after.split(' ');
        let version = match after.next()? {
            "cgroup2" => 2,
            "cgroup" => 1,
            _ => return None,
        };
        let options = after.nth(1).unwrap_or_default().split(',').map(str::to_owned).collect();
        Some(Self { version, root, point: point.into(), options })
    }

    /// Where a group is seen. One that is above the root of our namespace begins with `/..`.
    fn directory(&self, group: &str) -> Option<PathBuf> {
        let below = Path::new(group).strip_prefix(&self.root).ok()?;
        below
            .components()
            .all(|part| part.as_os_str() != "..")
            .then(|| if below.as_os_str().is_empty() { self.point.clone() } else { self.point.join(below) })
    }
}

/// Spaces and the like are written as a backslash and three octal digits.
fn unescape(text: &str) -> String {
    let mut parts = text.split('\\');
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let code = part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(code) if code.is_ascii() => {
                plain.push(char::from(code));
                plain.push_str(&part[3..]);
            }
            _ => {
                plain.push('\\');
                plain.push_str(part);
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    const V2: &str = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate";
    const HYBRID: &str = "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
33 31 0:30 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw";

    #[test]
    fn our_own_group_is_found_in_each_layout() {
        let container = "900 890 0:30 /docker/abc /sys/fs/cgroup/mem\\040ory ro - cgroup cgroup rw,memory";
        let own_hybrid = "9:name=systemd:/\n4:memory:/a/b\n2:cpu,cpuacct:/c\n0::/\n";
        let table = [
            (
                V2,
                "0::/system.slice/muster.service/daemon\n",
                None,
                Some("/sys/fs/cgroup/system.slice/muster.service/daemon"),
            ),
            (V2, "0::/\n", None, Some("/sys/fs/cgroup")),
            (V2, "0::/../other\n", None, None),
            (HYBRID, own_hybrid, Some("/sys/fs/cgroup/memory/a/b"), Some("/sys/fs/cgroup/unified")),
            (container, "4:memory:/docker/abc/x\n", Some("/sys/fs/cgroup/mem ory/x"), None),
            (container, "4:memory:/docker/abcd\n", None, None),
            ("", "0::/\n", None, None),
            (V2, "", None, None),
            ("a - b\n - \n1 2 3 4 5 6 - cgroup2", "::\n:\n\n4", None, None),
        ];
        for (mounts, own, memory, v2) in table {
            let Hierarchies(found) = Hierarchies::parse(mounts, own);
            let of = |wanted: Option<&str>| {
                let hierarchy = found.iter().find(|h| h.controllers.first().map(String::as_str) == wanted);
                hierarchy.and_then(|hierarchy| hierarchy.own.clone())
            };
            let path = |path: Option<&str>| path.map(PathBuf::from);
            assert_eq!((of(Some("memory")), of(None)), (path(memory), path(v2)), "{own:?} in {mounts:?}");
        }
    }

    #[test]
    fn groups_are_made_beside_the_daemon_and_only_where_they_may_be() {
        let root = tempfile::tempdir().unwrap();
        let service = root.path().join("muster.service");
        for dir in [&service, &service.join("daemon")] {
            std::fs::create_dir(dir).unwrap();
            std::fs::write(dir.join("cgroup.procs"), "").unwrap();
        }
        let base_of = |group: &str| {
            let mounts = format!("30 23 0:26 / {} rw - cgroup2 cgroup2 rw", root.path().display());
            Hierarchies::parse(&mounts, &format!("0::{group}\n")).v2()
        };
        assert_eq!(base_of("/muster.service/daemon"), Ok(service.clone()));
        assert_eq!(base_of("/muster.service"), Ok(service));
        assert!(base_of("/gone").unwrap_err().contains("is not ours to change"), "{:?}", base_of("/gone"));
        assert!(Hierarchies(vec![]).v1("memory").unwrap_err().ends_with("are not mounted"));
    }
}
