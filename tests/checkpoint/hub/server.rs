//! A hub on 127.0.0.1, with the URL scheme and the headers of the real one.
//!
//! It speaks plain sockets, because breaking off in the middle of a body is its main business.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
pub const WEIGHTS: &str = "model.safetensors";
/// Where the first answer of a server that breaks off ends.
pub const BREAK: usize = 70_000;

/// How long a server that falls silent keeps the connection; no test waits for it.
pub const SILENCE: Duration = Duration::from_secs(60);

/// How a body goes wrong.
#[derive(Clone, Copy, PartialEq)]
pub enum Fault {
    /// The connection is closed in the middle.
    Closes,
    /// As that, but nothing had told how long the body would be.
    ClosesUnannounced,
    /// The connection stays open and silent.
    Stalls,
    /// The body is longer than the file.
    Overflows,
}

#[derive(Default)]
pub struct Script {
    /// Name to content; `.safetensors` files are redirected to storage.
    pub files: BTreeMap<String, Vec<u8>>,
    /// Status and error code of every answer.
    pub refuse: Option<(u16, &'static str)>,
    /// Answers of 503 before the first good one.
    pub busy: usize,
    /// How many bodies of weights go wrong, and how.
    pub faults: Option<(usize, Fault)>,
    /// Whether ranges are ignored.
    pub no_ranges: bool,
    /// Another server that holds the large files.
    pub storage: Option<SocketAddr>,
    /// One line a request: method, path, range, token.
    pub log: Vec<String>,
}

pub struct Hub {
    pub address: SocketAddr,
    script: Arc<Mutex<Script>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Hub {
    pub fn serve(files: &[(&str, Vec<u8>)]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let files = files.iter().map(|(name, bytes)| (name.to_string(), bytes.clone())).collect();
        let script = Arc::new(Mutex::new(Script { files, ..Script::default() }));
        let stop = Arc::new(AtomicBool::new(false));
        let (shared, stopped) = (script.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::SeqCst) {
                    break;
                }
                let (stream, shared) = (stream.unwrap(), shared.clone());
                // A client that hangs up early is part of some tests.
                std::thread::spawn(move || answer(stream, &shared).ok());
            }
        });
        Self { address, script, stop, thread: Some(thread) }
    }

    /// One small checkpoint: all required files and one weight file.
    pub fn whole() -> Self {
        Self::serve(&[
            ("config.json", b"{}".to_vec()),
            ("tokenizer.json", b"{\"a\": 1}".to_vec()),
            ("chat_template.jinja", b"x".to_vec()),
            (WEIGHTS, weights(7)),
        ])
    }

    pub fn set(&self, change: impl FnOnce(&mut Script)) {
        change(&mut self.script.lock().unwrap());
    }

    /// The requests since the last call.
    pub fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.script.lock().unwrap().log)
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Wakes the thread up.
        let _ = TcpStream::connect(self.address);
        let ended = self.thread.take().unwrap().join();
        assert!(ended.is_ok() || std::thread::panicking(), "the hub's thread panicked");
    }
}

/// Answers the one request of a connection.
fn answer(mut stream: TcpStream, script: &Mutex<Script>) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().unwrap_or(Ok(String::new()))?;
    let mut headers = BTreeMap::new();
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(": ") else { break };
        headers.insert(name.to_ascii_lowercase(), value.to_string());
    }
    let mut words = first.split(' ');
    let (Some(method), Some(path)) = (words.next(), words.next()) else { return Ok(()) };
    let range = headers.get("range").cloned().unwrap_or_default();
    let token = headers.get("authorization").cloned().unwrap_or_default();

    let mut script = script.lock().unwrap();
    script.log.push(format!("{method} {path} {range} {token}").trim_end().to_string());
    let file = path.rsplit('/').next().unwrap_or_default();
    let at_storage = path.starts_with("/storage/");
    let mut head = String::new();
    let mut body: &[u8] = &[];
    let mut status = 200;
    if script.busy > 0 {
        script.busy -= 1;
        status = 503;
    } else if let Some((refused, code)) = script.refuse {
        status = refused;
        head = format!("X-Error-Code: {code}\r\n");
    } else if let Some(content) = script.files.get(file) {
        let etag = etag(content);
        if !at_storage {
            head = format!("X-Repo-Commit: {COMMIT}\r\n");
        }
        if file.ends_with(".safetensors") && !at_storage {
            status = 302;
            let host = script.storage.map_or_else(String::new, |address| format!("http://{address}"));
            head += &format!("X-Linked-Etag: \"{etag}\"\r\nX-Linked-Size: {}\r\n", content.len());
            head += &format!("Location: {host}/storage/{file}\r\nETag: \"of-the-redirect\"\r\n");
        } else {
            head += &format!("ETag: \"{etag}\"\r\nAccept-Ranges: bytes\r\n");
            let from = range.strip_prefix("bytes=").and_then(|range| range.strip_suffix('-'));
            let from: usize = from.filter(|_| !script.no_ranges).map_or(0, |from| from.parse().unwrap());
            if from > 0 {
                status = if from < content.len() { 206 } else { 416 };
                head += &format!("Content-Range: bytes {from}-{0}/{1}\r\n", content.len() - 1, content.len());
            }
            body = content.get(from..).unwrap_or_default();
        }
    } else {
        status = 404;
        head = "X-Error-Code: EntryNotFound\r\n".to_string();
    }
    let body = body.to_vec();
    let mut fault = None;
    if at_storage && method == "GET" && status < 300 {
        let left = script.faults.filter(|(left, _)| *left > 0);
        fault = left.map(|(_, fault)| fault);
        script.faults = left.map(|(left, fault)| (left - 1, fault));
    }
    drop(script);
    respond(&mut stream, status, &head, &body, method, fault)
}

fn respond(
    stream: &mut TcpStream,
    status: u16,
    head: &str,
    body: &[u8],
    method: &str,
    fault: Option<Fault>,
) -> std::io::Result<()> {
    let length = match fault {
        Some(Fault::ClosesUnannounced | Fault::Overflows) => String::new(),
        _ => format!("Content-Length: {}\r\n", body.len()),
    };
    write!(stream, "HTTP/1.1 {status} X\r\n{head}{length}Connection: close\r\n\r\n")?;
    if method == "HEAD" {
        return Ok(());
    }
    match fault {
        None => stream.write_all(body),
        Some(Fault::Overflows) => stream.write_all(body).and_then(|()| stream.write_all(b"more")),
        Some(fault) => {
            stream.write_all(&body[..BREAK.min(body.len() / 2)])?;
            stream.flush()?;
            if fault == Fault::Stalls {
                std::thread::sleep(SILENCE);
            }
            Ok(())
        }
    }
}

/// Stands for the hash that the hub would give.
pub fn etag(content: &[u8]) -> String {
    let hash = content.iter().fold(17u64, |hash, byte| hash.wrapping_mul(31).wrapping_add(u64::from(*byte)));
    format!("{hash:016x}")
}

pub fn weights(seed: usize) -> Vec<u8> {
    (0..200_000usize).map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 7) as u8).collect()
}
