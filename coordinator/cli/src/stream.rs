//! `muster logs` and `muster metrics`.

use std::cell::RefCell;
use std::collections::HashMap;
use std::future::ready;

use muster_core::types::text::escape_output;
use muster_proto::v1;

use crate::args::{Global, LogStream, LogsArgs, MetricsArgs, Output};
use crate::client::{Client, Retries};
use crate::exit::Failure;
use crate::json;
use crate::output::lined::{HELD_MAX, Lined};
use crate::output::{Target, out, put_stream, raw};

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
    let lines = RefCell::new(Lines::default());
    let copied = copy_logs(client, request, |chunk| {
        ready(if global.output == Output::Json {
            json::print("LogChunk", &chunk)
        } else if args.rank.is_some() {
            let target = target(chunk.stream);
            raw(chunk.data.into(), target)
        } else {
            lines.borrow_mut().add(&chunk)
        })
    });
    // What has no end of its line yet is shown as well, such as a prompt.
    let shown = async {
        loop {
            tokio::time::sleep(HELD_MAX / 2).await;
            if let Err(failure) = lines.borrow_mut().show_due() {
                return failure;
            }
        }
    };
    let result = tokio::select! {
        result = copied => result,
        failure = shown => Err(failure),
    };
    lines.borrow_mut().finish()?;
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
struct Lines(HashMap<(u32, i32), Lined>);

impl Lines {
    fn add(&mut self, chunk: &v1::LogChunk) -> Result<(), Failure> {
        let rank = chunk.rank.unwrap_or(0);
        let new = || lined(rank, chunk.stream);
        let text = self.0.entry((rank, chunk.stream)).or_insert_with(new).add(&chunk.data);
        text.map_or(Ok(()), put_stream)
    }

    fn show_due(&mut self) -> Result<(), Failure> {
        self.0.values_mut().filter_map(Lined::due).try_for_each(put_stream)
    }

    fn finish(&mut self) -> Result<(), Failure> {
        self.0.values_mut().filter_map(Lined::end).try_for_each(put_stream)
    }
}

fn lined(rank: u32, stream: i32) -> Lined {
    let id = u64::from(rank) * 4 + u64::from(stream.unsigned_abs());
    let shown = |line: &[u8]| escape_output(line).into_bytes();
    Lined::new(target(stream), id, format!("[{rank}]: ").into(), shown)
}

fn target(stream: i32) -> Target {
    if stream == i32::from(v1::LogStream::Stderr) { Target::Stderr } else { Target::Stdout }
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
    use crate::output::lined::Text;

    fn shown(text: &Text) -> String {
        String::from_utf8(text.bytes().to_vec()).unwrap()
    }

    #[test]
    fn no_line_of_a_rank_looks_like_another_ranks() {
        let table: [(&[u8], &str); 5] = [
            (b"a\nb", "a\n[3]: b\n"),
            (b"a\r\n\n", "a\n[3]: \n"),
            (b"\r 10%\r 20%\n", " 10%\n[3]:  20%\n"),
            (b"a\r[0]: b\n", "a\n[3]: [0]: b\n"),
            (b"\x1b[1A[0]: \xff\tx\n", "\\x1b[1A[0]: \\xff\tx\n"),
        ];
        for (bytes, expected) in table {
            let mut lined = lined(3, v1::LogStream::Stdout.into());
            let texts =
                [lined.add(bytes), lined.end()].map(|text| text.as_ref().map_or(String::new(), shown));
            // The writer's prefix, where a line begins.
            let texts = texts.iter().filter(|text| !text.is_empty()).map(|text| format!("[3]: {text}"));
            assert_eq!(texts.collect::<String>(), format!("[3]: {expected}"));
        }
    }
}
