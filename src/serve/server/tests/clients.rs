//! What HTTP clients write, byte for byte.

use super::*;
use flate2::Compression;
use flate2::write::GzEncoder;
use std::io::Write;

fn fake() -> Fake {
    Fake::with(quick(), None, |request, events| say(b"hello", request, &events))
}

fn body() -> String {
    json!({"model": BASE, "prompt": "x"}).to_string()
}

async fn raw(server: &Running, text: &[u8]) -> String {
    let mut stream = server.connect().await;
    stream.write_all(text).await.unwrap();
    rest(&mut stream).await
}

/// curl asks before it sends a body of more than 1 MiB; .NET's and Java's clients do if they are told to.
#[tokio::test]
async fn expect_100_is_answered_before_the_body() {
    let server = Running::new(&fake()).await;
    let (body, expect) = (body(), "expect: 100-continue\r\nconnection: close\r\n");
    let request = post("/v1/completions", &body, expect);
    let (head, body) = request.split_at(request.len() - body.len());
    let mut stream = server.connect().await;
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut go = [0; 25];
    tokio::time::timeout(LONG, stream.read_exact(&mut go)).await.unwrap().unwrap();
    assert_eq!(&go, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(body.as_bytes()).await.unwrap();
    let answer = rest(&mut stream).await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("hello"), "{answer}");
    let key = ServerOptions { api_key: Some("k".into()), ..quick() };
    let closed = Running::new(&Fake::with(key, None, |_, _| true)).await;
    let answer = closed.exchange(head).await;
    assert!(answer.starts_with("HTTP/1.1 401"), "{answer}");
}

/// HTTP/1.0 has no chunks: a stream ends with its connection.
#[tokio::test]
async fn http_1_0_gets_plain_bodies() {
    let server = Running::new(&fake()).await;
    for stream in [false, true] {
        let body = json!({"model": BASE, "prompt": "x", "stream": stream}).to_string();
        let request =
            format!("POST /v1/completions HTTP/1.0\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        let answer = server.exchange(&request).await;
        let (head, text) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.0 200"), "{head}");
        assert!(!head.to_lowercase().contains("transfer-encoding"), "{head}");
        let ends = if stream { "data: [DONE]\n\n" } else { "}" };
        assert!(text.ends_with(ends) && text.starts_with(if stream { "data: " } else { "{" }), "{text}");
    }
    let kept = "GET /health HTTP/1.0\r\nconnection: keep-alive\r\n\r\nGET /health HTTP/1.0\r\n\r\n";
    assert_eq!(server.exchange(kept).await.matches(" 200 OK").count(), 2);
}

/// Go and Java send bodies whose length they don't know in chunks.
#[tokio::test]
async fn a_body_may_come_in_chunks() {
    let server = Running::new(&fake()).await;
    let body = body();
    let (one, two) = body.split_at(9);
    let chunked = format!(
        "POST /v1/completions HTTP/1.1\r\nHOST: x\r\nTransfer-Encoding: chunked\r\nCONTENT-TYPE: application/json; \
         charset=utf-8\r\nConnection: close\r\n\r\n{:X};ext=1\r\n{one}\r\n{:x}\r\n{two}\r\n0\r\nx-trailer: 1\r\n\r\n",
        one.len(),
        two.len()
    );
    let answer = server.exchange(&chunked).await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("hello"), "{answer}");
}

#[tokio::test]
async fn bodies_may_be_compressed_and_have_a_byte_order_mark() {
    let server = Running::new(&fake()).await;
    let marked = format!("\u{feff}{}", body());
    let mut packed = GzEncoder::new(Vec::new(), Compression::default());
    packed.write_all(marked.as_bytes()).unwrap();
    let packed = packed.finish().unwrap();
    let request = |encoding: &str, body: &[u8]| {
        let more = format!("content-encoding: {encoding}\r\nconnection: close\r\n");
        let length = body.len();
        let head =
            format!("POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n{more}\r\n");
        [head.as_bytes(), body].concat()
    };
    for (encoding, body) in [("identity", marked.as_bytes()), ("gzip", &packed)] {
        let answer = raw(&server, &request(encoding, body)).await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("hello"), "{answer}");
    }
    let refused = raw(&server, &request("zstd", &packed)).await;
    assert!(refused.starts_with("HTTP/1.1 415"), "{refused}");
    assert!(refused.contains("accept-encoding: gzip, deflate") && refused.contains("zstd"), "{refused}");
}

