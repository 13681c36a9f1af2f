//! The routes over a server whose worker is a script.

use super::*;
use crate::serve::ServerOptions;
use crate::serve::testing::{self, BASE, Fake, KEY, say};
use crate::watsonx::records::{Deployment, Moment, StoredModel, Training};
use crate::watsonx::service::{Loading, ServiceOptions};
use crate::watsonx::{Store, TunableModel, TuningProfile};
use axum::http::StatusCode;
use tempfile::TempDir;

mod reading;

const ALIAS: &str = "ibm/granite-13b-instruct-v2";
const BEARER: (&str, &str) = ("authorization", "Bearer the-key");
const ROWS: &[u8] = br#"[{"input": "good", "output": "1"}, {"input": "bad", "output": "0"}]"#;

struct Server {
    fake: Fake,
    service: Arc<Service>,
    _folder: TempDir,
}

impl Server {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let options = ServerOptions {
            api_key: Some(KEY.into()),
            base_aliases: vec![ALIAS.to_owned()],
            max_body_bytes: 10_000,
            ..ServerOptions::default()
        };
        let fake = Fake::with(options, None, |request, events| say(b"1", request, &events));
        let service_options = ServiceOptions {
            profile: TuningProfile::new(Vec::new()).unwrap(),
            max_asset_bytes: 1000,
            max_store_bytes: 1500,
            max_records: 3,
        };
        let store = Store::open(folder.path()).unwrap();
        let base = TunableModel {
            name: BASE.to_owned(),
            aliases: vec![ALIAS.to_owned()],
            client: fake.app.0.client.clone(),
            tokenizer: testing::byte_level(),
            chats: false,
        };
        let service = Service::new(store, vec![base], service_options).unwrap();
        let fake = Fake { app: fake.app.with_platform(service.platform()), seen: fake.seen };
        Self { fake, service, _folder: folder }
    }

    async fn send(&self, method: &str, path: &str, body: Value) -> testing::Answer {
        self.fake.send(method, path, &[BEARER], body.to_string().into_bytes()).await
    }

    async fn get(&self, path: &str) -> testing::Answer {
        self.fake.send("GET", path, &[BEARER], Vec::new()).await
    }

    /// Creates a data asset, and returns its id, its attachment's id and the address for the content.
    async fn asset(&self, name: &str) -> (String, String, String) {
        let body = json!({"metadata": {"name": name, "asset_type": "data_asset"}, "entity": {"data_asset": {"mime_type": "m"}}});
        let made = self.send("POST", "/v2/assets?project_id=p", body).await;
        assert_eq!(made.status, StatusCode::CREATED, "{}", made.text);
        let id = made.json()["metadata"]["asset_id"].as_str().unwrap().to_owned();
        let attached = self
            .send("POST", &format!("/v2/assets/{id}/attachments"), json!({"name": "f", "mime": "m"}))
            .await
            .json();
        let text = |key: &str| attached[key].as_str().unwrap().to_owned();
        (id, text("attachment_id"), text("url1"))
    }

    /// A data asset with content.
    async fn uploaded(&self, content: &[u8]) -> String {
        let (id, attachment, url) = self.asset("rows").await;
        let put = self.fake.send("PUT", &url, &[], content.to_vec()).await;
        assert_eq!(put.status, StatusCode::CREATED, "{}", put.text);
        let path = format!("/v2/assets/{id}/attachments/{attachment}/complete");
        assert_eq!(self.send("POST", &path, json!({})).await.status, StatusCode::OK);
        id
    }

    async fn train(&self, asset: &str, tuning: Value) -> testing::Answer {
        let mut prompt_tuning = json!({"base_model": {"model_id": ALIAS}, "task_id": "classification"});
        prompt_tuning.as_object_mut().unwrap().extend(tuning.as_object().unwrap().clone());
        let body = json!({
            "name": "run", "project_id": "p", "tags": ["prompt_tuning"], "auto_update_model": true,
            "training_data_references": [{"type": "data_asset", "location": {"id": asset, "href": format!("/v2/assets/{asset}")}}],
            "results_reference": {"type": "fs", "location": {"path": "/projects/p/assets/wx_prompt_tune"}},
            "prompt_tuning": prompt_tuning,
        });
        self.send("POST", "/ml/v4/trainings?version=2026-10-14", body).await
    }
}

#[track_caller]
fn refused(answer: &testing::Answer, status: u16, words: &str) {
    assert_eq!(answer.status.as_u16(), status, "{}", answer.text);
    let json = answer.json();
    let message = json["errors"][0]["message"].as_str().unwrap();
    assert!(message.contains(words), "{words} is not in {message}");
}

