use super::*;
use crate::serve::testing::{Answer, BASE, Fake, KEY, byte_level, say};
use crate::serve::{App, Metrics, ServerOptions};
use serde_json::{Value, json};

fn with(options: ServerOptions) -> Fake {
    Fake::with(options, None, |request, events| say(b"x", request, &events))
}

#[track_caller]
fn error(answer: &Answer, status: u16, code: &str) -> String {
    assert_eq!(answer.status.as_u16(), status, "{}", answer.text);
    let error = answer.json()["error"].clone();
    assert_eq!(error["code"], code, "{error}");
    error["message"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn key_is_required_except_for_open_paths() {
    let fake = with(ServerOptions { api_key: Some(KEY.into()), ..ServerOptions::default() });
    for path in ["/", "/health", "/ml/wml_services/v2/version"] {
        assert_eq!(fake.get(path).await.status, 200, "{path}");
    }
    for path in ["/v1/models", "/metrics", "/v1/tasks", "/v1/models/org/base", "/nothing"] {
        let answer = fake.get(path).await;
        error(&answer, 401, "invalid_api_key");
        assert_eq!(answer.headers["www-authenticate"], "Bearer");
        assert_eq!(answer.json()["error"]["type"], "invalid_request_error");
        let wrong = fake.send("GET", path, &[("authorization", "Bearer the-kex")], Vec::new()).await;
        error(&wrong, 401, "invalid_api_key");
        let right = fake.send("GET", path, &[("authorization", "Bearer the-key")], Vec::new()).await;
        assert_ne!(right.status, 401, "{path}");
    }
    let body = json!({"model": BASE, "prompt": "x"}).to_string().into_bytes();
    error(&fake.send("POST", "/v1/completions", &[], body).await, 401, "invalid_api_key");
    assert!(fake.seen.lock().unwrap().is_empty());
}

#[tokio::test]
async fn the_page_may_load_nothing_from_elsewhere() {
    let answer = Fake::saying("").get("/").await;
    assert_eq!(answer.status, 200);
    assert!(answer.headers["content-type"].to_str().unwrap().starts_with("text/html"));
    let policy = answer.headers["content-security-policy"].to_str().unwrap();
    let expected = [
        "default-src 'none'", "style-src 'unsafe-inline'", "script-src 'unsafe-inline'",
        "connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'",
        "frame-ancestors 'none'",
    ];
    assert_eq!(policy.split("; ").collect::<Vec<_>>(), expected);
}

#[tokio::test]
async fn unknown_paths_have_the_errors_of_their_api() {
    let fake = Fake::saying("");
    assert!(error(&fake.get("/v1/embeddings").await, 404, "not_found").contains("GET /v1/embeddings"));
    let answer = fake.get("/v1/completions").await;
    error(&answer, 405, "method_not_allowed");
    assert_eq!(answer.headers["allow"], "POST");
    let answer = fake.get("/ml/v1/text/generation").await;
    assert_eq!(
        (answer.status.as_u16(), &answer.json()["errors"][0]["code"]),
        (405, &json!("method_not_allowed"))
    );
}

#[tokio::test]
async fn invalid_bodies_are_rejected_with_the_reason() {
    let fake = with(ServerOptions { max_body_bytes: 100, ..ServerOptions::default() });
    let send = |body: &str| fake.send("POST", "/v1/completions", &[], body.as_bytes().to_vec());
    assert!(error(&send("{\"model\": }").await, 400, "invalid_json").contains("line 1 column 11"));
    assert!(
        error(&send("{\"temperature\": NaN}").await, 400, "invalid_json").contains("NaN is no JSON number")
    );
    error(&send("\u{0}\u{1}").await, 400, "invalid_json");
    let large = " ".repeat(101);
    assert!(error(&send(&large).await, 413, "request_too_large").contains("100 bytes"));
    let announced = [("content-length", "99999999999")];
    let answer = fake.send("POST", "/ml/v1/text/generation", &announced, Vec::new()).await;
    assert_eq!(
        (answer.status.as_u16(), &answer.json()["errors"][0]["code"]),
        (413, &json!("request_too_large"))
    );
    assert_eq!(send("{}").await.status, 400, "and the server goes on");
}

#[tokio::test]
async fn a_panic_is_an_answer_and_the_server_goes_on() {
    let fake = Fake::saying("");
    let router: Router = Router::new()
        .route(
            "/v1/panic",
            get(|| async {
                if true {
                    panic!("on purpose")
                }
            }),
        )
        .route("/v1/fine", get(|| async { "fine" }));
    let router = with_layers(router, &fake.app.0);
    use hyper::service::Service;
    let service = hyper_util::service::TowerToHyperService::new(router);
    let get = |path: &str| service.call(Request::get(path).body(axum::body::Body::empty()).unwrap());
    let answer = get("/v1/panic").await.unwrap();
    assert_eq!(answer.status(), 500);
    let body = http_body_util::BodyExt::collect(answer.into_body()).await.unwrap().to_bytes();
    let json: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(json["error"]["type"], "server_error");
    assert_eq!(get("/v1/fine").await.unwrap().status(), 200);
}

#[tokio::test]
async fn answers_are_counted_by_api_model_and_status() {
    let fake = Fake::saying("xy");
    fake.post("/v1/completions", json!({"model": "dogs", "prompt": "abc"})).await.ok();
    fake.post("/v1/completions", json!({"model": "dogs", "prompt": "abc", "top_p": 7})).await;
    fake.post("/v1/completions", json!({"model": "cats", "prompt": "abc"})).await;
    fake.post("/ml/v1/deployments/dogs/text/generation", json!({"input": "x"})).await.ok();
    fake.get("/v1/tasks").await.ok();
    let answer = fake.get("/metrics").await;
    assert!(answer.headers["content-type"].to_str().unwrap().starts_with("application/openmetrics-text"));
    for line in [
        "gneiss_requests_total{api=\"openai\",model=\"dogs\",status=\"200\"} 1",
        "gneiss_requests_total{api=\"openai\",model=\"dogs\",status=\"400\"} 1",
        "gneiss_requests_total{api=\"openai\",model=\"\",status=\"404\"} 1",
        "gneiss_requests_total{api=\"watsonx\",model=\"dogs\",status=\"200\"} 1",
        "gneiss_requests_total{api=\"gneiss\",model=\"\",status=\"200\"} 1",
        // 3 and 10 virtual ones; "classify x Label:" and 10.
        "gneiss_prompt_tokens_total 40",
        "gneiss_request_seconds_count 2",
        "gneiss_first_token_seconds_count 2",
        "gneiss_queue 0",
        "gneiss_models 3",
    ] {
        assert!(answer.text.lines().any(|found| found == line), "{line} is missing in\n{}", answer.text);
    }
}

#[tokio::test]
async fn ending_server_refuses_requests() {
    let fake = Fake::saying("x");
    assert_eq!(fake.get("/health").await.ok(), json!({"status": "ok", "models": 3, "waiting": 0}));
    fake.app.end();
    let health = fake.get("/health").await;
    assert_eq!((health.status.as_u16(), &health.json()["status"]), (503, &json!("ending")));
    let answer = fake.post("/v1/completions", json!({"model": BASE, "prompt": "x"})).await;
    error(&answer, 503, "shutting_down");
    assert_eq!(answer.headers["connection"], "close");
    assert_eq!(fake.get("/metrics").await.status, 200);
}

#[tokio::test]
async fn steps_of_the_worker_are_counted_in_the_apps_metrics() {
    let Fake { app, seen } = Fake::saying("x");
    let metrics = Arc::new(Metrics::default());
    let fake = Fake { app: app.with_metrics(metrics.clone()), seen };
    metrics.count_step(crate::serve::worker::StepMetrics {
        sequences: 2,
        rows: 9,
        generated: 2,
        waiting: 0,
        seconds: 0.1,
        ..Default::default()
    });
    assert!(fake.get("/metrics").await.text.contains("gneiss_generated_tokens_total 2\n"));
}

#[test]
fn options_that_make_no_server_are_refused() {
    let client = |options: ServerOptions| {
        let app = with(ServerOptions::default()).app;
        App::new(app.0.client.clone(), byte_level(), None, BASE.into(), options).map(drop)
    };
    assert!(client(ServerOptions::default()).is_ok());
    for options in [
        ServerOptions { api_key: Some(String::new()), ..ServerOptions::default() },
        ServerOptions { request_seconds: 0.0, ..ServerOptions::default() },
        ServerOptions { header_seconds: f64::NAN, ..ServerOptions::default() },
        ServerOptions { body_seconds: f64::INFINITY, ..ServerOptions::default() },
    ] {
        assert!(client(options.clone()).unwrap_err().is_bad_input(), "{options:?}");
    }
}
