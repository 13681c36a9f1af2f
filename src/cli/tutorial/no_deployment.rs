//! Steps 8 and 9 of the tutorial in a program that was built without the cargo feature `serve`: they are left out.

use super::heading;
use gneiss::config::Config;
use gneiss::evaluate::Evaluation;
use gneiss::session::Session;
use std::path::Path;

/// Answers of a model over HTTP; there are none.
#[derive(Debug, Clone, serde::Serialize)]
pub(super) struct NoAnswers;

/// Says that steps 8 and 9 need the server, if `show` is true.
pub(super) fn steps(
    _: &Config,
    _: Session,
    _: &Path,
    _: &Evaluation,
    show: bool,
) -> anyhow::Result<Vec<NoAnswers>> {
    if show {
        heading(8, "Deployment", "left out, as step 9 is: this program was built without its server");
        println!(
            "Build it with the cargo feature `serve`, which is on by default, to run both steps and `gneiss serve`."
        );
    }
    Ok(Vec::new())
}
