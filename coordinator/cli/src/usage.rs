//! What is said of a command line that is wrong: which variable it was, and which flag was meant.

use std::error::Error;
use std::ffi::OsString;
use std::io::IsTerminal;

use clap::error::{ContextKind, ContextValue};
use clap::{Arg, CommandFactory};
use muster_worker::trust;

use crate::args::Args;
use crate::exit::Failure;
use crate::output::{self, Target};

/// Least likeness of a flag's name for it to be proposed.
const LIKENESS_MIN: f64 = 0.7;

/// Prints help, the version, or what is wrong with the command line.
pub(crate) fn say(said: &clap::Error) -> Result<(), Failure> {
    let target = if said.use_stderr() { Target::Stderr } else { Target::Stdout };
    let is_terminal = match target {
        Target::Stdout => std::io::stdout().is_terminal(),
        Target::Stderr => std::io::stderr().is_terminal(),
    };
    let has_colors = is_terminal && std::env::var_os("NO_COLOR").is_none_or(|no| no.is_empty());
    if let Some(why) = wrong_variable(said, &std::env::args_os().collect::<Vec<_>>()) {
        return Err(Failure::Usage(why));
    }
    let text = said.render();
    let text = if has_colors { text.ansi().to_string() } else { text.to_string() };
    // A password in a URL is not shown, whatever was wrong with it.
    let text = match said.get(ContextKind::InvalidValue) {
        Some(ContextValue::String(value)) => text.replace(value.as_str(), &trust::shown(value)),
        _ => text,
    };
    output::raw(text.into_bytes(), target)?;
    match target {
        Target::Stdout => Ok(()),
        Target::Stderr => Err(Failure::CommandLine),
    }
}

/// Returns words about a value that is wrong and came from a variable, not from the command line.
fn wrong_variable(said: &clap::Error, words: &[OsString]) -> Option<String> {
    let text = |kind| match said.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        _ => None,
    };
    let (shown, value) = (text(ContextKind::InvalidArg)?, text(ContextKind::InvalidValue)?);
    let mut command = Args::command();
    // Flags are not shown in full before that.
    command.build();
    let commands = || std::iter::once(&command).chain(command.get_subcommands());
    let is_meant = |arg: &&Arg| arg.to_string() == shown && arg.get_env().is_some();
    let mut meant = commands().flat_map(clap::Command::get_arguments).filter(is_meant);
    let arg = meant.find(|arg| {
        let set = arg.get_env().and_then(std::env::var_os);
        set.is_some_and(|set| set == value) && !is_given(arg, words)
    })?;
    let variable = arg.get_env()?.display();
    let why = said.source().map(|why| format!(": {why}")).unwrap_or_default();
    let long = arg.get_long().unwrap_or_default();
    Some(format!(
        "the variable {variable} has the value {:?}, which is none for --{long}{why}",
        trust::shown(value)
    ))
}

/// Whether the command line names a flag, which may be cut short.
fn is_given(arg: &Arg, words: &[OsString]) -> bool {
    let names = arg.get_long_and_visible_aliases().into_iter().flatten();
    let names: Vec<String> = names.map(plain).collect();
    words.iter().filter_map(|word| word.to_str()).any(|word| {
        let short = arg.get_short().is_some_and(|short| word.starts_with(&format!("-{short}")));
        let long = word.strip_prefix("--").map(|word| plain(word.split('=').next().unwrap_or(word)));
        short || long.is_some_and(|long| !long.is_empty() && names.iter().any(|name| name.starts_with(&long)))
    })
}

/// Takes apart words of `muster run` that are a short flag with its value, such as -r3: what begins
/// a script's arguments may begin with a dash, so that the value would be looked for among the
/// flags.
pub(crate) fn plain_words(words: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut words: Vec<OsString> = words.collect();
    let is_short = |word: &OsString| word.to_str().and_then(short_with_value).is_some();
    // To describe the command line takes its time.
    if !words.iter().any(is_short) {
        return words;
    }
    let mut all = Args::command();
    all.build();
    let Some(command) = all.find_subcommand("run") else { return words };
    let mut at = 1;
    while let Some(word) = words.get(at).and_then(|word| word.to_str()).filter(|word| word.starts_with('-')) {
        at += if takes_next(&all, word) { 2 } else { 1 };
    }
    if words.get(at).is_none_or(|word| word != "run") {
        return words;
    }
    at += 1;
    while let Some(word) = words.get(at).and_then(|word| word.to_str()) {
        if let Some((short, value)) = short_with_value(word) {
            let (short, value) = (format!("-{short}").into(), value.into());
            words.splice(at..=at, [short, value]);
            at += 2;
        } else if word.len() > 1 && word != "--" && word.starts_with('-') {
            at += if takes_next(command, word) { 2 } else { 1 };
        } else {
            // The script: what follows is its own.
            break;
        }
    }
    words
}

