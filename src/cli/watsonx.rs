//! `gneiss watsonx`: IBM's tutorial notebook against one's own machine.

use super::listen::Listen;
use super::process::ProcessMemory;
use super::serve::{self, LimitArgs};
use super::{PlaceArgs, progress};
use clap::Args;
use gneiss::config::ModelOptions;
use gneiss::device::{DeviceMemory, PeakMemory};
use gneiss::serve::turns::DeviceTurns;
use gneiss::serve::{ServerOptions, Tls};
use gneiss::watsonx::{Service, ServiceOptions, Store, Tuner, TuningProfile};
use std::path::{Path, PathBuf};

/// Answers IBM's SDK ibm-watsonx-ai as watsonx does, from data assets to deployments, so that IBM's notebook for prompt
/// tuning runs on this machine with other credentials and no other change. Everything that clients create is kept in a
/// folder. Ctrl-C ends the server; a run in progress continues after the next start.
#[derive(Args)]
pub struct Watsonx {
    /// The base model: a folder, a .gguf file or org/name[@revision].
    #[arg(long)]
    model: String,
    /// Another name for the base model, such as ibm/granite-13b-instruct-v2, which an unchanged notebook asks for. May be
    /// repeated. Clients are warned that the local model stands in.
    #[arg(long = "as", value_name = "NAME")]
    aliases: Vec<String>,
    /// The folder of data assets, trainings, models and deployments.
    #[arg(long, value_name = "DIR", default_value = "watsonx")]
    store: PathBuf,
    /// Override a key of every run, such as `--set prompt.num_virtual_tokens=20`; watsonx has parameters for some keys
    /// only. May be repeated. Clients whose parameters are overridden are warned.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Address or host name, and port, to listen on; port 0 chooses a free one.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:8443")]
    listen: Listen,
    /// A file with the key, on one line, that clients give as `apikey`. Without it every key is accepted.
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Certificate chain (PEM), together with --tls-key; without it a certificate is made on the first start.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// The certificate's private key (PEM).
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Most bytes of a data asset.
    #[arg(long, default_value_t = 200 << 20)]
    max_asset_bytes: u64,
    /// Most bytes of all data assets.
    #[arg(long, default_value_t = 4 << 30)]
    max_store_bytes: u64,
    /// Most data assets; the same for trainings, models and deployments.
    #[arg(long, default_value_t = 1000)]
    max_records: usize,
    #[command(flatten)]
    limits: LimitArgs,
    #[command(flatten)]
    place: PlaceArgs,
}

impl Watsonx {
    /// Runs the subcommand.
    pub fn run(self) -> anyhow::Result<()> {
        let profile = TuningProfile::new(self.sets.clone())?;
        let api_key = self.api_key_file.as_deref().map(serve::read_key).transpose()?;
        let store = Store::open(&self.store)?;
        let tls = match (&self.tls_cert, &self.tls_key) {
            (Some(certificate), Some(key)) => Tls { certificate: certificate.clone(), key: key.clone() },
            _ => Tls::self_signed(&store.root().join("tls"), self.listen.host())?,
        };
        let mut options = ModelOptions { id: self.model.clone(), ..ModelOptions::default() };
        self.place.apply(&mut options);
        let session = progress::open(&options)?;
        let serving = ServerOptions {
            api_key,
            tls: Some(tls.clone()),
            token_secret: store.secret()?,
            base_aliases: self.aliases.clone(),
            ..self.limits.options()
        };
        let turns = DeviceTurns::new();
        let deployed = serve::deploy_sharing(&session, self.limits.limits(), serving, turns.clone())?;
        let service_options = ServiceOptions {
            base: session.id.clone(),
            aliases: self.aliases.clone(),
            profile,
            max_asset_bytes: self.max_asset_bytes,
            max_store_bytes: self.max_store_bytes,
            max_records: self.max_records,
        };
        describe(store.root(), &tls, &self.aliases);
        let service = Service::new(store, deployed.client.clone(), service_options)?;
        let memory: Box<dyn PeakMemory + Send> = match session.model.device() {
            device if device.is_cpu() => Box::new(ProcessMemory),
            device => Box::new(DeviceMemory::new(device)),
        };
        let tuner = Tuner { service: service.clone(), session, turns, memory }.start()?;
        let deployed = deployed.with_platform(service.platform());
        let outcome = serve::listen(&self.listen, "https", self.api_key_file.is_some(), &deployed);
        service.end();
        let tuned = tuner.join();
        let ended = deployed.end();
        outcome?;
        ended?;
        anyhow::ensure!(tuned.is_ok(), "the tuner's thread ended by a panic");
        eprintln!("ended");
        Ok(())
    }
}

fn describe(store: &Path, tls: &Tls, aliases: &[String]) {
    eprintln!("store      {}", store.display());
    eprintln!("tls        {}", tls.certificate.display());
    for alias in aliases {
        eprintln!("stands in  for {alias}");
    }
}
