//! The pages of the service: one to tune and deploy, and one to try what is deployed.

use crate::serve::page::{SCRIPT, STYLE, answer, assembled, try_page};
use crate::serve::state::AppState;
use axum::Router;
use axum::response::Response;
use axum::routing::get;
use std::sync::{Arc, LazyLock};

/// Where the page to try prompts is.
pub const TRY: &str = "/try";

static TUNE_PAGE: LazyLock<String> = LazyLock::new(|| {
    let style = [STYLE, include_str!("page/style.css")].concat();
    let script = [SCRIPT, include_str!("page/page.js")].concat();
    assembled(include_str!("page/page.html"), &navigation("/"), &style, &script)
});
static TRY_PAGE: LazyLock<String> = LazyLock::new(|| try_page(&navigation(TRY)));

pub fn routes() -> Router<Arc<AppState>> {
    Router::new().route("/", get(tune)).route(TRY, get(try_prompts))
}

async fn tune() -> Response {
    answer(&TUNE_PAGE)
}

async fn try_prompts() -> Response {
    answer(&TRY_PAGE)
}

/// Links to both pages, of which `current` is shown.
fn navigation(current: &str) -> String {
    let link = |(path, text): (&str, &str)| {
        let mark = if path == current { " aria-current=\"page\"" } else { "" };
        format!("<a href=\"{path}\"{mark}>{text}</a>")
    };
    let links = [("/", "Tune"), (TRY, "Try")].map(link).concat();
    format!("<nav aria-label=\"Pages\">{links}</nav>\n")
}
