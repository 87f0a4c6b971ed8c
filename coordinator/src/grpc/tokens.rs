//! TokenService. Secrets are made here, shown once, and go no further than their hash.

use muster_core::access::{NewToken, Role, Token, hex};
use muster_core::types::{Millis, NodeName, TokenName, UserName};
use muster_core::{Input, Reply};
use muster_proto::convert::{self, FieldError, field_error};
use muster_proto::v1::{self, token_service_server::TokenService};
use tokio_rustls::rustls::crypto::ring::default_provider;
use tonic::{Request, Response, Status};
use tracing::warn;

use super::{Api, unexpected_reply};
use crate::access::{JOIN_PREFIX, NODE_PREFIX, TOKEN_PREFIX, denied, hash};
use crate::audit::subject as audit;

/// Tokens on a page.
const PAGE_MAX: u32 = 1000;
/// Bytes of a secret.
const SECRET_BYTES: usize = 32;
/// Bytes of a name that is made.
const NAME_BYTES: usize = 5;
/// How long a join token is good by default.
const JOIN_LIFE: Millis = Millis::from_secs(3600);
/// Longest life of a token.
const LIFE_MAX: Millis = Millis::from_secs(3653 * 24 * 3600);
/// Most certificates for one join token: as many as there may be nodes.
const USES_MAX: u32 = 100_000;

fn random<const N: usize>() -> Result<String, Status> {
    let mut bytes = [0; N];
    let filled = default_provider().secure_random.fill(&mut bytes);
    filled.map_err(|_| Status::internal("this machine gives no random numbers"))?;
    Ok(hex(&bytes))
}

/// What is asked for, but for its secret and a name that is to be made.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub name: Option<TokenName>,
    pub role: Role,
    pub life: Option<Millis>,
    pub uses: Option<u32>,
    pub run_as: Option<UserName>,
    pub node: Option<NodeName>,
}

pub(crate) fn checked_token(wire: v1::CreateTokenRequest) -> Result<Wanted, FieldError> {
    let role = convert::role_from_wire("role", wire.role)?;
    let joins = role == Role::Node;
    let name = (!wire.name.is_empty()).then(|| TokenName::new(wire.name)).transpose();
    let default = if joins { Some(JOIN_LIFE) } else { None };
    let life = match &wire.expires_in {
        None => default,
        Some(_) => Some(convert::span_from_wire("expires_in", wire.expires_in.as_ref(), Millis(0))?),
    };
    if life.is_some_and(|life| life == Millis(0) || life > LIFE_MAX) {
        return Err(field_error("expires_in", "is nothing, or longer than ten years"));
    }
    if wire.uses > 0 && !joins {
        return Err(field_error(
            "uses",
            "is for join tokens, which have the role node; others are not used up",
        ));
    }
    if wire.uses > USES_MAX {
        return Err(field_error("uses", format!("is {}; at most {USES_MAX} are possible", wire.uses)));
    }
    let uses = joins.then_some(wire.uses.max(1));
    let run_as = (!wire.run_as.is_empty()).then(|| UserName::new(wire.run_as)).transpose();
    let run_as = run_as.map_err(|why| field_error("run_as", why))?;
    if run_as.is_some() && !matches!(role, Role::Submitter | Role::Operator) {
        let why =
            "is for submitters and operators; viewers and nodes submit nothing, and admins may name anybody";
        return Err(field_error("run_as", why));
    }
    let node = (!wire.node_name.is_empty()).then(|| NodeName::new(wire.node_name)).transpose();
    let node = node.map_err(|why| field_error("node_name", why))?;
    if node.is_some() && !joins {
        return Err(field_error("node_name", "is for join tokens, which have the role node"));
    }
    let name = name.map_err(|why| field_error("name", why))?;
    Ok(Wanted { name, role, life, uses, run_as, node })
}

