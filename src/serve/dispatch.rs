//! Several models in one server: each has a state of its own, and a request goes to the state of the model that it names.
//!
//! The first state has the routes of the whole server. Of the others only the routes that ask a model are used.

use super::api::Api;
use super::api_error::ApiError;
use super::body;
use super::paths::cleaned;
use super::router::{refusal, routes_of_one};
use super::state::AppState;
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{Method, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::Response;
use hyper::service::Service;
use hyper_util::service::TowerToHyperService;
use std::sync::Arc;

/// Paths of requests whose body names a model.
const WITH_MODEL: [&str; 2] = ["/v1/", "/ml/v1/text/"];
/// Paths that name a deployment.
const WITH_DEPLOYMENT: &str = "/ml/v1/deployments/";

/// The states of a server with several models, and the routes of all but the first.
struct Engines {
    first: Arc<AppState>,
    others: Vec<(Arc<AppState>, TowerToHyperService<Router>)>,
}

/// Sends requests for the other models of `state` to their own routes, and all else to `routes`.
pub(super) fn by_model(routes: Router, state: &Arc<AppState>) -> Router {
    if state.others.is_empty() {
        return routes;
    }
    let of_one = |other: &Arc<AppState>| (other.clone(), TowerToHyperService::new(routes_of_one(other)));
    let engines = Engines { first: state.clone(), others: state.others.iter().map(of_one).collect() };
    routes.layer(from_fn_with_state(Arc::new(engines), dispatch))
}

async fn dispatch(State(engines): State<Arc<Engines>>, request: Request, next: Next) -> Response {
    let path = cleaned(request.uri().path());
    let names_model =
        *request.method() == Method::POST && WITH_MODEL.iter().any(|prefix| path.starts_with(prefix));
    let deployment = path.strip_prefix(WITH_DEPLOYMENT).and_then(|rest| rest.split('/').next());
    if !(names_model || deployment.is_some()) || refusal(&engines.first, &request, &path).is_some() {
        return next.run(request).await;
    }
    let (request, chosen) = if let Some(name) = deployment {
        let chosen = engines.others.iter().find(|(state, _)| state.deployed(name).is_some());
        (request, chosen)
    } else {
        match read(&engines.first, request).await {
            Ok((request, name)) => {
                let is_its =
                    |state: &AppState| name.as_deref().is_some_and(|name| state.own_model(name).is_some());
                (request, engines.others.iter().find(|(state, _)| is_its(state)))
            }
            Err(error) => return error.with_body((Api::for_path(&path).error_body)(&error)),
        }
    };
    match chosen {
        Some((_, routes)) => match routes.call(without_extensions(request)).await {
            Ok(response) => response,
            Err(never) => match never {},
        },
        None => next.run(request).await,
    }
}

/// The request as it came: the parameters of its path are those that the other routes find.
fn without_extensions(request: Request) -> Request {
    let (mut parts, body) = request.into_parts();
    parts.extensions.clear();
    Request::from_parts(parts, body)
}

/// Reads the body and puts it back; the name of a model in it. A body that is no JSON object is refused later.
async fn read(state: &AppState, request: Request) -> Result<(Request, Option<String>), ApiError> {
    let (mut parts, body) = request.into_parts();
    let bytes: Bytes = body::read(state.body_limits(), &parts.headers, body).await?;
    for name in [header::CONTENT_ENCODING, header::CONTENT_LENGTH, header::TRANSFER_ENCODING] {
        parts.headers.remove(name);
    }
    let object = body::object(&bytes).unwrap_or_default();
    let name = ["model", "model_id"].iter().find_map(|key| object.get(*key)?.as_str()).map(str::to_owned);
    Ok((Request::from_parts(parts, Body::from(bytes)), name))
}

#[cfg(test)]
mod tests {
    use crate::serve::ServerOptions;
    use crate::serve::testing::{BASE, Fake, KEY, Seen, say};
    use serde_json::json;

    const SECOND: &str = "org/second";

    /// A server of two models, and what reaches the second one.
    fn server(options: ServerOptions) -> (Fake, Seen) {
        let second = Fake::saying("second").renamed(SECOND, "cats");
        let first = Fake::with(options, None, |request, events| say(b"first", request, &events));
        let seen = second.seen.clone();
        (Fake { app: first.app.with_others(vec![second.app]), seen: first.seen }, seen)
    }

    #[tokio::test]
    async fn requests_reach_the_model_that_they_name() {
        let (server, seen) = server(ServerOptions::default());
        for (name, expected) in [(BASE, "first"), ("dogs", "first"), (SECOND, "second"), ("cats", "second")] {
            let answer = server.post("/v1/completions", json!({"model": name, "prompt": "x"})).await.ok();
            assert_eq!(answer["choices"][0]["text"], expected, "{name}");
            let answer =
                server.post("/ml/v1/text/generation", json!({"model_id": name, "input": "x"})).await.ok();
            assert_eq!(answer["results"][0]["generated_text"], expected, "{name}");
        }
        for (name, expected) in
            [("dogs", "first"), ("cats", "second"), ("/dogs", "first"), ("/cats", "second")]
        {
            let path = format!("/ml/v1/deployments/{name}/text/generation");
            let answer = server.post(&path, json!({"input": "x"})).await.ok();
            assert_eq!(answer["results"][0]["generated_text"], expected, "{name}");
        }
        assert_eq!(seen.lock().unwrap().len(), 6);
    }

    #[tokio::test]
    async fn lists_name_the_models_of_all() {
        let (server, _) = server(ServerOptions::default());
        let list = server.get("/v1/models").await.ok();
        let names: Vec<&str> =
            list["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
        assert_eq!(names, [BASE, "dogs", "plain", SECOND, "cats"]);
        assert_eq!(server.get("/v1/models/org/second").await.ok()["id"], SECOND);
        assert_eq!(server.get("/v1/tasks").await.ok()["tasks"][2]["model"], "cats");
        assert_eq!(server.get("/health").await.ok()["models"], 5);
        let unknown = server.post("/v1/completions", json!({"model": "none", "prompt": "x"})).await;
        assert_eq!(unknown.status, 404);
        assert!(unknown.text.contains(BASE) && unknown.text.contains("cats"), "{}", unknown.text);
    }

    #[tokio::test]
    async fn what_is_refused_with_one_model_is_refused_with_two() {
        let options =
            ServerOptions { api_key: Some(KEY.into()), max_body_bytes: 100, ..ServerOptions::default() };
        let (server, seen) = server(options);
        let body = json!({"model": SECOND, "prompt": "x"}).to_string().into_bytes();
        let bearer = [("authorization", "Bearer the-key")];
        for (headers, body, status) in [
            (&[][..], body.clone(), 401),
            (&bearer, b"{".to_vec(), 400),
            (&bearer, b"[]".to_vec(), 400),
            (&bearer, br#"{"model": 7}"#.to_vec(), 400),
            (&bearer, vec![b' '; 101], 413),
        ] {
            let answer = server.send("POST", "/v1/completions", headers, body).await;
            assert_eq!(answer.status, status, "{}", answer.text);
            assert!(answer.json()["error"]["message"].is_string());
        }
        assert!(seen.lock().unwrap().is_empty());
    }
}
