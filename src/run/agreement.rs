//! What the ranks of a run must have alike, compared before its first step.

use super::Tuning;
use crate::config::other_keys;
use crate::ranks::Ranks;
use crate::ranks::agree::{self, SharedValue, decode, encode};
use crate::session::Session;
use crate::tune::{Trainer, evaluate};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// Losses of one example that differ by a larger part than this are those of different models: in bf16 on unlike CPUs they
/// differ by some thousandths.
const SAME_LOSS: f64 = 0.02;

/// What a rank is about to tune.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Agreement {
    /// Of gneiss.
    version: String,
    /// The resolved configuration, TOML.
    config: String,
    /// Numbers and checksum of the examples.
    examples: String,
    /// dtype of the weights and kind of the device.
    place: String,
    /// The step after which the run goes on, and a checksum of its prompt.
    start: String,
    /// The loss of one example with the first prompt.
    #[serde(with = "crate::number")]
    loss: f64,
    warnings: Vec<String>,
}

impl Agreement {
    /// That of this rank; `config` is the configuration as TOML.
    ///
    /// # Errors
    /// Returns an error if a device operation fails.
    pub fn new(tuning: &Tuning, trainer: &Trainer, session: &Session, config: &str) -> Result<Self> {
        let state = trainer.state(0)?;
        let model = &session.model;
        let values =
            state.prompt.values().flatten_all()?.to_dtype(candle_core::DType::F32)?.to_vec1::<f32>()?;
        let checksum = values.iter().fold(0, |sum, value| crc32c::crc32c_append(sum, &value.to_le_bytes()));
        let prefix = state.prompt.prefix()?.to_dtype(model.prompt_dtype())?;
        let group = prefix.group(tuning.data.train.1.examples.iter().take(1))?;
        Ok(Self {
            version: env!("CARGO_PKG_VERSION").into(),
            config: config.to_owned(),
            examples: state.examples,
            place: format!(
                "{} on {}",
                format!("{:?}", session.dtype).to_lowercase(),
                crate::device::kind(model.device())
            ),
            start: format!("after step {}, prompt {checksum:08x}", state.position.step),
            loss: evaluate(model, &prefix, &[group], usize::MAX)?.loss()?,
            warnings: session.warnings.iter().chain(&tuning.data.warnings).cloned().collect(),
        })
    }

    /// What must be the same on all ranks, but for the loss.
    fn values(&self) -> Vec<String> {
        [&self.version, &self.config, &self.examples, &self.place, &self.start].map(Clone::clone).to_vec()
    }

    /// Compares those of all ranks. Returns, on rank 0, the warnings that only other ranks have, each with its rank.
    ///
    /// # Errors
    /// Returns [`Error::Ranks`] on all ranks if one of them has an error or something else than rank 0.
    pub fn check(own: Result<Self>, ranks: &dyn Ranks) -> Result<Vec<String>> {
        let mut warnings = Vec::new();
        ranks.combine(own.and_then(|own| encode(&own)), |all| {
            let all = all.iter().map(|bytes| decode(bytes)).collect::<Result<Vec<Self>>>()?;
            warnings = compare(&all)?;
            Ok(Vec::new())
        })?;
        Ok(warnings)
    }
}

/// What must be the same, in the order of [`Agreement::values`].
const SHARED: [SharedValue; 5] = [
    agree::VERSION,
    agree::configuration(other_keys),
    SharedValue {
        what: "examples",
        hint: "the same data files and tokenizer on every machine",
        difference: agree::both,
    },
    SharedValue {
        what: "dtype and device",
        hint: "--dtype and --device, which `auto` decides on each machine",
        difference: agree::both,
    },
    SharedValue {
        what: "start",
        hint: "a run that goes on needs its folder on every machine, a new one the same model; RUNS/NAME on a shared file system",
        difference: agree::both,
    },
];

/// The warnings that only other ranks than 0 have.
fn compare(all: &[Agreement]) -> Result<Vec<String>> {
    let Some((first, others)) = all.split_first() else { return Ok(Vec::new()) };
    let values: Vec<Vec<String>> = all.iter().map(Agreement::values).collect();
    let mut problems = agree::differences(&SHARED, &values);
    // Another model is another loss; other data, dtypes or prompts may be the reason too, and are named above.
    if problems.is_empty() {
        let far = |other: &Agreement| (other.loss - first.loss).abs() > SAME_LOSS * first.loss.abs();
        for (rank, other) in (1..).zip(others).filter(|(_, other)| far(other)) {
            problems.push(format!(
                "model: expected the same on ranks 0 and {rank}, found losses of {:.4} and {:.4} for the first example; hint: the \
                 same files of model.id on every machine",
                first.loss, other.loss
            ));
        }
    }
    if !problems.is_empty() {
        return Err(Error::Ranks { problem: problems.join("\n"), is_bad_input: true });
    }
    let of_rank = |(rank, other): (usize, &Agreement)| {
        let new = other.warnings.iter().filter(|text| !first.warnings.contains(text));
        new.map(|text| format!("[rank {rank}] {text}")).collect::<Vec<_>>()
    };
    Ok((1..).zip(others).flat_map(of_rank).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ranks::Threads;

    fn agreement() -> Agreement {
        Agreement {
            version: "1.2.3".into(),
            config: "name = \"dogs\"\n".into(),
            examples: "12 training".into(),
            place: "f32 on cpu".into(),
            start: "after step 0".into(),
            loss: 3.5,
            warnings: vec!["a warning of all".into()],
        }
    }

    fn problem(change: impl Fn(&mut Agreement)) -> String {
        let mut other = agreement();
        change(&mut other);
        let error = compare(&[agreement(), agreement(), other]).unwrap_err();
        assert!(error.is_bad_input());
        error.to_string()
    }

    #[test]
    fn compare_names_what_differs_and_the_ranks() {
        assert!(compare(&[agreement(), agreement()]).unwrap().is_empty());
        let text = problem(|other| other.version = "1.2.4".into());
        assert!(
            text.starts_with("version of gneiss: expected the same on ranks 0 and 2, found 1.2.3 and 1.2.4"),
            "{text}"
        );
        let text = problem(|other| other.examples = "13 training".into());
        assert!(text.starts_with("examples: ") && text.contains("data files"), "{text}");
        let text = problem(|other| other.place = "bf16 on cpu".into());
        assert!(text.contains("f32 on cpu and bf16 on cpu") && text.contains("--dtype"), "{text}");
        let text = problem(|other| other.start = "after step 7".into());
        assert!(text.contains("after step 0 and after step 7"), "{text}");
        let text = problem(|other| other.loss = 3.9);
        assert!(text.starts_with("model: ") && text.contains("3.5000 and 3.9000"), "{text}");
        let mut near = agreement();
        near.loss = 3.51;
        near.warnings.push("a slow disk".into());
        assert_eq!(compare(&[agreement(), near]).unwrap(), ["[rank 1] a slow disk"]);
    }

    #[test]
    fn check_is_an_error_on_all_ranks() {
        let problems = Threads::run(3, |ranks| {
            let mut own = agreement();
            own.examples = format!("{} training", 12 + ranks.rank() % 2);
            Agreement::check(Ok(own), ranks).unwrap_err().to_string()
        });
        for text in &problems {
            assert!(text.contains("ranks 0 and 1, found 12 training and 13 training"), "{text}");
        }
    }
}
