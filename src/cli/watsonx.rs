//! `gneiss watsonx`: IBM's tutorial notebook against one's own machine.

use super::listen::Listen;
use super::process::ProcessMemory;
use super::serve::{self, LimitArgs, SharedParts};
use super::{PlaceArgs, progress};
use clap::Args;
use gneiss::config::ModelOptions;
use gneiss::device::{DeviceMemory, PeakMemory};
use gneiss::serve::{ServerOptions, Tls};
use gneiss::watsonx::{Service, ServiceOptions, Store, TunableModel, Tuner, TuningProfile};
use std::path::{Path, PathBuf};

/// Answers IBM's SDK ibm-watsonx-ai as watsonx does, from data assets to deployments, so that IBM's notebook for prompt
/// tuning runs on this machine with other credentials and no other change. Everything that clients create is kept in a
/// folder. Ctrl-C ends the server; a run in progress continues after the next start.
#[derive(Args)]
pub struct Watsonx {
    /// A base model: a folder, a .gguf file or org/name[@revision]. May be repeated.
    #[arg(long = "model", value_name = "MODEL", required = true)]
    models: Vec<String>,
    /// Another name for a base model, such as ibm/granite-13b-instruct-v2, which an unchanged notebook asks for. =MODEL
    /// says for which one if there are several. May be repeated. Clients are warned that the local model stands in.
    #[arg(long = "as", value_name = "NAME[=MODEL]")]
    aliases: Vec<String>,
    /// The folder of data assets, trainings, models and deployments.
    #[arg(long, value_name = "DIR", default_value = "watsonx")]
    store: PathBuf,
    /// A TOML file whose table [watsonx] has keys of a run's configuration, such as learning_rate in [watsonx.train]. They
    /// override those of every run.
    #[arg(long, value_name = "FILE")]
    profile: Option<PathBuf>,
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
        let profile = self.profile.as_deref().map(TuningProfile::read).transpose()?.unwrap_or_default();
        let profile = profile.with("--set", self.sets.clone())?;
        let api_key = self.api_key_file.as_deref().map(serve::read_key).transpose()?;
        let store = Store::open(&self.store)?;
        let tls = match (&self.tls_cert, &self.tls_key) {
            (Some(certificate), Some(key)) => Tls { certificate: certificate.clone(), key: key.clone() },
            _ => Tls::self_signed(&store.root().join("tls"), self.listen.host())?,
        };
        let aliases = self.aliases()?;
        let shared = SharedParts::new();
        let mut sessions = Vec::new();
        let mut bases = Vec::new();
        let mut servers = Vec::new();
        for (name, aliases) in self.models.iter().zip(aliases) {
            let mut options = ModelOptions { id: name.clone(), ..ModelOptions::default() };
            self.place.apply(&mut options);
            let session = progress::open(&options)?;
            let serving = ServerOptions {
                api_key: api_key.clone(),
                tls: Some(tls.clone()),
                token_secret: store.secret()?,
                base_aliases: aliases.clone(),
                ..self.limits.options()
            };
            let server = serve::deploy_sharing(&session, self.limits.limits(), serving, &shared)?;
            bases.push(TunableModel {
                name: name.clone(),
                aliases,
                client: server.client.clone(),
                tokenizer: session.tokenizer.clone(),
                chats: server.app.chats(),
            });
            servers.push(server);
            sessions.push(session);
        }
        let service_options = ServiceOptions {
            profile,
            max_asset_bytes: self.max_asset_bytes,
            max_store_bytes: self.max_store_bytes,
            max_records: self.max_records,
        };
        describe(store.root(), &tls, &bases);
        let service = Service::new(store, bases, service_options)?;
        let memory: Box<dyn PeakMemory + Send> = match sessions[0].model.device() {
            device if device.is_cpu() => Box::new(ProcessMemory),
            device => Box::new(DeviceMemory::new(device)),
        };
        let tuner = Tuner { service: service.clone(), sessions, turns: shared.turns, memory }.start()?;
        let deployed = servers.remove(0).with_others(servers).with_platform(service.platform());
        let outcome = serve::listen(&self.listen, "https", self.api_key_file.is_some(), &deployed);
        service.end();
        let tuned = tuner.join();
        let ended = deployed.end();
        outcome?;
        ended?;
        anyhow::ensure!(tuned.is_ok(), "the tuner's thread ended by a panic");
        status!("ended");
        Ok(())
    }

    /// The other names of each model.
    fn aliases(&self) -> gneiss::Result<Vec<Vec<String>>> {
        let mut aliases = vec![Vec::new(); self.models.len()];
        for given in &self.aliases {
            let (name, model) = given.split_once('=').unwrap_or((given, &self.models[0]));
            let is_clear = self.models.len() == 1 || given.contains('=');
            let index =
                self.models.iter().position(|own| own == model).filter(|_| is_clear && !name.is_empty());
            let Some(index) = index else {
                let expected = format!("expected NAME=MODEL with one of {}", self.models.join(", "));
                return Err(gneiss::Error::Invalid(format!("--as {given}: {expected}")));
            };
            aliases[index].push(name.to_owned());
        }
        Ok(aliases)
    }
}

fn describe(store: &Path, tls: &Tls, bases: &[TunableModel]) {
    status!("store      {}", store.display());
    status!("tls        {}", tls.certificate.display());
    for base in bases {
        for alias in &base.aliases {
            status!("stands in  {} for {alias}", base.name);
        }
    }
}
