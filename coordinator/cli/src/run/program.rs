//! What is run as each rank.

use std::ffi::OsString;
use std::path::Path;
use std::str::FromStr;

use crate::exit::Failure;
use crate::output::say;

use super::args::RunArgs;

/// Runs a script as torchrun's --run-path does.
const RUN_PATH: &str =
    "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')";

/// The command, and a name for listings.
pub(super) fn command(args: &RunArgs, dir: &Path) -> Result<(Vec<OsString>, String), Failure> {
    let [script, rest @ ..] = args.command.as_slice() else {
        return Err(Failure::Usage("no script is named".to_owned()));
    };
    if args.no_python && args.module {
        return Err(Failure::Usage("--no-python and --module exclude each other".to_owned()));
    }
    let mut command = Vec::new();
    if args.run_path {
        command.extend([python(), "-c".into(), RUN_PATH.into()]);
        command.push(dir.join(script).into());
    } else if args.no_python {
        command.push(script.clone());
    } else {
        command.extend([python(), "-u".into()]);
        if args.module {
            command.push("-m".into());
        } else if !dir.join(script).exists() {
            return Err(Failure::Usage(format!(
                "there is no {} in {}; a module needs -m, a program that is no Python script --no-python",
                script.display(),
                dir.display()
            )));
        }
        command.push(script.clone());
    }
    command.extend_from_slice(rest);
    let base = Path::new(script).file_name().unwrap_or(script).to_string_lossy();
    let plain = |c: char| if c.is_ascii_alphanumeric() || ".-_".contains(c) { c } else { '_' };
    Ok((command, base.chars().map(plain).take(64).collect()))
}

/// The interpreter: PYTHON_EXEC, or the first python or python3 of the PATH, which is that of an active environment.
fn python() -> OsString {
    if let Some(python) = std::env::var_os("PYTHON_EXEC").filter(|python| !python.is_empty()) {
        return python;
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let has = |name: &str| std::env::split_paths(&path).any(|dir| dir.join(name).is_file());
    if has("python") { "python".into() } else { "python3".into() }
}

/// Flags that mean nothing here are not swallowed.
pub(super) fn say_what_has_no_effect(args: &RunArgs) -> Result<(), Failure> {
    if let Some(name) = args.logs_specs.as_deref().filter(|name| *name != "default") {
        let why = "is a Python class, which cannot be loaded here; --log-dir, --redirects and --tee say where logs go";
        return Err(Failure::Usage(format!("--logs-specs {name} {why}")));
    }
    let name = args.event_log_handler.as_str();
    if !matches!(name, "null" | "console") {
        return Err(Failure::Usage(format!(
            "--event-log-handler {name} is a Python class, which cannot be loaded here"
        )));
    }
    for name in &args.signals_to_handle.unknown {
        let is_short = nix::sys::signal::Signal::from_str(&format!("SIG{name}")).is_ok();
        let meant = if is_short { format!("; SIG{name} is one") } else { String::new() };
        say!("muster run: --signals-to-handle: {name} is no signal, and is passed over{meant}");
    }
    let given = [
        ("--monitor-interval", args.monitor_interval.is_some(), "the end of a rank is seen at once"),
        ("--event-log-handler", name == "console", "nothing is recorded but what is printed"),
        ("--start-method", args.start_method.is_some(), "ranks are programs of their own"),
    ];
    for (flag, _, why) in given.into_iter().filter(|(_, given, _)| *given) {
        say!("muster run: {flag} has no effect here: {why}");
    }
    Ok(())
}
