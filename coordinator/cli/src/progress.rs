//! How far a job is, from the points its rank 0 reports.

use std::time::Duration;

use muster_proto::v1;

use crate::units::show_span;

/// What is known of a job's progress.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    pub step: u64,
    pub steps_total: Option<u64>,
    pub epoch: Option<f64>,
    pub loss: Option<f64>,
    pub accuracy: Option<f64>,
    /// Throughput under the program's own name for it, such as `images_per_second`.
    pub rate: Option<(String, f64)>,
    /// Generation, step and Unix seconds of the first point, from which the pace is taken.
    first: Option<(u32, u64, f64)>,
    last_seconds: f64,
}

impl Progress {
    /// Takes one point.
    pub fn add(&mut self, point: &v1::Point) {
        let seconds = point.time.map_or(0.0, |time| time.seconds as f64 + f64::from(time.nanos) / 1e9);
        let step = point.step.unwrap_or(0);
        // A restarted gang has its own pace.
        if self.first.is_none_or(|(generation, ..)| generation != point.generation) {
            self.first = Some((point.generation, step, seconds));
        }
        (self.step, self.last_seconds) = (step, seconds);
        for (name, value) in &point.values {
            match name.as_str() {
                "loss" => self.loss = Some(*value),
                "epoch" => self.epoch = Some(*value),
                "accuracy" => self.accuracy = Some(*value),
                "steps_total" => self.steps_total = Some(*value as u64),
                other if other.ends_with("_per_second") => self.rate = Some((other.to_owned(), *value)),
                _ => {}
            }
        }
    }

    /// Time left at the pace so far; none without a total or a pace.
    pub fn eta(&self) -> Option<Duration> {
        let (_, first_step, first_seconds) = self.first?;
        let left = self.steps_total?.checked_sub(self.step)?;
        let (steps, seconds) = (self.step.checked_sub(first_step)?, self.last_seconds - first_seconds);
        let per_step = (steps > 0 && seconds > 0.0).then(|| seconds / steps as f64)?;
        Duration::try_from_secs_f64(per_step * left as f64).ok()
    }

    /// One line: epoch, step, loss, throughput, time left.
    pub fn line(&self) -> String {
        let mut parts = Vec::new();
        if let Some(epoch) = self.epoch {
            parts.push(format!("epoch {epoch}"));
        }
        match self.steps_total {
            Some(total) => parts.push(format!("step {}/{total}", self.step)),
            None => parts.push(format!("step {}", self.step)),
        }
        if let Some(loss) = self.loss {
            parts.push(format!("loss {loss:.4}"));
        }
        if let Some((name, rate)) = &self.rate {
            parts.push(format!("{rate:.0} {}/s", name.trim_end_matches("_per_second")));
        }
        if let Some(accuracy) = self.accuracy {
            parts.push(format!("accuracy {:.2} %", accuracy * 100.0));
        }
        if let Some(eta) = self.eta().filter(|eta| !eta.is_zero()) {
            parts.push(format!("ETA {}", show_span(eta)));
        }
        parts.join("  ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(generation: u32, step: u64, seconds: i64) -> v1::Point {
        let values = [("loss", 0.5), ("steps_total", 100.0), ("images_per_second", 1234.4), ("epoch", 2.0)];
        v1::Point {
            generation,
            rank: Some(0),
            step: Some(step),
            time: Some(prost_types::Timestamp { seconds, nanos: 0 }),
            values: values.map(|(name, value)| (name.to_owned(), value)).into(),
            seq: step,
        }
    }

    #[test]
    fn the_line_shows_what_is_known() {
        let mut progress = Progress::default();
        assert_eq!(progress.line(), "step 0");
        progress.add(&point(1, 10, 1000));
        assert_eq!(progress.line(), "epoch 2  step 10/100  loss 0.5000  1234 images/s");
        progress.add(&point(1, 20, 1005));
        assert_eq!(progress.line(), "epoch 2  step 20/100  loss 0.5000  1234 images/s  ETA 40s");
        progress.add(&point(2, 5, 1010));
        assert_eq!(progress.eta(), None, "a new generation has its own pace");
    }
}
