//! The report of a run: one self-contained page, and its learning curve as pictures.
//!
//! The page has no script and loads nothing; its pictures are inline SVG whose colours follow the reader's choice of
//! light or dark. Every text from data, a model or a configuration is escaped.

mod axis;
mod chart;
mod compare;
mod csv;
mod html;
mod parallel;
pub mod plot;
mod raster;
mod series;
mod svg;
mod sweep;
mod text;
mod view;

use crate::Result;
use crate::evaluate::Evaluation;
use crate::files::write_atomically;
pub use crate::layout::{CURVE_PNG, CURVE_SVG, REPORT};
use crate::run::Run;
pub use compare::compare;
pub use csv::metrics_csv;
use plot::Size;
use std::path::PathBuf;
pub use sweep::{sweep_page, write_sweep};

/// File of the page that compares runs, next to their folders.
pub const COMPARE: &str = "compare.html";

/// Writes the report into the run's folder: the page and, after the first step, the learning curve as SVG and PNG.
/// Returns the files.
///
/// # Errors
/// Returns [`crate::Error::Io`] if a file can't be written.
pub fn write(run: &Run) -> Result<Vec<PathBuf>> {
    let mut files = vec![(REPORT, page(run)?.into_bytes())];
    files.extend(plot::learning_curve(run, Size::WIDE)?.map(|svg| (CURVE_SVG, svg.into_bytes())));
    files.extend(plot::learning_curve_png(run, Size::WIDE)?.map(|png| (CURVE_PNG, png)));
    let write = |(name, content): (&str, Vec<u8>)| {
        let path = run.path.join(name);
        write_atomically(&path, |out| out.write_all(&content))?;
        Ok(path)
    };
    files.into_iter().map(write).collect()
}

/// The report as a page of HTML, with the evaluation in the run's folder.
///
/// # Errors
/// Returns an error if the evaluation can't be read or a plot can't be drawn.
pub fn page(run: &Run) -> Result<String> {
    let evaluation = Evaluation::read(&run.path)?;
    html::render(html::Page::Run, &view::RunView::new(run, evaluation.as_ref())?)
}
