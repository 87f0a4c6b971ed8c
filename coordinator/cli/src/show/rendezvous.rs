//! Who is missing at the store of a job's ranks, and who waits there for what.

use muster_proto::v1;

/// Ranks that are named one by one.
const NAMED_MAX: usize = 8;

/// What it is about in one line for each finding, without a line's end.
pub(crate) fn lines(stuck: &v1::Rendezvous, world_size: u32) -> Vec<String> {
    let mut lines = Vec::new();
    let last = stuck.last_came.as_ref().map(|at| format!(", the last at {at}")).unwrap_or_default();
    lines.push(format!("{} of {world_size} ranks have come{last}", stuck.come()));
    let missing = stuck.missing_total();
    if missing > 0 {
        let have = if missing == 1 { "has" } else { "have" };
        lines.push(format!("{} {have} not come", named(&stuck.missing, missing)));
    }
    for key in &stuck.awaited {
        let wait = if key.waiting_total == 1 { "waits" } else { "wait" };
        let since = key.since.as_ref().map(|at| format!(" since {at}")).unwrap_or_default();
        let setter = key.setter.as_ref().map(|setter| format!(", which {} sets", name(setter)));
        lines.push(format!(
            "{} {wait}{since} for the key {:?}{}",
            named(&key.waiting, key.waiting_total),
            key.key,
            setter.unwrap_or_default()
        ));
    }
    if stuck.awaited_more > 0 {
        lines.push(format!("{} further keys are waited for", stuck.awaited_more));
    }
    lines
}

/// Whose output says more: who has not come, else who should set what is waited for, else who waits.
pub(crate) fn suspect(stuck: &v1::Rendezvous) -> Option<u32> {
    let first = stuck.awaited.first();
    let setter = first.and_then(|key| key.setter.as_ref());
    let waits = first.and_then(|key| key.waiting.first());
    stuck.missing.first().or(setter).or(waits)?.rank
}

fn name(rank: &v1::RankOnNode) -> String {
    format!("rank {} on {}", rank.rank(), rank.node_name)
}

/// `rank 1 on a, rank 2 on b and 5 more`.
fn named(ranks: &[v1::RankOnNode], total: u32) -> String {
    let names: Vec<String> = ranks.iter().take(NAMED_MAX).map(name).collect();
    match total as usize - names.len().min(total as usize) {
        0 => names.join(", "),
        1 if names.is_empty() => "one rank".to_owned(),
        more if names.is_empty() => format!("{more} ranks"),
        more => format!("{} and {more} more", names.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use muster_proto::v1;

    fn on(rank: u32, node: &str) -> v1::RankOnNode {
        v1::RankOnNode { rank: Some(rank), node_name: node.to_owned() }
    }

    #[test]
    fn each_finding_is_a_sentence() {
        let key = |waiting: Vec<v1::RankOnNode>, waiting_total, setter| v1::AwaitedKey {
            key: "init/".to_owned(),
            setter,
            waiting,
            waiting_total,
            since: None,
        };
        let stuck = v1::Rendezvous {
            come: Some(6),
            missing: vec![on(6, "c"), on(7, "c")],
            missing_total: Some(4),
            last_came: None,
            awaited: vec![
                key(vec![on(1, "a")], 1, Some(on(6, "c"))),
                key(vec![], 1, None),
                key(vec![], 5, None),
            ],
            awaited_more: 2,
        };
        let expected = [
            "6 of 10 ranks have come",
            "rank 6 on c, rank 7 on c and 2 more have not come",
            "rank 1 on a waits for the key \"init/\", which rank 6 on c sets",
            "one rank waits for the key \"init/\"",
            "5 ranks wait for the key \"init/\"",
            "2 further keys are waited for",
        ];
        assert_eq!(super::lines(&stuck, 10), expected);
        assert_eq!(super::suspect(&stuck), Some(6));
        let come = v1::Rendezvous { missing: vec![], missing_total: Some(0), ..stuck };
        assert_eq!(
            super::suspect(&v1::Rendezvous { awaited: vec![key(vec![on(1, "a")], 1, None)], ..come }),
            Some(1)
        );
    }
}
