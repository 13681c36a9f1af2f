//! The trials of a sweep: one configuration each.

use super::validate::ValueProblem;
use super::{Config, SweepMethod, SweepOptions};
use crate::{Error, Result};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

/// Most trials of a sweep.
const MAX_TRIALS: usize = 999;

/// Draws of a random search for each trial, after which there are no new combinations to be found.
const DRAWS_PER_TRIAL: usize = 100;

/// Keys of `[train]` that the trials can differ in.
const HYPERPARAMETERS: [&str; 11] = [
    "learning_rate", "schedule", "warmup_ratio", "batch_size", "accumulate_steps", "num_epochs",
    "weight_decay", "beta1", "beta2", "max_grad_norm", "seed",
];

/// The values that the trials of a sweep have for one key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum SweepValues {
    /// One of a list.
    List {
        /// The list.
        values: Vec<Value>,
    },
    /// A number of a range; whole if the key's values are.
    Range {
        /// The least.
        min: f64,
        /// The largest.
        max: f64,
        /// Whether the logarithms of the numbers are spread evenly, and not the numbers.
        #[serde(default)]
        log: bool,
        /// Numbers of a grid, both ends among them; 0 if it is not given.
        #[serde(default)]
        count: usize,
    },
}

/// The configuration of a trial.
#[derive(Debug, Clone, PartialEq)]
pub struct TrialConfig {
    /// The keys in which it differs from the sweep's, with their values.
    pub values: Vec<(String, Value)>,
    /// The whole configuration; its run folder is `RUNS/NAME/trials/NNN`.
    pub config: Config,
}

/// Whether the trials of a sweep can differ in `key`.
pub(super) fn can_vary(key: &str) -> bool {
    match key.split_once('.') {
        Some(("prompt", _)) => true,
        Some(("train", name)) => HYPERPARAMETERS.contains(&name),
        _ => key == "data.verbalizer",
    }
}

impl SweepOptions {
    /// Whether there is no sweep.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// A sweep over `count` seeds from `first` on, without pruning.
    pub fn seeds(first: u64, count: usize) -> Self {
        let seeds = (first..).take(count).map(|seed| Value::Integer(seed as i64)).collect();
        let parameters = [("train.seed".to_owned(), SweepValues::List { values: seeds })];
        Self { reduction_factor: 1, parameters: parameters.into(), ..Self::default() }
    }

    /// Problems of the values.
    pub(super) fn problems(&self) -> Vec<ValueProblem> {
        let mut problems = Vec::new();
        let mut add = |key: &'static str, what: String| {
            problems.push(ValueProblem { key, because_of: None, what });
        };
        let at_least_one = [
            ("sweep.reduction_factor", self.reduction_factor),
            ("sweep.grace_period", self.grace_period),
            ("sweep.keep", self.keep),
        ];
        for (key, value) in at_least_one {
            if value == 0 {
                add(key, "expected 1 or more, found 0".into());
            }
        }
        match (self.method, self.trials) {
            (SweepMethod::Grid, 1..) => add(
                "sweep.trials",
                format!(
                    "expected 0 with method = \"grid\", which has a trial for each combination, found {}",
                    self.trials
                ),
            ),
            (SweepMethod::Random, 0) => {
                add("sweep.trials", "expected 1 or more with method = \"random\", found 0".into())
            }
            (_, trials) if trials > MAX_TRIALS => {
                add("sweep.trials", format!("expected at most {MAX_TRIALS}, found {trials}"));
            }
            _ => {}
        }
        for (key, values) in &self.parameters {
            match (self.method, values) {
                (SweepMethod::Grid, SweepValues::Range { count: 0, .. }) => {
                    add("sweep.parameters", format!("{key}: count: required with method = \"grid\""));
                }
                (SweepMethod::Random, SweepValues::Range { count: 1.., .. }) => add(
                    "sweep.parameters",
                    format!(
                        "{key}: count: is for method = \"grid\"; a random search draws from the whole range"
                    ),
                ),
                _ => {}
            }
        }
        problems
    }

    /// The combinations of values that are tried, in order.
    fn combinations(&self, defaults: &Table) -> Result<Vec<Vec<Value>>> {
        let is_whole = |key: &str| matches!(super::set::find(defaults, key), Some(Value::Integer(_)));
        let axes: Vec<(&SweepValues, bool)> =
            self.parameters.iter().map(|(key, values)| (values, is_whole(key))).collect();
        match self.method {
            SweepMethod::Grid => grid(&axes),
            SweepMethod::Random => self.random(&axes),
        }
    }

    fn random(&self, axes: &[(&SweepValues, bool)]) -> Result<Vec<Vec<Value>>> {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        let mut found: Vec<Vec<Value>> = Vec::new();
        for _ in 0..DRAWS_PER_TRIAL * self.trials {
            let drawn = axes.iter().map(|(values, whole)| values.draw(*whole, &mut rng)).collect();
            if !found.contains(&drawn) {
                found.push(drawn);
            }
            if found.len() == self.trials {
                return Ok(found);
            }
        }
        Err(Error::Invalid(format!(
            "sweep.trials: expected at most as many trials as there are combinations of values, found {} trials and {} \
             combinations",
            self.trials,
            found.len()
        )))
    }
}

