//! Points in memory and in their file, over restarts and beyond the bounds.

use super::*;

fn point(generation: u32, rank: u32, seq: u64, loss: f64) -> Point {
    let values = BTreeMap::from([("loss".to_owned(), loss)]);
    let (generation, rank) = (Generation(generation), Rank(rank));
    Point { generation, rank, seq, step: seq.wrapping_mul(10), time: Millis(seq), values }
}

#[test]
fn what_is_sent_twice_is_kept_once_and_survives() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics/job.jsonl");
    let series = Series::read(path.clone());
    let sent = vec![point(1, 0, 1, 2.0), point(1, 0, 2, 1.5)];
    assert_eq!(series.append(sent.clone()), Some(2));
    assert_eq!(series.append(sent), Some(2));
    assert_eq!(series.append(vec![point(1, 0, 2, 1.5), point(1, 0, 3, 1.0)]), Some(3));
    for series in [series, Series::read(path)] {
        let seqs: Vec<u64> = series.after(0, 100).iter().map(|(_, p)| p.seq).collect();
        assert_eq!(seqs, [1, 2, 3]);
        assert_eq!(series.latest(Generation(1)), Latest { step: Some(30), loss: Some(1.0) });
        assert_eq!(series.latest(Generation(2)), Latest::default());
    }
    let path = dir.path().join("metrics/job.jsonl");
    let end = Series::read_end(&path).latest(Generation(1));
    assert_eq!(end, Latest { step: Some(30), loss: Some(1.0) });
}

#[test]
fn values_that_are_not_finite_survive() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("job.jsonl");
    let series = Series::read(path.clone());
    let losses = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, f64::NAN];
    series.append((1..).zip(losses).map(|(seq, loss)| point(1, 0, seq, loss)).collect());
    let end = Series::read_end(&path);
    for series in [series, Series::read(path)] {
        let kept: Vec<f64> = series.after(0, 9).iter().map(|(_, point)| point.values["loss"]).collect();
        assert_eq!(format!("{kept:?}"), format!("{losses:?}"));
        assert!(series.latest(Generation(1)).loss.is_some_and(f64::is_nan));
    }
    assert!(end.latest(Generation(1)).loss.is_some_and(f64::is_nan));
}

#[test]
fn a_number_far_beyond_the_last_is_refused_and_costs_nothing() {
    let series = Series::read(PathBuf::new());
    assert_eq!(series.append_checked(vec![point(1, 0, 5, 2.0)]), Ok(Some(5)));
    for seqs in [vec![1 << 63], vec![6, u64::MAX], vec![6 + SEQ_JUMP_MAX]] {
        let jump = SeqJump { seq: *seqs.last().unwrap(), known: if seqs.len() > 1 { 6 } else { 5 } };
        let points = seqs.into_iter().map(|seq| point(1, 0, seq, 2.0)).collect();
        assert_eq!(series.append_checked(points), Err(jump));
    }
    let next = vec![point(1, 0, 5, 2.0), point(1, 0, 5 + SEQ_JUMP_MAX, 2.0)];
    assert_eq!(series.append_checked(next), Ok(Some(5 + SEQ_JUMP_MAX)));
    let kept: Vec<u64> = series.after(0, 9).iter().map(|(_, point)| point.seq).collect();
    assert_eq!(kept, [5, 5 + SEQ_JUMP_MAX]);
}

#[test]
fn a_torn_last_line_is_dropped_and_written_over() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("job.jsonl");
    Series::read(path.clone()).append(vec![point(1, 0, 1, 2.0), point(1, 0, 2, 1.5)]);
    let bytes = std::fs::read(&path).unwrap();
    for cut in 0..bytes.len() {
        std::fs::write(&path, &bytes[..cut]).unwrap();
        let series = Series::read(path.clone());
        series.append(vec![point(1, 0, 9, 0.5)]);
        let again: Vec<u64> = Series::read(path.clone()).after(0, 9).iter().map(|(_, p)| p.seq).collect();
        assert_eq!(again.last(), Some(&9), "cut at {cut}");
    }
}

