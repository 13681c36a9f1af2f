//! Configurations: what loads, what every error says.

mod sweep;

use std::path::{Path, PathBuf};

use gneiss::config::{Config, DtypeChoice, InitMethod, Keep, OnNotFinite, Schedule, SweepOptions, Task};
use gneiss::device::DeviceChoice;

/// The least that a configuration says.
const LEAST: &str = r#"
[model]
id = "ibm-granite/granite-4.1-3b"
[prompt]
init_text = "Say whether the customer is satisfied."
[data]
train = "train.csv"
validation = "validation.csv"
"#;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn sets(sets: &[&str]) -> Vec<String> {
    sets.iter().map(ToString::to_string).collect()
}

#[track_caller]
fn least_with(options: &[&str]) -> Config {
    Config::parse(LEAST, "test.toml", &sets(options)).unwrap()
}

#[track_caller]
fn message(text: &str, options: &[&str]) -> String {
    let error = Config::parse(text, "test.toml", &sets(options)).unwrap_err();
    assert!(error.is_bad_input());
    error.to_string()
}

#[track_caller]
fn problem_of(options: &[&str]) -> String {
    message(LEAST, options).strip_prefix("test.toml: ").unwrap().to_string()
}

#[test]
fn every_recipe_loads() {
    let entries = std::fs::read_dir(root().join("configs")).unwrap();
    let mut recipes: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    recipes.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
    recipes.sort();
    for recipe in &recipes {
        Config::load(recipe, &[]).unwrap();
        let text = std::fs::read_to_string(recipe).unwrap();
        let command = format!("# gneiss tune configs/{}", recipe.file_name().unwrap().display());
        assert_eq!(text.lines().next(), Some(command.as_str()));
    }
    assert_eq!(recipes.len(), 2, "{recipes:?}");
}

#[test]
fn the_tutorial_is_what_its_file_says() {
    let config = Config::load(&root().join("configs/tutorial.toml"), &[]).unwrap();
    let mut expected = Config { name: "tutorial".into(), ..Config::default() };
    expected.model.id = "models/SmolLM2-135M-Instruct.Q4_1.gguf".into();
    expected.prompt.init_text = "Extract the satisfaction from the comment. Return simple '1' for satisfied \
                                 customer or '0' for unsatisfied. Comment:"
        .into();
    expected.data.task = Task::Classification;
    expected.data.train = "data/train.csv".into();
    expected.data.validation = "data/validation.csv".into();
    expected.data.test = "data/test.csv".into();
    expected.data.verbalizer = "classify {0, 1} {{input}}".into();
    (expected.data.max_input_tokens, expected.data.max_output_tokens) = (128, 2);
    assert_eq!(config, expected);
}

/// What tomllib (Python 3.13) reads of the same bytes: CRLF is LF, an escape stays what it says.
#[test]
fn crlf_is_lf() {
    let keys = "verbalizer = \"\"\"\nTicket: {{input}}\n\nTeam:\\r\\n\"\"\"\ninput = '''a\nb'''\n";
    let text = format!("{LEAST}{keys}");
    let crlf = text.replace('\n', "\r\n");
    let config = Config::parse(&crlf, "test.toml", &[]).unwrap();
    assert_eq!(config.data.verbalizer, "Ticket: {{input}}\n\nTeam:\r\n");
    assert_eq!(config.data.input, "a\nb");
    assert_eq!(config, Config::parse(&text, "test.toml", &[]).unwrap());
    // The saved configuration says the same, a carriage return that was meant included.
    let saved = config.to_toml().unwrap();
    assert_eq!(Config::parse(&saved, "saved", &[]).unwrap(), config);
    assert_eq!(Config::parse(&saved.replace('\n', "\r\n"), "saved", &[]).unwrap(), config);
    let set = least_with(&["data.verbalizer=\"\"\"a\r\n{{input}}\"\"\"", "prompt.init_text=one\r\ntwo"]);
    assert_eq!((set.data.verbalizer.as_str(), set.prompt.init_text.as_str()), ("a\n{{input}}", "one\ntwo"));
}

