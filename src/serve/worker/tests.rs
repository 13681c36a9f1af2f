//! The worker on a device that runs out of memory, on the test's own thread.

use super::*;
use crate::checkpoint::Checkpoint;
use crate::device::{Work, faults};
use crate::generate::{Request, StopReason};
use crate::model::Dtypes;
use candle_core::{DType, Device};
use std::cell::RefCell;
use std::rc::Rc;
use tokio::sync::mpsc::UnboundedReceiver;

fn model(name: &str) -> Decoder {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let bare = Checkpoint::open_without_tokenizer(&path).unwrap();
    let dtypes = Dtypes::for_weights(DType::F32, &Device::Cpu).unwrap();
    Decoder::load(&bare.config, &bare.weights, dtypes, &Device::Cpu, &mut |_| ()).unwrap()
}

fn request(seed: u32) -> Request {
    let tokens = (0..5 + seed % 4).map(|i| (seed * 7 + i * 3) % 90).collect();
    Request { tokens, max_new_tokens: 3, ..Request::default() }
}

/// What the clients of `requests` hear, and the steps, where `fails` says when memory runs out.
fn serve(
    requests: Vec<Request>,
    fails: impl FnMut(Work, usize) -> bool + 'static,
) -> (Vec<Vec<Event>>, Vec<StepMetrics>) {
    serve_by(&model("granite"), requests, fails)
}

/// The same by another model.
fn serve_by(
    model: &Decoder,
    requests: Vec<Request>,
    fails: impl FnMut(Work, usize) -> bool + 'static,
) -> (Vec<Vec<Event>>, Vec<StepMetrics>) {
    let limits = ServerLimits { queue: 100, sequence_tokens: 200, cache_rows: 400, step_rows: 64 };
    let base = Served::base("base");
    let shared = Arc::new(WorkerState {
        limits,
        vocab_size: model.config().vocab_size,
        hidden_size: model.config().hidden_size,
        waiting: AtomicUsize::new(requests.len()),
        models: RwLock::new(Arc::from([Arc::new(base.clone())])),
        serving: AtomicBool::new(true),
    });
    let steps = Rc::new(RefCell::new(Vec::new()));
    let seen = steps.clone();
    let (commands, inbox) = mpsc::channel();
    let receivers: Vec<UnboundedReceiver<Event>> = requests
        .into_iter()
        .map(|request| {
            let (events, receiver) = tokio::sync::mpsc::unbounded_channel();
            commands.send(Command::Submit { model: "base".into(), request, events }).unwrap();
            receiver
        })
        .collect();
    drop(commands);
    let worker = Worker::new(model, base, shared.clone(), DeviceTurns::new(), move |step| {
        seen.borrow_mut().push(step);
    })
    .unwrap();
    faults::with(fails, || worker.run(&inbox));
    assert_eq!(shared.waiting.load(Ordering::Relaxed), 0);
    let heard =
        |mut receiver: UnboundedReceiver<Event>| std::iter::from_fn(|| receiver.try_recv().ok()).collect();
    let heard = receivers.into_iter().map(heard).collect();
    (heard, steps.take())
}

fn requests() -> Vec<Request> {
    (0..6).map(request).collect()
}

#[test]
fn requests_get_the_same_answers_in_smaller_steps() {
    for name in ["granite", "experts", "mamba_experts"] {
        let model = model(name);
        let (expected, steps) = serve_by(&model, requests(), |_, _| false);
        assert!(expected.iter().all(|events| events.last() == Some(&Event::Finished(StopReason::MaxTokens))));
        assert!(steps.iter().all(|step| step.less_rows.is_none()));
        let (found, steps) = serve_by(&model, requests(), |work, rows| work == Work::Pass && rows > 9);
        assert_eq!(tokens(&found), tokens(&expected), "{name}");
        assert!(name == "mamba_experts" || found == expected, "{name}");
        assert!(steps.iter().all(|step| step.rows <= 9) && steps.len() > 3, "{name}: {steps:?}");
        let limits: Vec<usize> = steps.iter().filter_map(|step| step.less_rows).collect();
        assert_eq!(limits.len(), 1, "once, in the step that halved them until they fitted: {limits:?}");
    }
}

/// The tokens of each request. A state that is computed in two parts has other last bits, and so have log-probabilities.
fn tokens(heard: &[Vec<Event>]) -> Vec<Vec<u32>> {
    let token = |event: &Event| if let Event::Token(token) = event { Some(token.id) } else { None };
    heard.iter().map(|events| events.iter().filter_map(token).collect()).collect()
}

#[test]
fn a_request_that_does_not_fit_ends_alone() {
    // The first pass of a single row fails, whosever it is, and none after it.
    let mut failed = false;
    let (found, _) = serve(requests(), move |work, rows| {
        let fails = work == Work::Pass && (rows > 1 || !failed);
        failed |= rows == 1;
        fails
    });
    let (expected, _) = serve(requests(), |_, _| false);
    let differ: Vec<usize> = (0..6).filter(|i| found[*i] != expected[*i]).collect();
    assert_eq!(differ, [0]);
    let [Event::NoMemory(problem)] = &found[0][..] else { panic!("{:?}", found[0]) };
    assert!(problem.contains("CUDA_ERROR_OUT_OF_MEMORY") && problem.contains("hint"), "{problem}");
}

#[test]
fn a_request_whose_logits_do_not_fit_ends_alone() {
    let mut failed = false;
    let (found, steps) = serve(requests(), move |work, rows| {
        let fails = work == Work::Logits && (rows > 1 || !failed);
        failed |= work == Work::Logits && rows == 1;
        fails
    });
    let (expected, _) = serve(requests(), |_, _| false);
    let differ: Vec<usize> = (0..6).filter(|i| found[*i] != expected[*i]).collect();
    let [one] = differ[..] else { panic!("{differ:?}") };
    assert!(matches!(&found[one][..], [Event::NoMemory(_)]), "{:?}", found[one]);
    assert!(steps.iter().all(|step| step.less_rows.is_none()), "logits alone are fewer at a time");
}

#[test]
fn a_server_without_any_memory_answers_every_request() {
    let (found, _) = serve(requests(), |work, _| work == Work::Pass);
    assert!(found.iter().all(|events| matches!(&events[..], [Event::NoMemory(_)])), "{found:?}");
}
