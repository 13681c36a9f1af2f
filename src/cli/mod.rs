//! The command line: one file per subcommand. Results go to stdout, progress and logs to stderr.

#[macro_use]
pub mod stderr;

#[cfg(feature = "serve")]
mod adapter_folder;
pub mod allocator;
mod bench;
mod check;
mod completions;
mod eval;
pub mod exit;
mod export;
mod find_lr;
mod generate;
mod init;
mod inspect;
pub mod interrupt;
pub mod launch;
mod learning_curve;
#[cfg(feature = "serve")]
mod listen;
mod man;
pub mod process;
mod progress;
mod report;
#[cfg(feature = "serve")]
mod serve;
mod sweep;
mod text;
mod tune;
mod tutorial;
mod version;
#[cfg(feature = "serve")]
mod watsonx;

use candle_core::Device;
use clap::{Args, Parser, Subcommand};
use gneiss::config::{Config, DtypeChoice, ModelOptions};
use gneiss::device::DeviceChoice;
use gneiss::prompt::peft::Adapter;
use std::path::{Path, PathBuf};
use stderr::{ProgressFormat, StderrOptions, warn};

/// Tunes soft prompts for open IBM Granite language models on your own machine.
#[derive(Parser)]
#[command(name = "gneiss", version, long_version = version::long(), arg_required_else_help = true)]
pub struct Cli {
    /// Write only warnings and errors to stderr: no progress, notes or hints.
    #[arg(short, long, global = true)]
    quiet: bool,
    /// How progress is written to stderr.
    #[arg(long, global = true, value_enum, value_name = "FORMAT", default_value_t)]
    progress: ProgressFormat,
    #[command(subcommand)]
    command: CliCommand,
}

#[derive(Subcommand)]
enum CliCommand {
    /// Walk through IBM's tutorial on this machine: data, run, learning curve, tuned against base, deployment.
    Tutorial(tutorial::Tutorial),
    /// Tune a soft prompt; writes a run folder.
    Tune(tune::Tune),
    /// Tune a prompt for each of many settings, and prune the worse ones on the way.
    Sweep(sweep::SweepArgs),
    /// Answer the test file with the base model and with the tuned prompt, side by side.
    Eval(eval::Eval),
    /// Continue one text.
    Generate(generate::Generate),
    /// Serve base and tuned prompts over HTTP.
    #[cfg(feature = "serve")]
    Serve(serve::Serve),
    /// Answer IBM's SDK as watsonx does: data, tuning, deployments, text.
    #[cfg(feature = "serve")]
    Watsonx(watsonx::Watsonx),
    /// Write tuned prompts for other engines: as tokens of a checkpoint, or as embeddings of a text.
    Export(export::Export),
    /// Write a run's report again, or compare several runs on one page.
    Report(report::ReportArgs),
    /// Measure the throughput of tuning, for a configuration or for a model's shape alone.
    Bench(bench::BenchArgs),
    /// Compare a device with the CPU: every op, and a short run.
    Check(check::Check),
    /// Describe a model, adapter, run, dataset or configuration.
    Inspect(inspect::Inspect),
    /// Write a configuration for your own examples, with proposals from the file.
    Init(init::Init),
    /// Print the completions of a shell.
    Completions(completions::Completions),
    /// Print the manual page of the program or of a command.
    Man(man::Man),
}

impl Cli {
    /// Runs the subcommand.
    pub fn run(self) -> anyhow::Result<()> {
        stderr::configure(StderrOptions { format: self.progress, is_quiet: self.quiet });
        if let Some(command) = self.command.of_one_process() {
            launch::refuse(command)?;
        }
        match self.command {
            CliCommand::Tutorial(command) => command.run(),
            CliCommand::Tune(command) => command.run(),
            CliCommand::Sweep(command) => command.run(),
            CliCommand::Eval(command) => command.run(),
            CliCommand::Generate(command) => command.run(),
            #[cfg(feature = "serve")]
            CliCommand::Serve(command) => command.run(),
            #[cfg(feature = "serve")]
            CliCommand::Watsonx(command) => command.run(),
            CliCommand::Export(command) => command.run(),
            CliCommand::Report(command) => command.run(),
            CliCommand::Bench(command) => command.run(),
            CliCommand::Check(command) => command.run(),
            CliCommand::Inspect(command) => command.run(),
            CliCommand::Init(command) => command.run(),
            CliCommand::Completions(command) => command.run(),
            CliCommand::Man(command) => command.run(),
        }
    }
}

impl CliCommand {
    /// The name of a command that several processes can't run together.
    fn of_one_process(&self) -> Option<&'static str> {
        match self {
            Self::Tune(_) | Self::Sweep(_) | Self::Eval(_) => None,
            Self::Tutorial(_) => Some("tutorial"),
            Self::Generate(_) => Some("generate"),
            #[cfg(feature = "serve")]
            Self::Serve(_) => Some("serve"),
            #[cfg(feature = "serve")]
            Self::Watsonx(_) => Some("watsonx"),
            Self::Export(_) => Some("export"),
            Self::Report(_) => Some("report"),
            Self::Bench(_) => Some("bench"),
            Self::Check(_) => Some("check"),
            Self::Inspect(_) => Some("inspect"),
            Self::Init(_) => Some("init"),
            Self::Completions(_) => Some("completions"),
            Self::Man(_) => Some("man"),
        }
    }
}

/// A configuration file with overrides.
#[derive(Args)]
struct ConfigArgs {
    /// The configuration, such as configs/tutorial.toml.
    config: PathBuf,
    #[command(flatten)]
    overrides: Overrides,
}

/// Changes to a configuration by the command line.
#[derive(Args)]
struct Overrides {
    /// Override a key, such as `--set train.learning_rate=0.01`; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Use this model instead of the configuration's: a folder, a .gguf file or org/name[@revision].
    #[arg(long)]
    model: Option<String>,
    #[command(flatten)]
    place: PlaceArgs,
}

/// The device and the dtype of a model.
#[derive(Args)]
struct PlaceArgs {
    /// auto, cpu, cuda[:n] or metal.
    #[arg(long)]
    device: Option<DeviceChoice>,
    /// dtype of the weights: auto, f32, bf16 or f16.
    #[arg(long)]
    dtype: Option<DtypeChoice>,
}

impl ConfigArgs {
    fn load(&self) -> anyhow::Result<Config> {
        self.overrides.load(&self.config)
    }
}

impl Overrides {
    fn load(&self, path: &Path) -> anyhow::Result<Config> {
        let mut config = Config::load(path, &self.sets)?;
        self.apply(&mut config);
        Ok(config)
    }

    /// Applies the model and its device to `config`; the `--set` options were applied before.
    fn apply(&self, config: &mut Config) {
        if let Some(model) = &self.model {
            config.model.id.clone_from(model);
        }
        self.place.apply(&mut config.model);
    }
}

impl PlaceArgs {
    fn apply(&self, options: &mut ModelOptions) {
        options.device = self.device.unwrap_or(options.device);
        options.dtype = self.dtype.unwrap_or(options.dtype);
    }
}

/// Opens a device, and prints its warning.
fn device(choice: DeviceChoice) -> anyhow::Result<Device> {
    let gneiss::device::Chosen { device, warnings } = gneiss::device::open(choice)?;
    warnings.iter().for_each(warn);
    Ok(device)
}

/// Prints the warning about an adapter before it is used.
fn warn_about(adapter: &Adapter) {
    adapter.warning().iter().for_each(warn);
}
