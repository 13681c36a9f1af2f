//! A folder with a small checkpoint, its tokenizer, a configuration and data, in which mpirun starts the program.

use super::common::word_level;
use candle_core::{DType, Device, Tensor};
use gneiss::prompt::peft::Adapter;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const GOOD: [&str; 4] = ["shiny", "gentle", "happy", "fluffy"];
const BAD: [&str; 4] = ["late", "rude", "smelly", "matted"];

const CONFIG: &str = r#"name = "dogs"

[model]
id = "model"
device = "cpu"
dtype = "f32"

[prompt]
init_text = "say 1 or 0"
num_virtual_tokens = 5

[data]
task = "classification"
train = "train.csv"
validation = "validation.csv"
verbalizer = "say {{input}} :"
max_output_tokens = 2

[train]
learning_rate = 0.05
batch_size = 5
num_epochs = 4
"#;

pub struct Place(TempDir);

/// A job that mpirun runs.
pub struct Running(Child);

impl Place {
    /// `None` without mpirun, which is said.
    pub fn new() -> Option<Self> {
        let has_mpirun =
            Command::new("mpirun").arg("--version").output().is_ok_and(|output| output.status.success());
        if !has_mpirun {
            assert!(std::env::var_os("GNEISS_REQUIRE_MPI").is_none(), "expected mpirun, found none");
            eprintln!("skipped: there is no mpirun");
            return None;
        }
        let place = Self(tempfile::tempdir().unwrap());
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/granite");
        std::fs::create_dir(place.path("model")).unwrap();
        for name in ["config.json", "model.safetensors"] {
            std::fs::copy(golden.join(name), place.path("model").join(name)).unwrap();
        }
        place.write("model/tokenizer.json", &tokenizer().to_string());
        place.write("model/tokenizer_config.json", r#"{"eos_token": "</s>"}"#);
        place.write("dogs.toml", CONFIG);
        place.write("train.csv", &reviews(12));
        place.write("validation.csv", &reviews(3));
        place.write("test.csv", &reviews(7));
        Some(place)
    }

    /// Another folder with the same files.
    pub fn copy(&self) -> Self {
        let other = Self::new().unwrap();
        for name in ["train.csv", "validation.csv", "test.csv", "dogs.toml"] {
            std::fs::copy(self.path(name), other.path(name)).unwrap();
        }
        other
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    pub fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&std::fs::read(self.path(name)).unwrap()).unwrap()
    }

    /// Lines of the records of a run.
    pub fn lines(&self, run: &str) -> usize {
        std::fs::read_to_string(self.path(run).join("metrics.jsonl"))
            .map_or(0, |text| text.matches('\n').count())
    }

    /// Records without wall times.
    pub fn records(&self, run: &str) -> Vec<Value> {
        let text = std::fs::read_to_string(self.path(run).join("metrics.jsonl")).unwrap();
        let timeless = |line: &str| {
            let mut record: Value = serde_json::from_str(line).unwrap();
            let object = record.as_object_mut().unwrap();
            assert!(object.remove("seconds").is_some() && object.remove("elapsed").is_some());
            record
        };
        text.lines().map(timeless).collect()
    }

    pub fn adapter(&self, run: &str) -> Tensor {
        let adapter = Adapter::read(&self.path(run).join("adapter")).unwrap();
        adapter.prompt.values().to_dtype(DType::F32).unwrap().to_device(&Device::Cpu).unwrap()
    }

    pub fn adapter_bytes(&self, run: &str) -> Vec<u8> {
        std::fs::read(self.path(run).join("adapter/adapter_model.safetensors")).unwrap()
    }

    /// One process, without a launcher, which succeeds; its stdout and stderr.
    pub fn succeeds(&self, command: &[&str]) -> (String, String) {
        let mut program = Command::new(env!("CARGO_BIN_EXE_gneiss"));
        let output = program.current_dir(self.0.path()).args(command).output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        (text(&output.stdout), text(&output.stderr))
    }

    fn launcher(&self) -> Command {
        let mut command = Command::new("mpirun");
        command.current_dir(self.0.path());
        // In a container the tests may run as root; more ranks than cores are meant.
        command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
        command.env("RAYON_NUM_THREADS", "1").env("OMPI_MCA_rmaps_base_oversubscribe", "1");
        // A rank that waits leaves its core to the others.
        command.env("OMPI_MCA_mpi_yield_when_idle", "1");
        command.args(["--bind-to", "none"]);
        command
    }