/// All combinations; the last axis varies fastest.
fn grid(axes: &[(&SweepValues, bool)]) -> Result<Vec<Vec<Value>>> {
    let axes: Vec<Vec<Value>> = axes.iter().map(|(values, whole)| values.grid(*whole)).collect();
    let trials = axes.iter().fold(1usize, |product, values| product.saturating_mul(values.len()));
    if trials > MAX_TRIALS {
        return Err(Error::Invalid(format!(
            "sweep.parameters: expected at most {MAX_TRIALS} combinations of values, found {trials}; hint: method = \
             \"random\" tries some of them"
        )));
    }
    let mut combinations: Vec<Vec<Value>> = vec![Vec::new()];
    for values in &axes {
        let longer = |start: &Vec<Value>| {
            let start = start.clone();
            values.iter().map(move |value| [&start[..], std::slice::from_ref(value)].concat())
        };
        combinations = combinations.iter().flat_map(longer).collect();
    }
    Ok(combinations)
}

impl SweepValues {
    /// The values of a grid.
    fn grid(&self, whole: bool) -> Vec<Value> {
        match *self {
            Self::List { ref values } => values.clone(),
            Self::Range { min, max, log, count } => {
                let number = |i: usize| between(min, max, log, i as f64 / (count.max(2) - 1) as f64);
                let mut values: Vec<Value> = (0..count).map(|i| as_value(number(i), whole)).collect();
                values.dedup();
                values
            }
        }
    }

    /// A value drawn at random.
    fn draw(&self, whole: bool, rng: &mut ChaCha8Rng) -> Value {
        match *self {
            Self::List { ref values } => values[rng.random_range(0..values.len())].clone(),
            Self::Range { min, max, log, .. } => as_value(between(min, max, log, rng.random()), whole),
        }
    }
}

/// The number at a share, 0 to 1, of the way from `min` to `max`; four significant digits, which are read easily.
fn between(min: f64, max: f64, log: bool, share: f64) -> f64 {
    if share <= 0.0 || share >= 1.0 {
        return if share <= 0.0 { min } else { max };
    }
    let number = match log {
        true => min * (max / min).powf(share),
        false => min + (max - min) * share,
    };
    format!("{number:.3e}").parse::<f64>().unwrap_or(number).clamp(min, max)
}

fn as_value(number: f64, whole: bool) -> Value {
    if whole { Value::Integer(number.round() as i64) } else { Value::Float(number) }
}

impl Config {
    /// The configurations of the trials that `[sweep]` describes, in the order of their numbers from 1 on.
    ///
    /// # Errors
    /// Returns [`Error::Invalid`] if `[sweep.parameters]` is empty, if there are too many trials or too few combinations, or
    /// if the trials can't be compared without a validation file; [`Error::Config`] with the problems of a trial's
    /// configuration.
    pub fn trials(&self) -> Result<Vec<TrialConfig>> {
        let sweep = &self.sweep;
        if sweep.parameters.is_empty() {
            return Err(Error::Invalid(
                "[sweep.parameters]: required; expected keys with the values to try, such as \"train.learning_rate\" = { \
                 min = 0.001, max = 0.1, log = true, count = 4 }"
                    .into(),
            ));
        }
        if self.data.validation.is_empty() {
            return Err(Error::Invalid(
                "data.validation: required for a sweep, whose trials are compared by it; expected a file"
                    .into(),
            ));
        }
        if self.distils() && sweep.max_prompts > 1 {
            return Err(Error::Invalid(format!(
                "sweep.max_prompts: expected 0 or 1 with data.teacher_text, since a prompt with a teacher is tuned alone, found {}",
                sweep.max_prompts
            )));
        }
        let mut base = self.clone();
        base.sweep = SweepOptions::default();
        let failed = |error: String| Error::Invalid(format!("config as TOML: {error}"));
        let table = Table::try_from(&base).map_err(|error| failed(error.to_string()))?;
        let folder = self.folder().join(crate::layout::TRIALS);
        let mut trials = Vec::new();
        for (i, values) in sweep.combinations(&table)?.into_iter().enumerate() {
            let mut table = table.clone();
            let values: Vec<(String, Value)> = sweep.parameters.keys().cloned().zip(values).collect();
            for (key, value) in &values {
                if let Some(slot) = super::set::find_mut(&mut table, key) {
                    *slot = value.clone();
                }
            }
            let mut config: Self = table.try_into().map_err(|error| failed(error.message().to_owned()))?;
            config.name = format!("{:03}", i + 1);
            config.runs = folder.display().to_string();
            let problems: Vec<String> = config.problems().iter().map(ToString::to_string).collect();
            if !problems.is_empty() {
                let settings: Vec<String> =
                    values.iter().map(|(key, value)| format!("{key} = {value}")).collect();
                let origin = format!("trial {} ({})", config.name, settings.join(", "));
                return Err(Error::Config { origin, problems });
            }
            trials.push(TrialConfig { values, config });
        }
        Ok(trials)
    }
}
