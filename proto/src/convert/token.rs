//! Tokens and roles.

use muster_core::access::{Role, Token};

use super::{FieldError, field_error, timestamp_to_wire};
use crate::v1;

/// The role with this number.
pub fn role_from_wire(field: &str, role: i32) -> Result<Role, FieldError> {
    match v1::Role::try_from(role) {
        Ok(v1::Role::Viewer) => Ok(Role::Viewer),
        Ok(v1::Role::Submitter) => Ok(Role::Submitter),
        Ok(v1::Role::Operator) => Ok(Role::Operator),
        Ok(v1::Role::Admin) => Ok(Role::Admin),
        Ok(v1::Role::Node) => Ok(Role::Node),
        Ok(v1::Role::Unspecified) | Err(_) => {
            Err(field_error(field, "is none of viewer, submitter, operator, admin and node"))
        }
    }
}

/// A role as it is sent.
pub fn role_to_wire(role: Role) -> v1::Role {
    match role {
        Role::Viewer => v1::Role::Viewer,
        Role::Submitter => v1::Role::Submitter,
        Role::Operator => v1::Role::Operator,
        Role::Admin => v1::Role::Admin,
        Role::Node => v1::Role::Node,
    }
}

/// A token as it is shown.
pub fn token_to_wire(token: &Token) -> v1::Token {
    v1::Token {
        name: token.name.to_string(),
        role: role_to_wire(token.role).into(),
        created: Some(timestamp_to_wire(token.created)),
        expires: token.expires.map(timestamp_to_wire),
        uses_left: token.uses_left,
        run_as: token.run_as.as_ref().map(ToString::to_string).unwrap_or_default(),
        node_name: token.node.as_ref().map(ToString::to_string).unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_survive_and_numbers_that_are_none_are_refused() {
        for role in Role::ALL {
            assert_eq!(role_from_wire("role", role_to_wire(role).into()), Ok(role));
        }
        for number in [0, -1, 6, i32::MAX] {
            assert_eq!(role_from_wire("role", number).unwrap_err().field, "role");
        }
    }
}
