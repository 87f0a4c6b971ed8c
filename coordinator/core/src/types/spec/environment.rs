//! What a job adds to the environment of its ranks: variables, and variables whose values nodes have in files.

use super::{Errors, JobSpec, limits};

/// Variables that the worker sets for every rank; a job cannot set them.
pub const RESERVED_ENV: [&str; 15] = [
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "ROLE_RANK",
    "ROLE_NAME",
    "LOCAL_WORLD_SIZE",
    "WORLD_SIZE",
    "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_MAX_RESTARTS",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_USE_AGENT_STORE",
];

impl JobSpec {
    pub(super) fn check_env(&self, errors: &mut Errors) {
        if self.env.len() > limits::ENV_VARS_MAX {
            errors
                .add("env", format!("has {} entries; at most {} fit", self.env.len(), limits::ENV_VARS_MAX));
        }
        for (key, value) in &self.env {
            let shown: String = key.chars().take(64).collect();
            let field = format!("env[{shown:?}]");
            if key.is_empty() || key.contains('=') {
                errors.add(&field, "is not a variable name: it is empty or contains '='".into());
            }
            errors.check_text(&field, key, limits::NAME_BYTES_MAX);
            errors.check_text(&field, value, limits::ARG_BYTES_MAX);
            errors.check_unreserved(&field, key);
        }
        self.check_env_files(errors);
        let bytes: usize = self.command.iter().map(String::len).sum::<usize>()
            + self.env.iter().chain(&self.env_files).map(|(k, v)| k.len() + v.len()).sum::<usize>();
        if bytes > limits::SPEC_BYTES_MAX {
            errors.add(
                "command",
                format!("and env have {bytes} bytes together; at most {} fit", limits::SPEC_BYTES_MAX),
            );
        }
    }

    fn check_env_files(&self, errors: &mut Errors) {
        let most = limits::ENV_FILES_MAX;
        if self.env_files.len() > most {
            errors.add("env_files", format!("has {} entries; at most {most} fit", self.env_files.len()));
        }
        for (key, path) in self.env_files.iter().take(most) {
            let shown: String = key.chars().take(64).collect();
            let field = format!("env_files[{shown:?}]");
            if key.is_empty() || key.contains('=') {
                errors.add(&field, "is not a variable name: it is empty or contains '='".into());
            }
            errors.check_text(&field, key, limits::NAME_BYTES_MAX);
            errors.check_text(&field, path, limits::PATH_BYTES_MAX);
            errors.check_unreserved(&field, key);
            if !path.starts_with('/') {
                errors.add(&field, "is not an absolute path, which nodes need".into());
            }
            if self.env.contains_key(key) {
                errors.add(&field, "is in env too; name it once".into());
            }
        }
    }
}

impl Errors {
    fn check_unreserved(&mut self, field: &str, variable: &str) {
        if variable.starts_with("MUSTER_") || RESERVED_ENV.contains(&variable) {
            self.add(field, "is set by Muster for each rank; remove it from the job".into());
        }
    }
}
