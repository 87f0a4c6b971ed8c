//! Following a job to its end: state, points and rank 0's output, over breaks of the connection.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use muster_core::types::text::escape;
use muster_proto::v1;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::client::{Client, Retries};
use crate::exit::Failure;
use crate::output::bar::Terminal;
use crate::output::{Target, quoted, raw, room, say, say_lines};
use crate::progress::Progress;
use crate::{show, stream};

/// Events that may wait to be shown; the streams wait beyond it.
const EVENTS_MAX: usize = 256;
/// Where there is no terminal, a line this often.
const LINE_INTERVAL: Duration = Duration::from_secs(5);
/// As often as a terminal's own bar is drawn.
const DRAWS_PER_SECOND: u8 = 20;
/// Time for the last points and output after the job's end.
const LAST_WORDS_MAX: Duration = Duration::from_secs(5);

/// What to show.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Options {
    /// Pass rank 0's output through.
    pub logs: bool,
    /// All of it on standard error, because standard output is for something else.
    pub logs_on_stderr: bool,
    /// On Ctrl-C cancel the job rather than leave it running.
    pub cancel_on_interrupt: bool,
}

enum Event {
    Job(Box<v1::Job>),
    Point(v1::Point),
    Output(v1::LogChunk),
    /// One of the streams has come to its end.
    Ended,
    Failed(Failure),
}

/// Shows a job until it has ended. Returns its last state and rank 0's points.
pub(crate) async fn to_the_end(
    client: &Client,
    job_id: &str,
    options: Options,
) -> Result<(v1::Job, Vec<v1::Point>), Failure> {
    // Listened to from here on: one that comes between two looks is not lost.
    let mut interrupt = signal(SignalKind::interrupt()).map_err(anyhow::Error::from)?;
    let (events, mut incoming) = mpsc::channel(EVENTS_MAX);
    tokio::spawn(watch(client.clone(), job_id.to_owned(), events.clone()));
    tokio::spawn(points(client.clone(), job_id.to_owned(), events.clone()));
    let mut screen = Screen::new();
    let mut points = Vec::new();
    let (mut job, mut logs_of, mut open) = (v1::Job::default(), 0, 2_u32);
    let mut last_words = None;
    while open > 0 {
        let event = tokio::select! {
            event = incoming.recv() => event,
            _ = interrupt.recv() => {
                screen.close();
                return Err(interrupted(client, job_id, options).await);
            }
            () = sleep_until(last_words) => break,
            () = screen.tick() => continue,
        };
        match event {
            Some(Event::Job(now)) => {
                let generation = now.generation.unwrap_or(0);
                let not_yet = matches!(now.state(), v1::JobState::Queued | v1::JobState::Starting);
                if options.logs && generation > logs_of && !not_yet {
                    logs_of = generation;
                    for stream in [v1::LogStream::Stdout, v1::LogStream::Stderr] {
                        open += 1;
                        let request = v1::StreamLogsRequest {
                            job_id: now.id.clone(),
                            rank: Some(0),
                            stream: stream.into(),
                            generation: Some(generation),
                            follow: true,
                            offset: 0,
                        };
                        tokio::spawn(output(client.clone(), request, events.clone()));
                    }
                }
                if show::is_terminal(&now) {
                    last_words = Some(tokio::time::Instant::now() + LAST_WORDS_MAX);
                }
                screen.job(&now);
                job = *now;
            }
            Some(Event::Point(point)) => {
                screen.point(&point);
                points.push(point);
            }
            Some(Event::Output(chunk)) => {
                let is_stderr = options.logs_on_stderr || chunk.stream() == v1::LogStream::Stderr;
                let target = if is_stderr { Target::Stderr } else { Target::Stdout };
                // Whoever reads our output may pause or go; the job is not to suffer for it.
                tokio::select! {
                    () = room(chunk.data.len(), target) => screen.output(chunk.data.into(), target),
                    _ = interrupt.recv() => {
                        screen.close();
                        return Err(interrupted(client, job_id, options).await);
                    }
                }
            }
            Some(Event::Ended) => open -= 1,
            Some(Event::Failed(failure)) => {
                screen.close();
                return Err(failure);
            }
            None => break,
        }
    }
    screen.close();
    Ok((job, points))
}

/// The last line, and the command's result.
pub(crate) fn verdict(job: &v1::Job) -> Result<(), Failure> {
    say!("job {} {}: {}", job.id, show::job_state(job), job.reason);
    let tail = job.exit.as_ref().map(|exit| quoted(&exit.stderr_tail)).unwrap_or_default();
    if !tail.is_empty() {
        say!("its last words on standard error:");
        say_lines(tail);
    }
    match job.state() {
        v1::JobState::Succeeded => Ok(()),
        v1::JobState::Cancelled => Err(Failure::JobCancelled),
        _ => Err(Failure::JobFailed),
    }
}

