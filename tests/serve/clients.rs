//! The program as clients see it: the openai package, IBM's SDK, a browser, and what no client should send.
//!
//! Where Python lacks the packages the tests say so and pass, unless GNEISS_REQUIRE_CLIENTS=1 (and for the browser
//! GNEISS_REQUIRE_CHROMIUM=1).

use crate::common::python::python_with;
use crate::common::server::ServerProcess;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use tempfile::TempDir;

pub const REQUIRED: &str = "GNEISS_REQUIRE_CLIENTS";
pub const KEY: &str = "a-key-of-the-tests";
const CHROMIUM: &str = "/usr/bin/chromium";

/// A prompt's place in the base's: raw bytes are tokens, so any text will do.
const TASK: &str = r#"{"task": "classification", "verbalizer": "classify {0, 1} {{input}}", "labels": ["0", "1"],
  "hard_prompt": "Say 1 or 0.", "max_output_tokens": 2, "examples": ["Comment: They were kind.\nSatisfaction:\n", "Comment: Long waits.\n"]}"#;

const CONFIG: &str = r#"
name = "one"
[model]
id = "base"
device = "cpu"
dtype = "f32"
[prompt]
init_text = "Say 1 or 0."
[data]
task = "classification"
train = "rows.csv"
test = "rows.csv"
verbalizer = "classify {0, 1} {{input}}"
max_output_tokens = 2
[train]
keep = "last"
"#;

/// The files that `checkpoint.py` writes, with their paths in its folder; made once, because Python takes seconds.
fn checkpoint(python: &Path) -> &'static [(String, Vec<u8>)] {
    static FILES: OnceLock<Vec<(String, Vec<u8>)>> = OnceLock::new();
    FILES.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        run(python, "checkpoint.py", &[folder.path().to_str().unwrap()]);
        let mut files = Vec::new();
        for part in ["base", "one", "two"] {
            for file in std::fs::read_dir(folder.path().join(part)).unwrap().map(Result::unwrap) {
                let name = format!("{part}/{}", file.file_name().to_str().unwrap());
                files.push((name, std::fs::read(file.path()).unwrap()));
            }
        }
        files
    })
}

/// What a server is started in: a checkpoint that transformers wrote and prompts that PEFT wrote.
pub struct Place(TempDir);

impl Place {
    pub fn new(python: &Path) -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        for (name, bytes) in checkpoint(python) {
            std::fs::create_dir_all(place.path(name).parent().unwrap()).unwrap();
            std::fs::write(place.path(name), bytes).unwrap();
        }
        for name in ["one", "two"] {
            std::fs::write(place.path(name).join("task.json"), TASK).unwrap();
        }
        std::fs::write(place.path("one.toml"), CONFIG).unwrap();
        let rows =
            (0..12).map(|i| format!("\"Comment: visit {i} was {}.\nSatisfaction:\n\",{}\n", i * i, i % 2));
        std::fs::write(place.path("rows.csv"), format!("input,output\n{}", rows.collect::<String>()))
            .unwrap();
        std::fs::write(place.path("key"), format!("{KEY}\n")).unwrap();
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gneiss"));
        command.current_dir(self.0.path()).env("HF_HUB_OFFLINE", "1").args(args);
        command
    }
}

/// Starts `gneiss serve`.
fn serve(place: &Place, more: &[&str]) -> ServerProcess {
    start(place, "serve", more)
}

/// Starts a subcommand that serves the base model.
pub fn start(place: &Place, subcommand: &str, more: &[&str]) -> ServerProcess {
    let args =
        [subcommand, "--model", "base", "--device", "cpu", "--dtype", "f32", "--listen", "localhost:0"];
    ServerProcess::start(place.command(&[&args, more].concat()))
}

/// Runs a script of this folder, which has to succeed; what it prints.
#[track_caller]
pub fn run(python: &Path, script: &str, args: &[&str]) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/serve");
    let output = Command::new(python).arg(folder.join(script)).args(args).output().unwrap();
    let said =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    assert!(output.status.success(), "{script}: {said}");
    said
}

fn python() -> Option<PathBuf> {
    python_with(&["openai", "ibm_watsonx_ai", "peft"], REQUIRED)
}

const ADAPTERS: [&str; 6] = ["--adapter", "one=one", "--adapter", "two=two", "--api-key-file", "key"];

#[test]
fn the_openai_package_gets_what_peft_computes() {
    let Some(python) = python() else { return };
    let place = Place::new(&python);
    let server = serve(&place, &ADAPTERS);
    let text = |name: &str| place.path(name).to_str().unwrap().to_owned();
    let (one, two) = (format!("one={}", text("one")), format!("two={}", text("two")));
    let args = ["--url", &server.url, "--key", KEY, "--base", "base", "--tuned", "one", "--tuned", "two"];
    let reference = ["--checkpoint", &text("base"), "--adapter", &one, "--adapter", &two];
    run(&python, "openai_client.py", &[&args[..], &reference].concat());
    run(&python, "openai_responses.py", &args);
    let said = server.end();
    assert!(said.ends_with("ended\n"), "{said}");
    assert!(said.contains("serving    two: 9 virtual tokens, classification, two"), "{said}");
}

#[test]
fn ibms_sdk_gets_what_gneiss_eval_says() {
    let Some(python) = python() else { return };
    let place = Place::new(&python);
    let evaluated = place.command(&["eval", "one.toml", "--adapter", "one", "--out", "."]).output().unwrap();
    assert!(evaluated.status.success(), "{}", String::from_utf8_lossy(&evaluated.stderr));
    let server = serve(&place, &ADAPTERS);
    let (rows, evaluation) = (place.path("rows.csv"), place.path("evaluation.json"));
    let files = ["--test", rows.to_str().unwrap(), "--evaluation", evaluation.to_str().unwrap()];
    let args = ["--url", &server.url, "--key", KEY, "--deployment", "one", "--base", "base"];
    run(&python, "watsonx.py", &[&args[..], &files].concat());
    server.end();
}

#[test]
fn what_no_client_should_send_is_answered_and_survived() {
    let Some(python) = python() else { return };
    let place = Place::new(&python);
    let limits = ["--max-read-seconds", "2", "--max-seconds", "60"];
    let server = serve(&place, &[&ADAPTERS[..], &limits].concat());
    let pid = server.pid();
    let args = ["--url", &server.url, "--key", KEY, "--model", "one", "--seconds", "20", "--pid", &pid];
    run(&python, "hostile.py", &args);
    server.end();
}

/// Python with a browser's driver, if the browser is there.
pub fn browser() -> Option<PathBuf> {
    let required = "GNEISS_REQUIRE_CHROMIUM";
    if !Path::new(CHROMIUM).is_file() {
        assert!(std::env::var(required).as_deref() != Ok("1"), "{CHROMIUM} is not there");
        eprintln!("skipped: {CHROMIUM} is not there: Debian's package chromium has it");
        return None;
    }
    python_with(&["playwright.sync_api"], required)
}

/// The folder of screenshots, to be looked at.
pub fn screenshots(name: &str) -> String {
    let shots = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&shots).unwrap();
    shots.to_str().unwrap().to_owned()
}

#[test]
fn the_page_is_clicked_through() {
    let (Some(python), Some(browser)) = (python(), browser()) else { return };
    let place = Place::new(&python);
    let server = serve(&place, &ADAPTERS);
    run(&browser, "page.py", &[&server.url, "--key", KEY, "--shots", &screenshots("serve")]);
    server.end();
}
