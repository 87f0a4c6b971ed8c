//! Tokens, from their making to their end.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use muster_core::access::{CERTIFICATE_LIFE_MAX, Digest, NewToken, Role, TOKENS_MAX, Token};
use muster_core::types::{Millis, NodeName, TokenName};
use muster_core::{Input, Refusal, Reply};

use crate::world::World;

fn create(world: &mut World, name: &str, life: Option<Millis>) -> Result<Token, Refusal> {
    let hash = Digest::new(format!("{:064x}", name.len())).unwrap();
    let new = NewToken {
        name: TokenName::new(name).unwrap(),
        role: Role::Viewer,
        hash,
        life,
        uses: None,
        run_as: None,
        node: None,
    };
    token(world.input(Input::CreateToken(Box::new(new))).unwrap())
}

fn revoke(world: &mut World, name: &str) -> Result<Token, Refusal> {
    token(world.input(Input::RevokeToken { name: name.to_owned() }).unwrap())
}

fn token(reply: Result<Reply, Refusal>) -> Result<Token, Refusal> {
    match reply? {
        Reply::Token(token) => Ok(*token),
        other => panic!("{other:?}"),
    }
}

fn names(world: &World) -> Vec<&str> {
    world.core.tokens().keys().map(TokenName::as_str).collect()
}

#[test]
fn a_token_is_made_once_and_revoked_once() {
    let mut world = World::default();
    let made = create(&mut world, "a", None).unwrap();
    assert_eq!((made.created, made.expires, made.is_over(Millis(u64::MAX))), (world.now, None, false));
    assert_eq!(create(&mut world, "a", None), Err(Refusal::TokenExists(made.name.clone())));
    assert_eq!(names(&world), ["a"]);
    assert_eq!(revoke(&mut world, "a"), Ok(made));
    for unknown in ["a", "b", "", "no name", &"x".repeat(1 << 20)] {
        let refused = revoke(&mut world, unknown).unwrap_err();
        assert!(matches!(refused, Refusal::NoToken(_)) && refused.to_string().len() < 256, "{refused}");
    }
    create(&mut world, "a", None).unwrap();
}

#[test]
fn a_token_is_good_until_it_expires_and_is_forgotten_with_the_next() {
    let mut world = World::default();
    let life = Millis::from_secs(60);
    let short = create(&mut world, "short", Some(life)).unwrap();
    let end = world.now.plus(life);
    for (at, over) in [(world.now, false), (Millis(end.0 - 1), false), (end, true), (end.plus(life), true)] {
        assert_eq!(short.is_over(at), over, "{at:?}");
    }
    let never = create(&mut world, "far", Some(Millis(u64::MAX))).unwrap();
    assert_eq!(never.expires, Some(Millis(u64::MAX)), "no span is too long");
    world.now = end;
    assert_eq!(names(&world), ["far", "short"]);
    create(&mut world, "next", None).unwrap();
    assert_eq!(names(&world), ["far", "next"]);
    world.restart_coordinator();
    assert_eq!(names(&world), ["far", "next"], "it is gone from the store too");
}

#[test]
fn there_are_so_many_and_no_more() {
    let mut world = World::default();
    create(&mut world, "first", Some(Millis(1))).unwrap();
    for index in 1..TOKENS_MAX {
        create(&mut world, &format!("t{index}"), None).unwrap();
    }
    assert_eq!(create(&mut world, "more", None), Err(Refusal::TooManyTokens));
    assert!(Refusal::TooManyTokens.to_string().contains("10000 tokens"));
    world.now = world.now.plus(Millis(1));
    create(&mut world, "more", None).expect("one that is over makes room");
    assert_eq!(create(&mut world, "most", None), Err(Refusal::TooManyTokens));
    revoke(&mut world, "t7").unwrap();
    create(&mut world, "most", None).unwrap();
}

#[test]
fn a_restart_forgets_nothing_and_brings_nothing_back() {
    let mut world = World::default();
    let kept = create(&mut world, "kept", Some(Millis::from_secs(3600))).unwrap();
    create(&mut world, "revoked", None).unwrap();
    revoke(&mut world, "revoked").unwrap();
    world.restart_coordinator();
    assert_eq!(world.core.tokens().values().collect::<Vec<_>>(), [&kept]);
    assert!(matches!(create(&mut world, "kept", None), Err(Refusal::TokenExists(_))));
}

#[test]
fn a_join_token_is_spent_as_often_as_it_says_also_over_restarts() {
    let mut world = World::default();
    let [hash, wrong] = [1, 2].map(|n| Digest::new(format!("{n:064x}")).unwrap());
    let name = TokenName::new("join").unwrap();
    let life = Some(Millis::from_secs(60));
    let new = NewToken {
        name: name.clone(),
        role: Role::Node,
        hash: hash.clone(),
        life,
        uses: Some(2),
        run_as: None,
        node: None,
    };
    world.input(Input::CreateToken(Box::new(new))).unwrap().unwrap();
    let spend = |world: &mut World, hash: &Digest| {
        let input = Input::SpendToken { name: name.clone(), hash: hash.clone() };
        token(world.input(input).unwrap()).map(|token| token.uses_left)
    };
    let unknown = Err(Refusal::NoToken("join".to_owned()));
    assert_eq!(spend(&mut world, &wrong), unknown, "a wrong secret spends nothing");
    assert_eq!(spend(&mut world, &hash), Ok(Some(1)));
    world.restart_coordinator();
    assert_eq!(spend(&mut world, &hash), Ok(Some(0)));
    world.restart_coordinator();
    assert_eq!(spend(&mut world, &hash), Err(Refusal::TokenUsedUp(name.clone())));
    world.now = world.now.plus(Millis::from_secs(60));
    assert_eq!(spend(&mut world, &hash), unknown, "its time is over");
}

#[test]
fn a_node_is_shut_out_for_as_long_as_its_certificates_can_live() {
    let mut world = World::default();
    let node = |name: &str| NodeName::new(name).unwrap();
    let bar = |world: &mut World, name: &str| world.input(Input::BarNode(node(name))).unwrap().unwrap();
    bar(&mut world, "n1");
    let first = world.now;
    world.now = world.now.plus(CERTIFICATE_LIFE_MAX);
    bar(&mut world, "n2");
    world.restart_coordinator();
    assert_eq!(world.core.barred().get(&node("n1")), Some(&first));
    world.now = world.now.plus(Millis(1));
    bar(&mut world, "n3");
    world.restart_coordinator();
    let names: Vec<_> = world.core.barred().keys().map(NodeName::as_str).collect();
    assert_eq!(names, ["n2", "n3"]);
}

#[test]
fn roles_cover_one_another_as_they_say() {
    let covered = |role: Role| -> Vec<&str> {
        Role::ALL.into_iter().filter(|needed| role.covers(*needed)).map(Role::name).collect()
    };
    let table: [(Role, &[&str]); 5] = [
        (Role::Viewer, &["viewer"]),
        (Role::Submitter, &["viewer", "submitter"]),
        (Role::Operator, &["viewer", "submitter", "operator"]),
        (Role::Admin, &["viewer", "submitter", "operator", "admin"]),
        (Role::Node, &["node"]),
    ];
    for (role, expected) in table {
        assert_eq!(covered(role), expected, "{}", role.name());
    }
}
