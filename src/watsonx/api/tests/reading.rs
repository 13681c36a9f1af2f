//! The examples of data assets.

use super::*;

fn gzip(content: &[u8]) -> Vec<u8> {
    let mut packed = Vec::new();
    std::io::Read::read_to_end(
        &mut flate2::read::GzEncoder::new(content, flate2::Compression::best()),
        &mut packed,
    )
    .unwrap();
    packed
}

#[tokio::test]
async fn examples_are_those_of_the_content_whatever_its_format() {
    let lines = b"{\"input\": \"good\", \"output\": \"1\"}\n{\"input\": \"bad\", \"output\": \"0\"}\n";
    let table = b"id,input,output\n1,good,1\n2,bad,0\n";
    for content in [ROWS, lines, table, &gzip(ROWS), &gzip(table)] {
        let server = Server::new();
        let id = server.uploaded(content).await;
        let found = server.get(&format!("/v2/assets/{id}/examples")).await.ok();
        assert_eq!(found["examples"], serde_json::from_slice::<Value>(ROWS).unwrap());
        assert_eq!(found["total_count"], 2);
    }
    let server = Server::new();
    let id = server.uploaded("input,output\ngood,\u{a0}ja\u{200b}\nbad,no\n".as_bytes()).await;
    for (query, expected) in [("?task=generation", "\u{a0}ja\u{200b}"), ("?task=classification", "ja")] {
        let found = server.get(&format!("/v2/assets/{id}/examples{query}")).await.ok();
        assert_eq!(found["examples"][0]["output"], expected, "{query}");
    }
    refused(
        &server.get(&format!("/v2/assets/{id}/examples?task=x")).await,
        400,
        "expected \"classification\"",
    );
}

#[cfg(feature = "parquet")]
#[tokio::test]
async fn examples_of_parquet_are_read() {
    let server = Server::new();
    let id = server.uploaded(include_bytes!("../../../../tests/fixtures/datasets/dictionary.parquet")).await;
    let found = server.get(&format!("/v2/assets/{id}/examples")).await.ok();
    assert_eq!(found["examples"][1], json!({"input": "b", "output": "no"}));
}

#[tokio::test]
async fn examples_that_cannot_be_read_are_refused_by_name() {
    for (content, words) in [
        (&b"\0\x01"[..], "rows: line 1: expected text, found a NUL character"),
        (b"PK\x03\x04 word/", "rows: the file is a zip archive"),
        (b"\x28\xB5\x2F\xFD", "rows: the file is compressed by zstd"),
        (b"%PDF-1.7", "rows: the file is a PDF"),
        (b"[{\"question\": 1}]", "found the keys `question`"),
        (b"\x1F\x8B broken", "rows: gzip: "),
        (&gzip(&[b'a'; 1001]), "expected at most 1000 bytes after gzip's compression is undone"),
        (
            &gzip(&vec![0; 50_000_000])[..900],
            "expected at most 1000 bytes after gzip's compression is undone",
        ),
    ] {
        let server = Server::new();
        let id = server.uploaded(content).await;
        refused(&server.get(&format!("/v2/assets/{id}/examples")).await, 400, words);
    }
    let server = Server::new();
    let bomb = server.uploaded(&gzip(&[b'a'; 1001])).await;
    refused(&server.train(&bomb, json!({})).await, 400, "expected at most 1000 bytes after");
    let (empty, _, _) = server.asset("empty").await;
    refused(&server.get(&format!("/v2/assets/{empty}/examples")).await, 404, "\"empty\" has no content yet");
    refused(&server.get("/v2/assets/..%2F..%2Fsecret/examples").await, 404, "there is no data asset");
    assert_eq!(
        server.fake.get(&format!("/v2/assets/{bomb}/examples")).await.status,
        StatusCode::UNAUTHORIZED
    );
}
