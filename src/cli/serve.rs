//! `gneiss serve`: base and tuned prompts over HTTP.

use super::adapter_folder::watch_folder;
use super::listen::Listen;
use super::{PlaceArgs, process, progress};
use anyhow::Context;
use clap::Args;
use gneiss::checkpoint::find_chat_template;
use gneiss::config::ModelOptions;
use gneiss::prompt::peft::Adapter;
use gneiss::prompt::{Tuned, check_name, split_name};
use gneiss::serve::client::Client;
use gneiss::serve::served::Served;
use gneiss::serve::turns::DeviceTurns;
use gneiss::serve::watch::AdapterFolder;
use gneiss::serve::{App, Metrics, Platform, ServerLimits, ServerOptions, Tls, worker};
use gneiss::session;
use gneiss::session::Session;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

/// Serves the base model and tuned prompts over HTTP: OpenAI's API, watsonx's API, and a page to try them at `/`.
/// Ctrl-C ends it after the requests in progress are answered.
#[derive(Args)]
pub struct Serve {
    /// The base model: a folder, a .gguf file or org/name[@revision].
    #[arg(long)]
    model: String,
    /// A tuned prompt and its name in requests: a folder in PEFT's format, a run's folder, or org/name[@revision];
    /// :TASK follows if it holds the prompts of several tasks. May be repeated.
    #[arg(long = "adapter", value_name = "NAME=DIR[:TASK]")]
    adapters: Vec<String>,
    /// Several tuned prompts of one classification that answer together under one name: POST /v1/classify, by votes and by the
    /// mean likelihood of each label, and requests whose answer has given choices, by mean likelihood. Other generation is
    /// refused. The folders are named as for --adapter. May be repeated.
    #[arg(long = "ensemble", value_name = "NAME=DIR,DIR,...")]
    ensembles: Vec<String>,
    /// Serve the tuned prompts in this folder's subfolders under the subfolders' names, and follow changes: new prompts
    /// are loaded, removed ones are unloaded.
    #[arg(long, value_name = "DIR")]
    adapter_dir: Option<PathBuf>,
    /// Address or host name, and port, to listen on; port 0 chooses a free one.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:8080")]
    listen: Listen,
    /// Origins of web pages whose scripts may use the server, such as http://localhost:5173, or * for every page.
    #[arg(long, value_name = "ORIGIN", num_args = 1..)]
    cors_origin: Vec<String>,
    /// A file with the key, on one line, that every request must send.
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Accept embeddings instead of text (`prompt_embeds` of completions, as in vLLM).
    #[arg(long)]
    enable_prompt_embeds: bool,
    /// Certificate chain (PEM) for HTTPS, together with --tls-key.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// The certificate's private key (PEM).
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    #[command(flatten)]
    limits: LimitArgs,
    #[command(flatten)]
    place: PlaceArgs,
}

/// Limits.
#[derive(Args)]
pub(super) struct LimitArgs {
    /// Most waiting requests; further requests get status 429.
    #[arg(long, default_value_t = 1024)]
    max_queue: usize,
    /// Most tokens of a sequence: virtual tokens, text and answer together; 0: as many as the model has positions.
    #[arg(long, default_value_t = 0)]
    max_sequence_tokens: usize,
    /// Most seconds that a request may take; then its answer ends with the text so far.
    #[arg(long, default_value_t = 300.0)]
    max_seconds: f64,
    /// Most seconds for a client to send the head of a request, and its body; then it gets status 408.
    #[arg(long, default_value_t = 30.0)]
    max_read_seconds: f64,
    /// Most bytes of a request's body.
    #[arg(long, default_value_t = 4 << 20)]
    max_body_bytes: usize,
    /// Most connections at a time.
    #[arg(long, default_value_t = 1024)]
    max_connections: usize,
    /// Size of the key-value cache in tokens; 0: by the free memory.
    #[arg(long, default_value_t = 0)]
    cache_tokens: usize,
    /// Most token rows per step; 0: 1024 on the CPU, 2048 on a GPU.
    #[arg(long, default_value_t = 0)]
    step_tokens: usize,
}

/// What the command line gives names to.
struct Named {
    adapters: Vec<Tuned>,
    /// Each with the prompts of its members.
    ensembles: Vec<(Served, Vec<Adapter>)>,
}

/// Splits `given` at its name, which is added to `names` if it is not among them.
fn own_name(
    option: &str,
    given: &str,
    form: &str,
    names: &mut Vec<String>,
) -> gneiss::Result<(String, PathBuf)> {
    let invalid = |problem: &str| gneiss::Error::Invalid(format!("{option}: {problem}"));
    let (Some(name), folder) = split_name(given) else {
        return Err(invalid(&format!("expected {form}, found no name")));
    };
    check_name(name)?;
    if names.iter().any(|other| other == name) {
        return Err(invalid("expected a name of its own, found that another model has it"));
    }
    names.push(name.to_owned());
    Ok((name.to_owned(), folder))
}

