//! The minimal system: packages that dpkg calls essential, and all that these need. A tool that is
//! brought may rely on these alone; whatever else this machine has was installed for some other reason.

use anyhow::{Context, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

/// Facts of each installed package, one a line.
const FORMAT: &str = "${Package}\\t${Essential}\\t${Pre-Depends},${Depends}\\t${Provides}\\n";

/// Returns the names of the packages of the minimal system.
pub fn packages() -> Result<BTreeSet<String>> {
    Ok(closure(&dpkg(&["-W", "-f", FORMAT])?))
}

/// Returns the file names of the shared libraries that these packages have installed.
pub fn libraries(packages: &BTreeSet<String>) -> Result<BTreeSet<String>> {
    let mut args = vec!["-L"];
    args.extend(packages.iter().map(String::as_str));
    let listed = dpkg(&args)?;
    let names = listed.lines().filter_map(|path| path.rsplit('/').next());
    Ok(names.filter(|name| name.contains(".so")).map(str::to_owned).collect())
}

fn dpkg(args: &[&str]) -> Result<String> {
    let output = Command::new("dpkg-query").args(args).output().context("failed to start dpkg-query")?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Follows the dependencies of the essential packages. Of alternatives the first that is installed
/// counts, as it does for dpkg.
fn closure(listed: &str) -> BTreeSet<String> {
    let mut depends: BTreeMap<&str, &str> = BTreeMap::new();
    let mut providers: BTreeMap<&str, &str> = BTreeMap::new();
    let mut open = Vec::new();
    for line in listed.lines() {
        let fields: Vec<&str> = line.split('\t').collect();
        let [package, essential, needs, provides] = fields[..] else { continue };
        depends.insert(package, needs);
        for provided in names(provides) {
            providers.entry(provided).or_insert(package);
        }
        if essential == "yes" {
            open.push(package);
        }
    }
    let mut seen = BTreeSet::new();
    while let Some(package) = open.pop() {
        if !seen.insert(package.to_owned()) {
            continue;
        }
        for alternatives in depends[package].split(',') {
            let installed = |name: &str| {
                let own = depends.get_key_value(name).map(|(name, _)| *name);
                own.or_else(|| providers.get(name).copied())
            };
            open.extend(alternatives.split('|').flat_map(names).find_map(installed));
        }
    }
    seen
}

/// Returns the package names in a list as dpkg writes it, without versions and architectures.
fn names(list: &str) -> impl Iterator<Item = &str> {
    let name = |item: &'_ str| item.trim().find([' ', ':', '(']).map_or(item.trim().len(), |end| end);
    list.split(',').map(move |item| &item.trim()[..name(item)]).filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(listed: &str, expected: &[&str]) {
        let expected: BTreeSet<String> = expected.iter().map(|name| (*name).to_owned()).collect();
        assert_eq!(closure(listed), expected);
    }

    #[test]
    fn what_nothing_essential_needs_is_not_of_the_minimal_system() {
        check(
            "bash\tyes\tlibtinfo6 (>= 6), base-files (>= 2),debianutils:any\t\n\
             libtinfo6\tno\t,libc6 (>= 2.33)\t\n\
             libc6\tno\t,\t\n\
             base-files\tno\t,awk\t\n\
             mawk\tno\t,libc6\tawk\n\
             debianutils\tno\t,\t\n\
             libnuma1\tno\t,libc6\t\n",
            &["bash", "libtinfo6", "libc6", "base-files", "mawk", "debianutils"],
        );
    }

    #[test]
    fn of_alternatives_the_first_that_is_installed_counts() {
        check("a\tyes\t,absent | b | c\t\nb\tno\t,\t\nc\tno\t,\t\n", &["a", "b"]);
        check("a\tyes\t,absent | gone\t\nb\tno\t,\t\n", &["a"]);
    }
}
