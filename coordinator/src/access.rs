//! Who calls, and whether they may. Secrets are hashed here and go no further.

pub(crate) mod layer;
mod local;
pub(crate) mod rules;

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Bound;

use http::{HeaderMap, header};
use muster_core::access::{Digest, Role, Token};
use muster_core::types::{Millis, NodeName, Owner, TokenName, UserName};
use muster_core::{Caller, Core, Rights, Write};
use muster_proto::convert;
use sha2::{Digest as _, Sha256};
use tonic::{Code, Status};
use x509_parser::extensions::GeneralName;

/// Begins what a person's token looks like.
pub(crate) const TOKEN_PREFIX: &str = "muster";
/// Begins what a join token looks like.
pub(crate) const JOIN_PREFIX: &str = "muster-join";
/// Begins the name of a node in its certificate, a URI, and where it is shut out.
pub(crate) const NODE_PREFIX: &str = "node:";
/// Longest token that is looked at: name, secret and authority are shorter.
const BEARER_BYTES_MAX: usize = 512;

/// By what callers are judged. All of it is stored.
#[derive(Debug, Default)]
pub(crate) struct Tokens {
    by_name: BTreeMap<TokenName, Token>,
    barred: BTreeMap<NodeName, Millis>,
}

impl Tokens {
    pub fn of(core: &Core) -> Self {
        Self { by_name: core.tokens().clone(), barred: core.barred().clone() }
    }

    /// Returns the tokens by name, after `after`.
    pub fn after(&self, after: Option<&TokenName>) -> impl Iterator<Item = &Token> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        self.by_name.range::<TokenName, _>((from, Bound::Unbounded)).map(|(_, token)| token)
    }

    /// Returns when the node was shut out, if it was.
    pub fn barred_at(&self, node: &NodeName) -> Option<Millis> {
        self.barred.get(node).copied()
    }

    /// Takes over a change, once it is stored.
    pub fn apply(&mut self, change: &Write) {
        match change {
            Write::Token(token) => drop(self.by_name.insert(token.name.clone(), (**token).clone())),
            Write::DeleteToken(name) => drop(self.by_name.remove(name)),
            Write::Barred(barred) => drop(self.barred.insert(barred.node.clone(), barred.at)),
            Write::DeleteBarred(node) => drop(self.barred.remove(node)),
            Write::Meta(_) | Write::Job(_) | Write::DeleteJob(_) | Write::Node(_) | Write::DeleteNode(_) => {}
        }
    }
}

/// Who calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Identity {
    /// Somebody on this machine, by its Unix socket or where nothing is encrypted.
    Local(Caller),
    /// Whoever has this token.
    Bearer(Box<Token>),
    /// A node with a certificate of ours.
    Node(NodeCertificate),
}

/// What a node's certificate says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NodeCertificate {
    pub node: NodeName,
    pub issued: Millis,
    pub expires: Millis,
}

impl Identity {
    /// Returns who it is where jobs have owners.
    pub fn caller(&self) -> Caller {
        match self {
            Self::Local(caller) => caller.clone(),
            Self::Bearer(token) => {
                let rights = if token.role.covers(Role::Operator) { Rights::All } else { Rights::Own };
                Caller { name: Owner::new(token.name.as_str()).ok(), rights }
            }
            Self::Node(own) => {
                let name = Owner::new(format!("{NODE_PREFIX}{}", own.node)).ok();
                Caller { name, rights: Rights::Own }
            }
        }
    }

    /// Whether it may speak for this node.
    pub fn check_node(&self, node: &NodeName) -> Result<(), Status> {
        match self {
            Self::Local(_) => Ok(()),
            Self::Node(own) if own.node == *node => Ok(()),
            Self::Node(own) => Err(denied(format!(
                "the certificate is that of node {}, which cannot speak for node {node}; start the daemon with --name {}, or \
                 with a data directory and a join token of its own",
                own.node, own.node
            ))),
            Self::Bearer(_) => Err(denied("only a node with its own certificate may do that")),
        }
    }

    /// As whom ranks run that it submits, who asked for this user.
    pub fn runs_as(&self, asked: Option<UserName>) -> Result<Option<UserName>, Status> {
        let allowed = match self {
            Self::Local(Caller { rights: Rights::All, .. }) => return Ok(asked),
            Self::Bearer(token) if token.role == Role::Admin => return Ok(asked),
            Self::Local(caller) => {
                // By its own name, if it wants to.
                let own = caller.name.as_ref().and_then(|name| UserName::new(name.as_str()).ok());
                own.filter(|_| asked.is_some())
            }
            Self::Bearer(token) => token.run_as.clone(),
            Self::Node(_) => None,
        };
        match (asked, allowed) {
            (None, allowed) => Ok(allowed),
            (Some(asked), Some(allowed)) if asked == allowed => Ok(Some(allowed)),
            (Some(asked), allowed) => {
                let may = match allowed {
                    Some(allowed) => format!("runs ranks as {allowed}, not as {asked}"),
                    None => format!("may not have ranks run as {asked}"),
                };
                Err(denied(format!(
                    "{self} {may}; `muster token create --role submitter --run-as {asked}` makes a token that does"
                )))
            }
        }
    }

