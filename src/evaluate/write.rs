//! An evaluation on disk.

use super::Evaluation;
use crate::files::{read_json, write_atomically, write_json};
use crate::layout::{EVALUATION, PREDICTIONS};
use crate::{Error, Result};
use std::io;
use std::path::Path;

impl Evaluation {
    /// Reads the evaluation in a run folder; `None` if `gneiss eval` has not run yet.
    ///
    /// # Errors
    /// Returns [`Error::Io`] or [`Error::Checkpoint`] if the file can't be read or is malformed.
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        read_json(&folder.join(EVALUATION))
    }

    /// Writes `evaluation.json` and `predictions.csv` into `folder`, which is created if it is missing. Each file is
    /// written completely or not at all.
    ///
    /// The table has one line for each row of the test file, in UTF-8: the text that each arm generated, and in a
    /// classification its likeliest label and each label's probability among the labels.
    ///
    /// ```text
    /// line,input,expected,base,tuned,base_likeliest,tuned_likeliest,base P(0),base P(1),tuned P(0),tuned P(1)
    /// ```
    ///
    /// If there are several tuned prompts, their names stand in place of `tuned`.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if a file can't be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
        write_atomically(&folder.join(PREDICTIONS), |out| self.table(out))?;
        write_json(&folder.join(EVALUATION), self)
    }

    fn table(&self, out: &mut dyn io::Write) -> io::Result<()> {
        let columns = self.columns();
        let mut table = csv::Writer::from_writer(out);
        let mut header = ["line", "input", "expected"].map(str::to_owned).to_vec();
        header.extend(columns.iter().cloned());
        if !self.labels.is_empty() {
            header.extend(columns.iter().map(|name| format!("{name}_likeliest")));
        }
        for name in &columns {
            header.extend(self.labels.iter().map(|label| format!("{name} P({label})")));
        }
        table.write_record(&header)?;
        let rows = self.arms.first().map_or(&[][..], |base| &base.answers.predictions);
        for (i, row) in rows.iter().enumerate() {
            let answers = || self.arms.iter().map(|arm| &arm.answers.predictions[i]);
            let mut cells = vec![row.line.to_string(), row.input.clone(), row.expected.clone()];
            cells.extend(answers().map(|answer| answer.generated.clone()));
            cells.extend(answers().filter_map(|answer| answer.likeliest.clone()));
            cells.extend(answers().flat_map(|answer| &answer.probabilities).map(|p| format!("{p:.6}")));
            table.write_record(&cells)?;
        }
        table.flush()
    }
}
