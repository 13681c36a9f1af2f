//! Answers that come in pieces: server-sent events (<https://html.spec.whatwg.org/multipage/server-sent-events.html>).

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use serde_json::Value;
use std::convert::Infallible;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// Events that wait for a slow client; then the sequence waits.
const WAITING: usize = 16;

/// Where events go. Sending to a client that hung up gives `Err`.
#[derive(Clone)]
pub(super) struct Events(mpsc::Sender<Result<Bytes, Infallible>>);

/// The client hung up.
#[derive(Debug)]
pub(super) struct ClientGone;

impl Events {
    /// `data: JSON`, an event of OpenAI's.
    pub async fn data(&self, value: &Value) -> Result<(), ClientGone> {
        self.text(format!("data: {value}\n\n")).await
    }

    /// An event with a name and an id, as watsonx has them.
    pub async fn named(&self, id: usize, name: &str, value: &Value) -> Result<(), ClientGone> {
        self.text(format!("id: {id}\nevent: {name}\ndata: {value}\n\n")).await
    }

    /// An event with a name, as OpenAI's Responses have them.
    pub async fn event(&self, name: &str, value: &Value) -> Result<(), ClientGone> {
        self.text(format!("event: {name}\ndata: {value}\n\n")).await
    }

    /// What ends OpenAI's streams.
    pub async fn done(&self) -> Result<(), ClientGone> {
        self.text("data: [DONE]\n\n".into()).await
    }

    async fn text(&self, text: String) -> Result<(), ClientGone> {
        self.0.send(Ok(text.into())).await.map_err(|_| ClientGone)
    }
}

/// An answer whose events `work` sends. When the client hangs up, the work is dropped, and with it its sequences.
pub(super) fn respond<F>(work: impl FnOnce(Events) -> F) -> Response
where
    F: Future<Output = Result<(), ClientGone>> + Send + 'static,
{
    let (sender, receiver) = mpsc::channel(WAITING);
    let work = work(Events(sender.clone()));
    tokio::spawn(async move {
        tokio::select! {
            _ = work => {}
            () = sender.closed() => {}
        }
    });
    let mut response = Response::new(Body::from_stream(ReceiverStream::new(receiver)));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // nginx would collect the events otherwise.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}
