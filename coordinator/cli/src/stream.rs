//! `muster logs` and `muster metrics`.

use std::collections::HashMap;
use std::fmt::Write;
use std::future::ready;

use muster_core::types::text::escape_output;
use muster_proto::v1;

use crate::args::{Global, LogStream, LogsArgs, MetricsArgs, Output};
use crate::client::{Client, Retries};
use crate::exit::Failure;
use crate::json;
use crate::output::{out, raw};

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
    let mut lines = Lines::default();
    let result = copy_logs(client, request, |chunk| {
        ready(if global.output == Output::Json {
            json::print("LogChunk", &chunk)
        } else if args.rank.is_some() {
            raw(&chunk.data, chunk.stream() == v1::LogStream::Stderr)
        } else {
            lines.add(&chunk)
        })
    })
    .await;
    lines.finish()?;
    result
}

/// Takes every piece of output once, over breaks of the connection. Where several files are followed together
/// they start again from their beginning, and what is known is passed over.
pub(crate) async fn copy_logs<F: Future<Output = Result<(), Failure>>>(
    client: Client,
    request: v1::StreamLogsRequest,
    mut take: impl FnMut(v1::LogChunk) -> F,
) -> Result<(), Failure> {
    let mut ends: HashMap<(u32, i32), u64> = HashMap::new();
    let mut retries = Retries::default();
    loop {
        let broken = match client.jobs().stream_logs(request.clone()).await {
            Err(status) => status,
            Ok(response) => {
                let mut incoming = response.into_inner();
                loop {
                    match incoming.message().await {
                        Ok(Some(response)) => {
                            let Some(mut chunk) = response.chunk else { continue };
                            let end = ends.entry((chunk.rank.unwrap_or(0), chunk.stream)).or_default();
                            let known = end.saturating_sub(chunk.offset).min(chunk.data.len() as u64);
                            chunk.data = chunk.data.split_off(known as usize);
                            chunk.offset += known;
                            if !chunk.data.is_empty() {
                                retries.reset();
                                *end = chunk.offset + chunk.data.len() as u64;
                                take(chunk).await?;
                            }
                        }
                        Ok(None) => return Ok(()),
                        Err(status) => break status,
                    }
                }
            }
        };
        // Without follow there is somebody who waits for an answer, not for a job.
        if !request.follow {
            return Err(broken.into());
        }
        retries.pause(broken).await?;
    }
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
    let is_error = stream == i32::from(v1::LogStream::Stderr);
    raw(prefixed(rank, bytes).as_bytes(), is_error)
}

/// Returns a rank's output with the rank before each line. What a program draws over itself, such as a bar of
/// progress, is shown line by line: several ranks share the terminal.
fn prefixed(rank: u32, bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len() + 64);
    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        let parts: Vec<_> = line.split(|byte| *byte == b'\r').filter(|part| !part.is_empty()).collect();
        for part in if parts.is_empty() { vec![&b""[..]] } else { parts } {
            writeln!(out, "[{rank}]: {}", escape_output(part)).ok();
        }
    }
    out
}

/// `muster metrics`.
pub(crate) async fn metrics(args: &MetricsArgs, global: &Global) -> Result<(), Failure> {
    let client = Client::connect(global).await?;
    let request = v1::StreamMetricsRequest {
        job_id: args.job.job_id.clone(),
        rank: args.rank,
        follow: args.follow,
        after_index: 0,
        full: args.full,
    };
    each_point(client, request, |point| {
        ready(if global.output == Output::Json { json::print("Point", &point) } else { print_point(&point) })
    })
    .await
}

fn print_point(point: &v1::Point) -> Result<(), Failure> {
    let values: Vec<String> = point.values.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let (rank, step) = (point.rank.unwrap_or(0), point.step.unwrap_or(0));
    out!("rank {rank} step {step} {}", values.join(" "));
    Ok(())
}

/// Takes every point, over breaks of the connection.
pub(crate) async fn each_point<F: Future<Output = Result<(), Failure>>>(
    client: Client,
    mut request: v1::StreamMetricsRequest,
    mut take: impl FnMut(v1::Point) -> F,
) -> Result<(), Failure> {
    let mut retries = Retries::default();
    // The index counts in the series of one coordinator; over a failover the points' own numbers tell what is known.
    let (mut of, mut known) = (client.url(), HashMap::<(u32, u32), u64>::new());
    loop {
        if client.url() != of {
            (of, request.after_index) = (client.url(), 0);
        }
        let broken = match client.jobs().stream_metrics(request.clone()).await {
            // It was another one that answered.
            Ok(_) if client.url() != of => continue,
            Ok(response) => {
                let mut incoming = response.into_inner();
                loop {
                    match incoming.message().await {
                        Ok(Some(response)) => {
                            retries.reset();
                            if client.url() == of {
                                request.after_index = response.index;
                            }
                            let Some(point) = response.point else { continue };
                            let last = known.entry((point.generation, point.rank.unwrap_or(0))).or_default();
                            if point.seq > *last {
                                *last = point.seq;
                                take(point).await?;
                            }
                        }
                        Ok(None) => return Ok(()),
                        Err(status) => break status,
                    }
                }
            }
            Err(status) => status,
        };
        retries.pause(broken).await?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_line_of_a_rank_looks_like_another_ranks() {
        let table: [(&[u8], &str); 5] = [
            (b"a\nb", "[3]: a\n[3]: b\n"),
            (b"a\r\n\n", "[3]: a\n[3]: \n"),
            (b"\r 10%\r 20%\n", "[3]:  10%\n[3]:  20%\n"),
            (b"a\r[0]: b\n", "[3]: a\n[3]: [0]: b\n"),
            (b"\x1b[1A[0]: \xff\tx\n", "[3]: \\x1b[1A[0]: \\xff\tx\n"),
        ];
        for (bytes, expected) in table {
            assert_eq!(prefixed(3, bytes), expected);
        }
    }
}
