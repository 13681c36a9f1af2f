//! The Python package, which runs the program: from its source, and from a wheel in an environment of its own.

use super::*;
use std::ffi::OsStr;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// A folder for tests/python/test_face.py.
fn place() -> Place {
    let place = Place::new();
    let parameters = "[sweep.parameters]\n\"train.learning_rate\" = { values = [0.01, 0.05] }\n";
    place.write("sweep.toml", &format!("{CONFIG}\n{parameters}"));
    place
}

/// Runs a program in the folder; fails with what it wrote to stderr.
#[track_caller]
fn run(place: &Place, program: impl AsRef<OsStr>, args: &[&str], variables: &[(&str, &str)]) -> String {
    let mut command = Command::new(program);
    command
        .current_dir(place.path(""))
        .args(args)
        .env("HF_HUB_OFFLINE", "1")
        .env("PYTHONDONTWRITEBYTECODE", "1");
    let assert = command.envs(variables.iter().copied()).assert();
    let (stdout, stderr) = texts(&assert);
    assert!(assert.get_output().status.success(), "{args:?}: {stdout}{stderr}");
    stdout
}

#[test]
fn the_python_package_runs_the_program() {
    // Any Python will do; that of the oracle also has pandas and tqdm.
    let own = Path::new(ROOT).join(".venv/bin/python");
    let python = if own.is_file() { own } else { PathBuf::from("python3") };
    let source = format!("{ROOT}/src/python");
    let variables = [("GNEISS_PROGRAM", env!("CARGO_BIN_EXE_gneiss")), ("PYTHONPATH", source.as_str())];
    run(&place(), python, &[&format!("{ROOT}/tests/python/test_face.py")], &variables);
}

#[test]
fn the_notebook_runs_and_shows_what_is_kept_in_it() {
    let packages = ["nbclient", "ipykernel", "pandas", "tqdm"];
    let Some(python) = crate::common::python::python_with(&packages, "GNEISS_REQUIRE_CLIENTS") else {
        return;
    };
    let place = place();
    for name in ["configs/tutorial.toml", "data/train.csv", "data/validation.csv", "data/test.csv"] {
        let path = place.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::copy(Path::new(ROOT).join(name), path).unwrap();
    }
    // As Jupyter starts it: in its own folder, not in the repository's.
    std::fs::create_dir(place.path("docs")).unwrap();
    let docs = place.path("docs").to_str().unwrap().to_owned();
    let home = place.path("jupyter").to_str().unwrap().to_owned();
    let source = format!("{ROOT}/src/python");
    let settings =
        json!({ "train.max_steps": 2, "prompt.init_text": "say 1 or 0", "data.verbalizer": "{{input}}" });
    let variables = [
        ("GNEISS_PROGRAM", env!("CARGO_BIN_EXE_gneiss")),
        ("PYTHONPATH", source.as_str()),
        ("GNEISS_NOTEBOOK_MODEL", "model"),
        ("GNEISS_NOTEBOOK_SET", &settings.to_string()),
        ("IPYTHONDIR", &home),
        ("JUPYTER_RUNTIME_DIR", &home),
        ("PYTHONWARNINGS", "ignore:IProgress"),
    ];
    run(&place, python, &[&format!("{ROOT}/tests/python/check_notebook.py"), &docs], &variables);
}

/// With GNEISS_WHEEL, the path of a wheel.
#[test]
fn the_wheel_works_in_a_bare_environment() {
    let Some(wheel) = std::env::var("GNEISS_WHEEL").ok().filter(|wheel| !wheel.is_empty()) else {
        eprintln!("skipped: GNEISS_WHEEL names no wheel; `make wheel` builds one");
        return;
    };
    let place = place();
    run(&place, "python3", &["-m", "venv", "bare"], &[]);
    let bin = |name: &str| place.path("bare/bin").join(name);
    run(&place, bin("pip"), &["install", "--quiet", "--no-index", &wheel], &[]);
    let version = run(&place, bin("gneiss"), &["-V"], &[]);
    assert_eq!(version, format!("gneiss {}\n", env!("CARGO_PKG_VERSION")));
    assert_eq!(run(&place, bin("python"), &["-m", "gneiss_tune", "-V"], &[]), version);
    run(&place, bin("python"), &[&format!("{ROOT}/tests/python/test_face.py")], &[]);

    // From an empty folder to an opened report.
    std::fs::create_dir(place.path("empty")).unwrap();
    let sets = ["prompt.init_text=say 1 or 0", "data.verbalizer={{input}}", "train.max_steps=2"];
    let sets = sets.iter().flat_map(|set| ["--set", set]);
    let args: Vec<&str> = ["tutorial", "--model", "../model"].into_iter().chain(sets).collect();
    let mut command = Command::new(bin("gneiss"));
    command.current_dir(place.path("empty")).args(args).assert().success();
    assert!(place.path("empty/runs/tutorial/report.html").is_file());
    assert!(place.path("empty/data/train.csv").is_file());
}
