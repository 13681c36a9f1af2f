//! Templates of the pages, and the filters with which they format numbers.

use super::text;
use crate::{Error, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, Value, context};
use serde::Serialize;

/// The pages.
#[derive(Debug, Clone, Copy)]
pub(super) enum Page {
    /// The page of one run.
    Run,
    /// The page of several runs.
    Compare,
    /// The page of a sweep.
    Sweep,
}

const STYLE: &str = include_str!("style.css");

/// A page: `view` in its template. The template's own text is trusted, the text of `view` is escaped.
pub(super) fn render(page: Page, view: &impl Serialize) -> Result<String> {
    let source = match page {
        Page::Run => include_str!("page.html"),
        Page::Compare => include_str!("compare.html"),
        Page::Sweep => include_str!("sweep.html"),
    };
    let failed = |e: minijinja::Error| Error::Invalid(format!("report: {e:#}"));
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::Html);
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.map_err(failed)?);
    environment.add_filter("num", |value: Option<f64>| text::number(value));
    // Records contain the name of a number that is not finite.
    environment.add_filter("loss", |value: Value| match value.as_str() {
        Some(name) => name.to_owned(),
        None => text::loss(f64::try_from(value).ok()),
    });
    environment.add_filter("count", text::count);
    environment.add_filter("percent", text::percent);
    environment.add_filter("small_percent", text::small_percent);
    environment.add_filter("points", text::points);
    environment.add_filter("p_value", text::p_value);
    environment.add_filter("duration", text::duration);
    // Two decimals, for scores and cosines.
    environment.add_filter("two", |value: f64| format!("{value:.2}"));
    environment.add_filter("score", |value: f64| format!("{value:.3}"));
    environment.add_filter("three", text::three);
    // A share as a CSS value.
    environment.add_filter("css", |share: f64| format!("{:.1}%", 100.0 * share.clamp(0.0, 1.0)));
    let context =
        context! { style => Value::from_safe_string(STYLE.into()), view => Value::from(Serde(view)) };
    environment.render_str(source, context).map_err(failed)
}
