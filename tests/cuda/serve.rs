//! A server with two prompts on the device.

use crate::place::{Place, succeeded};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read};
use std::process::Child;

struct Server {
    child: Child,
    url: String,
}

impl Server {
    fn start(place: &Place, device: &str, graphs: &str) -> Self {
        let args =
            ["serve", "--model", "model", "--device", device, "--dtype", "f32", "--listen", "127.0.0.1:0"];
        let prompts = ["--adapter", "one=runs/one", "--adapter", "two=runs/two"];
        let mut command = place.command("", args.into_iter().chain(prompts));
        let mut child = command.env("GNEISS_CUDA_GRAPHS", graphs).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let Some(url) = line.trim().strip_prefix("listening on ") else {
            let mut said = String::new();
            child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
            panic!("{line}{said}");
        };
        Self { url: url.to_owned(), child }
    }

    /// The text that follows a prompt, and the log-probabilities of its tokens.
    fn completion(&self, model: &str, prompt: &str) -> (Value, Vec<f64>) {
        let request =
            json!({"model": model, "prompt": prompt, "max_tokens": 6, "temperature": 0, "logprobs": 1});
        let url = format!("{}/v1/completions", self.url);
        let mut answer = ureq::post(&url).content_type("application/json").send(request.to_string()).unwrap();
        let answer: Value = serde_json::from_str(&answer.body_mut().read_to_string().unwrap()).unwrap();
        let choice = &answer["choices"][0];
        let logprobs = choice["logprobs"]["token_logprobs"].as_array().unwrap();
        (choice["text"].clone(), logprobs.iter().map(|l| l.as_f64().unwrap()).collect())
    }

    fn end(mut self) {
        // SAFETY: a signal to a child that has not been waited for.
        assert_eq!(unsafe { libc::kill(self.child.id() as libc::pid_t, libc::SIGTERM) }, 0);
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}: {said}");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // If a test failed; a server that has ended is gone.
        let _ = self.child.kill();
    }
}

/// Requests for two prompts and for the base, several at a time, get what the CPU answers, with graphs too.
#[test]
fn two_prompts_are_served_as_on_the_cpu() {
    let place = Place::new();
    for (name, rate) in [("name=one", "train.learning_rate=0.05"), ("name=two", "train.learning_rate=0.2")] {
        succeeded(&place.cuda("", ["tune", "dogs.toml", "--set", name, "--set", rate]));
    }
    let words = ["gentle", "late", "rude", "shiny"];
    let asked: Vec<(&str, String)> = ["one", "two", "model"]
        .into_iter()
        .flat_map(|model| words.map(|word| (model, format!("say {word} dog word{} :", 30 + word.len()))))
        .collect();
    let [cpu, cuda, graphs] = [("cpu", "0"), ("cuda", "0"), ("cuda", "1")].map(|(device, graphs)| {
        let server = Server::start(&place, device, graphs);
        let answers: Vec<_> = std::thread::scope(|scope| {
            let ask = |(model, prompt): &(&'static str, String)| server.completion(model, prompt);
            let threads: Vec<_> = asked.iter().map(|request| scope.spawn(move || ask(request))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        server.end();
        answers
    });
    let launched = place.calls().get(&("graph".into(), "launched".into())).copied();
    assert!(launched > Some(0), "{launched:?}");
    for (request, (cpu, cuda)) in
        asked.iter().chain(&asked).zip(cpu.iter().chain(&cpu).zip(cuda.iter().chain(&graphs)))
    {
        assert_eq!(cpu.0, cuda.0, "{request:?}");
        let far = cpu.1.iter().zip(&cuda.1).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(far < 1e-4 && cpu.1.len() == cuda.1.len(), "{request:?}: {cpu:?} and {cuda:?}");
    }
}