async fn interrupted(client: &Client, job_id: &str, options: Options) -> Failure {
    if options.cancel_on_interrupt {
        let reason = "interrupted".to_owned();
        client
            .jobs()
            .cancel_job(v1::CancelJobRequest { job_id: job_id.to_owned(), reason, ..Default::default() })
            .await
            .ok();
    } else {
        say!(
            "job {job_id} runs on; stop it with `muster cancel {job_id}`, follow it with `muster logs -f {job_id}`"
        );
    }
    Failure::Interrupted
}

async fn sleep_until(at: Option<tokio::time::Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// The job's states, over breaks of the connection.
async fn watch(client: Client, job_id: String, events: mpsc::Sender<Event>) {
    let mut retries = Retries::default();
    loop {
        let request = v1::WatchJobRequest { job_id: job_id.clone() };
        let broken = match client.jobs().watch_job(request).await {
            Err(status) => status,
            Ok(response) => {
                let mut incoming = response.into_inner();
                loop {
                    match incoming.message().await {
                        Ok(Some(response)) => {
                            let Some(job) = response.job else { continue };
                            retries.reset();
                            if events.send(Event::Job(Box::new(job))).await.is_err() {
                                return;
                            }
                        }
                        Ok(None) => return drop(events.send(Event::Ended).await),
                        Err(status) => break status,
                    }
                }
            }
        };
        if let Err(failure) = retries.pause(broken).await {
            return drop(events.send(Event::Failed(failure)).await);
        }
    }
}

async fn points(client: Client, job_id: String, events: mpsc::Sender<Event>) {
    let request = v1::StreamMetricsRequest {
        job_id,
        rank: Some(0),
        follow: true,
        ..v1::StreamMetricsRequest::default()
    };
    let points = stream::each_point(client, request, |point| tell(events.clone(), Event::Point(point)));
    let last = points.await.map_or_else(Event::Failed, |()| Event::Ended);
    events.send(last).await.ok();
}

/// One stream of rank 0's output in one generation. Output that cannot be had is no reason to stop following.
async fn output(client: Client, request: v1::StreamLogsRequest, events: mpsc::Sender<Event>) {
    stream::copy_logs(client, request, |chunk| tell(events.clone(), Event::Output(chunk))).await.ok();
    events.send(Event::Ended).await.ok();
}

async fn tell(events: mpsc::Sender<Event>, event: Event) -> Result<(), Failure> {
    events.send(event).await.map_err(|_| Failure::ReaderGone)
}

/// The live line: a bar on a terminal, else a plain line now and then.
struct Screen {
    bar: ProgressBar,
    live: bool,
    progress: Progress,
    last_line: tokio::time::Instant,
    said: String,
    shown: String,
    waiting: Option<String>,
}

impl Screen {
    fn new() -> Self {
        let live = std::io::stderr().is_terminal();
        let target = if live {
            ProgressDrawTarget::term_like_with_hz(Box::new(Terminal::stderr()), DRAWS_PER_SECOND)
        } else {
            ProgressDrawTarget::hidden()
        };
        let bar = ProgressBar::with_draw_target(None, target);
        // The template is a constant; a wrong one would show in every test.
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(120));
        let last_line = tokio::time::Instant::now();
        let (said, shown) = (String::new(), String::new());
        Self { bar, live, progress: Progress::default(), last_line, said, shown, waiting: None }
    }

    fn say(&mut self, line: &str) {
        if self.said != line {
            line.clone_into(&mut self.said);
            self.bar.suspend(|| say!("{line}"));
        }
    }

    fn job(&mut self, job: &v1::Job) {
        let line = format!("{}: {}", show::job_state(job), job.reason);
        if self.bar.length().is_none() {
            self.bar.set_message(escape(&line).into_owned());
        }
        self.say(&line);
    }

    fn point(&mut self, point: &v1::Point) {
        self.progress.add(point);
        if let (Some(total), None) = (self.progress.steps_total, self.bar.length()) {
            let template = "{wide_bar:.cyan/blue} {msg}";
            if let Ok(style) = ProgressStyle::with_template(template) {
                self.bar.set_style(style.progress_chars("━╸─"));
            }
            self.bar.set_length(total);
        }
        self.bar.set_position(self.progress.step);
        let line = self.progress.line();
        self.bar.set_message(escape(&line).into_owned());
        self.waiting = Some(line);
        self.plain_line(false);
    }

    fn output(&self, data: Vec<u8>, target: Target) {
        self.bar.suspend(|| raw(data, target).ok());
    }

    fn plain_line(&mut self, now: bool) {
        if !self.live && (now || self.last_line.elapsed() >= LINE_INTERVAL) {
            if let Some(line) = self.waiting.take().filter(|line| *line != self.shown) {
                say!("{line}");
                self.shown = line;
            }
            self.last_line = tokio::time::Instant::now();
        }
    }

    async fn tick(&mut self) {
        tokio::time::sleep(LINE_INTERVAL).await;
        self.plain_line(true);
    }

    fn close(&mut self) {
        self.plain_line(true);
        let line = self.progress.line();
        self.bar.finish_and_clear();
        if self.live && self.progress.step > 0 {
            say!("{line}");
        }
    }
}
