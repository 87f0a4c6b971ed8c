//! A rank that is asked to end goes on to the next report, where all ranks learn of it, and rank 0 writes a checkpoint.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use signal_hook::consts::SIGTERM;
use signal_hook::iterator::Signals;

/// Time to come to a report. A rank whose peers are gone may never come to one.
const REPORT_MAX: Duration = Duration::from_secs(5);

/// Whether this rank was asked to end.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Listens to SIGTERM from now on.
    pub fn listen() -> std::io::Result<Self> {
        let stop = Self::default();
        let (asked, mut signals) = (stop.clone(), Signals::new([SIGTERM])?);
        std::thread::Builder::new().name("stop".to_owned()).spawn(move || {
            if signals.forever().next().is_some() {
                asked.0.store(true, Ordering::Relaxed);
                std::thread::sleep(REPORT_MAX);
                end();
            }
        })?;
        Ok(stop)
    }

    /// Whether it was.
    pub fn is_asked(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Ends as a process does that SIGTERM ends, in a shell's words.
pub fn end() -> ! {
    std::process::exit(128 + SIGTERM)
}
