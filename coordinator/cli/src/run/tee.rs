//! What ranks write to files, shown as well: line by line, with the rank before each. The files have it first, and
//! neither the ranks nor this process wait for whoever reads what is shown.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use muster_core::types::Generation;
use muster_worker::Attached;
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::args::{Filters, RunArgs};
use crate::output::lined::Lined;
use crate::output::{self, Target, say, send_stream};

/// Time between looks at a file whose end was reached.
const INTERVAL: Duration = Duration::from_millis(20);
/// Bytes taken at once.
const READ_BYTES: usize = 64 << 10;
/// Longest line that is searched whole; of longer ones, the pieces are, so that no program fills the memory.
const LINE_BYTES_MAX: usize = 1 << 20;
/// Longest time for the rest of the output once the ranks have ended, however slowly it is read.
const REST_MAX: Duration = Duration::from_secs(10);
/// The same, once somebody does not want to wait.
const REST_MAX_HURRIED: Duration = Duration::from_millis(200);
/// Of torchrun's template for the text before each line.
const TEMPLATE: &str = "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE";

/// One stream of one rank that is shown or searched.
#[derive(Clone, Debug)]
struct Stream {
    local_rank: u32,
    is_error: bool,
    /// Template of what stands before each line; none if it is not shown.
    prefix: Option<String>,
    /// Lines with one of these are copied.
    filters: Vec<String>,
}

/// Follows the files of each attempt.
pub(super) struct Tees {
    attached: Attached,
    streams: Vec<Stream>,
    followed: BTreeSet<Generation>,
    ended: watch::Sender<bool>,
    tasks: JoinSet<()>,
    /// Files and how much of each was handed over to be shown.
    files: Vec<(PathBuf, Arc<AtomicU64>)>,
    keeps_logs: bool,
}

impl Tees {
    pub fn new(args: &RunArgs, attached: Attached, procs: u32) -> Self {
        let template = std::env::var(TEMPLATE).ok().filter(|template| !template.is_empty());
        let template = template.unwrap_or_else(|| "[${role_name}${local_rank}]:".to_owned());
        let shown =
            |rank: u32| args.local_ranks_filter.0.is_empty() || args.local_ranks_filter.0.contains(&rank);
        let texts = |filters: &Option<Filters>| filters.clone().map_or(Vec::new(), |filters| filters.0);
        let mut streams = Vec::new();
        for local_rank in 0..procs {
            for (bit, filters) in [(1, &args.duplicate_stdout_filters), (2, &args.duplicate_stderr_filters)] {
                let prefix = (args.tee.has(local_rank, bit) && shown(local_rank)).then(|| template.clone());
                let is_file = args.tee.has(local_rank, bit) || args.redirects.has(local_rank, bit);
                let filters = if is_file { texts(filters) } else { Vec::new() };
                if prefix.is_some() || !filters.is_empty() {
                    streams.push(Stream { local_rank, is_error: bit == 2, prefix, filters });
                }
            }
        }
        let (ended, tasks) = (watch::channel(false).0, JoinSet::new());
        let keeps_logs = !attached.log_dir.starts_with(&attached.scratch);
        Self { attached, streams, followed: BTreeSet::new(), ended, tasks, files: Vec::new(), keeps_logs }
    }

    pub fn attached(&self) -> &Attached {
        &self.attached
    }