    /// How it is named in audit lines.
    pub fn role(&self) -> &'static str {
        match self {
            Self::Local(_) => "local",
            Self::Bearer(token) => token.role.name(),
            Self::Node(_) => Role::Node.name(),
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local(Caller { name: Some(name), .. }) => write!(f, "user:{name}"),
            Self::Local(Caller { name: None, .. }) => f.write_str("local"),
            Self::Bearer(token) => write!(f, "token:{}", token.name),
            Self::Node(own) => write!(f, "{NODE_PREFIX}{}", own.node),
        }
    }
}

pub(crate) fn denied(message: impl Into<String>) -> Status {
    convert::refusal(Code::PermissionDenied, "NOT_PERMITTED", message)
}

fn unauthenticated(message: impl Into<String>) -> Status {
    convert::refusal(Code::Unauthenticated, "NOT_AUTHENTICATED", message)
}

/// Hash under which a secret is known.
pub(crate) fn hash(secret: &str) -> Digest {
    Digest::from(<[u8; 32]>::from(Sha256::digest(secret.as_bytes())))
}

/// Who calls over an encrypted connection: the bearer of a token, else the owner of the certificate.
pub(crate) fn identify(
    headers: &HeaderMap,
    certificate: Option<&[u8]>,
    tokens: &Tokens,
    now: Millis,
) -> Result<Identity, Status> {
    if let Some(value) = headers.get(header::AUTHORIZATION) {
        return bearer(value.to_str().unwrap_or_default(), tokens, now);
    }
    let Some(certificate) = certificate else {
        return Err(unauthenticated(
            "this needs a token: pass --token-file or MUSTER_TOKEN_FILE (grpcurl: -H 'authorization: Bearer …'); on the \
             coordinator's machine `muster token create --role submitter` makes one",
        ));
    };
    let own = read_certificate(certificate)
        .ok_or_else(|| unauthenticated("the certificate names no node; only nodes show certificates"))?;
    if own.expires <= now {
        return Err(unauthenticated(format!(
            "the certificate of node {} has expired; start it with a new join token, which `muster token create --role node` \
             makes",
            own.node
        )));
    }
    // A second is as fine as certificates tell.
    if tokens.barred.get(&own.node).is_some_and(|at| own.issued <= *at) {
        return Err(denied(format!(
            "the certificate of node {} was revoked; start it with a new join token, which `muster token create --role node` \
             makes",
            own.node
        )));
    }
    Ok(Identity::Node(own))
}

/// The name and the secret of a token as it is shown.
fn parse(text: &str) -> Option<(bool, TokenName, &str)> {
    let mut parts = text.split('.');
    let (prefix, name, secret) = (parts.next()?, parts.next()?, parts.next()?);
    let joins = match prefix {
        TOKEN_PREFIX => false,
        JOIN_PREFIX => true,
        _ => return None,
    };
    // A join token goes on with the authority, which concerns its bearer.
    let rest = parts.count();
    let whole = rest == 0 || joins && rest == 1;
    Some((joins, TokenName::new(name).ok()?, secret)).filter(|_| whole)
}

fn bearer(value: &str, tokens: &Tokens, now: Millis) -> Result<Identity, Status> {
    let shown = value.split_once(' ').filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
    let shown = shown.map(|(_, text)| text.trim()).filter(|text| text.len() <= BEARER_BYTES_MAX);
    let Some((joins, name, secret)) = shown.and_then(parse) else {
        return Err(unauthenticated(
            "the authorization header holds no token; it looks like \"Bearer muster.NAME.SECRET\", as `muster token create` \
             printed it",
        ));
    };
    // The same words for a name that is unknown and a secret that is wrong: neither can be found out.
    let unknown = || {
        unauthenticated(format!(
            "the token {name} is not known, was revoked or has expired; `muster token create` makes another one"
        ))
    };
    let token = tokens.by_name.get(&name).filter(|token| token.hash == hash(secret)).ok_or_else(unknown)?;
    if token.is_over(now) || joins != (token.role == Role::Node) {
        return Err(unknown());
    }
    Ok(Identity::Bearer(Box::new(token.clone())))
}

