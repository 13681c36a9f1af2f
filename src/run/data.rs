//! The files of a run, read and encoded.

use super::TeacherData;
use super::position::SplitFile;
use crate::batch::Example;
use crate::config::Config;
use crate::data::{Dataset, Encoded, Template};
use crate::session::{self, Session};
use crate::tune::health;
use crate::{Error, Result};

/// The files that `[data]` names. Runs with the same `[data]` and tokenizer can share them.
pub struct TuningData {
    /// Rows and token ids for the training.
    pub train: (Dataset, Encoded),
    /// Rows and token ids for the validation loss after each epoch.
    pub validation: Option<(Dataset, Encoded)>,
    /// Rows and token ids of the test file, which no run learns from.
    pub test: Option<(Dataset, Encoded)>,
    /// The same files as a teacher reads them, if the run distils one.
    pub teacher: Option<TeacherData>,
    /// Warnings about the data, with hints.
    pub warnings: Vec<String>,
    /// Notes about how the files were read.
    pub notes: Vec<String>,
}

impl TuningData {
    /// Reads and encodes the files of a configuration. The test file is read too, so that a mistake in it shows before the
    /// run and not after.
    ///
    /// # Errors
    /// Returns an error if a file can't be read or a row is malformed.
    pub fn read(config: &Config, session: &Session) -> Result<Self> {
        let data = &config.data;
        let template = Template::parse(&data.verbalizer)?;
        let encoder = session::encoder(data, &session.tokenizer, &template);
        let Some(train) = session::examples(&data.train, config, &encoder)? else {
            return Err(Error::Invalid(
                "data.train: required; expected a .csv, .tsv, .json, .jsonl, .ndjson or .parquet file".into(),
            ));
        };
        let validation = session::examples(&data.validation, config, &encoder)?;
        let datasets = (&train.0, validation.as_ref().map(|(dataset, _)| dataset));
        let teacher = TeacherData::encode(config, session, &encoder, datasets)?;
        let test = session::examples(&data.test, config, &encoder)?;
        let [of_validation, of_test] =
            [&validation, &test].map(|split| split.as_ref().map(|(dataset, _)| &dataset.records[..]));
        let mut warnings = health::data(config, &train.0.records, of_validation, of_test);
        let mut notes = Vec::new();
        let files = [("train", Some(&train)), ("validation", validation.as_ref()), ("test", test.as_ref())];
        for (split, (dataset, _)) in files.into_iter().filter_map(|(split, file)| Some((split, file?))) {
            warnings.extend(dataset.warnings.iter().map(|text| format!("data.{split}: {text}")));
            notes.extend(dataset.notes.iter().map(|text| format!("data.{split}: {text}")));
        }
        Ok(Self { train, validation, test, teacher, warnings, notes })
    }

    /// The files with their names after `data.`.
    pub(super) fn files(&self) -> [SplitFile<'_>; 3] {
        [("train", Some(&self.train)), ("validation", self.validation.as_ref()), ("test", self.test.as_ref())]
    }

    /// Token ids of the validation file; none without one.
    pub fn validation_examples(&self) -> &[Example] {
        self.validation.as_ref().map_or(&[], |(_, encoded)| &encoded.examples)
    }
}
