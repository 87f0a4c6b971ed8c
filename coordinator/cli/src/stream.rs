//! `muster logs` and `muster metrics`.

use std::collections::HashMap;
use std::io::Write;

use muster_proto::v1;

use crate::args::{Global, LogStream, LogsArgs, MetricsArgs, Output};
use crate::client::{Client, RETRIES_MAX, RETRY_PAUSE, is_passing};
use crate::exit::Failure;
use crate::json;

/// Longest line held back to prefix it whole; longer ones are cut.
const LINE_BYTES_MAX: usize = 64 << 10;

/// `muster logs`.
pub(crate) async fn logs(args: &LogsArgs, global: &Global) -> Result<(), Failure> {
    let client = Client::connect(global).await?;
    let stream = match args.stream {
        None => v1::LogStream::Unspecified,
        Some(LogStream::Stdout) => v1::LogStream::Stdout,
        Some(LogStream::Stderr) => v1::LogStream::Stderr,
    };
    let request = v1::StreamLogsRequest {
        job_id: args.job.job_id.clone(),
        rank: args.rank,
        stream: stream.into(),
        generation: args.generation,
        follow: args.follow,
        offset: 0,
    };
    let mut incoming = client.jobs().stream_logs(request).await?.into_inner();
    let mut lines = Lines::default();
    let result = loop {
        match incoming.message().await {
            Ok(Some(response)) => {
                let Some(chunk) = response.chunk else { continue };
                if global.output == Output::Json {
                    json::print("LogChunk", &chunk)?;
                } else if args.rank.is_some() {
                    write(&chunk.data, chunk.stream() == v1::LogStream::Stderr)?;
                } else {
                    lines.add(&chunk)?;
                }
            }
            Ok(None) => break Ok(()),
            Err(status) => break Err(status.into()),
        }
    };
    lines.finish()?;
    result
}

fn write(bytes: &[u8], to_stderr: bool) -> Result<(), Failure> {
    let written = if to_stderr {
        std::io::stderr().write_all(bytes)
    } else {
        let mut out = std::io::stdout().lock();
        out.write_all(bytes).and_then(|()| out.flush())
    };
    written.map_err(|error| anyhow::Error::from(error).context("failed to write the output").into())
}

/// Output of several ranks, a line at a time, each with its rank before it.
#[derive(Default)]
struct Lines(HashMap<(u32, i32), Vec<u8>>);

impl Lines {
    fn add(&mut self, chunk: &v1::LogChunk) -> Result<(), Failure> {
        let rank = chunk.rank.unwrap_or(0);
        let held = self.0.entry((rank, chunk.stream)).or_default();
        held.extend_from_slice(&chunk.data);
        let end = held.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
        let end = if end == 0 && held.len() > LINE_BYTES_MAX { held.len() } else { end };
        let whole: Vec<u8> = held.drain(..end).collect();
        print_lines(rank, chunk.stream, &whole)
    }

    fn finish(&mut self) -> Result<(), Failure> {
        for ((rank, stream), rest) in self.0.drain() {
            print_lines(rank, stream, &rest)?;
        }
        Ok(())
    }
}

fn print_lines(rank: u32, stream: i32, bytes: &[u8]) -> Result<(), Failure> {
    let mut out = Vec::with_capacity(bytes.len() + 64);
    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
        out.extend_from_slice(format!("[{rank}]: ").as_bytes());
        out.extend_from_slice(line);
        if !line.ends_with(b"\n") {
            out.push(b'\n');
        }
    }
    write(&out, stream == i32::from(v1::LogStream::Stderr))
}

/// `muster metrics`.
pub(crate) async fn metrics(args: &MetricsArgs, global: &Global) -> Result<(), Failure> {
    let client = Client::connect(global).await?;
    each_point(&client, &args.job.job_id, args.rank, args.follow, |point| {
        if global.output == Output::Json {
            return Ok(json::print("Point", point)?);
        }
        let values: Vec<String> =
            point.values.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let (rank, step) = (point.rank.unwrap_or(0), point.step.unwrap_or(0));
        println!("rank {rank} step {step} {}", values.join(" "));
        Ok(())
    })
    .await
}

/// Takes every point, over breaks of the connection.
pub(crate) async fn each_point(
    client: &Client,
    job_id: &str,
    rank: Option<u32>,
    follow: bool,
    mut take: impl FnMut(&v1::Point) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let (mut after_index, mut tries) = (0, 0);
    loop {
        let request = v1::StreamMetricsRequest { job_id: job_id.to_owned(), rank, follow, after_index };
        let broken = match client.jobs().stream_metrics(request).await {
            Ok(response) => {
                let mut incoming = response.into_inner();
                loop {
                    match incoming.message().await {
                        Ok(Some(response)) => {
                            (after_index, tries) = (response.index, 0);
                            if let Some(point) = &response.point {
                                take(point)?;
                            }
                        }
                        Ok(None) => return Ok(()),
                        Err(status) => break status,
                    }
                }
            }
            Err(status) => status,
        };
        if !is_passing(&broken) || tries >= RETRIES_MAX {
            return Err(broken.into());
        }
        tries += 1;
        tokio::time::sleep(RETRY_PAUSE).await;
    }
}