#[test]
fn crlf_leaves_lines_and_columns_right() {
    let same = |text: &str| {
        let (lf, crlf) = (message(text, &[]), message(&text.replace('\n', "\r\n"), &[]));
        assert_eq!(crlf, lf);
        lf
    };
    let text = "name = \"x\"\n\n[model]\nid = \"\"\"a\nb\"\"\"\n[data]\ntrian = \"x\"\n";
    assert!(same(text).contains("line 7: `data.trian`"));
    assert!(same(&format!("{text}batch = = 1\n")).starts_with("test.toml: line 8, column 9: "));
    // A carriage return by itself is no line break to TOML.
    assert!(message("name = \"x\"\rruns = \"y\"\r", &[]).starts_with("test.toml: line 1, "));
}

#[test]
fn a_file_in_another_encoding_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.toml");
    let load = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        Config::load(&path, &[]).map_err(|error| error.to_string())
    };
    let units: Vec<u8> = LEAST.trim_start().encode_utf16().flat_map(u16::to_le_bytes).collect();
    assert!(load(&units).unwrap_err().contains("line 1: expected UTF-8 text, found UTF-16 (little-endian"));
    let marked = [&b"\xFF\xFE"[..], &units].concat();
    let message = load(&marked).unwrap_err();
    assert!(
        message.contains("found the byte order mark of UTF-16; hint: save the file as UTF-8"),
        "{message}"
    );
    assert!(
        load(b"name = \"caf\xE9\"").unwrap_err().contains("line 1: expected UTF-8 text, found another byte")
    );
    // Editors on Windows write this mark.
    assert_eq!(load(&[b"\xEF\xBB\xBF", LEAST.as_bytes()].concat()), Ok(least_with(&[])));
}

#[test]
fn the_resolved_config_reads_back_the_same() {
    let options = [
        "train.learning_rate=1e-300",
        "train.eps=1e-8",
        "train.seed=9223372036854775807",
        "train.memory_budget=1.5GiB",
        "model.device=cuda:3",
        "prompt.init_text=\"two\\nlines, \\\"quotes\\\" and ü\"",
        "data.verbalizer=\"'''{{input}}\\n\"",
    ];
    let config = least_with(&options);
    assert_eq!(config.prompt.init_text, "two\nlines, \"quotes\" and ü");
    assert_eq!(config.train.memory_budget.bytes, Some(3 << 29));
    assert_eq!(least_with(&["train.memory_budget="]).train.memory_budget.bytes, None);
    let text = config.to_toml().unwrap();
    assert_eq!(Config::parse(&text, "resolved", &[]).unwrap(), config);
    assert_eq!(toml::from_str::<Config>(&text).unwrap(), config);
}

#[test]
fn serde_alone_refuses_unknown_keys_too() {
    for text in ["lr = 1", "[train]\nlr = 1", "[model]\nlr = 1", "[data]\nlr = 1", "[prompt]\nlr = 1"] {
        let error = toml::from_str::<Config>(text).unwrap_err();
        assert!(error.message().starts_with("unknown field `lr`"), "{error}");
    }
}

#[test]
fn early_stopping_needs_a_validation_file() {
    assert_eq!(least_with(&["train.early_stopping=3"]).train.early_stopping, 3);
    let problem = problem_of(&["train.early_stopping=3", "train.keep=last", "data.validation="]);
    assert!(problem.contains("train.early_stopping") && problem.contains("data.validation"), "{problem}");
}

#[test]
fn sets_override_the_file_and_the_last_counts() {
    let config = least_with(&[
        "name=a b", "train.schedule=cosine", "train.schedule = constant", "train.learning_rate=1",
        "train.shuffle=false", "train.keep=last", "train.on_not_finite=skip", "data.validation=",
        "data.task=classification", "data.verbalizer={0, 1} {{input}} a=b", "prompt.init_method=vocab",
        "prompt.num_virtual_tokens=32", "model.id=org/name@main", "model.dtype=bf16", "model.device=cuda",
    ]);
    assert_eq!(config.name, "a b");
    assert_eq!((config.train.schedule, config.train.keep), (Schedule::Constant, Keep::Last));
    assert_eq!((config.train.learning_rate, config.train.shuffle), (1.0, false));
    assert_eq!(config.train.on_not_finite, OnNotFinite::Skip);
    assert_eq!((config.data.validation.as_str(), config.data.task), ("", Task::Classification));
    assert_eq!(config.data.verbalizer, "{0, 1} {{input}} a=b");
    assert_eq!((config.prompt.init_method, config.prompt.num_virtual_tokens), (InitMethod::Vocab, 32));
    assert_eq!(config.model.id, "org/name@main");
    assert_eq!((config.model.dtype, config.model.device), (DtypeChoice::Bf16, DeviceChoice::Cuda(0)));
}

