//! Steps 8 and 9 of the tutorial: a server with the base model and the tuned prompt, and both asked over HTTP to answer
//! the test file.

use super::super::eval::show::share;
use super::super::serve::{self, RunningServer};
use super::super::{progress, text};
use super::{line, step};
use anyhow::Context;
use gneiss::config::Config;
use gneiss::data::Template;
use gneiss::evaluate::{Answers, Evaluation};
use gneiss::layout;
use gneiss::prompt::MAX_NAME_CHARS;
use gneiss::prompt::peft::Adapter;
use gneiss::serve::served::Served;
use gneiss::serve::{ServerLimits, ServerOptions};
use gneiss::session::Session;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Most requests that wait for an answer at the same time.
const CONNECTIONS: usize = 32;

/// Most seconds for an answer.
const PATIENCE: Duration = Duration::from_secs(600);

/// A model's answers over HTTP, compared with those of step 7.
#[derive(Debug, Clone, serde::Serialize)]
pub(super) struct HttpAnswers {
    /// The model's name on the server.
    model: String,
    /// Number of rows.
    rows: usize,
    /// Number of answers that equal the expected output.
    correct: usize,
    /// The same number in step 7.
    correct_before: usize,
    /// Number of answers that equal those of step 7.
    same: usize,
    /// Wall time of all answers.
    seconds: f64,
}

/// A running server, which ends when this value is dropped.
struct Server {
    url: String,
    /// The tuned prompt's name.
    name: String,
    base: String,
    runtime: tokio::runtime::Runtime,
    end: tokio::sync::oneshot::Sender<()>,
    serving: tokio::task::JoinHandle<std::io::Result<()>>,
    deployed: RunningServer,
}

/// Runs steps 8 and 9, and prints them if `show` is true. Returns each model's answers.
pub(super) fn steps(
    config: &Config,
    session: Session,
    folder: &Path,
    evaluation: &Evaluation,
    show: bool,
) -> anyhow::Result<Vec<HttpAnswers>> {
    if show {
        step(8);
    }
    let server = Server::start(config, session, folder)?;
    if show {
        print_server(config, folder, &server, evaluation)?;
        step(9);
    }
    let answers = server.ask(config, evaluation)?;
    server.end()?;
    if show {
        print(&answers);
    }
    Ok(answers)
}

impl Server {
    /// Serves the model of `session` and the run's prompt on a free port of this machine.
    fn start(config: &Config, session: Session, folder: &Path) -> anyhow::Result<Self> {
        let limits =
            ServerLimits { queue: 1024, sequence_tokens: 0, cache_rows: 0, step_rows: config.train.max_rows };
        let base = session.id.clone();
        let deployed = serve::deploy(session, limits, ServerOptions::default())?;
        let (name, path) = (deployment_name(&config.name, &base), folder.join(layout::ADAPTER));
        let adapter = Adapter::read(&path)?;
        deployed.client.load(Served::tuned(&name, &path, &adapter)?, adapter)?;
        let runtime = serve::runtime()?;
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))?;
        let url = format!("http://{}", listener.local_addr()?);
        let (end, ended) = tokio::sync::oneshot::channel();
        let app = deployed.app.clone();
        let serving = runtime.spawn(gneiss::serve::serve(vec![listener], app, async {
            // An error means that the other end is gone, which ends the server as well.
            let _ = ended.await;
        }));
        Ok(Self { url, name, base, runtime, end, serving, deployed })
    }

    /// Ends the server after every request is answered.
    fn end(self) -> anyhow::Result<()> {
        drop(self.end);
        self.runtime.block_on(self.serving)??;
        drop(self.runtime);
        self.deployed.end()
    }

    /// Asks the base model and the tuned prompt for every row of step 7: with watsonx's requests, as the tutorial's own
    /// step 9 sends them.
    fn ask(&self, config: &Config, evaluation: &Evaluation) -> anyhow::Result<Vec<HttpAnswers>> {
        let [base, tuned, ..] = &evaluation.arms[..] else {
            anyhow::bail!("step 7 asked base and tuned prompt")
        };
        let template = Template::parse(&config.data.verbalizer)?;
        let parameters =
            json!({"decoding_method": "greedy", "max_new_tokens": config.data.max_output_tokens});
        let with_hard_prompt = |input: &str| {
            let text = template.render(input);
            let words = &evaluation.hard_prompt;
            let input = if words.is_empty() { text } else { format!("{words} {text}") };
            json!({"model_id": self.base, "input": input, "parameters": parameters})
        };
        // The server knows the prompt's verbalizer.
        let with_soft_prompt = |input: &str| json!({"input": input, "parameters": parameters});
        let deployment = format!("/ml/v1/deployments/{}/text/generation", self.name);
        Ok(vec![
            self.ask_one(&self.base, "/ml/v1/text/generation", &base.answers, &with_hard_prompt)?,
            self.ask_one(&self.name, &deployment, &tuned.answers, &with_soft_prompt)?,
        ])
    }

    fn ask_one(
        &self,
        model: &str,
        path: &str,
        answers: &Answers,
        body: &(dyn Fn(&str) -> Value + Sync),
    ) -> anyhow::Result<HttpAnswers> {
        let (rows, next, started) = (&answers.predictions, AtomicUsize::new(0), Instant::now());
        let bar = progress::bar(rows.len(), "asking", progress::COUNT);
        let texts = Mutex::new(vec![String::new(); rows.len()]);
        let ask_some = || {
            let agent: ureq::Agent =
                ureq::Agent::config_builder().timeout_global(Some(PATIENCE)).build().into();
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                let Some(row) = rows.get(at) else { return anyhow::Ok(()) };
                let answer = self.post(&agent, path, &body(&row.input))?;
                let text = answer["results"][0]["generated_text"].as_str();
                let text =
                    text.with_context(|| format!("{path}: expected results with a text, found {answer}"))?;
                texts.lock().unwrap_or_else(std::sync::PoisonError::into_inner)[at] = text.trim().to_owned();
                bar.inc(1);
            }
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..CONNECTIONS).map(|_| scope.spawn(ask_some)).collect();
            threads.into_iter().try_for_each(|thread| match thread.join() {
                Ok(outcome) => outcome,
                Err(panic) => std::panic::resume_unwind(panic),
            })
        })?;
        bar.finish_and_clear();
        let texts = texts.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        let count = |fits: &dyn Fn(usize) -> bool| (0..rows.len()).filter(|i| fits(*i)).count();
        Ok(HttpAnswers {
            model: model.to_owned(),
            rows: rows.len(),
            correct: count(&|i| texts[i] == rows[i].expected),
            correct_before: count(&|i| rows[i].generated == rows[i].expected),
            same: count(&|i| texts[i] == rows[i].generated),
            seconds: started.elapsed().as_secs_f64(),
        })
    }

    fn post(&self, agent: &ureq::Agent, path: &str, body: &Value) -> anyhow::Result<Value> {
        let url = format!("{}{path}", self.url);
        let answer = agent.post(&url).header("content-type", "application/json").send(body.to_string());
        let text =
            answer.with_context(|| url.clone())?.body_mut().read_to_string().with_context(|| url.clone())?;
        serde_json::from_str(&text).with_context(|| format!("{url}: {text}"))
    }

    /// One request as a person would send it, and its answer.
    fn example(&self, config: &Config, input: &str) -> anyhow::Result<(String, String)> {
        let path = format!("/ml/v1/deployments/{}/text/generation", self.name);
        let body = json!({"input": input, "parameters": {"max_new_tokens": config.data.max_output_tokens}});
        let answer = self.post(&ureq::Agent::new_with_defaults(), &path, &body)?;
        let shell = body.to_string().replace('\'', r"'\''");
        Ok((
            format!("curl {}{path} \\\n    -H 'content-type: application/json' -d '{shell}'", self.url),
            answer.to_string(),
        ))
    }
}

