//! The error file of a rank, as torchrun's `@record` writes it: what the launcher reports as the cause.

use std::fmt::Display;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::json;

/// Names the file.
const FILE: &str = "TORCHELASTIC_ERROR_FILE";

/// Runs a program, and leaves what goes wrong where the launcher looks for it: the error that it returns, or a panic of any
/// thread. Without a launcher it only runs the program.
///
/// Call it once, around all of `main`:
///
/// ```no_run
/// fn main() -> Result<(), Box<dyn std::error::Error>> {
///     muster_ddp::record(|| {
///         let group = muster_ddp::ProcessGroup::from_env()?;
///         Ok(())
///     })
/// }
/// ```
pub fn record<T, E: Display>(program: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
    match std::env::var_os(FILE).filter(|file| !file.is_empty()) {
        Some(file) => record_to(Path::new(&file), program),
        None => program(),
    }
}

fn record_to<T, E: Display>(file: &Path, program: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
    let before = std::panic::take_hook();
    let path = file.to_owned();
    std::panic::set_hook(Box::new(move |panic| {
        let said = panic.payload_as_str().unwrap_or("a panic that says nothing");
        let place = panic.location().map(|at| format!(" at {at}")).unwrap_or_default();
        let thread = std::thread::current().name().unwrap_or("without a name").to_owned();
        write(&path, &format!("panic: {said}"), &format!("thread {thread} panicked{place}:\n{said}"));
        before(panic);
    }));
    let result = program();
    if let Err(error) = &result {
        let said = format!("{error:#}");
        write(file, &said, &said);
    }
    result
}

/// It is the last thing of a rank that fails: whatever else goes wrong now is not the cause.
#[expect(clippy::disallowed_methods, reason = "a training program is its own driver")]
fn write(file: &Path, message: &str, call_stack: &str) {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let extra = json!({ "py_callstack": call_stack, "timestamp": seconds.to_string() });
    let written = json!({ "message": { "message": message, "extraInfo": extra } });
    std::fs::write(file, written.to_string()).ok();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(file: &Path) -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
    }

    #[test]
    fn errors_and_panics_are_left_and_success_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("error.json");
        assert_eq!(record_to(&file, || Ok::<_, String>(7)), Ok(7));
        assert!(!file.exists());
        record_to(&file, || Err::<(), _>("no shard 7")).unwrap_err();
        assert_eq!(written(&file)["message"]["message"], "no shard 7");
        let thread = std::thread::Builder::new().name("loader".into());
        let panics = || record_to(&file, || -> Result<(), String> { panic!("shard {}", 8) });
        std::thread::scope(|scope| assert!(thread.spawn_scoped(scope, panics).unwrap().join().is_err()));
        let left = written(&file);
        assert_eq!(left["message"]["message"], "panic: shard 8");
        let stack = left["message"]["extraInfo"]["py_callstack"].as_str().unwrap();
        assert!(stack.starts_with("thread loader panicked at ") && stack.contains("record.rs:"), "{stack}");
        let seconds = left["message"]["extraInfo"]["timestamp"].as_str().unwrap();
        assert!(seconds.parse::<u64>().unwrap() > 1_700_000_000);
    }
}
