//! Which run the arguments ask for: a new one, or one that goes on.

use crate::cli::{Overrides, warn};
use clap::Args;
use gneiss::config::{Config, SweepOptions};
use gneiss::files::FolderLock;
use gneiss::layout::CHECKPOINT;
use gneiss::tune::State;
use gneiss::{Error, run};
use std::path::{Path, PathBuf};

/// The value of `--resume` for the run that the configuration names.
const AUTO: &str = "auto";

/// The start of a run.
#[derive(Args)]
pub(in crate::cli) struct RunArgs {
    /// The configuration, such as configs/tutorial.toml.
    config: Option<PathBuf>,
    /// Continue the run in this folder, such as runs/tutorial, from its last checkpoint. With CONFIG and `auto`: continue the run
    /// that CONFIG names if it has a checkpoint, otherwise start it; the same command then starts a job and goes on with it.
    #[arg(long, value_name = "RUN", conflicts_with = "find_lr")]
    resume: Option<PathBuf>,
    /// Try increasing learning rates for a hundred steps and suggest one. `tune` then ends; `tutorial` uses it.
    #[arg(long)]
    pub(in crate::cli) find_lr: bool,
    #[command(flatten)]
    overrides: Overrides,
    /// Print the result as JSON.
    #[arg(long)]
    pub(in crate::cli) json: bool,
}

/// A requested run.
pub(in crate::cli) struct Order {
    /// Its configuration.
    pub(in crate::cli) config: Config,
    /// The folder and the state from which it continues.
    pub(in crate::cli) resume: Option<(PathBuf, State)>,
}

impl Order {
    /// Refuses a run folder that another program writes, before the model is loaded.
    pub(in crate::cli) fn check_folder(&self) -> gneiss::Result<()> {
        match &self.resume {
            Some((folder, _)) => FolderLock::check_free(folder),
            None => FolderLock::check_free(&self.config.folder()),
        }
    }
}

impl RunArgs {
    /// Whether the arguments name no configuration and no run.
    pub(in crate::cli) fn takes_default(&self) -> bool {
        self.config.is_none() && self.resume.is_none()
    }

    /// The run that the arguments ask for; with the configuration in `default` if they name none.
    pub(in crate::cli) fn order(&self, default: &Path) -> anyhow::Result<Order> {
        let (config, resume) = match &self.resume {
            None => (self.configured(default)?, None),
            Some(folder) if folder.as_os_str() == AUTO => self.resumed_if_there(default)?,
            Some(folder) => {
                if let Some(config) = &self.config {
                    return Err(Error::Invalid(format!(
                        "--resume: expected no configuration beside the folder of a run, which has its own, found {}; hint: --set \
                         changes a key, and --resume auto continues the run that a configuration names",
                        config.display()
                    ))
                    .into());
                }
                let (mut config, state) = run::resumable(folder, &self.overrides.sets)?;
                self.overrides.apply(&mut config);
                (config, Some((folder.clone(), state)))
            }
        };
        Ok(Order { config, resume })
    }

    /// The configuration with its overrides.
    fn configured(&self, default: &Path) -> anyhow::Result<Config> {
        let path = self.config.as_deref().unwrap_or(default);
        if path == Path::new("") {
            return Err(Error::Invalid(
                "--resume auto: expected a configuration, whose run it continues, found none".into(),
            )
            .into());
        }
        let mut config = self.overrides.load(path)?;
        if !config.sweep.is_default() {
            warn("[sweep] is for gneiss sweep; this command uses the other tables alone");
            config.sweep = SweepOptions::default();
        }
        Ok(config)
    }

    /// The run that the configuration names, from its last checkpoint if it has one.
    fn resumed_if_there(&self, default: &Path) -> anyhow::Result<(Config, Option<(PathBuf, State)>)> {
        let config = self.configured(default)?;
        let folder = config.folder();
        if !folder.join(CHECKPOINT).is_file() {
            return Ok((config, None));
        }
        let (config, state) = run::resumable_as(&folder, |_| Ok(config))?;
        Ok((config, Some((folder, state))))
    }
}