#[test]
fn all_problems_of_a_file_come_at_once() {
    let text = r#"name = "a/b"
learning_rate = 0.1
[modle]
id = "m"
[prompt]
init_method = "words"
num_virtual_tokens = -1
[data]
train = 5
verbalizer = "no place"
[train]
learning_rat = 0.1
batch_size = "eight"
num_epochs = 0
seed = 1.5
schedule = "linaer"
shuffle = "yes"
beta1 = 1
colour = "red"
"#;
    let expected = r#"test.toml: 17 problems
  line 1: `name`: expected a name for one folder, found "a/b"; leave out / \ : * ? " < > | and a space or dot at an end
  line 2: `learning_rate`: unknown key; did you mean `train.learning_rate`?
  line 3: `modle`: unknown key; did you mean `model`?
  line 6: `prompt.init_method`: unknown value `words`, expected one of `text`, `vocab`, `random`, `file`
  line 7: `prompt.num_virtual_tokens`: expected a whole number, 0 or more, found -1
  line 9: `data.train`: expected a string, found 5
  line 10: `data.verbalizer`: expected {{input}} once, found it 0 times in "no place"
  line 12: `train.learning_rat`: unknown key; did you mean `train.learning_rate`?
  line 13: `train.batch_size`: expected a whole number, 0 or more, found the string "eight"
  line 14: `train.num_epochs`: expected 1 or more, found 0
  line 15: `train.seed`: expected a whole number, 0 or more, found 1.5
  line 16: `train.schedule`: unknown value `linaer`, expected one of `linear`, `cosine`, `constant`
  line 17: `train.shuffle`: expected true or false, found the string "yes"
  line 18: `train.beta1`: expected a number from 0 to below 1, found 1
  line 19: `train.colour`: unknown key; expected one of train.accumulate_steps, train.batch_size, train.beta1, train.beta2, train.checkpoint_steps, train.early_stopping, train.eps, train.keep, train.learning_rate, train.max_grad_norm, train.max_rows, train.max_steps, train.memory_budget, train.num_epochs, train.on_not_finite, train.schedule, train.seed, train.shuffle, train.tensorboard, train.time_products, train.warmup_ratio, train.weight_decay
  `model.id`: required; expected a folder, a .gguf file or a hub id org/name[@revision]
  `train.keep`: "best" needs a validation file, found none; set data.validation, or keep = "last""#;
    assert_eq!(message(text, &[]), expected);
}

#[test]
fn what_is_required_is_asked_for() {
    assert_eq!(
        message("", &[]),
        "test.toml: 4 problems
  `model.id`: required; expected a folder, a .gguf file or a hub id org/name[@revision]
  `prompt.init_text`: required with init_method = \"text\"; expected the text that the prompt starts from
  `data.train`: required; expected a .csv, .tsv, .json, .jsonl, .ndjson or .parquet file
  `train.keep`: \"best\" needs a validation file, found none; set data.validation, or keep = \"last\""
    );
}

