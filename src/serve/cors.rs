//! Which web pages of other origins may use the server (<https://fetch.spec.whatwg.org/#http-cors-protocol>).
//!
//! Without `--cors-origin`, only the server's own page may. Cookies are never accepted: a page sends its key as other
//! clients do. A page on the internet may reach a server in a private network only if its origin is named, not by `*`.

use super::fields::IGNORED;
use crate::{Error, Result};
use axum::Router;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::map_response;
use axum::response::Response;
use std::time::Duration;
use tower_http::cors::{AllowHeaders, AllowOrigin, AllowPrivateNetwork, CorsLayer};

/// How long a browser may cache the answer to a preflight request; Chromium caches none for longer than 2 hours.
const MAX_AGE: Duration = Duration::from_secs(7200);
const EVERY: &str = "*";
/// The origin of a page from a file, and of a sandboxed frame.
const OPAQUE: &str = "null";

/// The layer that answers preflight requests and adds headers to all answers; `None` if no origin is allowed.
///
/// # Errors
/// Returns an error that says what is wrong with an invalid origin.
pub(super) fn layer(origins: &[String]) -> Result<Option<CorsLayer>> {
    let every = origins.iter().any(|origin| origin == EVERY);
    if origins.is_empty() {
        return Ok(None);
    }
    if every && origins.len() > 1 {
        let problem = "--cors-origin: expected * alone, as it allows every origin, found others with it";
        return Err(Error::Invalid(problem.into()));
    }
    let layer = CorsLayer::new()
        .allow_methods([Method::GET, Method::HEAD, Method::POST])
        // `*` would not include `Authorization`, and clients send headers of their own.
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers([header::RETRY_AFTER, IGNORED])
        .max_age(MAX_AGE);
    if every {
        return Ok(Some(layer.allow_origin(AllowOrigin::any())));
    }
    let named = origins.iter().map(|given| origin(given)).collect::<Result<Vec<_>>>()?;
    let private = AllowPrivateNetwork::predicate({
        let named = named.clone();
        move |origin, _| named.contains(origin)
    });
    Ok(Some(layer.allow_origin(AllowOrigin::list(named)).allow_private_network(private)))
}

/// Adds the layer to the routes.
pub(super) fn allow(router: Router, layer: CorsLayer) -> Router {
    // The layer answers a preflight request with 200 and no body; the status for no body is 204.
    let no_content = |mut response: Response| async move {
        let preflight = response.headers().contains_key(header::ACCESS_CONTROL_ALLOW_METHODS);
        if preflight && response.status() == StatusCode::OK {
            *response.status_mut() = StatusCode::NO_CONTENT;
        }
        response
    };
    router.layer(layer).layer(map_response(no_content))
}

/// Whether a page of another origin sends this request, and it could change something: a browser sends it even if the
/// page may not read the answer. `own` is the server's origin as the client wrote it.
pub(super) fn is_from_another_page(method: &Method, headers: &HeaderMap, own: Option<&str>) -> bool {
    let only_reads = matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS)
        && !headers.contains_key(header::UPGRADE);
    let is_other = |value: &HeaderValue| Some(value.as_bytes()) != own.map(str::as_bytes);
    let is_other_site = |value: &HeaderValue| !matches!(value.as_bytes(), b"same-origin" | b"none");
    !only_reads
        && (headers.get(header::ORIGIN).is_some_and(is_other)
            || headers.get("sec-fetch-site").is_some_and(is_other_site))
}