#[tonic::async_trait]
impl TokenService for Api {
    async fn create_token(
        &self,
        request: Request<v1::CreateTokenRequest>,
    ) -> Result<Response<v1::CreateTokenResponse>, Status> {
        let made = audit::tell(&request);
        let wanted =
            checked_token(request.into_inner()).map_err(|error| convert::invalid_argument(&[error]))?;
        let Wanted { name, role, life, uses, run_as, node } = wanted;
        let pin = if role == Role::Node { Some(self.authority()?.pin()?) } else { None };
        let name = match name {
            Some(name) => name,
            None => TokenName::new(random::<NAME_BYTES>()?).map_err(Status::internal)?,
        };
        made(name.as_str());
        let secret = random::<SECRET_BYTES>()?;
        let new = NewToken { name, role, hash: hash(&secret), life, uses, run_as, node };
        let token = self.token(Input::CreateToken(Box::new(new))).await?;
        let secret = match pin {
            Some(pin) => format!("{JOIN_PREFIX}.{}.{secret}.{pin}", token.name),
            None => format!("{TOKEN_PREFIX}.{}.{secret}", token.name),
        };
        Ok(Response::new(v1::CreateTokenResponse { token: Some(convert::token_to_wire(&token)), secret }))
    }

    async fn list_tokens(
        &self,
        request: Request<v1::ListTokensRequest>,
    ) -> Result<Response<v1::ListTokensResponse>, Status> {
        let v1::ListTokensRequest { page_size, page_token } = request.into_inner();
        let invalid = |why| convert::invalid_argument(&[field_error("page_token", why)]);
        let after = (!page_token.is_empty()).then(|| TokenName::new(page_token)).transpose();
        let after = after.map_err(invalid)?;
        let size = if page_size == 0 { PAGE_MAX } else { page_size.min(PAGE_MAX) } as usize;
        let driver = self.driver()?;
        let mut tokens: Vec<Token> = driver.tokens().after(after.as_ref()).take(size + 1).cloned().collect();
        driver.confirm()?;
        let more = tokens.len() > size;
        tokens.truncate(size);
        let last = tokens.last().filter(|_| more).map(|token| token.name.to_string());
        let tokens = tokens.iter().map(convert::token_to_wire).collect();
        Ok(Response::new(v1::ListTokensResponse { tokens, next_page_token: last.unwrap_or_default() }))
    }

    async fn revoke_token(
        &self,
        request: Request<v1::RevokeTokenRequest>,
    ) -> Result<Response<v1::RevokeTokenResponse>, Status> {
        let name = request.into_inner().name;
        let Some(node) = name.strip_prefix(NODE_PREFIX) else {
            let token = self.token(Input::RevokeToken { name }).await?;
            return Ok(Response::new(v1::RevokeTokenResponse {
                token: Some(convert::token_to_wire(&token)),
            }));
        };
        let node =
            NodeName::new(node).map_err(|why| convert::invalid_argument(&[field_error("name", why)]))?;
        let driver = self.driver()?;
        match driver.request(Input::BarNode(node.clone())).await? {
            Reply::Barred(_) => {}
            Reply::Job(_) | Reply::Node(_) | Reply::Session(_) | Reply::Token(_) => {
                return Err(unexpected_reply());
            }
        }
        // Whoever shows one of them from now on is refused; this is who has done so before.
        if let Some(link) = driver.links().get(&node) {
            warn!(%node, "the node was shut out, and its session ends");
            link.close(denied(format!("the certificate of node {node} was revoked")));
        }
        Ok(Response::new(v1::RevokeTokenResponse { token: None }))
    }
}

impl Api {
    /// Makes a change of a token.
    pub(super) async fn token(&self, input: Input) -> Result<Token, Status> {
        match self.driver()?.request(input).await? {
            Reply::Token(token) => Ok(*token),
            Reply::Job(_) | Reply::Node(_) | Reply::Session(_) | Reply::Barred(_) => Err(unexpected_reply()),
        }
    }
}
