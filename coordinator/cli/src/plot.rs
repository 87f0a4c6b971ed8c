//! `muster plot`: a curve in the terminal.

use std::future::ready;
use std::io::IsTerminal;

use muster_proto::v1;
use textplots::{Chart, Plot, Shape};

use crate::args::{Global, Output, PlotArgs};
use crate::client::Client;
use crate::exit::Failure;
use crate::output::{clear, lines};
use crate::{json, stream};

/// Size of the drawing in dots; a character is two dots wide and four high.
const DOTS: (u32, u32) = (140, 60);
/// Points kept for drawing; more than the dots can show.
const POINTS_MAX: usize = 100_000;
/// A followed curve is drawn again at most this often.
const REDRAW: std::time::Duration = std::time::Duration::from_secs(1);

/// `muster plot`.
pub(crate) async fn run(args: &PlotArgs, global: &Global) -> Result<(), Failure> {
    let client = Client::connect(global).await?;
    let mut curve: Vec<(f32, f32)> = Vec::new();
    let live = args.follow && std::io::stdout().is_terminal() && global.output == Output::Text;
    let mut drawn: Option<tokio::time::Instant> = None;
    let mut take = |point: &v1::Point| {
        if global.output == Output::Json {
            return json::print("Point", point);
        }
        curve.extend(dot(point, &args.key));
        curve.drain(..curve.len().saturating_sub(POINTS_MAX));
        if live && drawn.is_none_or(|at| at.elapsed() > REDRAW) {
            drawn = Some(tokio::time::Instant::now());
            clear()?;
            lines(draw(&curve, &args.key))?;
        }
        Ok(())
    };
    let request = v1::StreamMetricsRequest {
        job_id: args.job.job_id.clone(),
        rank: Some(args.rank),
        follow: args.follow,
        ..v1::StreamMetricsRequest::default()
    };
    stream::each_point(client, request, |point| ready(take(&point))).await?;
    if global.output == Output::Json {
        return Ok(());
    }
    if curve.is_empty() {
        let (id, rank, key) = (&args.job.job_id, args.rank, &args.key);
        return Err(Failure::Other(anyhow::anyhow!(
            "rank {rank} of job {id} has reported no {key:?}; `muster metrics {id}` shows what there is"
        )));
    }
    if live {
        clear()?;
    }
    lines(draw(&curve, &args.key))
}

/// The largest value that is drawn as it is: the height of a drawing, too, must be a number.
const HEIGHT_MAX: f32 = f32::MAX / 4.0;

/// Returns a point as a dot of the curve of one value. The dot of NaN or of an infinity is not finite.
pub(crate) fn dot(point: &v1::Point, key: &str) -> Option<(f32, f32)> {
    let value = *point.values.get(key)?;
    let height = value as f32;
    let height = if value.is_finite() { height.clamp(-HEIGHT_MAX, HEIGHT_MAX) } else { height };
    Some((point.step? as f32, height))
}

/// Returns the lines of the curve, with its axes' ends and last value. Where a value is not finite the
/// curve has a gap, and how many there are is said.
pub(crate) fn draw(curve: &[(f32, f32)], key: &str) -> Vec<String> {
    let (Some(first), Some(last)) = (curve.first(), curve.last()) else { return Vec::new() };
    let mut said = vec![format!("{key}: {} at step {}", last.1, last.0)];
    match curve.iter().filter(|(_, y)| !y.is_finite()).count() {
        0 => {}
        1 => said.push("1 value is NaN or infinite: a gap in the curve".to_owned()),
        many => said.push(format!("{many} values are NaN or infinite: gaps in the curve")),
    }
    let finite: Vec<f32> = curve.iter().map(|(_, y)| *y).filter(|y| y.is_finite()).collect();
    if finite.is_empty() {
        return said;
    }
    let (mut low, mut high) = finite.iter().fold((f32::MAX, f32::MIN), |(l, h), y| (l.min(*y), h.max(*y)));
    if (high - low).abs() < f32::EPSILON {
        // A flat curve needs some height to be drawn in.
        (low, high) = (low - 0.5, high + 0.5);
    }
    // The width of the axis must not be nothing either.
    let end = if last.0 > first.0 { last.0 } else { first.0 + 1.0 };
    let pieces = curve.split(|(_, y)| !y.is_finite()).filter(|piece| !piece.is_empty());
    // A line needs two ends: a value alone is a dot.
    let shapes: Vec<Shape<'_>> = pieces
        .map(|piece| if piece.len() == 1 { Shape::Points(piece) } else { Shape::Lines(piece) })
        .collect();
    let mut chart = Chart::new_with_y_range(DOTS.0, DOTS.1, first.0, end, low, high);
    let chart = shapes.iter().fold(&mut chart, |chart, shape| chart.lineplot(shape));
    chart.axis();
    chart.figures();
    let drawing = chart.to_string().lines().map(str::to_owned).collect();
    [drawing, said].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_are_drawn_whatever_their_shape() {
        let falling: Vec<(f32, f32)> = (1..100).map(|i| (i as f32, 2.0 / i as f32)).collect();
        let drawing = draw(&falling, "loss");
        assert!(drawing.len() > 10 && drawing.concat().contains("2.0"), "{drawing:?}");
        for odd in [vec![], vec![(1.0, 1.0)], vec![(1.0, 1.0), (1.0, 2.0)], vec![(1.0, 0.0), (9.0, 0.0)]] {
            draw(&odd, "loss");
        }
    }

    #[test]
    fn a_value_that_is_not_finite_is_a_gap_that_is_counted() {
        let gap = |x: f32| if (40.0..60.0).contains(&x) { f32::NAN } else { x };
        let curve: Vec<(f32, f32)> = (0..100).map(|i| (i as f32, gap(i as f32))).collect();
        let drawing = draw(&curve, "loss").concat();
        assert!(drawing.contains("20 values are NaN or infinite: gaps in the curve"), "{drawing}");
        assert!(drawing.contains("loss: 99 at step 99"), "{drawing}");
        let whole = draw(&(0..100).map(|i| (i as f32, i as f32)).collect::<Vec<_>>(), "loss").concat();
        let dots = |drawing: &str| drawing.chars().filter(|c| ('\u{2801}'..='\u{28ff}').contains(c)).count();
        assert!(dots(&drawing) < dots(&whole), "the gap is empty: {drawing}");
        let value = |value: f64| {
            let values = [("loss".to_owned(), value)].into();
            dot(&v1::Point { step: Some(1), values, ..v1::Point::default() }, "loss").unwrap()
        };
        let odd = [value(1e300), value(-1e300), value(f64::NAN), value(f64::INFINITY), value(1.0)];
        assert!(draw(&odd, "loss").concat().contains("2 values are NaN"), "what is too large is no gap");
        for last in [f64::NAN, f64::NEG_INFINITY] {
            let text = draw(&[value(last)], "loss");
            let said =
                [format!("loss: {last} at step 1"), "1 value is NaN or infinite: a gap in the curve".into()];
            assert_eq!(text, said);
        }
    }
}