#[tokio::test]
async fn content_goes_by_addresses_that_permit_one_thing() {
    let server = Server::new();
    let (id, attachment, url) = server.asset("rows").await;
    let put = |url: String, body: &[u8]| {
        let (server, body) = (&server, body.to_vec());
        async move { server.fake.send("PUT", &url, &[], body).await }
    };
    refused(&put(url.replace("signature=", "signature=A"), ROWS).await, 403, "signature");
    refused(&put(url.replace("expires=", "expires=9"), ROWS).await, 403, "signature");
    refused(&put(url.split('?').next().unwrap().to_owned(), ROWS).await, 403, "no signature");
    refused(&server.fake.get(&url).await, 403, "signature");
    refused(
        &server.send("POST", &format!("/v2/assets/{id}/attachments/{attachment}/complete"), json!({})).await,
        400,
        "none",
    );
    let form = [
        b"--xx\r\nContent-Disposition: form-data; name=\"file\"\r\nContent-Type: file\r\n\r\n",
        ROWS,
        b"\r\n--xx--\r\n",
    ]
    .concat();
    let kind = ("content-type", "multipart/form-data; boundary=xx");
    assert_eq!(server.fake.send("PUT", &url, &[kind], form).await.status, StatusCode::CREATED);
    let path = format!("/v2/assets/{id}/attachments/{attachment}");
    assert_eq!(server.send("POST", &format!("{path}/complete"), json!({})).await.status, StatusCode::OK);
    refused(&put(url.clone(), ROWS).await, 409, "already");
    let got = server.get(&path).await.ok();
    let answer = server.fake.get(got["url"].as_str().unwrap()).await;
    assert_eq!((answer.status, answer.text.as_bytes()), (StatusCode::OK, ROWS));
    assert_eq!(server.get(&format!("/v2/assets/{id}")).await.ok()["metadata"]["size"], ROWS.len());
}

#[tokio::test]
async fn sizes_and_counts_are_limited() {
    let server = Server::new();
    let (_, _, url) = server.asset("large").await;
    refused(&server.fake.send("PUT", &url, &[], vec![b'x'; 20_000]).await, 413, "at most 1000 bytes");
    server.asset(&"n".repeat(100)).await;
    refused(
        &server.send("POST", "/v2/assets", json!({"metadata": {"name": "n".repeat(5000)}})).await,
        400,
        "at most 4096 characters",
    );
    server.asset("third").await;
    let fourth = server.send("POST", "/v2/assets", json!({"metadata": {"name": "x"}})).await;
    refused(&fourth, 400, "at most 3 of each kind");
}

#[tokio::test]
async fn training_is_queued_told_and_canceled() {
    let server = Server::new();
    let asset = server.uploaded(ROWS).await;
    let made = server.train(&asset, json!({"num_epochs": 3})).await;
    assert_eq!(made.status, StatusCode::CREATED, "{}", made.text);
    let made = made.json();
    let warning = made["system"]["warnings"][0]["message"].as_str().unwrap();
    assert!(warning.contains(BASE) && warning.contains(ALIAS), "{warning}");
    let id = made["metadata"]["id"].as_str().unwrap();
    assert_eq!(made["entity"]["tags"].as_array().unwrap().len(), 2);
    let path = format!("/ml/v4/trainings/{id}");
    let got = server.get(&path).await.ok();
    assert_eq!(got["entity"]["status"], json!({"state": "pending"}));
    assert_eq!(got["entity"]["prompt_tuning"]["num_epochs"], 3);
    assert!(got["entity"].get("model_id").is_none());
    let count = |query: &str| {
        let (server, path) = (&server, format!("/ml/v4/trainings?{query}"));
        async move { server.get(&path).await.ok()["total_count"].as_u64().unwrap() }
    };
    assert_eq!(count("type=prompt_tuning&limit=50&project_id=p").await, 1);
    assert_eq!(count("project_id=q").await, 0);
    assert_eq!(count("tag.value=prompt_tuning&tag.value=other").await, 0);
    assert_eq!(server.send("DELETE", &path, json!({})).await.status, StatusCode::NO_CONTENT);
    assert_eq!(server.get(&path).await.ok()["entity"]["status"]["state"], "canceled");
    refused(&server.send("DELETE", &path, json!({})).await, 400, "Job already completed with state");
    let experiment = server.service.store.get::<Training>(id).unwrap().experiment;
    assert_eq!(
        server.send("DELETE", &format!("{path}?hard_delete=true"), json!({})).await.status,
        StatusCode::NO_CONTENT
    );
    refused(&server.get(&path).await, 404, id);
    assert_eq!(
        server.send("DELETE", &format!("/v2/assets/{experiment}"), json!({})).await.status,
        StatusCode::NO_CONTENT
    );
}

