use gneiss::{adapter::Adapter, config::ModelOptions, data::Dataset, generate::*, setup};
use std::path::Path;
fn main() {
    let args: Vec<String> = std::env::args().collect();
    let step_rows: usize = args.get(1).map_or(512, |a| a.parse().unwrap());
    let together: usize = args.get(2).map_or(32, |a| a.parse().unwrap());
    let mut options =
        ModelOptions { id: "models/SmolLM2-135M-Instruct.Q4_1.gguf".into(), ..Default::default() };
    if let Some(dtype) = args.get(3) {
        options.dtype = serde_json::from_value(serde_json::json!(dtype)).unwrap();
    }
    let session = setup::open(&options, &mut |_, _| ()).unwrap();
    let adapter = Adapter::read(Path::new("runs/tutorial/adapter")).unwrap();
    let data = Dataset::read(Path::new("data/test.csv"), "input", "output").unwrap();
    let mut engine = Engine::new(&session.model, 16384, step_rows).unwrap();
    let prefix = engine.add_prefix(Some(&adapter.prompt)).unwrap();
    let requests: Vec<Request> = data
        .records
        .iter()
        .map(|r| Request {
            tokens: session.tokenizer.encode(&format!("classify {{0, 1}} {}", r.input), true).unwrap(),
            max_new_tokens: 2,
            stop_token_ids: session.tokenizer.stop_token_ids.as_slice().into(),
            ..Default::default()
        })
        .collect();
    let total: usize = requests.iter().map(|r| r.tokens.len()).sum();
    println!("{} requests, {} tokens", requests.len(), total);
    for round in 0..3 {
        if round == 2 {
            gneiss::ops::profile::start();
        }
        let start = std::time::Instant::now();
        let (mut next, mut open, mut done, mut rows, mut steps) = (0, 0, 0, 0, 0);
        while done < requests.len() {
            while open < together && next < requests.len() {
                engine.submit(prefix, requests[next].clone()).unwrap();
                next += 1;
                open += 1;
            }
            let s = engine.step().unwrap();
            rows += s.rows;
            steps += 1;
            for (_, e) in s.events {
                if matches!(e, Event::Finished(_)) {
                    done += 1;
                    open -= 1;
                }
            }
        }
        let t = start.elapsed().as_secs_f64();
        println!(
            "{t:.2} s, {:.1} requests/s, {rows} rows in {steps} steps, {:.0} rows/s",
            requests.len() as f64 / t,
            rows as f64 / t
        );
    }
    println!("{:#?}", gneiss::ops::profile::finish());
}
