//! The conditions on the values of a configuration, beyond their types.

use std::fmt;

use super::{
    Config, InitMethod, Keep, MAX_BOTTLENECK, MAX_VIRTUAL_TOKENS, PromptKind, PromptPosition,
    Reparameterization,
};

/// The input's place in a verbalizer.
const INPUT: &str = "{{input}}";

/// Characters that are not allowed in file names on some system.
const NOT_IN_NAMES: &[char] = &['/', '\\', ':', '*', '?', '"', '<', '>', '|'];

/// Longest name of a run, in bytes: file systems allow 255, and a run folder's name may get a suffix.
const MAX_NAME: usize = 200;

/// One problem of a value.
pub(super) struct ValueProblem {
    /// The key of the value.
    pub(super) key: &'static str,
    /// Another key that caused the problem; if its value is malformed, this problem is not reported.
    pub(super) because_of: Option<&'static str>,
    /// Expected, found, hint.
    pub(super) what: String,
}

impl fmt::Display for ValueProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}`: {}", self.key, self.what)
    }
}

/// The problems found so far.
#[derive(Default)]
struct Validator(Vec<ValueProblem>);

impl Validator {
    /// Adds a problem of `key` unless `ok`.
    fn that(&mut self, ok: bool, key: &'static str, what: impl FnOnce() -> String) {
        if !ok {
            self.0.push(ValueProblem { key, because_of: None, what: what() });
        }
    }

    /// Adds a problem of `key` that the value of `because_of` causes.
    fn fail_with(&mut self, key: &'static str, because_of: &'static str, what: impl Into<String>) {
        self.0.push(ValueProblem { key, because_of: Some(because_of), what: what.into() });
    }

    fn not_empty(&mut self, key: &'static str, text: &str, expected: &str) {
        self.that(!text.trim().is_empty(), key, || format!("expected {expected}, found an empty string"));
    }

    fn required(&mut self, key: &'static str, text: &str, expected: &str) {
        self.that(!text.trim().is_empty(), key, || format!("required; expected {expected}"));
    }

    fn at_least_one(&mut self, key: &'static str, value: usize) {
        self.that(value >= 1, key, || format!("expected 1 or more, found {value}"));
    }

    fn number(&mut self, key: &'static str, value: f64, ok: impl Fn(f64) -> bool, expected: &str) {
        self.that(value.is_finite() && ok(value), key, || format!("expected {expected}, found {value}"));
    }
}

impl Config {
    /// All problems of the values.
    pub(super) fn problems(&self) -> Vec<ValueProblem> {
        let mut check = Validator::default();
        self.check_name(&mut check);
        check.not_empty("runs", &self.runs, "a folder for the run folders");
        check.required("model.id", &self.model.id, "a folder, a .gguf file or a hub id org/name[@revision]");
        self.check_prompt(&mut check);
        self.check_data(&mut check);
        self.check_train(&mut check);
        check.0.extend(self.sweep.problems());
        check.0
    }

    fn check_name(&self, check: &mut Validator) {
        let name = &self.name;
        let ends_well = !name.starts_with([' ', '.']) && !name.ends_with([' ', '.']);
        let is_name = ends_well && !name.contains(NOT_IN_NAMES) && !name.contains(char::is_control);
        check.that(!name.is_empty(), "name", || "expected a name, found an empty string".into());
        check.that(is_name, "name", || {
            format!(
                "expected a name for one folder, found {name:?}; leave out / \\ : * ? \" < > | and a space or \
                 dot at an end"
            )
        });
        check.that(name.len() <= MAX_NAME, "name", || {
            format!("expected at most {MAX_NAME} bytes, found {}", name.len())
        });
    }

    fn check_prompt(&self, check: &mut Validator) {
        let (prompt, method) = (&self.prompt, "prompt.init_method");
        check.that(prompt.num_virtual_tokens <= MAX_VIRTUAL_TOKENS, "prompt.num_virtual_tokens", || {
            format!("expected 0 to {MAX_VIRTUAL_TOKENS}, found {}", prompt.num_virtual_tokens)
        });
        match prompt.init_method {
            InitMethod::Text if prompt.init_text.trim().is_empty() => check.fail_with(
                "prompt.init_text",
                method,
                "required with init_method = \"text\"; expected the text that the prompt starts from",
            ),
            InitMethod::File if prompt.init_file.trim().is_empty() => check.fail_with(
                "prompt.init_file",
                method,
                "required with init_method = \"file\"; expected an adapter folder",
            ),
            InitMethod::Vocab | InitMethod::Random if prompt.num_virtual_tokens == 0 => check.fail_with(
                "prompt.num_virtual_tokens",
                method,
                format!(
                    "expected 1 to {MAX_VIRTUAL_TOKENS} with init_method = \"{}\", found 0; 32 is a good start",
                    prompt.init_method
                ),
            ),
            _ => {}
        }
        if (prompt.kind, prompt.position) == (PromptKind::Prefix, PromptPosition::AfterHead) {
            check.fail_with(
                "prompt.position",
                "prompt.kind",
                "expected \"start\" with kind = \"prefix\", found \"after_head\": keys and values are given, and stand before all \
                 rows that the model computes; set kind = \"embeddings\" or position = \"start\"",
            );
        }
        self.check_reparameterization(check);
    }

    fn check_reparameterization(&self, check: &mut Validator) {
        let (prompt, key) = (&self.prompt, "prompt.reparameterization");
        let (rows, frozen) = (prompt.num_virtual_tokens, prompt.frozen_tokens);
        if rows > 0 && frozen >= rows {
            let what =
                format!("expected fewer than prompt.num_virtual_tokens, which is {rows}, found {frozen}");
            check.fail_with("prompt.frozen_tokens", "prompt.num_virtual_tokens", what);
        }
        check.that(prompt.bottleneck <= MAX_BOTTLENECK, "prompt.bottleneck", || {
            format!("expected 0 to {MAX_BOTTLENECK}, found {}", prompt.bottleneck)
        });
        match (prompt.reparameterization, prompt.init_method) {
            (Reparameterization::None, _) if prompt.bottleneck > 0 => check.fail_with(
                "prompt.bottleneck",
                key,
                format!(
                    "expected 0 with reparameterization = \"none\", which has no network, found {}; set \
                     reparameterization = \"residual\" or \"mlp\"",
                    prompt.bottleneck
                ),
            ),
            (Reparameterization::Mlp, method) if method != InitMethod::Random => check.fail_with(
                key,
                "prompt.init_method",
                format!(
                    "\"mlp\" makes the rows by a network with random weights, so they cannot begin as init_method = \
                     \"{method}\" has them; set reparameterization = \"residual\", which keeps the first rows, or \
                     init_method = \"random\""
                ),
            ),
            _ => {}
        }
    }

    fn check_data(&self, check: &mut Validator) {
        let data = &self.data;
        check.required("data.train", &data.train, "a .csv, .tsv, .json, .jsonl, .ndjson or .parquet file");
        check.not_empty("data.input", &data.input, "the name of a column");
        check.not_empty("data.output", &data.output, "the name of a column");
        if !data.input.is_empty() && data.input == data.output {
            let what = format!("expected another column than data.input, found {:?} for both", data.output);
            check.fail_with("data.output", "data.input", what);
        }
        let places = data.verbalizer.matches(INPUT).count();
        check.that(places == 1, "data.verbalizer", || {
            format!("expected {INPUT} once, found it {places} times in {:?}", data.verbalizer)
        });
        check.at_least_one("data.max_input_tokens", data.max_input_tokens);
        check.at_least_one("data.max_output_tokens", data.max_output_tokens);
        let blank = self.distils() && data.teacher_text.trim().is_empty();
        check.that(!blank, "data.teacher_text", || {
            "expected a text, found white space alone; leave the key out for no teacher".into()
        });
        if self.train.keep == Keep::Best && data.validation.is_empty() {
            check.fail_with(
                "train.keep",
                "data.validation",
                "\"best\" needs a validation file, found none; set data.validation, or keep = \"last\"",
            );
        }
        if self.train.early_stopping > 0 && data.validation.is_empty() {
            check.fail_with(
                "train.early_stopping",
                "data.validation",
                "needs a validation file, found none; set data.validation, or early_stopping = 0",
            );
        }
    }

    fn check_train(&self, check: &mut Validator) {
        let train = &self.train;
        check.number("train.learning_rate", train.learning_rate, |x| x > 0.0, "a finite number above 0");
        check.number(
            "train.warmup_ratio",
            train.warmup_ratio,
            |x| (0.0..=1.0).contains(&x),
            "a number from 0 to 1",
        );
        check.at_least_one("train.batch_size", train.batch_size);
        check.at_least_one("train.accumulate_steps", train.accumulate_steps);
        check.at_least_one("train.num_epochs", train.num_epochs);
        check.number("train.weight_decay", train.weight_decay, |x| x >= 0.0, "a finite number, 0 or more");
        for (key, beta) in [("train.beta1", train.beta1), ("train.beta2", train.beta2)] {
            check.number(key, beta, |x| (0.0..1.0).contains(&x), "a number from 0 to below 1");
        }
        check.number("train.eps", train.eps, |x| x > 0.0, "a finite number above 0");
        check.number("train.max_grad_norm", train.max_grad_norm, |x| x >= 0.0, "a finite number, 0 or more");
        // TOML's integers are signed, and the resolved configuration is saved as TOML.
        let most = i64::MAX;
        check.that(i64::try_from(train.seed).is_ok(), "train.seed", || {
            format!("expected 0 to {most}, found {}", train.seed)
        });
    }
}