    /// Follows what the ranks of a generation write, if that is not done already.
    ///
    /// `first_rank` is the first rank here.
    pub fn follow(&mut self, generation: Generation, first_rank: u32) {
        if self.streams.is_empty() || !self.followed.insert(generation) {
            return;
        }
        // Those of the attempt before have written all they will.
        self.ended.send_replace(true);
        self.ended = watch::channel(false).0;
        for stream in &self.streams {
            let dir = self.attached.rank_dir(generation, stream.local_rank);
            let name = if stream.is_error { "stderr" } else { "stdout" };
            let copy = dir.parent().map(|attempt| attempt.join(format!("filtered_{name}.log")));
            let path = dir.join(format!("{name}.log"));
            let handed = Arc::new(AtomicU64::new(0));
            if stream.prefix.is_some() {
                self.files.push((path.clone(), handed.clone()));
            }
            let mut stream = stream.clone();
            let (rank, local_rank) = (first_rank + stream.local_rank, stream.local_rank);
            stream.prefix = stream.prefix.map(|template| {
                let names = [
                    ("role_name", self.attached.role.clone()),
                    ("rank", rank.to_string()),
                    ("local_rank", local_rank.to_string()),
                ];
                substitute(&template, &names)
            });
            let shown = Show::new(stream, copy, self.ended.subscribe(), handed);
            self.tasks.spawn(shown.run(path));
        }
    }

    /// Shows the rest, for as long as somebody reads it, and says how much was not shown.
    pub async fn finish(&mut self, is_hurried: bool) {
        self.ended.send_replace(true);
        if self.streams.is_empty() {
            return;
        }
        let (most, pause) =
            if is_hurried { (REST_MAX_HURRIED, REST_MAX_HURRIED) } else { (REST_MAX, output::PAUSE_MAX) };
        let end = Instant::now() + most;
        let mut before = None;
        loop {
            let until = end.min(Instant::now() + pause);
            match tokio::time::timeout_at(until, self.tasks.join_next()).await {
                Ok(Some(_)) => continue,
                Ok(None) => break,
                Err(_) => {}
            }
            let now = Some(output::taken_bytes());
            if now == before || Instant::now() >= end {
                break;
            }
            before = now;
        }
        let pause = pause.min(end.saturating_duration_since(Instant::now()));
        output::drain([pause; 2]).await.ok();
        self.tasks.abort_all();
        self.say_gap().await;
    }

    async fn say_gap(&self) {
        let mut missing = (output::held_bytes(Target::Stdout) + output::held_bytes(Target::Stderr)) as u64;
        for (path, handed) in &self.files {
            let written = tokio::fs::metadata(path).await.map_or(0, |file| file.len());
            missing += written.saturating_sub(handed.load(Ordering::Relaxed));
        }
        if missing == 0 {
            return;
        }
        let dir = self.attached.log_dir.display();
        if self.keeps_logs {
            say!(
                "muster run: {missing} bytes were not shown, for nothing read them in time; they are in {dir}"
            );
        } else {
            say!(
                "muster run: {missing} bytes were not shown, for nothing read them in time; --log-dir keeps them"
            );
        }
    }
}

/// Shows one stream of one rank.
struct Show {
    lined: Option<Lined>,
    search: Option<Search>,
    ended: watch::Receiver<bool>,
    /// Bytes that were handed over.
    handed: Arc<AtomicU64>,
}

impl Show {
    fn new(
        stream: Stream,
        copy: Option<PathBuf>,
        ended: watch::Receiver<bool>,
        handed: Arc<AtomicU64>,
    ) -> Self {
        let target = if stream.is_error { Target::Stderr } else { Target::Stdout };
        let id = u64::from(stream.local_rank) * 2 + u64::from(stream.is_error);
        let prefix = stream.prefix.clone().unwrap_or_else(|| format!("[{}]:", stream.local_rank));
        let search = copy.filter(|_| !stream.filters.is_empty()).map(|copy| Search {
            copy,
            filters: stream.filters,
            prefix: prefix.clone(),
            line: Vec::new(),
        });
        let lined = stream.prefix.map(|prefix| Lined::new(target, id, prefix.into(), <[u8]>::to_vec));
        Self { lined, search, ended, handed }
    }

