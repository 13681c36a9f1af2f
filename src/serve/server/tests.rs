//! Over a real socket.

mod clients;

use super::*;
use crate::generate::{Event, Request, StopReason};
use crate::serve::ServerOptions;
use crate::serve::testing::{BASE, Fake, say, token};
use serde_json::json;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// Longer than anything here takes, on a busy machine too.
const LONG: Duration = Duration::from_secs(20);

struct Running {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    served: JoinHandle<std::io::Result<()>>,
}

impl Running {
    async fn new(fake: &Fake) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel();
        let served = tokio::spawn(serve(vec![listener], fake.app.clone(), async { drop(stopped.await) }));
        Self { address, stop: Some(stop), served }
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// All that the server says to `text`, to the connection's end.
    async fn exchange(&self, text: &str) -> String {
        let mut stream = self.connect().await;
        stream.write_all(text.as_bytes()).await.unwrap();
        rest(&mut stream).await
    }

    async fn ended(&mut self) {
        drop(self.stop.take());
        tokio::time::timeout(LONG, &mut self.served).await.expect("the server ends").unwrap().unwrap();
    }
}

async fn rest(stream: &mut TcpStream) -> String {
    let mut text = Vec::new();
    let read = tokio::time::timeout(LONG, stream.read_to_end(&mut text)).await;
    read.expect("the connection ends").unwrap();
    String::from_utf8(text).unwrap()
}

fn post(path: &str, body: &str, more: &str) -> String {
    let length = body.len();
    format!("POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n{more}\r\n{body}")
}

fn completion(stream: bool) -> String {
    let body = json!({"model": BASE, "prompt": "x", "stream": stream}).to_string();
    post("/v1/completions", &body, "connection: close\r\n")
}

/// A worker that says one token of each request and then waits; where its events go can be had.
fn waiting(options: ServerOptions) -> (Fake, Arc<Mutex<Vec<UnboundedSender<Event>>>>) {
    let kept: Arc<Mutex<Vec<UnboundedSender<Event>>>> = Arc::default();
    let of_script = kept.clone();
    let script = move |request: &Request, events: UnboundedSender<Event>| {
        drop(events.send(Event::Token(token(65, request))));
        of_script.lock().unwrap_or_else(PoisonError::into_inner).push(events);
        true
    };
    (Fake::with(options, None, script), kept)
}

