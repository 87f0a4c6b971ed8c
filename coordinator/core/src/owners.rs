//! Whose a job is, who asks, and what that allows. This is the one place that decides it; roles,
//! which say who may call a method at all, are the shell's.

use crate::types::Owner;

/// Somebody who asks for something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Who it is, where that is known.
    pub name: Option<Owner>,
    /// What it may do with jobs.
    pub rights: Rights,
}

/// Which jobs a caller may see whole, and may change where its role lets it change jobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// Its own.
    Own,
    /// Its own, and those of which nobody knows whose they are: where callers have no roles.
    OwnAndUnowned,
    /// All of them, as operators may.
    All,
}

impl Caller {
    /// Returns a caller who may do everything, and of whom no more is known.
    pub fn trusted() -> Self {
        Self { name: None, rights: Rights::All }
    }

    /// Returns whether it may change what belongs to `owner`.
    pub fn may_change(&self, owner: Option<&Owner>) -> bool {
        match (self.rights, owner) {
            (Rights::All, _) | (Rights::OwnAndUnowned, None) => true,
            (Rights::Own, None) => false,
            (Rights::Own | Rights::OwnAndUnowned, Some(owner)) => self.name.as_ref() == Some(owner),
        }
    }

    /// Returns whether it may see all of what belongs to `owner`. `open`: everybody may.
    pub fn may_see(&self, owner: Option<&Owner>, open: bool) -> bool {
        open || self.may_change(owner)
    }
}

/// Returns ` by NAME`, or nothing where it is not known who it was.
pub(crate) fn by(name: Option<&Owner>) -> String {
    name.map(|name| format!(" by {name}")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_may_change_and_see_what() {
        let name = |text: &str| Some(Owner::new(text).unwrap());
        let caller = |text, rights| Caller { name: name(text), rights };
        let (ann, unknown) = (name("ann"), None);
        let table = [
            (caller("ann", Rights::Own), &ann, true),
            (caller("bob", Rights::Own), &ann, false),
            (caller("bob", Rights::All), &ann, true),
            (caller("ann", Rights::OwnAndUnowned), &ann, true),
            (caller("bob", Rights::OwnAndUnowned), &ann, false),
            (Caller { name: None, rights: Rights::Own }, &ann, false),
            (Caller::trusted(), &ann, true),
            (caller("bob", Rights::Own), &unknown, false),
            // Nobody is nobody's owner.
            (Caller { name: None, rights: Rights::Own }, &unknown, false),
            (caller("bob", Rights::OwnAndUnowned), &unknown, true),
            (caller("bob", Rights::All), &unknown, true),
        ];
        for (caller, owner, expected) in table {
            assert_eq!(caller.may_change(owner.as_ref()), expected, "{caller:?} {owner:?}");
            assert_eq!(caller.may_see(owner.as_ref(), false), expected, "{caller:?} {owner:?}");
            assert!(caller.may_see(owner.as_ref(), true));
        }
    }
}
