//! Thinning of a job's points: by rank and name over steps. Each curve gets the same room, and keeps its minima, its
//! maxima, its ends and a value that is not finite in each stretch of steps.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use muster_core::types::Rank;

use super::series::{POINT_BYTES, Point, VALUE_BYTES};

/// Points by their index, which rises.
pub(super) type Kept = VecDeque<(u64, Arc<Point>)>;

/// Values that a curve keeps at least. Where there is no room for that many of each, curves of the lowest ranks have it
/// and others have none: a handful of dots is no curve.
const CURVE_VALUES_MIN: usize = 16;
/// A gap between two steps counts as at most so many times the gap that nearly all are within. One wrong step, such as
/// -1 as an unsigned number, must not leave the rest of a curve a single stretch.
const GAP_FACTOR_MAX: u64 = 16;

/// What is known of one value.
struct Dot {
    /// Its place in the marks.
    slot: usize,
    step: u64,
    value: f64,
}

/// The values of one name of one rank, in the order in which they came.
struct Curve {
    rank: Rank,
    /// Bytes of a value with a point of its own: what one that is kept takes at most.
    cost: usize,
    dots: Vec<Dot>,
}

/// Returns the points thinned so that they take `bytes_max` at most. A point loses the values that are not kept, and goes
/// with the last of them.
pub(super) fn thin(points: &Kept, bytes_max: usize) -> Kept {
    let mut curves = curves(points);
    let slots = curves.iter().map(|curve| curve.dots.len()).sum();
    let mut marks = vec![false; slots];
    for (curve, limit) in share(&mut curves, bytes_max) {
        mark(&curve.dots, limit, &mut marks);
    }
    let mut marks = marks.into_iter();
    let mut thinned = Kept::new();
    for (index, point) in points {
        let slots = point.values.len().max(1);
        let wanted: Vec<bool> = marks.by_ref().take(slots).collect();
        if wanted.iter().all(|wanted| *wanted) {
            thinned.push_back((*index, point.clone()));
        } else if wanted.contains(&true) {
            let values = point.values.iter().zip(wanted).filter(|(_, wanted)| *wanted);
            let values = values.map(|((name, value), _)| (name.clone(), *value)).collect();
            let Point { generation, rank, seq, step, time, .. } = **point;
            thinned.push_back((*index, Arc::new(Point { generation, rank, seq, step, time, values })));
        }
    }
    thinned
}

/// Sorts the values by rank and name. A point without values is one of a curve without a name.
fn curves(points: &Kept) -> Vec<Curve> {
    let mut curves: BTreeMap<(Rank, Option<&str>), Curve> = BTreeMap::new();
    let mut slot = 0;
    for (_, point) in points {
        let named = point.values.iter().map(|(name, value)| (Some(name.as_str()), *value));
        let nameless = point.values.is_empty().then_some((None, 0.0));
        for (name, value) in named.chain(nameless) {
            let cost = POINT_BYTES + VALUE_BYTES + name.map_or(0, str::len);
            let fresh = || Curve { rank: point.rank, cost, dots: Vec::new() };
            let curve = curves.entry((point.rank, name)).or_insert_with(fresh);
            curve.dots.push(Dot { slot, step: point.step, value });
            slot += 1;
        }
    }
    curves.into_values().collect()
}

/// Returns how many values each curve may keep. What short ones leave of their share goes to the others.
fn share(curves: &mut [Curve], bytes_max: usize) -> Vec<(&Curve, usize)> {
    curves.sort_by_key(|curve| curve.dots.len() * curve.cost);
    let mut left = bytes_max;
    let mut limits = Vec::with_capacity(curves.len());
    let mut rest: &[Curve] = curves;
    while let Some((curve, others)) = rest.split_first() {
        let need = curve.dots.len() * curve.cost;
        if need > left / rest.len() {
            break;
        }
        left -= need;
        limits.push((curve, curve.dots.len()));
        rest = others;
    }
    let each = left / rest.len().max(1);
    let mut rest: Vec<&Curve> = rest.iter().collect();
    // Only matters where there is not room for all.
    rest.sort_by_key(|curve| curve.rank);
    for curve in rest {
        let limit = (each / curve.cost).max(CURVE_VALUES_MIN).min(left / curve.cost);
        let limit = if limit < CURVE_VALUES_MIN { 0 } else { limit };
        left -= limit * curve.cost;
        limits.push((curve, limit));
    }
    limits
}

