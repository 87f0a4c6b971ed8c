//! The set-up as a list of parts, each brought once. When all are there it is a few file look-ups.

use crate::deps::{Deps, Part};
use crate::optional::{self, Bring, Debian};
use crate::{data, libtorch, machine, tools};
use anyhow::{Context, Result};
use std::path::Path;
use std::time::Instant;

/// Which parts are asked for.
pub struct Wants {
    /// libtorch, and data to train on.
    pub libtorch: bool,
    /// What only the tests use.
    pub tools: bool,
    /// The digits even where Fashion-MNIST could be had.
    pub digits: bool,
}

/// Brings every part that is not in `dir` yet.
pub fn run(dir: &Path, wants: &Wants) -> Result<()> {
    let parts = parts(wants);
    let is_missing = |(part, _): &&(Part, Bring)| !part.is_there(dir);
    let has_data = !wants.libtorch || has_data(dir, wants);
    let optional = if wants.tools { optional::all(dir) } else { Vec::new() };
    let has_optional = optional.iter().all(|optional| optional.part.is_there(dir));
    if has_data && has_optional && machine::is_checked(dir) && !parts.iter().any(|part| is_missing(&part)) {
        eprintln!("set-up: all is there");
        return Ok(());
    }
    // Taking the lock may mean waiting for a set-up that brings it all.
    let deps = Deps::lock(dir)?;
    if !machine::is_checked(dir) {
        machine::check(&deps)?;
        eprintln!("set-up: the machine has what a build needs");
    }
    for (part, bring) in parts.iter().filter(is_missing) {
        once(&deps, part, bring.as_ref())?;
    }
    for optional in optional.iter().filter(|optional| !optional.part.is_there(dir)) {
        once(&deps, &optional.part, optional.bring.as_ref())
            .unwrap_or_else(|error| eprintln!("set-up: {} will be skipped: {error:#}", optional.serves));
    }
    if wants.libtorch && !self::has_data(dir, wants) {
        bring_data(&deps, wants)?;
    }
    eprintln!("set-up: all is there now");
    Ok(())
}

/// Brings programs of Debian that are not for the tests.
pub fn bring_debian(dir: &Path, programs: &Debian) -> Result<()> {
    let patchelf = tools::PATCHELF;
    let programs = programs.optional(dir);
    if programs.part.is_there(dir) {
        return Ok(());
    }
    let deps = Deps::lock(dir)?;
    if !patchelf.part().is_there(dir) {
        once(&deps, &patchelf.part(), &|deps| patchelf.bring(deps))?;
    }
    once(&deps, &programs.part, programs.bring.as_ref())
}

fn parts(wants: &Wants) -> Vec<(Part, Bring)> {
    let mut parts: Vec<(Part, Bring)> = vec![(tools::protoc(), Box::new(tools::bring_protoc))];
    if wants.libtorch {
        parts.push((libtorch::part(), Box::new(libtorch::bring)));
    }
    if wants.tools {
        for tool in tools::FOR_TESTS {
            parts.push((tool.part(), Box::new(move |deps| tool.bring(deps))));
        }
    }
    parts
}

/// Either data set will do: one who got the digits when apt failed is not asked to try again each time.
fn has_data(dir: &Path, wants: &Wants) -> bool {
    data::digits().is_there(dir) || !wants.digits && data::fashion_mnist().is_there(dir)
}

fn bring_data(deps: &Deps, wants: &Wants) -> Result<()> {
    let why = if wants.digits {
        "as asked".to_owned()
    } else {
        match once(deps, &data::fashion_mnist(), &data::bring_fashion_mnist) {
            Ok(()) => return Ok(()),
            Err(error) => format!("{error:#}"),
        }
    };
    eprintln!("set-up: taking scikit-learn's digits instead of Fashion-MNIST: {why}");
    once(deps, &data::digits(), &data::bring_digits)
}

#[expect(clippy::disallowed_methods, reason = "a duration shown to a person")]
fn once(deps: &Deps, part: &Part, bring: &dyn Fn(&Deps) -> Result<String>) -> Result<()> {
    let began = Instant::now();
    let how = bring(deps).with_context(|| format!("failed to bring {}", part.name))?;
    deps.stamp(part)?;
    eprintln!("set-up: {}: {how} ({:.1} s)", part.name, began.elapsed().as_secs_f64());
    Ok(())
}
