//! Who may do what: the tokens that callers show, and the role of each.
//!
//! Secrets never come here: a token is known by the hash of its secret.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::core::Core;
use crate::effects::{Effects, Refusal, Reply};
use crate::types::{Millis, NodeName, TokenName, UserName};

/// Most tokens: one for each person, program and node that has its own, and not a record per call of something that makes them
/// in a loop.
pub const TOKENS_MAX: usize = 10_000;
/// Longest life of a node's certificate. A node that was shut out need not be remembered for longer.
pub const CERTIFICATE_LIFE_MAX: Millis = Millis::from_secs(30 * 24 * 3600);
/// Most nodes that are shut out at once: as many as there may be.
pub const BARRED_MAX: usize = 100_000;

/// What a caller may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Reads, but for what is for the owner of a job alone.
    Viewer,
    /// The same, and submits jobs and cancels its own.
    Submitter,
    /// The same for every job, and cordons and drains nodes.
    Operator,
    /// The same, and makes and revokes tokens.
    Admin,
    /// A token by which a node gets its certificate, and nothing else.
    Node,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Viewer, Self::Submitter, Self::Operator, Self::Admin, Self::Node];

    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Submitter => "submitter",
            Self::Operator => "operator",
            Self::Admin => "admin",
            Self::Node => "node",
        }
    }

    /// Whether its bearer may do what needs the other one. Each of people's roles may do what those before it may; what a
    /// node does is for nodes alone, and a node does nothing else.
    pub fn covers(self, needed: Self) -> bool {
        let rank = |role| match role {
            Self::Viewer => Some(0),
            Self::Submitter => Some(1),
            Self::Operator => Some(2),
            Self::Admin => Some(3),
            Self::Node => None,
        };
        match (rank(self), rank(needed)) {
            (Some(has), Some(needs)) => has >= needs,
            (None, None) => true,
            (Some(_), None) | (None, Some(_)) => false,
        }
    }
}

/// SHA-256 of a secret, in hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct Digest(String);

impl Digest {
    /// Checks that it is one.
    pub fn new(text: impl Into<String>) -> Result<Self, String> {
        let text = text.into();
        let is_hex = text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        if text.len() == 64 && is_hex { Ok(Self(text)) } else { Err("is no SHA-256 digest".to_owned()) }
    }
}

impl From<[u8; 32]> for Digest {
    fn from(hash: [u8; 32]) -> Self {
        Self(hex(&hash))
    }
}

/// Hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        // Writing to a text cannot fail.
        write!(text, "{byte:02x}").ok();
        text
    })
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for Digest {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Self::new(text)
    }
}

/// A token, without its secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    /// Its name, by which it is revoked and which logs show.
    pub name: TokenName,
    /// What its bearer may do.
    pub role: Role,
    /// Hash of the secret.
    pub hash: Digest,
    /// When it was made.
    pub created: Millis,
    /// From when on it is refused; never, if there is none.
    pub expires: Option<Millis>,
    /// How often it can be spent yet; as often as one likes, if there is no number. Only tokens of nodes are spent.
    #[serde(default)]
    pub uses_left: Option<u32>,
    /// User of the nodes as whom ranks run that its bearer submits.
    #[serde(default)]
    pub run_as: Option<UserName>,
    /// The only node that may join by it, if there is one.
    #[serde(default)]
    pub node: Option<NodeName>,
}

impl Token {
    /// Returns whether this node may join by it.
    pub fn is_for(&self, node: &NodeName) -> bool {
        self.node.as_ref().is_none_or(|bound| bound == node)
    }

    /// Whether its time is over.
    pub fn is_over(&self, now: Millis) -> bool {
        self.expires.is_some_and(|at| at <= now)
    }
}

/// A node whose certificates are refused if they were issued then or before: one of them may have been stolen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Barred {
    /// The node.
    pub node: NodeName,
    /// When it was shut out.
    pub at: Millis,
}