    fn job(&self, ranks: usize, arguments: &[&str]) -> Command {
        let mut command = self.launcher();
        command.args(["-n", &ranks.to_string(), env!("CARGO_BIN_EXE_gneiss")]).args(arguments);
        command
    }

    /// `mpirun -n RANKS gneiss ...`, which succeeds; its stdout and stderr.
    pub fn mpirun(&self, ranks: usize, arguments: &[&str]) -> (String, String) {
        let output = self.job(ranks, arguments).output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        (text(&output.stdout), text(&output.stderr))
    }

    /// Two ranks with arguments of their own, rank 1 in the folder `other`: exit code, stdout, stderr.
    pub fn mpirun_two(&self, first: &[&str], other: &Self, second: &[&str]) -> (Option<i32>, String, String) {
        let program = env!("CARGO_BIN_EXE_gneiss");
        let mut command = self.launcher();
        command.args(["-n", "1", program]).args(first).arg(":");
        command.args(["-n", "1", "-wdir"]).arg(other.0.path()).arg(program).args(second);
        let Output { status, stdout, stderr } = command.output().unwrap();
        (status.code(), text(&stdout), text(&stderr))
    }

    pub fn start(&self, ranks: usize, arguments: &[&str]) -> Running {
        Running(self.job(ranks, arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap())
    }
}

impl Running {
    /// Waits until a run has so many records.
    pub fn wait_for(&self, place: &Place, run: &str, records: usize) {
        let until = Instant::now() + Duration::from_secs(120);
        while place.lines(run) < records {
            assert!(Instant::now() < until, "no {records} records within two minutes");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Signals mpirun.
    pub fn signal(&self, signal: i32) {
        // SAFETY: signals a child of this process that has not been waited for.
        assert_eq!(unsafe { libc::kill(self.0.id() as i32, signal) }, 0);
    }

    /// Signals one rank, a child of mpirun.
    pub fn kill(&self, rank: usize, signal: i32) {
        let id = self.rank(rank);
        // SAFETY: signals a process that this job started.
        assert_eq!(unsafe { libc::kill(id, signal) }, 0);
    }

    /// The process of a rank: the child of mpirun whose environment says so.
    fn rank(&self, rank: usize) -> i32 {
        let children = format!("/proc/{0}/task/{0}/children", self.0.id());
        let children = std::fs::read_to_string(children).unwrap();
        let variable = format!("OMPI_COMM_WORLD_RANK={rank}");
        let is_it = |id: &&str| {
            let environment = std::fs::read(format!("/proc/{id}/environ")).unwrap_or_default();
            environment.split(|byte| *byte == 0).any(|entry| entry == variable.as_bytes())
        };
        let found = children.split_whitespace().find(is_it);
        found.unwrap_or_else(|| panic!("rank {rank} among {children:?}")).parse().unwrap()
    }

    /// Exit code and stderr.
    pub fn ended(self) -> (Option<i32>, String) {
        let Output { status, stderr, .. } = self.0.wait_with_output().unwrap();
        (status.code(), text(&stderr))
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The largest difference of two prompts' elements.
pub fn difference(a: &Tensor, b: &Tensor) -> f32 {
    (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
}

/// One word a token: the words of these tests, and as many others as fill the checkpoint's vocabulary.
fn tokenizer() -> Value {
    let mut words: Vec<String> =
        ["<unk>", "<s>", "</s>", "0", "1", "say", "or", ":", "dog"].map(str::to_owned).to_vec();
    words.extend(GOOD.iter().chain(&BAD).map(|w| (*w).to_owned()));
    words.extend((words.len()..131).map(|i| format!("word{i}")));
    word_level::tokenizer(&words)
}

/// Rows of a CSV file of unequal lengths, satisfied and unsatisfied by turns.
fn reviews(rows: usize) -> String {
    let row = |i: usize| {
        let words = if i.is_multiple_of(2) { GOOD } else { BAD };
        let more = "dog ".repeat(1 + i * 5 % 7);
        format!("{} {more}word{},{}\n", words[i / 2 % 4], 40 + i, (i + 1) % 2)
    };
    format!("input,output\n{}", (0..rows).map(row).collect::<String>())
}
