//! `muster plot`: a curve in the terminal.

use std::future::ready;
use std::io::IsTerminal;

use muster_proto::v1;
use textplots::{Chart, Plot, Shape};

use crate::args::{Global, Output, PlotArgs};
use crate::client::Client;
use crate::exit::{Failure, out};
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
            // Home, and clear what is below.
            out!("\x1b[H\x1b[J{}", draw(&curve, &args.key));
        }
        Ok(())
    };
    stream::each_point(client, args.job.job_id.clone(), Some(args.rank), args.follow, |point| {
        ready(take(&point))
    })
    .await?;
    if global.output == Output::Json {
        return Ok(());
    }
    if curve.is_empty() {
        let (id, rank, key) = (&args.job.job_id, args.rank, &args.key);
        return Err(Failure::Other(anyhow::anyhow!(
            "rank {rank} of job {id} has reported no {key:?}; `muster metrics {id}` shows what there is"
        )));
    }
    out!("{}{}", if live { "\x1b[H\x1b[J" } else { "" }, draw(&curve, &args.key));
    Ok(())
}

/// A point as a dot of the curve of one value.
pub(crate) fn dot(point: &v1::Point, key: &str) -> Option<(f32, f32)> {
    let value = *point.values.get(key)?;
    Some((point.step? as f32, value as f32))
}

/// The curve with its axes' ends and last value.
pub(crate) fn draw(curve: &[(f32, f32)], key: &str) -> String {
    let (Some(first), Some(last)) = (curve.first(), curve.last()) else { return String::new() };
    let (mut low, mut high) =
        curve.iter().fold((f32::MAX, f32::MIN), |(l, h), (_, y)| (l.min(*y), h.max(*y)));
    if (high - low).abs() < f32::EPSILON {
        // A flat curve needs some height to be drawn in.
        (low, high) = (low - 0.5, high + 0.5);
    }
    // The width of the axis must not be nothing either.
    let end = if last.0 > first.0 { last.0 } else { first.0 + 1.0 };
    let lines = Shape::Lines(curve);
    let mut chart = Chart::new_with_y_range(DOTS.0, DOTS.1, first.0, end, low, high);
    let chart = chart.lineplot(&lines);
    chart.axis();
    chart.figures();
    format!("{chart}\n{key}: {} at step {}\n", last.1, last.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_are_drawn_whatever_their_shape() {
        let falling: Vec<(f32, f32)> = (1..100).map(|i| (i as f32, 2.0 / i as f32)).collect();
        let drawing = draw(&falling, "loss");
        assert!(drawing.lines().count() > 10 && drawing.contains("2.0"), "{drawing}");
        for odd in [vec![], vec![(1.0, 1.0)], vec![(1.0, 1.0), (1.0, 2.0)], vec![(1.0, 0.0), (9.0, 0.0)]] {
            draw(&odd, "loss");
        }
    }
}