/// What is asked for where a token is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewToken {
    /// Its name.
    pub name: TokenName,
    /// What its bearer may do.
    pub role: Role,
    /// Hash of the secret.
    pub hash: Digest,
    /// How long it is good; for ever, if it is not said.
    pub life: Option<Millis>,
    /// How often it can be spent; as often as one likes, if it is not said.
    pub uses: Option<u32>,
    /// As whom ranks run that its bearer submits; as whom the nodes have for that, if it is not said.
    pub run_as: Option<UserName>,
    /// The only node that may join by it; any, if it is not said.
    pub node: Option<NodeName>,
}

impl Core {
    /// Every token, by name.
    pub fn tokens(&self) -> &BTreeMap<TokenName, Token> {
        &self.tokens
    }

    pub(crate) fn create_token(
        &mut self,
        now: Millis,
        new: NewToken,
        fx: &mut Effects,
    ) -> Result<Reply, Refusal> {
        self.forget_tokens(now, fx);
        let NewToken { name, role, hash, life, uses, run_as, node } = new;
        if self.tokens.contains_key(&name) {
            return Err(Refusal::TokenExists(name));
        }
        if self.tokens.len() >= TOKENS_MAX {
            return Err(Refusal::TooManyTokens);
        }
        let expires = life.map(|life| now.plus(life));
        let token =
            Token { name: name.clone(), role, hash, created: now, expires, uses_left: uses, run_as, node };
        fx.stored_tokens.insert(name.clone());
        self.tokens.insert(name, token.clone());
        Ok(Reply::Token(Box::new(token)))
    }

    pub(crate) fn revoke_token(&mut self, name: &str, fx: &mut Effects) -> Result<Reply, Refusal> {
        let token = TokenName::new(name).ok().and_then(|name| self.tokens.remove(&name));
        let token = token.ok_or_else(|| Refusal::NoToken(name.chars().take(64).collect()))?;
        fx.stored_tokens.insert(token.name.clone());
        Ok(Reply::Token(Box::new(token)))
    }

    /// A node gets a certificate for a token: it is spent before the certificate leaves.
    pub(crate) fn spend_token(
        &mut self,
        now: Millis,
        name: &TokenName,
        hash: &Digest,
        fx: &mut Effects,
    ) -> Result<Reply, Refusal> {
        let token = self.tokens.get_mut(name).filter(|token| token.hash == *hash && !token.is_over(now));
        let token = token.ok_or_else(|| Refusal::NoToken(name.to_string()))?;
        if let Some(left) = token.uses_left {
            token.uses_left = Some(left.checked_sub(1).ok_or_else(|| Refusal::TokenUsedUp(name.clone()))?);
            fx.stored_tokens.insert(name.clone());
        }
        Ok(Reply::Token(Box::new(token.clone())))
    }

    /// Nodes that were shut out, and when.
    pub fn barred(&self) -> &BTreeMap<NodeName, Millis> {
        &self.barred
    }

    /// The certificates that a node has are refused from now on; with a new token it gets another.
    pub(crate) fn bar_node(
        &mut self,
        now: Millis,
        node: NodeName,
        fx: &mut Effects,
    ) -> Result<Reply, Refusal> {
        self.barred.retain(|node, at| {
            let kept = now.since(*at) <= CERTIFICATE_LIFE_MAX;
            if !kept {
                fx.stored_barred.insert(node.clone());
            }
            kept
        });
        if self.barred.len() >= BARRED_MAX && !self.barred.contains_key(&node) {
            return Err(Refusal::TooManyBarred);
        }
        self.barred.insert(node.clone(), now);
        fx.stored_barred.insert(node.clone());
        Ok(Reply::Barred(Barred { node, at: now }))
    }

    /// Those whose time is over go when another one is made.
    fn forget_tokens(&mut self, now: Millis, fx: &mut Effects) {
        self.tokens.retain(|name, token| {
            let over = token.is_over(now);
            if over {
                fx.stored_tokens.insert(name.clone());
            }
            !over
        });
    }
}
