//! The lines of every log. What users, nodes or ranks wrote can neither begin a line nor reach a
//! terminal as a control character. That is ensured here, for all fields and messages.

use std::fmt::{self, Write as _};
use std::io::{self, Write};

use muster_core::types::text::{Escaping, escape_json};
use tracing::Subscriber;
use tracing::field::{Field, Visit};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::field::RecordFields;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::format::{FormatFields, Writer};

/// Returns what writes lines for people.
pub(crate) fn text<W>(filter: EnvFilter, ansi: bool, writer: W) -> impl Subscriber + Send + Sync
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        .with_ansi(ansi)
        .fmt_fields(TextFields)
        // It would panic where standard error is a file on a disk that is full.
        .log_internal_errors(false)
        .finish()
}

/// Returns what writes an object for each line.
pub(crate) fn json<W>(filter: EnvFilter, writer: W) -> impl Subscriber + Send + Sync
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .json()
        .flatten_event(true)
        .with_writer(JsonWriters(writer))
        .log_internal_errors(false)
        .finish()
}

/// Fields as `name=value`, after the message.
struct TextFields;

impl<'writer> FormatFields<'writer> for TextFields {
    fn format_fields<R: RecordFields>(&self, writer: Writer<'writer>, fields: R) -> fmt::Result {
        let mut shown = Shown { writer, is_first: true, result: Ok(()) };
        fields.record(&mut shown);
        shown.result
    }
}

struct Shown<'writer> {
    writer: Writer<'writer>,
    is_first: bool,
    result: fmt::Result,
}

impl Shown<'_> {
    fn show(&mut self, field: &Field, value: &dyn fmt::Debug) -> fmt::Result {
        // What the crate `log` adds about where a line came from.
        if field.name().starts_with("log.") {
            return Ok(());
        }
        if !std::mem::take(&mut self.is_first) {
            self.writer.write_char(' ')?;
        }
        if field.name() != "message" {
            let (italic, plain) =
                if self.writer.has_ansi_escapes() { ("\x1b[3m", "\x1b[0m") } else { ("", "") };
            write!(self.writer, "{italic}{}{plain}=", field.name().trim_start_matches("r#"))?;
        }
        write!(Escaping(&mut self.writer), "{value:?}")
    }
}

impl Visit for Shown<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if self.result.is_ok() {
            self.result = self.show(field, value);
        }
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.record_debug(field, &format_args!("{value}"));
        let mut cause = value.source();
        while let Some(source) = cause {
            let said =
                if self.result.is_ok() { write!(Escaping(&mut self.writer), ": {source}") } else { Ok(()) };
            self.result = self.result.and(said);
            cause = source.source();
        }
    }
}

/// Writers of lines that are JSON, of which serializers leave some control characters as they are.
struct JsonWriters<W>(W);

struct JsonWriter<W>(W);

impl<'writer, W: MakeWriter<'writer>> MakeWriter<'writer> for JsonWriters<W> {
    type Writer = JsonWriter<W::Writer>;

    fn make_writer(&'writer self) -> Self::Writer {
        JsonWriter(self.0.make_writer())
    }
}

impl<W: Write> Write for JsonWriter<W> {
    /// Takes whole lines, as they are handed over.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match std::str::from_utf8(line) {
            Ok(text) => self.0.write_all(escape_json(text).as_bytes())?,
            Err(_) => self.0.write_all(line)?,
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use muster_core::types::text::is_control;
    use tracing::{info, info_span};

    use super::*;

    const HOSTILE: &str = "x\n2026-11-30T00:00:00Z  INFO audit: who=root \x1b[2J\u{9b}\u{2028}\u{202e}";

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Everything that a hostile text can be part of.
    fn logged(make: impl FnOnce(Lines) -> Box<dyn Subscriber + Send + Sync>) -> String {
        let lines = Lines::default();
        tracing::subscriber::with_default(make(lines.clone()), || {
            let error = io::Error::other(HOSTILE);
            let error: &(dyn std::error::Error + 'static) = &error;
            let _entered = info_span!("call", path = %HOSTILE, other = HOSTILE).entered();
            info!(shown = %HOSTILE, debugged = ?HOSTILE, plain = HOSTILE, error, "said: {HOSTILE}");
        });
        let written = lines.0.lock().unwrap().clone();
        String::from_utf8(written).unwrap()
    }

    #[test]
    fn nobodys_text_begins_a_line_of_the_log() {
        let filter = || EnvFilter::new("info");
        let text = logged(|lines| Box::new(text(filter(), false, move || lines.clone())));
        let json = logged(|lines| Box::new(json(filter(), move || lines.clone())));
        for written in [&text, &json] {
            let line = written.strip_suffix('\n').unwrap();
            assert!(!line.contains(is_control), "{line:?}");
        }
        assert!(text.contains("said: x\\n2026") && text.contains(" shown=x\\n2026"), "{text}");
        let read: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(read["shown"], HOSTILE);
    }

    #[test]
    fn what_is_drawn_for_a_terminal_is_ours_alone() {
        let text = logged(|lines| Box::new(text(EnvFilter::new("info"), true, move || lines.clone())));
        assert!(text.contains("\x1b[3mshown\x1b[0m=x\\n2026"), "{text:?}");
        assert!(!text.contains("\x1b[2J") && text.lines().count() == 1, "{text:?}");
    }
}