/// A run's prompt's name on a server: its run's name, with `-` for characters that are not allowed in a URL path.
fn deployment_name(run: &str, base: &str) -> String {
    let fits = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '_' | '.') { c } else { '-' };
    let name: String = run.chars().map(fits).take(MAX_NAME_CHARS).collect();
    let name = name.trim_start_matches('.').to_owned();
    if name.is_empty() || name == base { "tuned".to_owned() } else { name }
}

/// Shows step 9: each model's accuracy over HTTP and in step 7.
fn print(asked: &[HttpAnswers]) {
    let mut rows =
        vec![["", "over HTTP", "step 7", "same answers", "requests/s"].map(str::to_owned).to_vec()];
    for (title, of) in ["base, hard prompt", "tuned, soft prompt"].iter().zip(asked) {
        rows.push(vec![
            (*title).to_owned(),
            share(of.correct, of.rows),
            share(of.correct_before, of.rows),
            format!("{} of {}", of.same, of.rows),
            format!("{:.1}", of.rows as f64 / of.seconds),
        ]);
    }
    println!("{}", text::table(&rows));
    let agree = asked.iter().all(|of| of.correct == of.correct_before);
    println!(
        "\n{}",
        if agree {
            "The accuracies agree with step 7's."
        } else {
            "The accuracies differ from step 7's: inputs beyond data.max_input_tokens are cut there and not by the server, \
             and in 16-bit dtypes two tokens can be as likely as each other."
        }
    );
}

/// Shows step 8: the files of the run, a request with its answer, and the commands to go on with.
fn print_server(
    config: &Config,
    folder: &Path,
    server: &Server,
    evaluation: &Evaluation,
) -> anyhow::Result<()> {
    let adapter = folder.join(layout::ADAPTER);
    let bytes = std::fs::metadata(adapter.join(layout::adapter_folder::WEIGHTS))?.len();
    line("adapter", format!("{} ({})", adapter.display(), text::bytes(bytes)));
    line("report", folder.join(layout::REPORT).display());
    line("server", format!("{} serves {} and {}", server.url, config.model.id, server.name));
    let first = evaluation.arms.first().and_then(|arm| arm.answers.predictions.first());
    let (request, answer) = server.example(config, first.map_or("", |row| &row.input))?;
    println!("\nA request, and its answer:\n\n  {request}\n  {answer}");
    let (model, name) = (&config.model.id, &server.name);
    println!("\nTo serve it from now on, with a page to try it in a browser:\n");
    println!("  gneiss serve --model {model} --adapter {name}={}", adapter.display());
    println!("\nFor engines that do not read adapters, such as vLLM or llama.cpp:\n");
    println!(
        "  gneiss export --model {model} --adapter {name}={} --bake --out {name}-baked",
        adapter.display()
    );
    println!("\nIn Python:\n");
    println!("  from peft import PeftModel");
    println!("  model = PeftModel.from_pretrained(base_model, {:?})", adapter.display().to_string());
    println!("  # how to call generate: {}", adapter.join("README.md").display());
    Ok(())
}