#[test]
fn memory_is_bounded_and_the_index_keeps_rising() {
    let series = Series::read(PathBuf::new());
    let last = 300_000;
    for first in (1..=last).step_by(500) {
        series.append((first..first + 500).map(|seq| point(1, 0, seq, 1.0)).collect());
        assert!(series.bytes() <= BYTES_MAX);
    }
    let kept = series.after(0, usize::MAX);
    assert!(kept.windows(2).all(|pair| pair[0].0 < pair[1].0));
    assert!(kept.iter().all(|(index, point)| *index == point.seq));
    assert_eq!(kept.last().unwrap().0, last);
    let gap = kept.windows(2).map(|pair| pair[1].0 - pair[0].0).max().unwrap();
    assert!(kept[0].0 == 1 && gap < last / 1000, "the whole curve is kept: a gap of {gap}");
    let newest = NEWEST_BYTES / bytes(&kept[0].1);
    assert!(kept[kept.len() - newest..].windows(2).all(|pair| pair[0].0 + 1 == pair[1].0), "its end in full");
}

/// As a program that reports its learning rate and its loss by themselves.
#[test]
fn a_curve_keeps_its_shape_beside_another_of_the_same_steps() {
    let series = Series::read(PathBuf::new());
    let of_step = |step: u64| {
        let of = |seq, name: &str, value| Point {
            step,
            values: [(name.to_owned(), value)].into(),
            ..point(1, 0, seq, 0.0)
        };
        let loss = if step == 7_777 { 50.0 } else { 1.0 / step as f64 };
        [of(2 * step - 1, "lr", 0.1), of(2 * step, "loss", loss)]
    };
    for first in (1..=100_000).step_by(250) {
        series.append((first..first + 250).flat_map(of_step).collect());
    }
    let kept = series.after(0, usize::MAX);
    let of_name = |name: &str| -> Vec<(u64, f64)> {
        kept.iter().filter_map(|(_, point)| Some((point.step, *point.values.get(name)?))).collect()
    };
    for name in ["lr", "loss"] {
        let steps: Vec<u64> = of_name(name).into_iter().map(|(step, _)| step).collect();
        let gap = steps.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap();
        assert!(steps[0] == 1 && steps.last() == Some(&100_000) && gap < 100, "{name}: a gap of {gap}");
    }
    assert!(of_name("loss").contains(&(7_777, 50.0)), "its greatest value is kept");
}

#[test]
fn a_flood_of_names_is_bounded_and_costs_no_other_value() {
    let dir = tempfile::tempdir().unwrap();
    let series = Series::read(dir.path().join("job.jsonl"));
    for seq in 1..=3000 {
        let mut point = point(1, 0, seq, 1.0 / seq as f64);
        point.values.extend((0..63).map(|i| (format!("{:0>128}", seq * 63 + i), 1.0)));
        series.append(vec![point]);
        assert!(series.bytes() <= BYTES_MAX);
    }
    let kept = series.after(0, usize::MAX);
    let names: BTreeSet<_> = kept.iter().flat_map(|(_, point)| point.values.keys().cloned()).collect();
    assert!(names.len() <= NAMES_MAX, "{}", names.len());
    assert!(kept.iter().all(|(_, point)| point.values.contains_key("loss")), "the loss is in every point");
    assert_eq!(series.latest(Generation(1)), Latest { step: Some(30_000), loss: Some(1.0 / 3000.0) });
}

#[test]
fn points_with_many_values_are_bounded_by_their_bytes() {
    let series = Series::read(PathBuf::new());
    for seq in 1..=10_000 {
        let mut point = point(1, 0, seq, 1.0);
        point.values.extend((0..63).map(|i| (format!("{i:0>128}"), 1.0)));
        series.append(vec![point]);
    }
    assert!((BYTES_MAX / 2..=BYTES_MAX).contains(&series.bytes()), "{}", series.bytes());
    let kept = series.after(0, usize::MAX);
    assert_eq!(kept.last().unwrap().1.seq, 10_000);
    assert!(kept[0].1.seq < 100, "the beginning of the curve is kept");
}

#[test]
fn a_series_of_any_length_is_the_same_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("job.jsonl");
    let series = Series::read(path.clone());
    let last = 30_000;
    for first in (1..=last).step_by(500) {
        series.append((first..first + 500).map(|seq| point(1, 0, seq, 1.0)).collect());
    }
    let again = Series::read(path);
    let end = |series: &Series| series.after(last - 5_000, usize::MAX);
    assert_eq!(end(&again), end(&series), "its end, with the same indices");
    assert_eq!(again.latest(Generation(1)), series.latest(Generation(1)));
    let full: Vec<u64> = again.stored_after(0).unwrap().map(|(index, _)| index).collect();
    assert!(full[0] == 1 && full.last() == Some(&last));
}