/// Returns the flag and the value of a word that has both.
fn short_with_value(word: &str) -> Option<(char, &str)> {
    let rest = word.strip_prefix(['-']).filter(|rest| rest.starts_with(['r', 't']))?;
    let (short, value) = (rest.chars().next()?, &rest[1..]);
    (!value.is_empty()).then(|| (short, value.strip_prefix('=').unwrap_or(value)))
}

/// Returns whether the word after a flag is its value.
fn takes_next(command: &clap::Command, word: &str) -> bool {
    let takes = |arg: &Arg| arg.get_action().takes_values();
    let Some(long) = word.strip_prefix("--") else {
        return command.get_arguments().any(|arg| {
            arg.get_short().is_some_and(|short| word.strip_prefix('-') == Some(short.to_string().as_str()))
                && takes(arg)
        });
    };
    let long = plain(long);
    let names = |arg: &&Arg| arg.get_long().is_some_and(|name| name.starts_with(&long));
    !long.contains('=')
        && command.get_arguments().filter(|arg| !arg.is_positional()).find(names).is_some_and(takes)
}

fn plain(name: &str) -> String {
    name.replace('_', "-")
}

/// Refuses a flag in the place of a script: nobody's script is named so, unless it follows two dashes.
pub(crate) fn refuse_unknown_flag(command: &[OsString]) -> Result<(), Failure> {
    let words: Vec<OsString> = std::env::args_os().collect();
    let before = words.len().checked_sub(command.len() + 1).and_then(|at| words.get(at));
    match command.first().map(|script| script.to_string_lossy()) {
        Some(script) if script.starts_with('-') && before.is_none_or(|word| word != "--") => {
            Err(Failure::Usage(unknown_flag(&script)))
        }
        _ => Ok(()),
    }
}

fn unknown_flag(word: &str) -> String {
    let name = plain(word.split('=').next().unwrap_or(word).trim_start_matches('-'));
    let command = Args::command();
    let run = command.get_subcommands().find(|command| command.get_name() == "run");
    let longs = run.into_iter().flat_map(clap::Command::get_arguments).filter_map(Arg::get_long);
    let likeness = |long: &&str| strsim::jaro_winkler(long, &name);
    let nearest = longs.max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
    let nearest = nearest.filter(|long| likeness(long) >= LIKENESS_MIN);
    let meant = nearest.map(|long| format!("; did you mean --{long}?")).unwrap_or_default();
    format!("there is no flag {word}, and a script comes after the flags{meant}")
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::*;

    #[test]
    fn short_flags_may_be_one_word_with_their_value_before_the_script() {
        for (line, expected) in [
            ("muster run -r3 -t=1 x -r3", "muster run -r 3 -t 1 x -r3"),
            ("muster run -r0:1,1:2 -m x", "muster run -r 0:1,1:2 -m x"),
            ("muster run --nproc 2 --standalone -t3 x", "muster run --nproc 2 --standalone -t 3 x"),
            ("muster run --role -r3 x -t1", "muster run --role -r3 x -t1"),
            ("muster run --log_dir=a -r 3 -r1 x", "muster run --log_dir=a -r 3 -r 1 x"),
            ("muster run -- -r3", "muster run -- -r3"),
            ("muster --coordinator run run -r3 x", "muster --coordinator run run -r 3 x"),
            ("muster submit run -r3", "muster submit run -r3"),
        ] {
            let words = plain_words(line.split(' ').map(OsString::from));
            assert_eq!(words.join(OsStr::new(" ")), OsString::from(expected));
        }
    }

    #[test]
    fn an_unknown_flag_names_the_nearest() {
        for (word, expected) in [
            ("--nprocs-per-node=2", "; did you mean --nproc-per-node?"),
            ("--rdvz_id", "; did you mean --rdzv-id?"),
            ("--max-restart-s", "; did you mean --max-restarts?"),
            ("--xyz", "after the flags"),
        ] {
            assert!(unknown_flag(word).ends_with(expected), "{}", unknown_flag(word));
        }
    }
}