/// What a certificate says, whose signature was checked when the connection was made.
pub(crate) fn read_certificate(der: &[u8]) -> Option<NodeCertificate> {
    let (_, certificate) = x509_parser::parse_x509_certificate(der).ok()?;
    let names = certificate.subject_alternative_name().ok()??;
    let node = names.value.general_names.iter().find_map(|name| match name {
        GeneralName::URI(uri) => NodeName::new(uri.strip_prefix(NODE_PREFIX)?).ok(),
        _ => None,
    })?;
    let millis = |seconds: i64| Millis(u64::try_from(seconds).unwrap_or(0).saturating_mul(1000));
    let validity = certificate.validity();
    let issued = millis(validity.not_before.timestamp()).plus(crate::authority::CLOCKS_APART_MAX);
    Some(NodeCertificate { node, issued, expires: millis(validity.not_after.timestamp()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(name: &str, role: Role, expires: Option<Millis>) -> (TokenName, Token) {
        let name = TokenName::new(name).unwrap();
        let hash = hash(&format!("secret-{name}"));
        (
            name.clone(),
            Token {
                name,
                role,
                hash,
                created: Millis(0),
                expires,
                uses_left: None,
                run_as: None,
                node: None,
            },
        )
    }

    #[test]
    fn a_token_says_as_whom_ranks_run() {
        let user = |name: &str| UserName::new(name).unwrap();
        let bearer = |role, run_as: Option<&str>| {
            let (_, token) = token("t", role, None);
            Identity::Bearer(Box::new(Token { run_as: run_as.map(user), ..token }))
        };
        let listed = |name| {
            let name = Some(Owner::new(name).unwrap());
            Identity::Local(Caller { name, rights: Rights::OwnAndUnowned })
        };
        let of_ann = bearer(Role::Submitter, Some("ann"));
        let table = [
            (Identity::Local(Caller::trusted()), Some("bob"), Ok(Some("bob"))),
            (listed("bob"), Some("bob"), Ok(Some("bob"))),
            (listed("bob"), None, Ok(None)),
            (listed("ann"), Some("bob"), Err("user:ann runs ranks as ann, not as bob")),
            (bearer(Role::Admin, None), Some("bob"), Ok(Some("bob"))),
            (bearer(Role::Operator, None), None, Ok(None)),
            (bearer(Role::Operator, None), Some("bob"), Err("token:t may not have ranks run as bob")),
            (of_ann.clone(), None, Ok(Some("ann"))),
            (of_ann.clone(), Some("ann"), Ok(Some("ann"))),
            (of_ann, Some("bob"), Err("token:t runs ranks as ann, not as bob")),
        ];
        for (identity, asked, expected) in table {
            match (identity.runs_as(asked.map(user)), expected) {
                (Ok(found), Ok(expected)) => assert_eq!(found, expected.map(user), "{identity} {asked:?}"),
                (Err(status), Err(words)) => assert!(status.message().contains(words), "{status}"),
                (found, expected) => panic!("{identity} {asked:?}: {found:?}, expected {expected:?}"),
            }
        }
    }

    #[test]
    fn only_a_whole_and_living_token_says_who_calls() {
        let now = Millis(1000);
        let by_name = BTreeMap::from([
            token("a", Role::Viewer, None),
            token("old", Role::Admin, Some(now)),
            token("join", Role::Node, None),
        ]);
        let tokens = Tokens { by_name, barred: BTreeMap::new() };
        let table = [
            ("Bearer muster.a.secret-a", Ok("token:a")),
            ("bearer muster.a.secret-a", Ok("token:a")),
            ("Bearer muster-join.join.secret-join", Ok("token:join")),
            ("Bearer muster-join.join.secret-join.aa", Ok("token:join")),
            ("Bearer muster-join.join.secret-join.aa.bb", Err("holds no token")),
            ("Bearer muster.a.secret-a.aa", Err("holds no token")),
            ("Bearer muster.join.secret-join", Err("is not known")),
            ("Bearer muster-join.a.secret-a", Err("is not known")),
            ("Bearer muster.a.secret-b", Err("is not known")),
            ("Bearer muster.b.secret-b", Err("is not known")),
            ("Bearer muster.old.secret-old", Err("is not known")),
            ("Basic muster.a.secret-a", Err("holds no token")),
            ("muster.a.secret-a", Err("holds no token")),
            ("Bearer ", Err("holds no token")),
            ("", Err("holds no token")),
        ];
        for (value, expected) in table {
            let mut headers = HeaderMap::new();
            headers.insert(header::AUTHORIZATION, value.parse().unwrap());
            match (identify(&headers, None, &tokens, now), expected) {
                (Ok(identity), Ok(who)) => assert_eq!(identity.to_string(), who, "{value}"),
                (Err(status), Err(words)) => {
                    assert_eq!(status.code(), Code::Unauthenticated, "{value}");
                    assert!(status.message().contains(words), "{value}: {status}");
                    assert!(!status.message().contains("secret-"), "{value}: {status}");
                }
                (found, expected) => panic!("{value}: {found:?}, expected {expected:?}"),
            }
        }
        let nobody = identify(&HeaderMap::new(), None, &tokens, now).unwrap_err();
        assert!(nobody.message().contains("--token-file"), "{nobody}");
        let junk = identify(&HeaderMap::new(), Some(b"junk"), &tokens, now).unwrap_err();
        assert_eq!(junk.code(), Code::Unauthenticated);
    }
}