#[tokio::test]
async fn trainings_that_cannot_run_are_refused() {
    let server = Server::new();
    let asset = server.uploaded(ROWS).await;
    refused(&server.train("no-such-asset", json!({})).await, 400, "there is no data asset `no-such-asset`");
    refused(&server.train("../../secret", json!({})).await, 400, "there is no data asset");
    refused(
        &server.train(&asset, json!({"base_model": {"model_id": "other/model"}})).await,
        400,
        "other/model",
    );
    refused(&server.train(&asset, json!({"batch_size": "many"})).await, 400, "prompt_tuning.batch_size");
    let (empty, _, _) = server.asset("empty").await;
    refused(&server.train(&empty, json!({})).await, 400, "found none in \"empty\"");
    assert!(server.service.store.list(|_: &Training| true).is_empty());
    assert_eq!(server.get("/ml/v4/trainings").await.ok()["total_count"], 0);
}

#[tokio::test]
async fn ids_are_no_paths() {
    let server = Server::new();
    for id in ["..%2F..%2Fsecret", "..", "%00", "a%0Ab", &"x".repeat(5000), "%F0%9F%90%95"] {
        for path in ["/v2/assets/", "/ml/v4/trainings/", "/ml/v4/models/", "/ml/v4/deployments/"] {
            let answer = server.get(&format!("{path}{id}")).await;
            assert_eq!(answer.status, StatusCode::NOT_FOUND, "{path}{id}: {}", answer.text);
            assert!(answer.json()["errors"].is_array());
            let deleted = server.send("DELETE", &format!("{path}{id}"), json!({})).await;
            assert_eq!(deleted.status, StatusCode::NOT_FOUND, "{path}{id}");
        }
    }
}

#[tokio::test]
async fn everything_but_files_and_tokens_needs_the_key() {
    let server = Server::new();
    for path in [
        "/v2/assets/x", "/ml/v4/trainings", "/ml/v4/models", "/v2/projects/p",
        "/ml/v1/foundation_model_specs",
    ] {
        assert_eq!(server.fake.get(path).await.status, StatusCode::UNAUTHORIZED, "{path}");
    }
    assert_eq!(server.fake.get(TASKS).await.status, StatusCode::OK);
    let form = |key: &str| format!("grant_type=x&apikey={key}").into_bytes();
    assert_eq!(server.fake.send("POST", IDENTITY, &[], form("wrong")).await.status, StatusCode::UNAUTHORIZED);
    let token = server.fake.send("POST", IDENTITY, &[], form(KEY)).await.ok()["access_token"].clone();
    let bearer = format!("Bearer {}", token.as_str().unwrap());
    let headers = [("authorization", bearer.as_str()), ("host", "h:1")];
    let body = json!({"metadata": {"name": "n"}}).to_string().into_bytes();
    let made = server.fake.send("POST", "/v2/assets", &headers, body).await;
    let id = made.json()["asset_id"].as_str().unwrap().to_owned();
    let path = format!("/v2/assets/{id}/attachments");
    let url = server.fake.send("POST", &path, &headers, b"{}".to_vec()).await.json()["url1"].clone();
    assert!(
        url.as_str().unwrap().starts_with("http://h:1/v2/asset_files/"),
        "clients of IBM Cloud get URLs: {url}"
    );
}

#[tokio::test]
async fn an_alias_is_answered_by_the_base_model_and_told() {
    let server = Server::new();
    let specs = server.get("/ml/v1/foundation_model_specs").await.ok();
    let ids: Vec<&str> =
        specs["resources"].as_array().unwrap().iter().map(|one| one["model_id"].as_str().unwrap()).collect();
    assert_eq!(ids, [BASE, ALIAS]);
    let answer =
        server.send("POST", "/ml/v1/text/generation", json!({"input": "a", "model_id": ALIAS})).await.ok();
    assert_eq!(answer["model_id"], BASE);
    assert!(answer["system"]["warnings"][0]["message"].as_str().unwrap().contains(ALIAS));
    let own =
        server.send("POST", "/ml/v1/text/generation", json!({"input": "a", "model_id": BASE})).await.ok();
    assert!(own.get("system").is_none());
    let unknown = json!({"asset": {"id": "none"}, "online": {}});
    refused(&server.send("POST", "/ml/v4/deployments", unknown).await, 404, "there is no model `none`");
}

