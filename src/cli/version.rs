//! `gneiss --version`: the version, the commit, the CPU's instructions and the cargo features.

use std::fmt::Write;
use std::sync::LazyLock;

/// The text of `--version`; `-V` prints its first line without the name of the commit.
pub fn long() -> &'static str {
    static TEXT: LazyLock<String> = LazyLock::new(text);
    &TEXT
}

/// The commit that the program was built from, as `make` passes it on. It is not read by the build script, which would
/// compile the whole package again after every commit.
const COMMIT: Option<&str> = option_env!("GNEISS_COMMIT");

fn text() -> String {
    let mut text = env!("CARGO_PKG_VERSION").to_owned();
    let commit = COMMIT.filter(|commit| !commit.is_empty()).unwrap_or("not recorded in this build");
    let rows = [
        ("commit", commit.to_owned()),
        ("target", format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS)),
        ("CPU", list(&gneiss::device::cpu_instructions(), "no more than the target's own instructions")),
        ("features", list(&features(), "none")),
    ];
    for (key, value) in rows {
        // Writing to a string can't fail.
        let _ = write!(text, "\n{key:<10} {value}");
    }
    text
}

fn list(names: &[&str], none: &str) -> String {
    if names.is_empty() { none.to_owned() } else { names.join(", ") }
}

/// The cargo features of this build.
fn features() -> Vec<&'static str> {
    let all = [
        ("parquet", cfg!(feature = "parquet")),
        ("serve", cfg!(feature = "serve")),
        ("mpi", cfg!(feature = "mpi")),
        ("cuda", cfg!(feature = "cuda")),
        ("metal", cfg!(feature = "metal")),
    ];
    all.into_iter().filter(|(_, is_on)| *is_on).map(|(name, _)| name).collect()
}
