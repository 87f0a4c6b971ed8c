//! What ranks write to files, shown as well: line by line, with the rank before each.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use muster_core::types::Generation;
use muster_worker::Attached;
use tokio::fs::File;
use tokio::io::AsyncReadExt;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::args::{Filters, RunArgs};

/// Time between looks at a file whose end was reached.
const INTERVAL: Duration = Duration::from_millis(20);
/// Bytes taken at once.
const READ_BYTES: usize = 64 << 10;
/// Longest line that is kept together; longer ones are shown in pieces, so that no program fills the memory.
const LINE_BYTES_MAX: usize = 1 << 20;
/// Of torchrun's template for the text before each line.
const TEMPLATE: &str = "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE";

/// One stream of one rank that is shown or searched.
#[derive(Clone, Debug)]
struct Stream {
    local_rank: u32,
    is_error: bool,
    /// What stands before each line; none if it is not shown.
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
}

impl Tees {
    pub fn new(args: &RunArgs, attached: Attached, procs: u32) -> Self {
        let template = std::env::var(TEMPLATE).unwrap_or_else(|_| "[${role_name}${local_rank}]:".to_owned());
        let shown =
            |rank: u32| args.local_ranks_filter.0.is_empty() || args.local_ranks_filter.0.contains(&rank);
        let texts = |filters: &Option<Filters>| filters.clone().map_or(Vec::new(), |filters| filters.0);
        let mut streams = Vec::new();
        for local_rank in 0..procs {
            for (bit, filters) in [(1, &args.duplicate_stdout_filters), (2, &args.duplicate_stderr_filters)] {
                let prefix = (args.tee.has(local_rank, bit) && shown(local_rank)).then(|| {
                    template
                        .replace("${role_name}", &args.role)
                        .replace("${local_rank}", &local_rank.to_string())
                });
                let is_file = args.tee.has(local_rank, bit) || args.redirects.has(local_rank, bit);
                let filters = if is_file { texts(filters) } else { Vec::new() };
                if prefix.is_some() || !filters.is_empty() {
                    streams.push(Stream { local_rank, is_error: bit == 2, prefix, filters });
                }
            }
        }
        let (ended, tasks) = (watch::channel(false).0, JoinSet::new());
        Self { attached, streams, followed: BTreeSet::new(), ended, tasks }
    }

    pub fn attached(&self) -> &Attached {
        &self.attached
    }

    /// Follows what the ranks of a generation write, if that is not done already.
    pub fn follow(&mut self, generation: Generation) {
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
            self.tasks.spawn(show(path, copy, stream.clone(), self.ended.subscribe()));
        }
    }

    /// Shows the rest.
    pub async fn finish(&mut self) {
        self.ended.send_replace(true);
        while self.tasks.join_next().await.is_some() {}
    }
}

async fn show(path: PathBuf, copy: Option<PathBuf>, stream: Stream, ended: watch::Receiver<bool>) {
    let mut file = loop {
        let last = *ended.borrow();
        match File::open(&path).await {
            Ok(file) => break file,
            Err(_) if last => return,
            Err(_) => tokio::time::sleep(INTERVAL).await,
        }
    };
    let (mut buffer, mut line) = (vec![0; READ_BYTES], Vec::new());
    loop {
        // Looked at before the file is read: what comes after its end was written before the rank's.
        let last = *ended.borrow();
        match file.read(&mut buffer).await {
            Ok(0) | Err(_) if last => break,
            Ok(0) | Err(_) => tokio::time::sleep(INTERVAL).await,
            Ok(read) => {
                for part in buffer[..read].split_inclusive(|byte| *byte == b'\n') {
                    line.extend_from_slice(part);
                    if line.ends_with(b"\n") || line.len() >= LINE_BYTES_MAX {
                        write(&line, &stream, copy.as_ref());
                        line.clear();
                    }
                }
            }
        }
    }
    if !line.is_empty() {
        write(&line, &stream, copy.as_ref());
    }
}

/// Whoever reads our output may go; the ranks are not to suffer for it.
fn write(line: &[u8], stream: &Stream, copy: Option<&PathBuf>) {
    if let Some(prefix) = &stream.prefix {
        let whole = [prefix.as_bytes(), line].concat();
        if stream.is_error {
            std::io::stderr().write_all(&whole).ok();
        } else {
            let mut out = std::io::stdout().lock();
            out.write_all(&whole).and_then(|()| out.flush()).ok();
        }
    }
    let text = String::from_utf8_lossy(line);
    if let Some(copy) = copy
        && stream.filters.iter().any(|filter| text.contains(filter.as_str()))
        && let Ok(mut file) = std::fs::OpenOptions::new().create(true).append(true).open(copy)
    {
        let prefix = stream.prefix.clone().unwrap_or_else(|| format!("[{}]:", stream.local_rank));
        file.write_all(&[prefix.as_bytes(), line].concat()).ok();
    }
}