#[test]
fn sets_that_fail_name_the_option() {
    let cases = [
        ("train.learning_rate=fast", r#"expected a number, found the string "fast""#),
        ("train.learning_rat=0.1", "unknown key; did you mean `train.learning_rate`?"),
        ("train.batch_size=0", "expected 1 or more, found 0"),
        ("train.batch_size=[1]", "expected a whole number, 0 or more, found an array"),
        ("train.keep=bets", "unknown value `bets`, expected `best` or `last`"),
        ("name=2024", r#"expected a string, found 2024; quote it: --set 'name="2024"'"#),
        (
            "model.device=gpu",
            r#"expected auto, cpu, cuda, cuda:N or metal, found "gpu"; N is the GPU's index from 0"#,
        ),
        (
            "model.device=cuda:-1",
            r#"expected auto, cpu, cuda, cuda:N or metal, found "cuda:-1"; N is the GPU's index from 0"#,
        ),
        ("model=granite", "expected a key of this table: model.device, model.dtype, model.id"),
        (
            "train.memory_budget=lots",
            r#"expected a size such as "24GB", "900MB" or "16GiB", or "" for the memory that the device has free, found "lots""#,
        ),
        (
            "train.memory_budget=24",
            "expected a string, found 24; quote it: --set 'train.memory_budget=\"24\"'",
        ),
        ("train.seed.low=1", "unknown key; did you mean `train.seed`?"),
    ];
    for (option, what) in cases {
        let key = option.split('=').next().unwrap();
        assert_eq!(problem_of(&[option]), format!("`--set {key}`: {what}"));
    }
    assert_eq!(problem_of(&["train.shuffle"]), "`--set train.shuffle`: expected KEY=VALUE, found no =");
    let unclosed = problem_of(&["name=\"half"]);
    assert!(unclosed.starts_with("`--set name`: ") && unclosed.ends_with(" in \"half"), "{unclosed}");
}

#[test]
fn ranges_are_held() {
    let cases = [
        ("prompt.num_virtual_tokens=4097", "expected 0 to 4096, found 4097"),
        ("train.learning_rate=0", "expected a finite number above 0, found 0"),
        ("train.learning_rate=inf", "expected a finite number above 0, found inf"),
        ("train.learning_rate=nan", "expected a finite number above 0, found NaN"),
        ("train.warmup_ratio=1.01", "expected a number from 0 to 1, found 1.01"),
        ("train.warmup_ratio=-0.1", "expected a number from 0 to 1, found -0.1"),
        ("train.accumulate_steps=0", "expected 1 or more, found 0"),
        ("train.num_epochs=0", "expected 1 or more, found 0"),
        ("train.weight_decay=-1", "expected a finite number, 0 or more, found -1"),
        ("train.beta1=-0.1", "expected a number from 0 to below 1, found -0.1"),
        ("train.beta2=1.0", "expected a number from 0 to below 1, found 1"),
        ("train.eps=0.0", "expected a finite number above 0, found 0"),
        ("train.max_grad_norm=-1", "expected a finite number, 0 or more, found -1"),
        ("data.max_input_tokens=0", "expected 1 or more, found 0"),
        ("data.max_output_tokens=0", "expected 1 or more, found 0"),
        ("data.output=input", "expected another column than data.input, found \"input\" for both"),
        ("data.input=", "expected the name of a column, found an empty string"),
        (
            "data.verbalizer={{input}}{{input}}",
            "expected {{input}} once, found it 2 times in \"{{input}}{{input}}\"",
        ),
        ("runs=", "expected a folder for the run folders, found an empty string"),
        ("name=", "expected a name, found an empty string"),
        ("model.id=", "required; expected a folder, a .gguf file or a hub id org/name[@revision]"),
    ];
    for (option, what) in cases {
        let key = option.split('=').next().unwrap();
        assert_eq!(problem_of(&[option]), format!("`--set {key}`: {what}"));
    }
    for name in ["..", ".hidden", "end.", " a", "a\\b", "a\tb", "a:b"] {
        let set = format!("name=\"{}\"", name.escape_default());
        assert!(problem_of(&[&set]).contains("expected a name for one folder"), "{name:?}");
    }
    assert!(problem_of(&[&format!("name={}", "n".repeat(201))]).contains("expected at most 200 bytes"));
    for edge in
        ["train.warmup_ratio=1", "train.beta1=0", "train.max_grad_norm=0", "prompt.num_virtual_tokens=4096"]
    {
        least_with(&[edge]);
    }
}

#[test]
fn what_one_key_asks_of_another() {
    let cases = [
        (
            "prompt.init_method=vocab",
            "`prompt.num_virtual_tokens`: expected 1 to 4096 with init_method = \"vocab\", found 0; 32 is a good start",
        ),
        (
            "prompt.init_method=random",
            "`prompt.num_virtual_tokens`: expected 1 to 4096 with init_method = \"random\", found 0; 32 is a good start",
        ),
        (
            "prompt.init_method=file",
            "`prompt.init_file`: required with init_method = \"file\"; expected an adapter folder",
        ),
        (
            "prompt.init_text=",
            "`--set prompt.init_text`: required with init_method = \"text\"; expected the text that the prompt starts from",
        ),
        (
            "data.validation=",
            "`train.keep`: \"best\" needs a validation file, found none; set data.validation, or keep = \"last\"",
        ),
    ];
    for (option, what) in cases {
        assert_eq!(problem_of(&[option]), what);
    }
    // A text that isn't used may be empty.
    least_with(&["prompt.init_method=file", "prompt.init_file=adapter", "prompt.init_text="]);
    least_with(&["data.validation=", "train.keep=last"]);
}

#[test]
fn a_malformed_key_brings_no_problems_of_others() {
    assert_eq!(problem_of(&["data.validation=5"]).lines().count(), 1);
    let text = LEAST.replace("init_text", "init_method = 3 #");
    assert_eq!(message(&text, &[]), "test.toml: line 5: `prompt.init_method`: expected a string, found 3");
}

#[test]
fn syntax_errors_name_line_and_column() {
    let error = message("name = \"a\"\n[train]\nseed = = 4\n", &[]);
    assert!(error.starts_with("test.toml: line 3, column "), "{error}");
    let error = message("name = \"a\"\nname = \"b\"\n", &[]);
    assert!(error.starts_with("test.toml: line 2, column 1: duplicate key"), "{error}");
    let error = message("name = \"a\"\n[train]\nseed = 99999999999999999999\n", &[]);
    assert!(error.starts_with("test.toml: ") && error.contains("line 3: `train.seed`: "), "{error}");
}

#[test]
fn dotted_keys_and_inline_tables_have_lines_too() {
    let text = "data.trian = 1\ntrain = {\n  seed = -1,\n}\n";
    let error = message(text, &[]);
    assert!(error.contains("line 1: `data.trian`: unknown key; did you mean `data.train`?"), "{error}");
    assert!(error.contains("line 3: `train.seed`: expected a whole number, 0 or more, found -1"), "{error}");
    let error = message("train = 5\n", &[]);
    assert!(error.contains("line 1: `train`: expected a table, found 5"), "{error}");
}

#[test]
fn files_that_cannot_be_read_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.toml");
    let error = Config::load(&path, &[]).unwrap_err();
    assert!(error.is_bad_input());
    assert!(error.to_string().starts_with(&path.display().to_string()), "{error}");
    std::fs::write(&path, b"name = \"a\"\n# \xff\n").unwrap();
    let expected = format!("{}: line 2: expected UTF-8 text, found another byte", path.display());
    assert_eq!(Config::load(&path, &[]).unwrap_err().to_string(), expected);
}

#[test]
fn validate_reports_all_at_once() {
    let mut config = least_with(&[]);
    config.validate().unwrap();
    config.train.seed = u64::MAX;
    config.train.batch_size = 0;
    assert_eq!(
        config.validate().unwrap_err().to_string(),
        "config: 2 problems\n  `train.batch_size`: expected 1 or more, found 0\n  \
         `train.seed`: expected 0 to 9223372036854775807, found 18446744073709551615"
    );
}

#[test]
fn choices_read_what_they_write() {
    for dtype in DtypeChoice::ALL {
        assert_eq!(dtype.to_string().parse::<DtypeChoice>().unwrap(), *dtype);
    }
    let error = "f64".parse::<DtypeChoice>().unwrap_err();
    assert_eq!(error.to_string(), "expected auto, f32, bf16 or f16, found \"f64\"");
    for device in [DeviceChoice::Auto, DeviceChoice::Cpu, DeviceChoice::Cuda(0), DeviceChoice::Cuda(7)] {
        assert_eq!(device.to_string().parse::<DeviceChoice>().unwrap(), device);
    }
    assert_eq!("cuda:0".parse::<DeviceChoice>().unwrap(), DeviceChoice::Cuda(0));
}

#[test]
fn keys_of_a_reparameterization_that_have_no_effect_are_refused() {
    let cases: [(&[&str], &str); 5] = [
        (
            &["prompt.bottleneck=64"],
            "`--set prompt.bottleneck`: expected 0 with reparameterization = \"none\"",
        ),
        (
            &["prompt.reparameterization=residual", "prompt.bottleneck=65537"],
            "expected 0 to 65536, found 65537",
        ),
        (
            &["prompt.reparameterization=mlp"],
            "set reparameterization = \"residual\", which keeps the first rows",
        ),
        (
            &["prompt.num_virtual_tokens=4", "prompt.frozen_tokens=4"],
            "`--set prompt.frozen_tokens`: expected fewer than prompt.num_virtual_tokens, which is 4, found 4",
        ),
        (
            &["prompt.reparameterization=lstm"],
            "unknown value `lstm`, expected one of `none`, `residual`, `mlp`",
        ),
    ];
    for (options, expected) in cases {
        let found = problem_of(options);
        assert!(found.contains(expected), "{found}");
    }
    least_with(&["prompt.reparameterization=residual", "prompt.bottleneck=64", "prompt.frozen_tokens=1"]);
    least_with(&[
        "prompt.kind=prefix", "prompt.reparameterization=mlp", "prompt.init_method=random",
        "prompt.num_virtual_tokens=8",
    ]);
}

/// A run goes on with the settings that it began with; its error names those that differ.
#[test]
fn changed_keys_are_named() {
    let (before, after) = (least_with(&[]), least_with(&["prompt.frozen_tokens=1", "train.seed=7"]));
    assert_eq!(before.changed_keys(&after).unwrap(), ["prompt.frozen_tokens", "train.seed"]);
    assert!(before.changed_keys(&before).unwrap().is_empty());
}

/// Every key's doc says `Default ` and the default as TOML, or that the key is required.
#[test]
fn every_keys_doc_states_its_default() {
    let source = std::fs::read_to_string(root().join("src/config/mod.rs")).unwrap();
    let mut defaults = toml::Table::try_from(Config::default()).unwrap();
    // A configuration without a sweep is written without its table.
    defaults.insert("sweep".into(), toml::Value::try_from(SweepOptions::default()).unwrap());
    let tables = [("Config", ""), ("ModelOptions", "model"), ("PromptOptions", "prompt")];
    let more = [("DataOptions", "data"), ("TrainOptions", "train"), ("SweepOptions", "sweep")];
    let mut checked = 0;
    for (name, table) in tables.into_iter().chain(more) {
        let body =
            source.split_once(&format!("pub struct {name} {{\n")).unwrap().1.split_once("\n}\n").unwrap().0;
        let table = defaults.get(table).map_or(&defaults, |section| section.as_table().unwrap());
        let mut doc = String::new();
        for line in body.lines().map(str::trim).filter(|line| !line.starts_with("#[")) {
            if let Some(text) = line.strip_prefix("/// ") {
                doc += text;
                doc.push(' ');
                continue;
            }
            let key = line.strip_prefix("pub ").unwrap().split(':').next().unwrap();
            let default = &table[key];
            match doc.split_once("Default `") {
                Some((_, text)) => {
                    let stated: toml::Value = text.strip_suffix("`. ").unwrap().parse().unwrap();
                    assert_eq!(&stated, default, "{key}");
                }
                None if default.is_table() => {}
                None => assert!(doc.ends_with("Required. "), "{key}: {doc}"),
            }
            checked += usize::from(!default.is_table());
            doc.clear();
        }
    }
    let keys = |table: &toml::Table| table.values().filter(|value| !value.is_table()).count();
    let sections = defaults.values().filter_map(toml::Value::as_table);
    assert_eq!(checked, keys(&defaults) + sections.map(keys).sum::<usize>());
}
