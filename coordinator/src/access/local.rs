//! Callers who are users of this machine: what they are called, and what they may do.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use muster_core::types::Owner;
use muster_core::{Caller, Rights};
use nix::unistd::{Uid, User, geteuid};

/// Users whose names are remembered: more than call on one machine.
const NAMES_MAX: usize = 1024;

/// Names by id. A name is looked up once: the look may go to a directory on the network.
static NAMES: Mutex<BTreeMap<u32, Owner>> = Mutex::new(BTreeMap::new());

/// Returns the caller that a user of this machine is. Root and the user who runs the coordinator could
/// change its files as well: they may do everything.
pub(crate) fn caller(user: Option<u32>) -> Caller {
    let is_own = user.is_some_and(|user| user == 0 || user == geteuid().as_raw());
    let rights = if is_own { Rights::All } else { Rights::OwnAndUnowned };
    Caller { name: user.and_then(name), rights }
}

/// Returns the caller at the other end of a Unix socket, which only those may open who may do everything.
pub(crate) fn trusted(user: Option<u32>) -> Caller {
    Caller { name: user.and_then(name), rights: Rights::All }
}

/// Returns what a user is called; one without a name is called by its number.
fn name(user: u32) -> Option<Owner> {
    let names = || NAMES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(name) = names().get(&user) {
        return Some(name.clone());
    }
    let number = || Owner::new(format!("uid:{user}"));
    let Ok(found) = User::from_uid(Uid::from_raw(user)) else {
        // The next look may tell.
        return number().ok();
    };
    let name = found.and_then(|found| Owner::new(found.name).ok()).map_or_else(number, Ok).ok()?;
    let mut names = names();
    if names.len() >= NAMES_MAX {
        names.clear();
    }
    names.insert(user, name.clone());
    Some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_have_names_or_numbers_and_few_may_do_everything() {
        let own = geteuid();
        let caller_of = |user: u32| caller(Some(user));
        let called = User::from_uid(own).unwrap().map_or(format!("uid:{own}"), |user| user.name);
        assert_eq!(caller_of(own.as_raw()).name, Some(Owner::new(called).unwrap()));
        assert_eq!(caller_of(0), Caller { name: Some(Owner::new("root").unwrap()), rights: Rights::All });
        let stranger = 3_999_999_999;
        let number = Some(Owner::new("uid:3999999999").unwrap());
        assert_eq!(caller_of(stranger), Caller { name: number.clone(), rights: Rights::OwnAndUnowned });
        assert_eq!(trusted(Some(stranger)), Caller { name: number, rights: Rights::All });
        assert_eq!(caller(None), Caller { name: None, rights: Rights::OwnAndUnowned });
    }
}
