//! The user's own checks of a machine: programs in a directory, run one after the other, each bounded in time and in what
//! it may say.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use muster_core::health::{Finding, Severity};
use muster_worker_core::health::{CheckEnd, judge_check};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::AsyncReadExt;
use tokio::process::Command;

/// Longest time of one check.
const CHECK_MAX: Duration = Duration::from_secs(30);
/// Most of what it writes that is read; a line with a reason fits well.
const OUTPUT_BYTES_MAX: u64 = 4096;
/// Most checks: each may take its whole time, one after the other.
const CHECKS_MAX: usize = 32;

/// Runs every check, and gives what they find.
pub(crate) async fn run(dir: &Path) -> Vec<Finding> {
    let programs = match list(dir) {
        Ok(programs) => programs,
        Err(error) => {
            let reason = format!("{} cannot be read: {error}", dir.display());
            return vec![Finding { subject: "checks".to_owned(), severity: Severity::Degraded, reason }];
        }
    };
    let mut all = Vec::new();
    for program in programs {
        let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let (end, line) = one(&program).await;
        all.extend(judge_check(&name, end, &line));
    }
    all
}

/// The executable files of a directory by name, without those that editors and packages leave.
fn list(dir: &Path) -> std::io::Result<Vec<PathBuf>> {
    let is_check = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let plain = !name.starts_with('.') && !name.ends_with('~') && !name.contains(".dpkg-");
        let meta = std::fs::metadata(path);
        plain && meta.is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    };
    let mut all: Vec<PathBuf> =
        std::fs::read_dir(dir)?.filter_map(|entry| Some(entry.ok()?.path())).collect();
    all.retain(is_check);
    all.sort();
    all.truncate(CHECKS_MAX);
    Ok(all)
}

async fn one(program: &Path) -> (CheckEnd, String) {
    let mut command = Command::new(program);
    // A group of its own, so that what it has started ends with it.
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .process_group(0)
        .kill_on_drop(true);
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => return (CheckEnd::NotStarted, error.to_string()),
    };
    let group = child.id().map(|id| Pid::from_raw(id.cast_signed()));
    let stdout = child.stdout.take();
    let mut output = Vec::new();
    let ended = async {
        if let Some(stdout) = stdout {
            // One that writes more finds its pipe closed.
            stdout.take(OUTPUT_BYTES_MAX).read_to_end(&mut output).await.ok();
        }
        child.wait().await
    };
    let end = match tokio::time::timeout(CHECK_MAX, ended).await {
        Ok(Ok(status)) => CheckEnd::Exited(status.code()),
        Ok(Err(_)) => CheckEnd::Exited(None),
        Err(_) => CheckEnd::TimedOut,
    };
    if let Some(group) = group {
        killpg(group, Signal::SIGKILL).ok();
    }
    if end == CheckEnd::TimedOut {
        // It was killed, and is not left as a zombie; one that the kernel holds is.
        tokio::time::timeout(Duration::from_secs(1), child.wait()).await.ok();
    }
    let text = String::from_utf8_lossy(&output);
    (end, text.lines().next().unwrap_or_default().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &Path, name: &str, mode: u32, script: &str) {
        let path = dir.join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    #[tokio::test]
    async fn a_check_that_does_not_end_is_killed_with_what_it_started() {
        let dir = tempfile::tempdir().unwrap();
        let (pid, new) = (dir.path().join("pid"), dir.path().join("new"));
        let script = format!(
            "sleep 1000 & echo $! > {new}; mv {new} {pid}; wait",
            new = new.display(),
            pid = pid.display()
        );
        write(dir.path(), "hangs", 0o755, &script);
        let checks = dir.path().to_owned();
        let running = tokio::spawn(async move { run(&checks).await });
        while !pid.exists() {
            tokio::task::yield_now().await;
        }
        let child = std::fs::read_to_string(pid).unwrap().trim().parse().unwrap();
        tokio::time::pause();
        tokio::time::advance(CHECK_MAX).await;
        let found = running.await.unwrap();
        let reasons: Vec<&str> = found.iter().map(|finding| finding.reason.as_str()).collect();
        assert_eq!(reasons, ["the check does not end, and was killed"]);
        while crate::launch::procfs::stat(child).is_some_and(|stat| !matches!(stat.state, 'Z' | 'X')) {
            std::thread::yield_now();
        }
    }

    #[tokio::test]
    async fn only_programs_are_run_and_each_is_heard() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "20-b", 0o755, "echo second; exit 2");
        write(dir.path(), "10-a", 0o755, "echo first; echo more; exit 1");
        write(dir.path(), ".hidden", 0o755, "exit 2");
        write(dir.path(), "backup~", 0o755, "exit 2");
        write(dir.path(), "README", 0o644, "exit 2");
        let found = run(dir.path()).await;
        let words: Vec<String> = found.iter().map(|f| format!("{}: {}", f.subject, f.reason)).collect();
        assert_eq!(words, ["check 10-a: first", "check 20-b: second"]);
        let missing = run(&dir.path().join("none")).await;
        assert!(missing[0].reason.contains("cannot be read"), "{missing:?}");
    }
}
