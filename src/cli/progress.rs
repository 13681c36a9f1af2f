//! Progress on stderr: a bar on a terminal, plain lines otherwise.

use super::stderr;
use gneiss::session::Session;
use gneiss::tune::Limits;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::IsTerminal;

/// A bar of `length` steps; hidden if stderr is no terminal or has no bars.
pub fn bar(length: usize, what: &'static str, template: &str) -> ProgressBar {
    let target = if std::io::stderr().is_terminal() && stderr::allows_bars() {
        ProgressDrawTarget::stderr()
    } else {
        ProgressDrawTarget::hidden()
    };
    let bar = ProgressBar::with_draw_target(Some(length as u64), target).with_prefix(what);
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    bar.set_style(style.progress_chars("━╸─"));
    bar
}

/// The template of a bar that only counts.
pub const COUNT: &str = "{prefix:>10} {bar:30} {pos}/{len} {msg}";

/// A line of progress, above the bar if there is one.
pub fn line(bar: &ProgressBar, text: &str) {
    if bar.is_hidden() { status!("{text}") } else { bar.println(text) }
}

/// A warning, above the bar if there is one.
pub fn warning(bar: &ProgressBar, text: &str) {
    if bar.is_hidden() { stderr::warn(text) } else { bar.println(format!("warning    {text}")) }
}

/// Says that a step is tried again with smaller limits.
pub fn out_of_memory(bar: &ProgressBar, limits: Limits) {
    let Limits { max_rows, recompute } = limits;
    line(
        bar,
        &format!("out of memory: trying again with {max_rows} rows a pass, {recompute} layers recomputed"),
    );
}

/// Says that the device ran out of memory, and that the work continues with fewer rows at a time.
pub fn fewer_rows(bar: &ProgressBar, rows: usize) {
    warning(bar, &format!("out of memory: going on with {rows} rows at a time"));
}

/// Opens a model with a bar, and describes it.
pub fn open(options: &gneiss::config::ModelOptions) -> anyhow::Result<Session> {
    let started = std::time::Instant::now();
    let bar = bar(1, "loading", COUNT);
    let session = gneiss::session::open(options, &mut |done, blocks| {
        bar.set_length(blocks as u64);
        bar.set_position(done as u64);
        stderr::progress("loading", done, blocks);
    })?;
    bar.finish_and_clear();
    let config = session.model.config();
    status!(
        "model      {} ({}): {} layers, hidden {}, vocabulary {}, {:?} on {}, {} in {:.1} s",
        session.id,
        session.format,
        config.num_hidden_layers,
        config.hidden_size,
        config.vocab_size,
        session.dtype,
        gneiss::device::kind(session.model.device()),
        super::text::bytes(session.model.weight_bytes() as u64),
        started.elapsed().as_secs_f64(),
    );
    session.warnings.iter().for_each(super::warn);
    Ok(session)
}