impl LimitArgs {
    /// The options that these limits set.
    pub(super) fn options(&self) -> ServerOptions {
        ServerOptions {
            max_body_bytes: self.max_body_bytes,
            request_seconds: self.max_seconds,
            header_seconds: self.max_read_seconds,
            body_seconds: self.max_read_seconds,
            max_connections: self.max_connections,
            ..ServerOptions::default()
        }
    }

    /// The limits of the model's thread.
    pub(super) fn limits(&self) -> ServerLimits {
        ServerLimits {
            queue: self.max_queue,
            sequence_tokens: self.max_sequence_tokens,
            cache_rows: self.cache_tokens,
            step_rows: self.step_tokens,
        }
    }
}

/// A server that is ready to accept connections.
pub(super) struct RunningServer {
    /// The server without its connections.
    pub(super) app: App,
    /// The handle to the model's thread.
    pub(super) client: Client,
    thread: JoinHandle<()>,
    /// The other models of the server.
    others: Vec<(Client, JoinHandle<()>)>,
}

impl Serve {
    /// Runs the subcommand.
    pub fn run(self) -> anyhow::Result<()> {
        let Named { adapters, ensembles } = self.named()?;
        let api_key = self.api_key_file.as_deref().map(read_key).transpose()?;
        let tls = match (&self.tls_cert, &self.tls_key) {
            (Some(certificate), Some(key)) => {
                Some(Tls { certificate: certificate.clone(), key: key.clone() })
            }
            _ => None,
        };
        let mut options = ModelOptions { id: self.model.clone(), ..ModelOptions::default() };
        self.place.apply(&mut options);
        let session = progress::open(&options)?;
        let serving = ServerOptions {
            api_key,
            prompt_embeds: self.enable_prompt_embeds,
            tls,
            cors_origins: self.cors_origin.clone(),
            ..self.limits.options()
        };
        let deployed = deploy(session, self.limits.limits(), serving)?;
        for tuned in adapters {
            let served = Served::tuned(&tuned.name, &tuned.argument(), &tuned.adapter)?;
            deployed.client.load(served, tuned.adapter)?;
        }
        for (served, adapters) in ensembles {
            deployed.client.load_ensemble(served, adapters)?;
        }
        let reserved = deployed.client.models().iter().map(|served| served.name.clone()).collect();
        let folder =
            self.adapter_dir.as_deref().map(|path| AdapterFolder::new(path, reserved)).transpose()?;
        self.listen(deployed, folder)
    }

    /// The adapters and ensembles that the command line names.
    fn named(&self) -> anyhow::Result<Named> {
        let mut names = vec![self.model.clone()];
        let mut named = Named { adapters: Vec::new(), ensembles: Vec::new() };
        for given in &self.adapters {
            let (name, folder) = own_name(&format!("--adapter {given}"), given, "NAME=DIR", &mut names)?;
            let mut tuned = Tuned::read(&folder)?;
            super::warn_about(&tuned.adapter);
            tuned.name = name;
            named.adapters.push(tuned);
        }
        for given in &self.ensembles {
            let option = format!("--ensemble {given}");
            let (name, folders) = own_name(&option, given, "NAME=DIR,DIR,...", &mut names)?;
            let folders = folders.to_string_lossy();
            let folders: Vec<PathBuf> = folders
                .split(',')
                .map(str::trim)
                .filter(|folder| !folder.is_empty())
                .map(PathBuf::from)
                .collect();
            let tuned = Tuned::read_all(&folders).with_context(|| option)?;
            tuned.iter().for_each(|tuned| super::warn_about(&tuned.adapter));
            let served = Served::ensemble(&name, &tuned)?;
            named.ensembles.push((served, tuned.into_iter().map(|tuned| tuned.adapter).collect()));
        }
        Ok(named)
    }

    fn listen(self, deployed: RunningServer, folder: Option<AdapterFolder>) -> anyhow::Result<()> {
        if let Some(folder) = folder {
            watch_folder(folder, deployed.client.clone());
        }
        let scheme = if self.tls_cert.is_some() { "https" } else { "http" };
        let outcome = listen(&self.listen, scheme, self.api_key_file.is_some(), &deployed);
        let ended = deployed.end();
        outcome?;
        ended?;
        status!("ended");
        Ok(())
    }
}

/// Serves until Ctrl-C or SIGTERM.
pub(super) fn listen(
    listen: &Listen,
    scheme: &str,
    has_key: bool,
    deployed: &RunningServer,
) -> anyhow::Result<()> {
    let runtime = runtime()?;
    runtime.block_on(async {
        let listeners = listen.bind().await?;
        let addresses: Vec<_> =
            listeners.iter().map(tokio::net::TcpListener::local_addr).collect::<Result<_, _>>()?;
        for address in addresses.iter().filter(|address| !address.ip().is_loopback() && !has_key) {
            super::warn(format_args!(
                "{address} can be reached from other machines, and there is no --api-key-file"
            ));
        }
        for client in
            std::iter::once(&deployed.client).chain(deployed.others.iter().map(|(client, _)| client))
        {
            client.models().iter().for_each(|served| describe(served));
        }
        // Scripts wait for these lines.
        for address in addresses {
            println!("listening on {scheme}://{address}");
        }
        std::io::stdout().flush()?;
        gneiss::serve::serve(listeners, deployed.app.clone(), shutdown_signal()).await?;
        anyhow::Ok(())
    })
}

