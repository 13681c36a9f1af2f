//! The Python that has what a test asks for.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Fails where a module is not there. Imports none of them: that of PEFT takes seconds.
const FIND: &str = "import importlib.util, sys
for module in sys.argv[1:]:
    if importlib.util.find_spec(module) is None:
        sys.exit(f'no module {module}')";

/// The Python that has `modules`: the one that GNEISS_PYTHON names, else .venv/bin/python, else python3. Where it hasn't,
/// `None` with a word on stderr, or a failure where the variable `required` is 1.
pub fn python_with(modules: &[&str], required: &str) -> Option<PathBuf> {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv/bin/python");
    let python = match std::env::var_os("GNEISS_PYTHON") {
        Some(named) => named.into(),
        None if own.is_file() => own,
        None => "python3".into(),
    };
    let problem = match Command::new(&python).args(["-c", FIND]).args(modules).output() {
        Ok(output) if output.status.success() => return Some(python),
        Ok(output) => String::from_utf8_lossy(&output.stderr).lines().last().unwrap_or_default().to_owned(),
        Err(error) => error.to_string(),
    };
    let message = format!("{}: {problem}: `make oracle` installs it", python.display());
    assert!(std::env::var(required).as_deref() != Ok("1"), "{message}");
    eprintln!("skipped: {message}");
    None
}