async fn first(kept: &Mutex<Vec<UnboundedSender<Event>>>) -> UnboundedSender<Event> {
    for _ in 0..2000 {
        if let Some(events) = kept.lock().unwrap().first() {
            return events.clone();
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("no request came");
}

fn quick() -> ServerOptions {
    ServerOptions { header_seconds: 0.3, body_seconds: 0.3, grace_seconds: 0.3, ..ServerOptions::default() }
}

#[tokio::test]
async fn a_connection_answers_one_request_after_the_other() {
    let fake = Fake::saying("hello");
    let mut server = Running::new(&fake).await;
    let body = json!({"model": BASE, "prompt": "x"}).to_string();
    let text = post("/v1/completions", &body, "") + &completion(true);
    let answers = server.exchange(&text).await;
    assert_eq!(answers.matches("HTTP/1.1 200 OK").count(), 2, "{answers}");
    assert!(answers.contains("\"text\":\"hello\"") && answers.contains("data: [DONE]"), "{answers}");
    server.ended().await;
}

#[tokio::test]
async fn incomplete_head_ends_the_connection() {
    let fake = Fake::with(quick(), None, |request, events| say(b"x", request, &events));
    let server = Running::new(&fake).await;
    let started = Instant::now();
    let answer = server.exchange("POST /v1/completions HTTP/1.1\r\nhost: x\r\n").await;
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 408"), "{answer}");
    assert!(started.elapsed() >= Duration::from_millis(250));
    // Who asks for nothing, too.
    assert_eq!(server.exchange("").await, "");
}

#[tokio::test]
async fn incomplete_body_is_408() {
    let fake = Fake::with(quick(), None, |request, events| say(b"x", request, &events));
    let server = Running::new(&fake).await;
    let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{\"model\"";
    let answer = server.exchange(head).await;
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    assert!(answer.contains("request_timeout") && answer.contains("connection: close"), "{answer}");
}

#[tokio::test]
async fn body_that_is_too_large_is_read_before_the_answer() {
    let options = ServerOptions { max_body_bytes: 1000, ..ServerOptions::default() };
    let fake = Fake::with(options, None, |request, events| say(b"x", request, &events));
    let server = Running::new(&fake).await;
    let answer = server.exchange(&post("/v1/completions", &"x".repeat(10 << 20), "")).await;
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    // A head that is too large is no matter of a route's.
    let head = format!("GET / HTTP/1.1\r\nhost: x\r\nbig: {}\r\n\r\n", "x".repeat(2 * MAX_HEAD_BYTES));
    let mut stream = server.connect().await;
    // The server may hang up while this is written.
    let _ = stream.write_all(head.as_bytes()).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 431"), "{}", String::from_utf8_lossy(&answer));
    assert!(server.exchange("no HTTP at all\r\n\r\n").await.starts_with("HTTP/1.1 400"));
    assert!(server.exchange(&completion(false)).await.contains("200 OK"));
}

#[tokio::test]
async fn disconnected_client_ends_the_generation() {
    for stream in [true, false] {
        let (fake, kept) = waiting(ServerOptions::default());
        let server = Running::new(&fake).await;
        let mut client = server.connect().await;
        client.write_all(completion(stream).as_bytes()).await.unwrap();
        let events = first(&kept).await;
        if stream {
            let mut some = [0; 32];
            client.read_exact(&mut some).await.unwrap();
            assert!(some.starts_with(b"HTTP/1.1 200"));
        }
        assert!(!events.is_closed());
        drop(client);
        tokio::time::timeout(LONG, events.closed()).await.expect("the request is cancelled");
    }
}

#[tokio::test]
async fn shutdown_waits_for_requests_in_progress() {
    let (fake, kept) = waiting(ServerOptions::default());
    let mut server = Running::new(&fake).await;
    let mut client = server.connect().await;
    let idle = server.connect().await;
    client.write_all(completion(true).as_bytes()).await.unwrap();
    let events = first(&kept).await;
    drop(server.stop.take());
    while TcpStream::connect(server.address).await.is_ok() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(!server.served.is_finished());
    events.send(Event::Token(token(66, &Request::default()))).unwrap();
    events.send(Event::Finished(StopReason::StopToken)).unwrap();
    let answer = rest(&mut client).await;
    assert!(answer.contains("\"text\":\"B\"") && answer.contains("[DONE]"), "{answer}");
    server.ended().await;
    drop(idle);
}

#[tokio::test]
async fn shutdown_cuts_off_requests_after_the_grace_time() {
    let (fake, kept) = waiting(quick());
    let mut server = Running::new(&fake).await;
    let mut client = server.connect().await;
    client.write_all(completion(true).as_bytes()).await.unwrap();
    let events = first(&kept).await;
    server.ended().await;
    tokio::time::timeout(LONG, events.closed()).await.expect("the request is cancelled");
}

#[tokio::test]
async fn a_server_with_a_certificate_speaks_https() {
    use tokio_rustls::TlsConnector;
    use tokio_rustls::rustls::pki_types::pem::PemObject;
    use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
    use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto::ring};
    let fixture =
        |name: &str| std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tls").join(name);
    let tls = crate::serve::Tls { certificate: fixture("certificate.pem"), key: fixture("key.pem") };
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(&tls.certificate).unwrap()).unwrap();
    let options = ServerOptions { tls: Some(tls), ..quick() };
    let fake = Fake::with(options, None, |request, events| say(b"hello", request, &events));
    let mut server = Running::new(&fake).await;
    let client = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let client = client.with_safe_default_protocol_versions().unwrap();
    let client = TlsConnector::from(Arc::new(client.with_root_certificates(roots).with_no_client_auth()));
    let name = ServerName::try_from("localhost").unwrap();
    let mut stream = client.connect(name, server.connect().await).await.unwrap();
    stream.write_all(completion(true).as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    assert!(text.starts_with("HTTP/1.1 200 OK") && text.ends_with("0\r\n\r\n"), "{text}");
    assert_eq!(text.matches("\"object\":\"text_completion\"").count(), 6, "{text}");
    // Who begins no handshake is hung up on, and who speaks HTTP gets no answer of it.
    assert_eq!(rest(&mut server.connect().await).await, "");
    let mut plain = server.connect().await;
    plain.write_all(completion(false).as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer).await;
    assert!(!answer.starts_with(b"HTTP"));
    server.ended().await;
}

#[tokio::test]
async fn connections_beyond_the_limit_wait() {
    let (fake, kept) = waiting(ServerOptions { max_connections: 1, ..ServerOptions::default() });
    let server = Running::new(&fake).await;
    let mut client = server.connect().await;
    client.write_all(completion(true).as_bytes()).await.unwrap();
    let events = first(&kept).await;
    let mut second = server.connect().await;
    second.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut some = [0; 8];
    let early = tokio::time::timeout(Duration::from_millis(200), second.read(&mut some)).await;
    assert!(early.is_err(), "the second connection is not answered while the first lasts");
    events.send(Event::Finished(StopReason::StopToken)).unwrap();
    assert!(rest(&mut client).await.contains("[DONE]"));
    assert!(rest(&mut second).await.contains("200 OK"));
}
