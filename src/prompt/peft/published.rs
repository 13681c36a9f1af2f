//! The model card of an adapter that goes to the hub: with the base model's id there, and with the evaluation's results.

use std::fmt::Write;

use super::card::{pretrained, quoted};
use crate::checkpoint::LicenseTag;

/// The results of an evaluation, for a card; without any text of the test file.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct CardResults {
    /// Name of the test file.
    pub test: String,
    /// Its rows.
    pub rows: usize,
    /// The metrics.
    pub metrics: Vec<CardMetric>,
}

/// A metric of the base model and of the tuned prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct CardMetric {
    /// The hub's name of the kind, such as `accuracy`.
    pub kind: String,
    /// Its name for people.
    pub name: String,
    /// The base model's value.
    pub base: f64,
    /// The tuned prompt's value.
    pub tuned: f64,
}

/// `card` for the repository `repo`: `base`, an id on the hub, stands in place of `local`, the license is added to the
/// header unless that has one, and the results to the header and as a table. A card without a header gets one.
pub fn published_card(
    card: &str,
    repo: &str,
    [local, base]: [&str; 2],
    license: &[LicenseTag],
    results: Option<&CardResults>,
) -> String {
    let card = if local.is_empty() {
        card.to_owned()
    } else {
        card.replace(&pretrained(local, None), &pretrained(base, None)).replace(local, base)
    };
    let (header, body) = match card.strip_prefix("---\n").and_then(|rest| rest.split_once("\n---\n")) {
        Some((header, body)) => (format!("{header}\n"), body.to_owned()),
        None => ("library_name: peft\n".to_owned(), card),
    };
    let mut header = header;
    let has = |header: &str, key: &str| header.lines().any(|line| line.starts_with(&format!("{key}:")));
    let license = if has(&header, "license") { &[] } else { license };
    let base = [("base_model", quoted(base)), ("base_model_relation", "adapter".to_owned())];
    let license = license.iter().map(|(key, value)| (*key, quoted(value)));
    for (key, value) in base.into_iter().chain(license) {
        if !has(&header, key) {
            // Writing to a string can't fail.
            let _ = writeln!(header, "{key}: {value}");
        }
    }
    let mut body = body.trim_end().to_owned() + "\n";
    if let Some(results) = results.filter(|results| !results.metrics.is_empty()) {
        header += &model_index(repo, results);
        body += &section(results);
    }
    format!("---\n{header}---\n{body}")
}

/// The tuned prompt's values in the form that the hub reads.
fn model_index(repo: &str, results: &CardResults) -> String {
    let name = repo.rsplit('/').next().unwrap_or(repo);
    let mut text = format!(
        "model-index:\n- name: {}\n  results:\n  - task:\n      type: text-generation\n    dataset:\n      name: {}\n      type: \
         custom\n    metrics:\n",
        quoted(name),
        quoted(&results.test)
    );
    for CardMetric { kind, name, tuned, .. } in &results.metrics {
        let _ = writeln!(text, "    - type: {kind}\n      name: {}\n      value: {tuned:.4}", quoted(name));
    }
    text
}

fn section(results: &CardResults) -> String {
    let mut rows = vec![(String::new(), "Base model".to_owned(), "Tuned prompt".to_owned())];
    rows.extend(
        results.metrics.iter().map(|m| (m.name.clone(), format!("{:.4}", m.base), format!("{:.4}", m.tuned))),
    );
    let mut text = format!("\n## Evaluation\n\n{} rows of {}.\n\n", results.rows, results.test);
    for (i, (name, base, tuned)) in rows.iter().enumerate() {
        let _ = writeln!(text, "| {name} | {base} | {tuned} |");
        text += if i == 0 { "|---|---|---|\n" } else { "" };
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_published_card_names_the_base_on_the_hub_and_the_results() {
        let card = "---\nbase_model: \"m/x.gguf\"\nlibrary_name: peft\n---\n\n# dogs\n\nfrom_pretrained(\"m\", gguf_file=\"x.gguf\")\n";
        let metric = CardMetric { kind: "accuracy".into(), name: "accuracy".into(), base: 0.5, tuned: 0.96 };
        let license = [("license", "apache-2.0".to_owned())];
        let results = CardResults { test: "test.csv".into(), rows: 116, metrics: vec![metric] };
        let text = published_card(card, "me/dogs", ["m/x.gguf", "org/base"], &license, Some(&results));
        assert_eq!(
            text,
            "---\nbase_model: \"org/base\"\nlibrary_name: peft\nbase_model_relation: adapter\nlicense: \"apache-2.0\"\nmodel-index:\n- name: \"dogs\"\n  \
             results:\n  - task:\n      type: text-generation\n    dataset:\n      name: \"test.csv\"\n      type: custom\n    metrics:\n    \
             - type: accuracy\n      name: \"accuracy\"\n      value: 0.9600\n---\n\n# dogs\n\nfrom_pretrained(\"org/base\")\n\n\
             ## Evaluation\n\n116 rows of test.csv.\n\n|  | Base model | Tuned prompt |\n|---|---|---|\n| accuracy | 0.5000 | 0.9600 |\n"
        );
        let bare = published_card("# dogs", "me/dogs", ["", "org/base"], &[], None);
        assert_eq!(
            bare,
            "---\nlibrary_name: peft\nbase_model: \"org/base\"\nbase_model_relation: adapter\n---\n# dogs\n"
        );
        let own = published_card("---\nlicense: mit\n---\n", "me/dogs", ["", "org/base"], &license, None);
        assert!(own.starts_with("---\nlicense: mit\nbase_model") && !own.contains("apache"), "{own}");
    }
}
