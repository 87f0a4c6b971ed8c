//! What callers show, and what nodes and admins ask for: tokens, certificates, and requests for them.

use http::{HeaderMap, HeaderValue, header};
use muster_core::access::{NewToken, Role};
use muster_core::types::{NodeName, TokenName};
use muster_core::{Input, Reply};
use muster_proto::v1;
use prost::Message;
use rcgen::{CertificateParams, KeyPair, SanType};

use super::cluster::{Cluster, NOW};
use super::{accepted, accepted_field, message};
use crate::access::{Tokens, hash, identify, read_certificate};
use crate::authority::checked_request;
use crate::grpc::tokens::{Wanted, checked_token};

pub(super) fn create_token(bytes: &[u8]) {
    let Some(wanted) = message(bytes).and_then(|wire| accepted_field(checked_token(wire))) else { return };
    let joins = wanted.role == Role::Node;
    assert!(wanted.uses.is_some() == joins && (!joins || wanted.life.is_some()), "join tokens end");
    let mut cluster = Cluster::new();
    let name = wanted.name.unwrap_or_else(|| TokenName::new("made").expect("it is valid"));
    let hash = hash("secret");
    let Wanted { role, life, uses, run_as, node, .. } = wanted;
    let new = NewToken { name, role, hash: hash.clone(), life, uses, run_as, node };
    if let Some(Reply::Token(token)) = cluster.feed(Input::CreateToken(Box::new(new))) {
        assert!(!token.is_over(NOW), "it is good at first");
        cluster.feed(Input::SpendToken { name: token.name.clone(), hash });
        cluster.feed(Input::RevokeToken { name: token.name.to_string() });
    }
    cluster.check();
}

pub(super) fn create_token_samples() -> Vec<Vec<u8>> {
    let expires_in = Some(prost_types::Duration { seconds: 60, nanos: 0 });
    let join = v1::CreateTokenRequest {
        role: v1::Role::Node.into(),
        expires_in,
        uses: 3,
        node_name: "n1".to_owned(),
        ..Default::default()
    };
    let of_ann = v1::CreateTokenRequest {
        role: v1::Role::Submitter.into(),
        run_as: "ann".to_owned(),
        ..Default::default()
    };
    let viewer =
        v1::CreateTokenRequest { role: v1::Role::Viewer.into(), name: "a".to_owned(), ..Default::default() };
    [join, viewer, of_ann].iter().map(Message::encode_to_vec).collect()
}

const BEARER: &str = "Bearer muster.people.secret";

/// Who shows anything else than the one token is nobody.
pub(super) fn bearer(bytes: &[u8]) {
    let Ok(value) = HeaderValue::from_bytes(bytes) else { return };
    let mut cluster = Cluster::new();
    let name = TokenName::new("people").expect("it is valid");
    let new = NewToken {
        name,
        role: Role::Viewer,
        hash: hash("secret"),
        life: None,
        uses: None,
        run_as: None,
        node: None,
    };
    cluster.feed(Input::CreateToken(Box::new(new)));
    let headers: HeaderMap = [(header::AUTHORIZATION, value)].into_iter().collect();
    if accepted(identify(&headers, None, &Tokens::of(&cluster.core), NOW)).is_some() {
        let text = String::from_utf8_lossy(bytes);
        assert!(text.trim().ends_with("muster.people.secret"), "{text}");
    }
}

pub(super) fn bearer_samples() -> Vec<Vec<u8>> {
    [BEARER, "Bearer muster-join.people.secret.00", "Basic YTpi"].map(|text| text.as_bytes().to_vec()).into()
}

fn params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI("node:node-1".try_into().expect("it is valid"))];
    params
}

pub(super) fn client_certificate(bytes: &[u8]) {
    if let Some(read) = read_certificate(bytes) {
        NodeName::new(read.node.as_str()).expect("a name that was checked");
    }
}

pub(super) fn client_certificate_samples() -> Vec<Vec<u8>> {
    let key = KeyPair::generate().expect("there is randomness");
    vec![params().self_signed(&key).expect("it can be signed").der().to_vec()]
}

pub(super) fn signing_request(bytes: &[u8]) {
    accepted(checked_request(bytes));
}

pub(super) fn signing_request_samples() -> Vec<Vec<u8>> {
    let key = KeyPair::generate().expect("there is randomness");
    vec![params().serialize_request(&key).expect("it can be signed").der().to_vec()]
}
