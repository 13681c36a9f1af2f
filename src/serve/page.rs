//! Pages for a browser. A page is one document: its style and its script are in it, and nothing of it comes from elsewhere.

use axum::http::{HeaderValue, header};
use axum::response::{Html, IntoResponse, Response};
use std::sync::LazyLock;

/// The style that all pages share.
pub(crate) const STYLE: &str = include_str!("page/style.css");
/// The functions that all pages share.
pub(crate) const SCRIPT: &str = include_str!("page/common.js");
/// What a page may load. No other page may contain it.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; \
                      img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The page to try prompts, of a server that does nothing else.
static TRY: LazyLock<String> = LazyLock::new(|| try_page(""));

/// The page to try prompts, with links to other pages.
pub(crate) fn try_page(navigation: &str) -> String {
    assembled(include_str!("page/try.html"), navigation, STYLE, SCRIPT)
}

/// A page of its parts.
pub(crate) fn assembled(html: &str, navigation: &str, style: &str, script: &str) -> String {
    html.replacen("<!--navigation-->\n", navigation, 1)
        .replacen("/*style*/\n", style, 1)
        .replacen("/*script*/\n", script, 1)
}

/// The answer with the page to try prompts.
pub(crate) async fn show_try_page() -> Response {
    answer(&TRY)
}

/// The answer with a page.
pub(crate) fn answer(page: &'static str) -> Response {
    let mut response = Html(page).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    response
}