/// An origin as browsers write it: scheme, host and port, in lower case, without the scheme's default port.
fn origin(given: &str) -> Result<HeaderValue> {
    let failed = |problem: &str| {
        let message = format!(
            "--cors-origin {given}: expected an origin as browsers send it, as http://localhost:5173, {OPAQUE} or \
             {EVERY}; {problem}"
        );
        Error::Invalid(message)
    };
    if given == OPAQUE {
        return Ok(HeaderValue::from_static(OPAQUE));
    }
    if !given.is_ascii() {
        return Err(failed("write a host of other letters as browsers do, as xn--..."));
    }
    let written = given.to_ascii_lowercase();
    let uri: Uri = written.parse().map_err(|error| failed(&format!("{error}")))?;
    let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
        return Err(failed("it has no scheme, as http://"));
    };
    let alone = format!("{scheme}://{authority}");
    if alone != written {
        return Err(failed(&format!("a path is no part of it: write {alone}")));
    }
    if authority.as_str().contains(['*', '@']) {
        return Err(failed("it names one host, without * and without a user"));
    }
    if matches!((scheme, authority.port_u16()), ("http", Some(80)) | ("https", Some(443))) {
        return Err(failed(&format!("browsers leave that port out: write {scheme}://{}", authority.host())));
    }
    HeaderValue::from_str(&alone).map_err(|error| failed(&error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::ServerOptions;
    use crate::serve::testing::{Answer, BASE, Fake, KEY, say};
    use serde_json::json;

    const PAGE: &str = "http://localhost:5173";
    const COMPLETIONS: &str = "/v1/completions";

    fn allowing(origins: &[&str]) -> Fake {
        let origins = origins.iter().map(|origin| (*origin).to_owned()).collect();
        let options =
            ServerOptions { cors_origins: origins, api_key: Some(KEY.into()), ..ServerOptions::default() };
        Fake::with(options, None, |request, events| say(b"x", request, &events))
    }

    async fn preflight(fake: &Fake, origin: &str, more: &[(&str, &str)]) -> Answer {
        let asked = [
            ("origin", origin),
            ("access-control-request-method", "POST"),
            ("access-control-request-headers", "authorization,content-type,x-stainless-lang"),
        ];
        fake.send("OPTIONS", COMPLETIONS, &[&asked, more].concat(), Vec::new()).await
    }

    fn allowed(answer: &Answer) -> Option<&str> {
        answer.headers.get(header::ACCESS_CONTROL_ALLOW_ORIGIN).map(|value| value.to_str().unwrap())
    }

    #[tokio::test]
    async fn a_preflight_of_an_allowed_page_needs_no_key() {
        for (origins, allows) in [(&["http://other", PAGE][..], PAGE), (&["*"], "*")] {
            let answer = preflight(&allowing(origins), PAGE, &[]).await;
            assert_eq!((answer.status.as_u16(), answer.text.as_str()), (204, ""));
            assert_eq!(allowed(&answer), Some(allows));
            assert_eq!(answer.headers["access-control-allow-methods"], "GET,HEAD,POST");
            let headers = &answer.headers["access-control-allow-headers"];
            assert_eq!(headers, "authorization,content-type,x-stainless-lang");
            assert_eq!(answer.headers["access-control-max-age"], "7200");
            assert!(answer.headers.get("access-control-allow-credentials").is_none());
            assert!(answer.headers["vary"].to_str().unwrap().contains("origin"));
        }
        assert_eq!(allowed(&preflight(&allowing(&[PAGE]), "http://evil", &[]).await), None);
    }

    #[tokio::test]
    async fn only_a_named_origin_reaches_a_private_network() {
        let asked = [("access-control-request-private-network", "true")];
        for (origins, allows) in [(&[PAGE][..], true), (&["*"], false)] {
            let answer = preflight(&allowing(origins), PAGE, &asked).await;
            assert_eq!(answer.headers.contains_key("access-control-allow-private-network"), allows);
        }
    }

    #[tokio::test]
    async fn answers_errors_and_streams_carry_the_header() {
        let fake = allowing(&[PAGE]);
        let bearer = format!("Bearer {KEY}");
        let headers = [("origin", PAGE), ("authorization", bearer.as_str())];
        let body = |stream: bool| json!({"model": BASE, "prompt": "x", "stream": stream}).to_string();
        for (headers, body, status) in [
            (&headers[..], body(false), 200),
            (&headers, body(true), 200),
            (&headers, "{".into(), 400),
            (&headers[..1], body(false), 401),
        ] {
            let answer = fake.send("POST", COMPLETIONS, headers, body.into_bytes()).await;
            assert_eq!((answer.status.as_u16(), allowed(&answer)), (status, Some(PAGE)));
            assert_eq!(
                answer.headers["access-control-expose-headers"],
                "retry-after,x-gneiss-ignored-fields"
            );
        }
        let gone = fake.send("GET", "/nothing", &headers, Vec::new()).await;
        assert_eq!((gone.status.as_u16(), allowed(&gone)), (404, Some(PAGE)));
        // A page that is not named gets its answer, and its browser keeps it from the page's script.
        let other = [("origin", "http://evil"), headers[1]];
        let answer = fake.send("POST", COMPLETIONS, &other, body(false).into_bytes()).await;
        assert_eq!((answer.status.as_u16(), allowed(&answer)), (200, None));
        assert_eq!(fake.get("/").await.status, 200, "the page stays");
    }

    #[tokio::test]
    async fn preflight_without_the_option_names_it() {
        let fake = Fake::saying("x");
        let answer = preflight(&fake, PAGE, &[]).await;
        assert_eq!((answer.status.as_u16(), allowed(&answer)), (405, None));
        assert!(answer.text.contains("operator") && answer.text.contains("--cors-origin"), "{}", answer.text);
        let plain = fake.send("OPTIONS", COMPLETIONS, &[], Vec::new()).await;
        assert_eq!((plain.status.as_u16(), plain.text.as_str()), (204, ""));
        assert_eq!(plain.headers["allow"], "POST");
        let answer = fake.post(COMPLETIONS, json!({"model": BASE, "prompt": "x"})).await;
        assert_eq!(allowed(&answer), None);
    }

    #[test]
    fn invalid_origins_are_rejected_with_the_reason() {
        let problem = |origins: &[&str]| {
            let origins: Vec<String> = origins.iter().map(|origin| (*origin).to_owned()).collect();
            layer(&origins).map(|layer| layer.is_some()).map_err(|error| error.to_string())
        };
        for good in [
            "http://localhost:5173", "https://Chat.Example.com", "http://[::1]:3000", "null", "*",
            "app://obsidian.md", "vscode-webview://1abc", "chrome-extension://abcdefgh",
        ] {
            assert_eq!(problem(&[good]), Ok(true), "{good}");
        }
        assert_eq!(problem(&[]), Ok(false));
        for (bad, words) in [
            (&["localhost:5173"][..], "no scheme"),
            (&["http://localhost:5173/"], "write http://localhost:5173"),
            (&["http://localhost/app"], "write http://localhost"),
            (&["https://*.example.com"], "one host"),
            (&["https://example.com:443"], "write https://example.com"),
            (&["http://b\u{fc}cher.example"], "xn--"),
            (&["*", "http://a"], "* alone"),
            (&[""], "--cors-origin"),
        ] {
            let message = problem(bad).unwrap_err();
            assert!(message.contains(words), "{words} is not in {message}");
        }
    }
}