impl RunningServer {
    /// Adds the routes of `platform`.
    pub(super) fn with_platform(self, platform: Platform) -> Self {
        Self { app: self.app.with_platform(platform), ..self }
    }

    /// Serves the models of `others` too.
    pub(super) fn with_others(self, others: Vec<Self>) -> Self {
        let (apps, others) = others.into_iter().map(|one| (one.app, (one.client, one.thread))).unzip();
        Self { app: self.app.with_others(apps), others, ..self }
    }

    /// Ends the models' threads after they have answered every request.
    pub(super) fn end(self) -> anyhow::Result<()> {
        drop(self.app);
        for (client, thread) in std::iter::once((self.client, self.thread)).chain(self.others) {
            client.end();
            anyhow::ensure!(thread.join().is_ok(), "a model's thread ended by a panic");
        }
        Ok(())
    }
}

/// A runtime of two threads, because the model needs the cores.
pub(super) fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    Ok(runtime.worker_threads(2).on_thread_start(process::survive_closed_connections).enable_all().build()?)
}

/// Starts a thread for the model of `session`, and returns a server for it that does not accept connections yet.
pub(super) fn deploy(
    session: Session,
    limits: ServerLimits,
    options: ServerOptions,
) -> anyhow::Result<RunningServer> {
    deploy_sharing(&session, limits, options, &SharedParts::new())
}

/// What the models of one server share.
pub(super) struct SharedParts {
    /// Whose turn it is to use the device.
    pub(super) turns: Arc<DeviceTurns>,
    metrics: Arc<Metrics>,
}

impl SharedParts {
    /// Parts that nothing uses yet.
    pub(super) fn new() -> Self {
        Self { turns: DeviceTurns::new(), metrics: Arc::default() }
    }
}

/// As [`deploy`], with a model and a device that others use too.
pub(super) fn deploy_sharing(
    session: &Session,
    limits: ServerLimits,
    options: ServerOptions,
    shared: &SharedParts,
) -> anyhow::Result<RunningServer> {
    let limits = gneiss::serve::serving_limits(&session.model, limits)?;
    let template = find_chat_template(&session::locate(&session.id)?)?;
    let Session { model, tokenizer, id, .. } = session;
    let (metrics, turns) = (shared.metrics.clone(), shared.turns.clone());
    let counted = metrics.clone();
    let on_step = move |step: worker::StepMetrics| {
        counted.count_step(step);
        if let Some(rows) = step.less_rows {
            super::warn(format_args!("the device ran out of memory: steps have at most {rows} rows for now"));
        }
    };
    let (client, thread) = worker::start_sharing(model.clone(), Served::base(id), limits, turns, on_step)?;
    let app =
        App::new(client.clone(), tokenizer.clone(), template, id.clone(), options)?.with_metrics(metrics);
    if let Some(problem) = app.chat_problem() {
        super::warn(format_args!(
            "the checkpoint's chat template can't be used, and chats are refused: {problem}"
        ));
    }
    Ok(RunningServer { app, client, thread, others: Vec::new() })
}

/// The key in a file of one line.
pub(super) fn read_key(path: &Path) -> gneiss::Result<String> {
    let text = std::fs::read_to_string(path).map_err(gneiss::Error::io(path))?;
    let key = text.trim();
    if key.is_empty() || key.lines().count() != 1 || !key.chars().all(|c| c.is_ascii_graphic()) {
        return Err(gneiss::Error::Invalid(format!(
            "{}: expected one line with a key of printable ASCII characters without spaces",
            path.display()
        )));
    }
    Ok(key.to_owned())
}

fn describe(served: &Served) {
    let what = match (&served.folder, &served.task) {
        (None, _) if !served.members.is_empty() => {
            let folders = served.members.iter().filter_map(|member| member.folder.as_ref());
            let folders: Vec<String> = folders.map(|folder| folder.display().to_string()).collect();
            format!("an ensemble of {}", folders.join(", "))
        }
        (None, _) => "the base model".to_owned(),
        (Some(folder), Some(task)) => {
            format!("{} virtual tokens, {}, {}", served.virtual_tokens, task.task, folder.display())
        }
        (Some(folder), None) => format!("{} virtual tokens, {}", served.virtual_tokens, folder.display()),
    };
    status!("serving    {}: {what}", served.name);
}

/// Completes at Ctrl-C or SIGTERM.
async fn shutdown_signal() {
    let interrupt = tokio::signal::ctrl_c();
    #[cfg(unix)]
    {
        let mut terminate = match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
            Ok(terminate) => terminate,
            Err(_) => return drop(interrupt.await),
        };
        tokio::select! { _ = interrupt => {}, _ = terminate.recv() => {} }
    }
    #[cfg(not(unix))]
    drop(interrupt.await);
    status!("ending once the requests under way are answered");
}