#[tokio::test]
async fn pages_are_shown_without_a_key_and_load_nothing() {
    let server = Server::new();
    for (path, word) in [("/", "id=\"upload\""), ("/try", "id=\"prompt\"")] {
        let page = server.fake.send("GET", path, &[], Vec::new()).await;
        assert_eq!(page.status, StatusCode::OK, "{path}");
        assert!(page.text.contains(word) && page.text.contains("aria-current"), "{path}: {}", page.text);
        for mark in ["<!--navigation-->", "/*style*/", "/*script*/"] {
            assert!(!page.text.contains(mark), "{path}: {mark}");
        }
        assert!(page.headers["content-security-policy"].to_str().unwrap().contains("frame-ancestors 'none'"));
    }
}

#[tokio::test]
async fn pages_of_another_origin_can_change_nothing() {
    let server = Server::new();
    let body = json!({"metadata": {"name": "n"}}).to_string().into_bytes();
    let host = ("host", "127.0.0.1:8443");
    for (header, expected) in [
        (("origin", "https://evil.example"), StatusCode::FORBIDDEN),
        (("origin", "null"), StatusCode::FORBIDDEN),
        (("origin", "http://127.0.0.1:8444"), StatusCode::FORBIDDEN),
        (("sec-fetch-site", "cross-site"), StatusCode::FORBIDDEN),
        (("sec-fetch-site", "same-site"), StatusCode::FORBIDDEN),
        (("sec-fetch-site", "same-origin"), StatusCode::CREATED),
        (("origin", "http://127.0.0.1:8443"), StatusCode::CREATED),
    ] {
        let answer = server.fake.send("POST", "/v2/assets", &[BEARER, host, header], body.clone()).await;
        assert_eq!(answer.status, expected, "{header:?}: {}", answer.text);
    }
    let headers = [BEARER, host, ("origin", "https://a.b")];
    let read = server.fake.send("GET", "/ml/v4/trainings", &headers, Vec::new());
    assert_eq!(read.await.status, StatusCode::OK, "the browser keeps the answer from the page");
}

fn stored_model(server: &Server) -> StoredModel {
    let model = StoredModel {
        id: "m".to_owned(),
        name: "n".to_owned(),
        description: String::new(),
        place: ProjectOrSpace::default(),
        local_model: BASE.to_owned(),
        training: "t".to_owned(),
        training_data_references: json!([{"location": {"id": "a"}}]),
        base_model: ALIAS.to_owned(),
        created: Moment::now(),
    };
    server.service.store.create(model.clone(), |_| Ok(())).unwrap();
    model
}

#[tokio::test]
async fn tags_of_deployments_are_checked() {
    let server = Server::new();
    let model = stored_model(&server);
    let found = server.get("/ml/v4/models/m").await.ok();
    assert_eq!(found["entity"]["training_data_references"], model.training_data_references);
    let deploy = |tags: Value| json!({"name": "d", "asset": {"id": "m"}, "online": {}, "tags": tags});
    for (tags, words) in [
        (json!(["a\0"]), "`tags`: expected a text without NUL"),
        (json!(["x".repeat(5000)]), "`tags`: expected at most 4096 characters"),
        (json!(vec!["x"; 65]), "`tags`"),
        (json!([7]), "`tags`"),
    ] {
        refused(&server.send("POST", "/ml/v4/deployments", deploy(tags)).await, 400, words);
    }
    let made = server.send("POST", "/ml/v4/deployments", deploy(json!(["one", "two"]))).await;
    assert_eq!(made.status, StatusCode::ACCEPTED, "{}", made.text);
    assert_eq!(made.json()["metadata"]["tags"], json!(["one", "two"]));
}

/// What can't be loaded says so, and does not hold up the others.
#[tokio::test]
async fn deployments_are_loaded_at_the_start() {
    let server = Server::new();
    let model = stored_model(&server);
    for id in ["first", "second", "third"] {
        let deployment = Deployment {
            id: id.to_owned(),
            name: id.to_owned(),
            description: String::new(),
            tags: Vec::new(),
            place: ProjectOrSpace::default(),
            model: model.id.clone(),
            base_model: model.base_model.clone(),
            serving_name: None,
            created: Moment::now(),
            modified: Moment::now(),
        };
        server.service.store.create(deployment, |_| Ok(())).unwrap();
    }
    let Server { fake, service, _folder: folder } = server;
    let (options, base) = (service.options.clone(), service.bases.iter().next().unwrap().clone());
    drop((fake, service));
    let service = Service::new(Store::open(folder.path()).unwrap(), vec![base], options).unwrap();
    let until = std::time::Instant::now() + std::time::Duration::from_secs(60);
    for id in ["first", "second", "third"] {
        while service.loading(id) == Loading::Initializing && std::time::Instant::now() < until {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let Loading::Failed(problem) = service.loading(id) else { panic!("{id}: {:?}", service.loading(id)) };
        assert!(problem.contains("adapter"), "{problem}");
    }
}
