//! The text of a configuration, with comments.

use super::Settings;

/// A string of TOML, quoted; on one line, also if the text has line breaks.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// The configuration, to be written to the file `path`.
pub(super) fn config(settings: &Settings, path: &str) -> String {
    let Settings { validation, test, limits, .. } = settings;
    let (validation_comment, keep, early_stopping) = match validation.is_empty() {
        true => (
            "none: the last epoch's prompt is kept; with a file of other rows, set train.keep to \"best\"",
            "last",
            "0",
        ),
        false => ("chooses the best epoch", "best", "3"),
    };
    let test_comment = if test.is_empty() { "none; gneiss eval needs one" } else { "for gneiss eval" };
    let counted = match limits.is_counted {
        true => "no text of the training file is cut",
        false => "estimated from above; gneiss inspect counts the tokens",
    };
    let values = [
        ("path", path.to_owned()),
        ("origin", settings.train.clone()),
        ("name", quoted(&settings.name)),
        ("model", quoted(&settings.model)),
        ("init_text", quoted(&settings.init_text)),
        ("task", quoted(&settings.task.to_string())),
        ("train", quoted(&settings.train)),
        ("validation", quoted(validation)),
        ("validation_comment", validation_comment.to_owned()),
        ("test", quoted(test)),
        ("test_comment", test_comment.to_owned()),
        ("input", quoted(&settings.columns.input)),
        ("output", quoted(&settings.columns.output)),
        ("verbalizer", quoted(&settings.verbalizer)),
        ("max_input", limits.input.to_string()),
        ("counted", counted.to_owned()),
        ("max_output", limits.output.to_string()),
        ("num_epochs", settings.num_epochs.to_string()),
        ("keep", quoted(keep)),
        ("early_stopping", early_stopping.to_owned()),
    ];
    fill(include_str!("template.toml"), &values)
}

/// The template with each `{name}` replaced once, from left to right, so that braces in a value stay.
fn fill(template: &str, values: &[(&str, String)]) -> String {
    let (mut out, mut rest) = (String::new(), template);
    while let Some((before, after)) = rest.split_once('{') {
        let Some((name, after)) = after.split_once('}') else { break };
        out += before;
        out += values.iter().find(|(key, _)| *key == name).map_or("", |(_, value)| value);
        rest = after;
    }
    out + rest
}
