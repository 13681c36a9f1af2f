//! A server with two prompts on the device.

use crate::common::server::ServerProcess;
use crate::place::{Place, succeeded};
use serde_json::{Value, json};

struct Server(ServerProcess);

impl Server {
    fn start(place: &Place, device: &str, graphs: &str) -> Self {
        let args =
            ["serve", "--model", "model", "--device", device, "--dtype", "f32", "--listen", "127.0.0.1:0"];
        let prompts = ["--adapter", "one=runs/one", "--adapter", "two=runs/two"];
        let mut command = place.command("", args.into_iter().chain(prompts));
        command.env("GNEISS_CUDA_GRAPHS", graphs);
        Self(ServerProcess::start(command))
    }

    /// The text that follows a prompt, and the log-probabilities of its tokens.
    fn completion(&self, model: &str, prompt: &str) -> (Value, Vec<f64>) {
        let request =
            json!({"model": model, "prompt": prompt, "max_tokens": 6, "temperature": 0, "logprobs": 1});
        let url = format!("{}/v1/completions", self.0.url);
        let mut answer = ureq::post(&url).content_type("application/json").send(request.to_string()).unwrap();
        let answer: Value = serde_json::from_str(&answer.body_mut().read_to_string().unwrap()).unwrap();
        let choice = &answer["choices"][0];
        let logprobs = choice["logprobs"]["token_logprobs"].as_array().unwrap();
        (choice["text"].clone(), logprobs.iter().map(|l| l.as_f64().unwrap()).collect())
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
        server.0.end();
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