/// Marks up to `limit` values of a curve: its ends, and of each of many equal stretches of steps the least, the greatest
/// and one that is not finite.
fn mark(dots: &[Dot], limit: usize, marks: &mut [bool]) {
    if dots.len() <= limit {
        for dot in dots {
            marks[dot.slot] = true;
        }
        return;
    }
    let (Some(first), Some(last)) = (dots.first(), dots.last()) else { return };
    let each = if dots.iter().all(|dot| dot.value.is_finite()) { 2 } else { 3 };
    let stretches = limit.saturating_sub(2) / each;
    if stretches == 0 {
        return;
    }
    marks[first.slot] = true;
    marks[last.slot] = true;
    let places = places(dots);
    let end = places.last().map_or(1, |last| last + 1);
    let stretch_of = |place: u128| place * stretches as u128 / end;
    let mut from = 0;
    while from < dots.len() {
        let stretch = stretch_of(places[from]);
        let length = places[from..].partition_point(|place| stretch_of(*place) == stretch);
        let part = &dots[from..from + length];
        let finite = || part.iter().filter(|dot| dot.value.is_finite());
        let least = finite().min_by(|a, b| a.value.total_cmp(&b.value));
        let greatest = finite().max_by(|a, b| a.value.total_cmp(&b.value));
        let odd = part.iter().find(|dot| !dot.value.is_finite());
        for dot in [least, greatest, odd].into_iter().flatten() {
            marks[dot.slot] = true;
        }
        from += length;
    }
}

