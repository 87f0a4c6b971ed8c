//! Flags that both daemons have.

use std::net::SocketAddr;

use clap::ValueEnum;
use muster_coordinator::{Http, Listen};

/// Reads an address and a port.
pub(super) fn socket_address(text: &str) -> Result<SocketAddr, String> {
    let why = "it is not an IP address and a port, such as 127.0.0.1:7070 or [::]:7070";
    text.trim().parse().map_err(|_| why.to_owned())
}

/// How a daemon logs, what it shows of itself, and when it ends.
#[derive(Debug, clap::Args)]
pub(crate) struct DaemonArgs {
    /// Form of the log lines on standard error; RUST_LOG filters them.
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// Address of /metrics for Prometheus, and of /healthz and /readyz for probes, or `off`; port 0 takes any free one and
    /// prints it in the first line of the log. Default: a coordinator's are at 127.0.0.1:7071 if that is free, a
    /// worker's are off.
    #[arg(long, value_name = "ADDRESS|off")]
    pub http_listen: Option<Listen>,
    /// Serve them on an address that is not loopback, in the clear: whoever reaches it can read them, and change nothing.
    #[arg(long)]
    pub http_insecure: bool,
    /// End when standard input does, so that the daemon cannot outlive whoever started it.
    #[arg(long, hide = true)]
    pub exit_with_stdin: bool,
}

impl DaemonArgs {
    /// Where metrics are served: without the flag, there.
    pub fn http(&self, default: Listen) -> Http {
        Http { listen: self.http_listen.unwrap_or(default), insecure: self.http_insecure }
    }
}

/// Form of the log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// For people.
    Text,
    /// An object per line.
    Json,
}