    async fn run(mut self, path: PathBuf) {
        let mut file = loop {
            let last = *self.ended.borrow();
            match File::open(&path).await {
                Ok(file) => break file,
                Err(_) if last => return,
                Err(_) => tokio::time::sleep(INTERVAL).await,
            }
        };
        let mut buffer = vec![0; READ_BYTES];
        loop {
            // Looked at before the file is read: what comes after its end was written before the rank's.
            let last = *self.ended.borrow();
            match file.read(&mut buffer).await {
                Ok(0) | Err(_) if last => break,
                Ok(0) | Err(_) => {
                    let due = self.lined.as_mut().and_then(Lined::due);
                    self.show(due).await;
                    tokio::time::sleep(INTERVAL).await;
                }
                Ok(read) => {
                    let bytes = &buffer[..read];
                    let text = self.lined.as_mut().and_then(|lined| lined.add(bytes).or_else(|| lined.due()));
                    self.show(text).await;
                    self.handed.fetch_add(read as u64, Ordering::Relaxed);
                    if let Some(search) = &mut self.search {
                        search.add(bytes).await;
                    }
                }
            }
        }
        let rest = self.lined.as_mut().and_then(Lined::rest);
        self.show(rest).await;
        if let Some(search) = &mut self.search {
            search.end_line().await;
        }
    }

    /// The file has it already: it is read on once there is room here. A reader may go; the ranks are not to suffer
    /// for it.
    async fn show(&self, text: Option<output::lined::Text>) {
        if let Some(text) = text {
            send_stream(text).await.ok();
        }
    }
}

/// Copies the lines that hold one of the texts.
struct Search {
    copy: PathBuf,
    filters: Vec<String>,
    prefix: String,
    line: Vec<u8>,
}

impl Search {
    async fn add(&mut self, bytes: &[u8]) {
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.line.extend_from_slice(part);
            if self.line.ends_with(b"\n") || self.line.len() >= LINE_BYTES_MAX {
                self.end_line().await;
            }
        }
    }

    async fn end_line(&mut self) {
        let line = std::mem::take(&mut self.line);
        let text = String::from_utf8_lossy(&line);
        if self.filters.iter().any(|filter| text.contains(filter.as_str())) {
            let whole = [self.prefix.as_bytes(), &line].concat();
            // A disk that is full costs the copy, not the run.
            append(&self.copy, &whole).await.ok();
        }
    }
}

async fn append(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = tokio::fs::OpenOptions::new().create(true).append(true).open(path).await?;
    file.write_all(bytes).await?;
    file.flush().await
}

/// Fills a template as Python's `Template.safe_substitute` does: `$name`, `${name}`, and `$$` for a dollar. What is no
/// name of these stays as it is.
fn substitute(template: &str, names: &[(&str, String)]) -> String {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut out = String::new();
    let mut rest = template;
    while let Some((before, after)) = rest.split_once('$') {
        out.push_str(before);
        let braced = after.strip_prefix('{').and_then(|inner| inner.split_once('}'));
        let plain = after.split_at(after.find(|c| !is_name(c)).unwrap_or(after.len()));
        let (name, next) = braced.unwrap_or(plain);
        if let Some(next) = after.strip_prefix('$') {
            out.push('$');
            rest = next;
        } else if let Some((_, value)) = names.iter().find(|(known, _)| *known == name) {
            out.push_str(value);
            rest = next;
        } else {
            out.push('$');
            rest = after;
        }
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_are_filled_as_python_fills_them() {
        let names = [("role_name", "r"), ("rank", "5"), ("local_rank", "1")];
        let names = names.map(|(name, value)| (name, value.to_owned()));
        for (template, expected) in [
            ("[${role_name}${local_rank}]:", "[r1]:"),
            ("$rank/$local_rank ", "5/1 "),
            ("[rank${rank}]: ", "[rank5]: "),
            ("$ranks $$rank ${other} $", "$ranks $rank ${other} $"),
            ("${rank", "${rank"),
        ] {
            assert_eq!(substitute(template, &names), expected, "{template}");
        }
    }
}
