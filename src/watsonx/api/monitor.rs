//! The steps of a training over a WebSocket while it runs: IBM's SDK prints them as they come.
//!
//! Each message has the state, a text, and at most one entry of metrics, because the SDK prints the first one only. The
//! server closes the socket when the training has ended.

use super::{details, trainings};
use crate::serve::api_error::ApiError;
use crate::watsonx::records::{Training, TrainingState};
use crate::watsonx::service::Service;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::http::StatusCode;
use axum::response::Response;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout, timeout_at};

/// Time between two looks at a training.
const PAUSE: Duration = Duration::from_secs(1);
/// Time that a client has to take a message.
const SEND: Duration = Duration::from_secs(10);
/// Most bytes of a message from a client, of which none is expected.
const MAX_MESSAGE: usize = 1 << 10;

/// Answers a request for a WebSocket.
pub fn open(service: Arc<Service>, id: String, upgrade: WebSocketUpgrade) -> super::HandlerResult {
    trainings::find(&service, &id)?;
    let place = service.monitors.clone().try_acquire_owned().map_err(|_| {
        let message = "as many trainings are monitored as this server allows; try again later";
        ApiError::new(StatusCode::TOO_MANY_REQUESTS, "too_many_monitors", message)
    })?;
    let upgrade = upgrade.max_message_size(MAX_MESSAGE).max_frame_size(MAX_MESSAGE);
    let answer: Response = upgrade.on_upgrade(move |socket| monitor(service, id, socket, place));
    Ok(answer)
}

/// Sends what is new until the training ends, the client leaves, or the client does not take a message in time.
async fn monitor(service: Arc<Service>, id: String, mut socket: WebSocket, _place: OwnedSemaphorePermit) {
    let (mut state, mut sent) = (None, None);
    loop {
        // The state is read before the steps, so that no step is left out at the end.
        let training = trainings::find(&service, &id).ok();
        let shared = service.clone();
        let read = move || {
            let steps = training
                .as_ref()
                .and_then(|training| Some(details::steps(&shared, training, training.started?)));
            (training, steps.unwrap_or_default())
        };
        let Ok((training, steps)) = tokio::task::spawn_blocking(read).await else { return };
        let Some(training) = training else { return close(socket).await };
        if state != Some(training.state) && !send(&mut socket, &training, None).await {
            return;
        }
        state = Some(training.state);
        for step in unsent(&steps, sent) {
            if !send(&mut socket, &training, Some(step)).await {
                return;
            }
        }
        sent = steps.last().map(iteration).or(sent);
        if training.state.is_final() || service.is_ending() {
            return close(socket).await;
        }
        if !pause(&mut socket).await {
            return;
        }
    }
}

/// The steps after `sent`, each once: an epoch's only step has two entries until a second one follows, which a client that gets the
/// steps as they come would take for two steps.
fn unsent(steps: &[Value], sent: Option<u64>) -> impl Iterator<Item = &Value> {
    let numbers = steps.iter().map(iteration);
    let next = numbers.skip(1).map(Some).chain([None]);
    let is_wanted = move |(step, next): &(&Value, Option<u64>)| {
        *next != Some(iteration(step)) && sent.is_none_or(|sent| iteration(step) > sent)
    };
    steps.iter().zip(next).filter(is_wanted).map(|(step, _)| step)
}

/// The number of an entry's step, from 0.
fn iteration(step: &Value) -> u64 {
    step["iteration"].as_u64().unwrap_or(0)
}

/// Waits, and reads what the client sends: false if it has left.
async fn pause(socket: &mut WebSocket) -> bool {
    let until = Instant::now() + PAUSE;
    loop {
        match timeout_at(until, socket.recv()).await {
            Err(_) => return true,
            Ok(None | Some(Err(_) | Ok(Message::Close(_)))) => return false,
            Ok(Some(Ok(_))) => {}
        }
    }
}

/// Sends a message; false if the client did not take it.
async fn send(socket: &mut WebSocket, training: &Training, step: Option<&Value>) -> bool {
    let message = message(training, step).to_string();
    matches!(timeout(SEND, socket.send(Message::Text(message.into()))).await, Ok(Ok(())))
}

async fn close(mut socket: WebSocket) {
    // The client may have gone.
    let _ = timeout(SEND, socket.send(Message::Close(None))).await;
}

fn message(training: &Training, step: Option<&Value>) -> Value {
    let failed = training.state == TrainingState::Failed;
    let text = match (step, &training.failure) {
        (Some(step), _) => {
            let metrics = &step["ml_metrics"];
            format!("step {}, epoch {}: loss {}", step["iteration"], metrics["epoch"], metrics["loss"])
        }
        (None, Some(failure)) => failure.clone(),
        (None, None) => format!("the training is {}", training.state.word()),
    };
    let level = if failed && step.is_none() { "error" } else { "info" };
    let mut status = json!({"state": training.state.word(), "message": {"level": level, "text": text}});
    if let Some(step) = step {
        status["metrics"] = json!([step]);
    }
    json!({"metadata": {"id": training.id}, "entity": {"status": status}})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_step_is_sent_once_when_an_epochs_only_step_gets_a_second_one() {
        let steps = |iterations: &[u64]| -> Vec<Value> {
            iterations.iter().map(|iteration| json!({"iteration": iteration})).collect()
        };
        let sent =
            |iterations: &[u64], sent| unsent(&steps(iterations), sent).map(iteration).collect::<Vec<_>>();
        assert_eq!(sent(&[0, 0], None), [0]);
        assert_eq!(sent(&[0, 1], Some(0)), [1]);
        assert_eq!(sent(&[0, 1, 2, 2], Some(1)), [2]);
        assert_eq!(sent(&[0, 0, 1, 1], None), [0, 1]);
        assert!(sent(&[0, 1], Some(1)).is_empty());
    }
}