/// The body of a refused request is read, so that the connection can be used on.
#[tokio::test]
async fn a_connection_outlives_what_is_refused() {
    let server = Running::new(&fake()).await;
    let packed = post("/v1/completions", &body(), "content-encoding: br\r\n");
    let nowhere = post("/chat/completions", &body(), "");
    let answers = server.exchange(&(packed + &nowhere + &completion(false))).await;
    let statuses: Vec<&str> =
        answers.match_indices("HTTP/1.1 ").map(|(at, _)| &answers[at + 9..at + 12]).collect();
    assert_eq!(statuses, ["415", "404", "200"], "{answers}");
    assert!(
        answers.contains(
            "did you mean /v1/chat/completions? The base URL of OpenAI's clients ends in /v1, here \
                              http://x/v1"
        ),
        "{answers}"
    );
}

#[tokio::test]
async fn targets_are_read_as_clients_write_them() {
    let server = Running::new(&fake()).await;
    let body = body();
    for target in [
        "/v1/completions?api-version=2024-06-01", "/v1/completions/", "//v1/completions",
        "/v1//completions/?x=%2F", "/v1/%63ompletions",
        // Through a proxy.
        "http://x:8080/v1/completions",
    ] {
        let answer = server.exchange(&post(target, &body, "connection: close\r\n")).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{target}: {answer}");
    }
    for (target, id) in
        [("/v1/models/", "org/base"), ("/v1/models/org/base/", "org/base"), ("/v1/models/dogs/", "dogs")]
    {
        let answer =
            server.exchange(&format!("GET {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")).await;
        assert!(
            answer.starts_with("HTTP/1.1 200") && answer.contains(&format!("\"id\":\"{id}\"")),
            "{answer}"
        );
    }
}

#[tokio::test]
async fn head_and_options_are_answered() {
    let server = Running::new(&fake()).await;
    let ask = |method: &str, target: &str| {
        format!("{method} {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    };
    for target in ["/", "/health", "/v1/models"] {
        let answer = server.exchange(&ask("HEAD", target)).await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("\r\n\r\n"), "{answer}");
    }
    let answer = server.exchange(&ask("HEAD", "/v1/completions")).await;
    assert!(answer.starts_with("HTTP/1.1 405") && answer.contains("allow: POST"), "{answer}");
    for (method, target, words) in [
        ("GET", "/v1/chat/completions", "is not for GET; it takes POST"),
        ("POST", "/v1/models", "is not for POST; it takes GET"),
        ("PUT", "/v1/completions", "is not for PUT"),
    ] {
        let answer = server.exchange(&ask(method, target)).await;
        assert!(answer.starts_with("HTTP/1.1 405") && answer.contains(words), "{answer}");
    }
    let answer = server.exchange(&ask("OPTIONS", "/v1/completions")).await;
    assert!(answer.starts_with("HTTP/1.1 204") && answer.contains("allow: POST"), "{answer}");
}

#[tokio::test]
async fn a_server_listens_at_several_addresses() {
    let listeners =
        [TcpListener::bind("127.0.0.1:0").await.unwrap(), TcpListener::bind("127.0.0.1:0").await.unwrap()];
    let addresses = listeners.each_ref().map(|listener| listener.local_addr().unwrap());
    let (stop, stopped) = oneshot::channel::<()>();
    let served = tokio::spawn(serve(listeners.into(), fake().app.clone(), async { drop(stopped.await) }));
    for address in addresses {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(completion(false).as_bytes()).await.unwrap();
        assert!(rest(&mut stream).await.contains("hello"));
    }
    drop(stop);
    tokio::time::timeout(LONG, served).await.unwrap().unwrap().unwrap();
}
