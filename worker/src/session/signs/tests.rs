//! What counts as proof that no coordinator leads.

use super::*;

#[tokio::test]
async fn all_coordinators_must_be_gone_as_of_the_oldest_sign() {
    let (sender, mut events) = mpsc::channel(8);
    let mut signs = signs(&["http://a:1", "http://b:1"], sender);
    let mut found = Vec::new();
    for (current, gone) in [(0, Some(5)), (1, None), (1, Some(9)), (0, None), (1, Some(11)), (0, Some(12))] {
        signs.current = Some(current);
        let witness = Witness::Word(current.to_string());
        signs.note(gone.map(|at| Sign { at: Millis(at), witness, coordinators: 2 })).await;
        found.push(match events.try_recv() {
            Ok(Event::CoordinatorGone { at }) => Some(at.0),
            _ => None,
        });
    }
    assert_eq!(found, [None, None, Some(5), None, None, Some(11)]);
}

fn signs(urls: &[&str], events: mpsc::Sender<Event>) -> Signs {
    let dir = tempfile::tempdir().unwrap();
    let known = Known::load(dir.path().to_owned(), "boot".to_owned());
    let newest = Newest::load(dir.path().to_owned());
    let urls = urls.iter().copied().map(str::to_owned).collect();
    let config = Config::new(urls, muster_core::types::NodeName::new("n1").unwrap(), dir.path().to_owned());
    Signs::new(&config, known, newest, events, watch::channel(None).1)
}

#[tokio::test]
async fn whether_anybody_is_there_is_asked_when_ranks_are_about_to_be_stopped() {
    let (sender, _events) = mpsc::channel(8);
    let in_a_lease = boot_now().plus(Millis::from_secs(10));
    let asks_in = |urls: &[&str], fenced_at| {
        let mut signs = signs(urls, sender.clone());
        signs.fenced_at = watch::channel(fenced_at).1;
        signs.asks_in().map(|left| left.as_secs_f64().round())
    };
    let one = ["http://a:1"];
    assert_eq!(asks_in(&one, None), None, "no rank lives by it");
    let left = asks_in(&one, Some(in_a_lease)).unwrap();
    assert!((7.0..=8.0).contains(&left), "a quarter of a lease before that: {left}");
    assert_eq!(asks_in(&one, Some(boot_now())), Some(0.0));
    assert_eq!(asks_in(&["http://a:1", "http://b:1"], None), Some(0.0), "another one may lead");
}

fn reached(peer: SocketAddr) -> Reached {
    Reached { peer: Some(peer), ..Reached::default() }
}

/// Which is asked, at which address, what it says, and whether nobody leads then.
type Answers<'a> = &'a [(usize, SocketAddr, NotLeader, bool)];

#[tokio::test]
async fn coordinators_that_do_not_lead_must_all_say_so_and_each_for_itself() {
    let at: [SocketAddr; 3] = [1, 2, 3].map(|host| SocketAddr::from(([10, 0, 0, host], 7070)));
    let says = |name: &str, accepted_at: SocketAddr, coordinators| NotLeader {
        coordinator: name.to_owned(),
        accepted_at: accepted_at.to_string(),
        coordinators,
        ..NotLeader::default()
    };
    let cases: [(&str, Answers<'_>); 4] = [
        ("two of two", &[(0, at[0], says("a", at[0], 2), false), (1, at[1], says("b", at[1], 2), true)]),
        ("two of three", &[(0, at[0], says("a", at[0], 3), false), (1, at[1], says("b", at[1], 3), false)]),
        ("one twice", &[(0, at[0], says("a", at[0], 2), false), (1, at[1], says("a", at[1], 2), false)]),
        ("behind a proxy", &[(0, at[0], says("a", at[0], 2), false), (1, at[2], says("b", at[1], 2), false)]),
    ];
    for (case, answers) in cases {
        let (sender, mut events) = mpsc::channel(8);
        let mut signs = signs(&["http://a:1", "http://b:1"], sender);
        for (index, peer, says, nobody) in answers {
            signs.current = Some(*index);
            let reached = reached(*peer);
            signs.does_not_lead(Millis(7), &reached, says).await;
            assert_eq!(events.try_recv().is_ok(), *nobody, "{case}");
        }
    }
    // One that was named by another says nothing of those that were configured.
    let (sender, mut events) = mpsc::channel(8);
    let mut signs = signs(&["http://a:1"], sender);
    signs.current = None;
    let reached = reached(at[0]);
    signs.does_not_lead(Millis(7), &reached, &says("a", at[0], 1)).await;
    assert!(events.try_recv().is_err());
}

#[tokio::test]
async fn a_port_without_a_listener_refuses_and_one_with_a_silent_one_does_not() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let url = format!("http://{address}");
    let endpoint = Endpoint::from_shared(url.clone()).unwrap();
    let (sender, mut events) = mpsc::channel(8);
    let mut signs = signs(&[&url], sender);
    signs.lease = Millis(800);
    assert_eq!(signs.ask_anew(&endpoint).await, Answer::Unreachable, "something may stand between");
    let joined = |accepted_at: &str| v1::JoinResponse {
        accepted_at: accepted_at.to_owned(),
        boot_id: "boot".to_owned(),
        ..v1::JoinResponse::default()
    };
    let reached = reached(address);
    signs.joined(&reached, &joined(&address.to_string())).await.unwrap();
    assert_eq!(signs.ask_anew(&endpoint).await, Answer::Silence);
    drop(listener);
    assert_eq!(signs.ask_anew(&endpoint).await, Answer::Unreachable);
    let (_, refused) = connect(&endpoint).await;
    signs.refused(Millis(7), &refused).await;
    assert!(matches!(events.try_recv(), Ok(Event::CoordinatorGone { at: Millis(7) })));
    signs.joined(&reached, &joined("10.0.0.1:7070")).await.unwrap();
    signs.refused(Millis(9), &refused).await;
    assert!(events.try_recv().is_err(), "a tunnel's end refuses for its own reasons");
}

#[tokio::test]
async fn a_handshake_that_is_not_answered_is_silence() {
    let dir = tempfile::tempdir().unwrap();
    let authority = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    std::fs::write(dir.path().join("ca.crt"), authority.cert.pem()).unwrap();
    let trust = Trust::from_file(&dir.path().join("ca.crt")).unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let url = format!("https://{address}");
    let endpoint = trust.endpoint(&url).unwrap();
    let (sender, _events) = mpsc::channel(8);
    let mut signs = signs(&[&url], sender);
    signs.lease = Millis(800);
    assert_eq!(signs.ask_anew(&endpoint).await, Answer::Unreachable, "something may stand between");
    let joined = v1::JoinResponse {
        accepted_at: address.to_string(),
        boot_id: "boot".to_owned(),
        ..v1::JoinResponse::default()
    };
    signs.joined(&reached(address), &joined).await.unwrap();
    assert_eq!(signs.ask_anew(&endpoint).await, Answer::Silence);
    // One that breaks is none.
    std::thread::spawn(move || while listener.accept().is_ok() {});
    assert_eq!(signs.ask_anew(&endpoint).await, Answer::Unreachable);
}
