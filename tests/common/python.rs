//! The Python that has what a test asks for.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The Python that can import `module`: the one that GNEISS_PYTHON names, else .venv/bin/python, else python3. Where it
/// can't, `None` with a word on stderr, or a failure where the variable `required` is 1.
pub fn python_with(module: &str, required: &str) -> Option<PathBuf> {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv/bin/python");
    let python = match std::env::var_os("GNEISS_PYTHON") {
        Some(named) => named.into(),
        None if own.is_file() => own,
        None => "python3".into(),
    };
    let imported = Command::new(&python).args(["-c", &format!("import {module}")]).output();
    let problem = match imported {
        Ok(output) if output.status.success() => return Some(python),
        Ok(output) => String::from_utf8_lossy(&output.stderr).lines().last().unwrap_or_default().to_owned(),
        Err(error) => error.to_string(),
    };
    let message =
        format!("{} can't import {module} ({problem}): `make oracle` installs it", python.display());
    assert!(std::env::var(required).as_deref() != Ok("1"), "{message}");
    eprintln!("skipped: {message}");
    None
}
