//! The Python package, which runs the program.

use super::*;

#[test]
fn the_python_package_runs_the_program() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    // Any Python will do; that of the oracle also has pandas and tqdm.
    let own = root.join(".venv/bin/python");
    let python = if own.is_file() { own } else { PathBuf::from("python3") };
    let place = Place::new();
    place.write(
        "sweep.toml",
        &format!("{CONFIG}\n[sweep.parameters]\n\"train.learning_rate\" = {{ values = [0.01, 0.05] }}\n"),
    );
    let mut command = Command::new(python);
    command.current_dir(place.path("")).env("GNEISS_PROGRAM", env!("CARGO_BIN_EXE_gneiss"));
    command.env("PYTHONPATH", root.join("src/python")).env("HF_HUB_OFFLINE", "1").env("PYTHONDONTWRITEBYTECODE", "1");
    let assert = command.arg(root.join("tests/python/test_face.py")).assert();
    let (_, stderr) = texts(&assert);
    assert!(assert.get_output().status.success(), "{stderr}");
}
