//! Which failures are final.

use super::*;

#[test]
fn only_a_refused_join_ends_the_daemon() {
    let held = |seconds| Some(Duration::from_secs(seconds));
    let join = |code| Failure::Join(Status::new(code, ""));
    let session = |code| Failure::Session(Status::new(code, ""));
    let table = [
        (join(Code::Unavailable), None, false),
        (join(Code::DeadlineExceeded), None, false),
        (join(Code::InvalidArgument), None, true),
        (join(Code::PermissionDenied), None, true),
        (join(Code::AlreadyExists), held(0), false),
        (join(Code::AlreadyExists), held(29), false),
        (join(Code::AlreadyExists), held(31), true),
        (Failure::Connect(Status::unavailable("")), None, false),
        (session(Code::InvalidArgument), None, false),
        (session(Code::AlreadyExists), None, false),
        (session(Code::Aborted), None, false),
    ];
    for (failure, held, expected) in table {
        assert_eq!(is_final(&failure, held), expected, "{failure:?} {held:?}");
    }
}
