//! Flags of `muster coordinator` for what users may see and ask for.

use crate::units::Bytes;

#[derive(Debug, clap::Args)]
pub(crate) struct LimitArgs {
    /// Show everybody who may see jobs all of each. Without it the command, the values of variables and the output of a
    /// job are for its owner and for operators.
    #[arg(long)]
    pub open_jobs: bool,
    /// Highest priority of a job that no operator submits.
    #[arg(long, default_value_t = 100, allow_negative_numbers = true, value_name = "N")]
    pub priority_max: i32,
    /// Most jobs that wait.
    #[arg(long, default_value_t = 100_000, value_name = "JOBS")]
    pub queue_jobs_max: usize,
    /// Most bytes that the specifications of waiting jobs have.
    #[arg(long, default_value = "256MiB", value_name = "BYTES")]
    pub queue_bytes_max: Bytes,
    /// Most jobs of one owner that wait.
    #[arg(long, default_value_t = 25_000, value_name = "JOBS")]
    pub owner_queue_jobs_max: usize,
    /// Most bytes that the specifications of one owner's waiting jobs have.
    #[arg(long, default_value = "64MiB", value_name = "BYTES")]
    pub owner_queue_bytes_max: Bytes,
}

impl LimitArgs {
    /// Returns how much may wait.
    pub fn queue_max(&self) -> muster_coordinator::QueueMax {
        let bytes = |bytes: Bytes| usize::try_from(bytes.0).unwrap_or(usize::MAX);
        muster_coordinator::QueueMax {
            jobs: self.queue_jobs_max,
            bytes: bytes(self.queue_bytes_max),
            owner_jobs: self.owner_queue_jobs_max,
            owner_bytes: bytes(self.owner_queue_bytes_max),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use crate::args::{Args, Command};

    #[test]
    fn defaults_are_those_of_the_coordinator() {
        let args = Args::try_parse_from(["muster", "coordinator"]).unwrap();
        let Command::Coordinator(args) = args.command else { panic!("{args:?}") };
        let config = muster_coordinator::Config::new("data".into());
        assert_eq!(args.limits.queue_max(), config.queue_max);
        assert_eq!(
            (args.limits.priority_max, args.limits.open_jobs),
            (config.priority_max, config.open_jobs)
        );
    }
}
