//! Answers that are sent in pieces: server-sent events (<https://html.spec.whatwg.org/multipage/server-sent-events.html>).

use axum::http::{HeaderValue, header};
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use serde_json::Value;
use std::convert::Infallible;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// Events that are kept for a slow client. When there are as many, the work waits.
const CAPACITY: usize = 16;

/// Sends events to a client.
#[derive(Clone)]
pub(super) struct Events(mpsc::Sender<Result<Event, Infallible>>);

/// The client closed the connection.
#[derive(Debug)]
pub(super) struct ClientGone;

impl Events {
    /// Sends an event with data alone, as OpenAI's completions have them.
    pub async fn data(&self, value: &Value) -> Result<(), ClientGone> {
        self.send(Event::default().data(value.to_string())).await
    }

    /// Sends an event with an id and a name, as watsonx has them.
    pub async fn named(&self, id: usize, name: &str, value: &Value) -> Result<(), ClientGone> {
        self.send(Event::default().id(id.to_string()).event(name).data(value.to_string())).await
    }

    /// Sends an event with a name, as OpenAI's Responses have them.
    pub async fn event(&self, name: &str, value: &Value) -> Result<(), ClientGone> {
        self.send(Event::default().event(name).data(value.to_string())).await
    }

    /// Sends the last event of OpenAI's completions.
    pub async fn done(&self) -> Result<(), ClientGone> {
        self.send(Event::default().data("[DONE]")).await
    }

    async fn send(&self, event: Event) -> Result<(), ClientGone> {
        self.0.send(Ok(event)).await.map_err(|_| ClientGone)
    }
}

/// A response whose events `work` sends. When the client closes the connection, the work is dropped, and with it its
/// sequences.
pub(super) fn respond<F>(work: impl FnOnce(Events) -> F) -> Response
where
    F: Future<Output = Result<(), ClientGone>> + Send + 'static,
{
    let (sender, receiver) = mpsc::channel(CAPACITY);
    let work = work(Events(sender.clone()));
    tokio::spawn(async move {
        tokio::select! {
            _ = work => {}
            () = sender.closed() => {}
        }
    });
    let mut response = Sse::new(ReceiverStream::new(receiver)).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    // Without it, nginx collects the events before it sends them on.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}