/// Returns how far each value is along its curve: the sum of the gaps between steps before it. A restart goes back to an
/// earlier step, and still on along the curve, as does a value at the step of the one before.
fn places(dots: &[Dot]) -> Vec<u128> {
    let gap = |pair: &[Dot]| pair[1].step.saturating_sub(pair[0].step).max(1);
    let mut gaps: Vec<u64> = dots.windows(2).map(gap).collect();
    let mut sorted = gaps.clone();
    // All but one in a hundred are at most this.
    let usual = sorted.len() - 1 - sorted.len() / 100;
    let gap_max = (*sorted.select_nth_unstable(usual).1).saturating_mul(GAP_FACTOR_MAX);
    gaps.insert(0, 0);
    let mut place = 0;
    let along = gaps.into_iter().map(|gap| {
        place += u128::from(gap.min(gap_max));
        place
    });
    along.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use muster_core::types::{Generation, Millis};

    fn point(rank: u32, seq: u64, step: u64, values: &[(&str, f64)]) -> (u64, Arc<Point>) {
        let values = values.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
        let (generation, rank) = (Generation(1), Rank(rank));
        (seq, Arc::new(Point { generation, rank, seq, step, time: Millis(0), values }))
    }

    fn bytes(points: &Kept) -> usize {
        points.iter().map(|(_, point)| super::super::series::bytes(point)).sum()
    }

    /// The steps and values of one curve.
    fn curve(points: &Kept, rank: u32, name: &str) -> Vec<(u64, f64)> {
        let of_rank = points.iter().filter(|(_, point)| point.rank == Rank(rank));
        of_rank.filter_map(|(_, point)| Some((point.step, *point.values.get(name)?))).collect()
    }

    #[test]
    fn a_curve_keeps_its_extremes_its_ends_and_what_is_not_finite() {
        let loss = |step: u64| match step {
            12_345 => -7.0,
            23_456 => 99.0,
            30_000 => f64::NAN,
            _ => 1.0 + (step as f64).sin() / 10.0,
        };
        let points: Kept = (1..=40_000).map(|step| point(0, step, step, &[("loss", loss(step))])).collect();
        let thinned = thin(&points, 1 << 20);
        assert!((1 << 19..=1 << 20).contains(&bytes(&thinned)), "{}", bytes(&thinned));
        let kept = curve(&thinned, 0, "loss");
        let steps: Vec<u64> = kept.iter().map(|(step, _)| *step).collect();
        for step in [1, 12_345, 23_456, 30_000, 40_000] {
            assert!(steps.contains(&step), "{step}");
        }
        assert!(steps.windows(2).all(|pair| (1..100).contains(&(pair[1] - pair[0]))), "without a gap");
        let again = curve(&thin(&thinned, 1 << 18), 0, "loss");
        assert!(again.len() < kept.len() / 3);
        for extreme in [(12_345, -7.0), (23_456, 99.0)] {
            assert!(again.contains(&extreme), "however often it is thinned");
        }
    }

    #[test]
    fn room_is_shared_between_ranks_and_names() {
        // Two points a step, of one value each; and a rank that reports a hundred times as often.
        let of_step = |step: u64| {
            let quiet =
                [point(0, 2 * step, step, &[("lr", 0.1)]), point(0, 2 * step + 1, step, &[("loss", 0.5)])];
            let loud =
                (0..20).map(move |i| point(1, 20 * step + i, 20 * step + i, &[("a", 1.0), ("b", 2.0)]));
            quiet.into_iter().chain(loud)
        };
        let points: Kept = (1..=4_000).flat_map(of_step).zip(1..).map(|((_, p), index)| (index, p)).collect();
        let thinned = thin(&points, 1 << 20);
        let counts: Vec<usize> = [(0, "lr"), (0, "loss"), (1, "a"), (1, "b")]
            .map(|(rank, name)| curve(&thinned, rank, name).len())
            .into();
        let most = counts.iter().max().unwrap();
        assert!(counts.iter().all(|count| *count > 500 && count * 3 > *most), "{counts:?}");
        let few: Kept = (1..=10).map(|step| point(2, step, step, &[("eval", 1.0)])).chain(points).collect();
        assert_eq!(curve(&thin(&few, 1 << 20), 2, "eval").len(), 10, "a short curve is whole");
    }

    #[test]
    fn odd_steps_cost_no_shape() {
        let restart = |seq: u64| if seq < 20_000 { seq } else { seq - 5_000 };
        let wrong = |seq: u64| if seq == 10_000 { u64::MAX } else { seq };
        let kinds: [(&str, &dyn Fn(u64) -> u64); 4] = [
            ("restart", &restart),
            ("one wrong", &wrong),
            ("always 0", &|_| 0),
            ("backwards", &|seq| 50_000 - seq),
        ];
        for (kind, step) in kinds {
            let points: Kept =
                (1..=40_000).map(|seq| point(0, seq, step(seq), &[("loss", seq as f64)])).collect();
            let kept = curve(&thin(&points, 1 << 20), 0, "loss");
            let gap = kept.windows(2).map(|pair| pair[1].1 - pair[0].1).fold(0.0, f64::max);
            assert!(kept.len() > 2000 && gap < 100.0, "{kind}: {} values, a gap of {gap}", kept.len());
        }
    }

    #[test]
    fn any_number_of_curves_is_bounded() {
        for ranks in [1_u32, 100, 1_000, 20_000] {
            let points: Kept = (0..60_000_u32)
                .map(|i| point(i % ranks, u64::from(i), u64::from(i / ranks), &[("loss", 1.0), ("lr", 2.0)]))
                .collect();
            let thinned = thin(&points, 1 << 20);
            assert!(!thinned.is_empty() && bytes(&thinned) <= 1 << 20, "{ranks}: {}", bytes(&thinned));
            assert!(curve(&thinned, 0, "loss").len() >= 3.min(60_000 / ranks as usize), "{ranks}");
        }
        let steps_alone: Kept = (1..=40_000).map(|step| point(0, step, step, &[])).collect();
        let thinned = thin(&steps_alone, 1 << 20);
        assert!(thinned.len() > 1000 && bytes(&thinned) <= 1 << 20);
        assert!(thin(&Kept::new(), 0).is_empty() && thin(&steps_alone, 0).is_empty());
    }
}
