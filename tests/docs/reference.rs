//! The parts of the documentation that are made from the source: tables of configuration keys and of fields.

use super::source::{self, Body, Field, Variant};
use gneiss::Error;
use gneiss::config::Config;
use gneiss::device::DeviceChoice;
use std::fmt::Write;
use toml::{Table, Value};

const CONFIG: &str = "src/config/mod.rs";
const CHOICES: [&str; 2] = ["src/config/choices.rs", "src/device/choose.rs"];

/// A valid configuration, over which a key's other values are tried.
const VALID: &str =
    "model.id = \"m\"\nprompt.init_text = \"t\"\ndata.train = \"a.csv\"\ndata.validation = \"b.csv\"\n";

/// A key as its doc comment tells it.
pub struct Key {
    /// With its table: `train.seed`.
    pub name: String,
    ty: String,
    meaning: String,
    /// In TOML; none where the key is required.
    default: Option<String>,
}

/// A table of the configuration; the first is the top level.
struct Section {
    title: String,
    keys: Vec<Key>,
}

/// All keys that the source documents.
pub fn keys() -> Vec<Key> {
    sections().into_iter().flat_map(|section| section.keys).collect()
}

fn sections() -> Vec<Section> {
    let mut sections = Vec::new();
    let mut top = Section { title: "Top level".into(), keys: Vec::new() };
    for field in fields(CONFIG, "Config") {
        match source::find(CONFIG, &field.ty) {
            None => top.keys.push(Key::new("", &field)),
            Some(item) => {
                let prefix = format!("{}.", field.name);
                let keys = fields(CONFIG, &field.ty).iter().map(|f| Key::new(&prefix, f)).collect();
                let title = item.doc.strip_suffix('.').expect("documentation ends with a full stop");
                assert!(title.starts_with(&format!("`[{}]`: ", field.name)), "{}: {title}", field.ty);
                sections.push(Section { title: title.into(), keys });
            }
        }
    }
    sections.insert(0, top);
    sections
}

fn fields(file: &str, name: &str) -> Vec<Field> {
    let item = source::find(file, name).unwrap_or_else(|| panic!("{file} has no {name}"));
    match item.body {
        Body::Struct(fields) => fields,
        Body::Enum(_) => panic!("{file}: {name} is an enum"),
    }
}

impl Key {
    fn new(prefix: &str, field: &Field) -> Self {
        let name = format!("{prefix}{}", field.name);
        let (meaning, default) = match field.doc.rsplit_once(" Default `") {
            Some((meaning, rest)) => {
                let value = rest.strip_suffix("`.");
                (meaning, Some(value.unwrap_or_else(|| panic!("{name}: expected its default at the end"))))
            }
            None => {
                let meaning = field.doc.strip_suffix(" Required.");
                (
                    meaning.unwrap_or_else(|| {
                        panic!("{name}: expected `Default ...` or `Required.` at the end")
                    }),
                    None,
                )
            }
        };
        Self { name, ty: field.ty.clone(), meaning: meaning.into(), default: default.map(str::to_owned) }
    }

    /// What is wrong with the documented default.
    pub fn check_default(&self, defaults: &Table) -> Result<(), String> {
        let documented = self.default.as_deref().unwrap_or("\"\"");
        let documented: Table =
            format!("v = {documented}").parse().map_err(|e| format!("{}: {e}", self.name))?;
        let real = lookup(defaults, &self.name).ok_or_else(|| format!("{}: no such key", self.name))?;
        if documented["v"] == *real {
            return Ok(());
        }
        Err(format!("{}: documented as {}, in fact {real}", self.name, documented["v"]))
    }

    /// The values that it takes, numbers' as the configuration's own errors put it.
    fn values(&self) -> String {
        match self.ty.as_str() {
            "String" => "text".into(),
            "bool" => "`true` or `false`".into(),
            "f64" => {
                let expected = expected(&self.name, "-1").unwrap_or_else(|| "number".into());
                expected.trim_start_matches("a ").replace("finite ", "")
            }
            "usize" | "u64" => {
                let refused =
                    ["0".to_owned(), i64::MAX.to_string()].iter().find_map(|v| expected(&self.name, v));
                format!("whole number, {}", refused.as_deref().unwrap_or("0 or more"))
            }
            "BTreeMap<String, SweepValues>" => "table".into(),
            "MemoryBudget" => "size such as `\"24GB\"`, or `\"\"`".into(),
            choice => {
                let names: Vec<_> =
                    values(choice).into_iter().map(|(name, _)| format!("`\"{name}\"`")).collect();
                names.join(", ")
            }
        }
    }
}

/// What the configuration says that it expects of a key where `value` is refused.
fn expected(key: &str, value: &str) -> Option<String> {
    let Err(error) = Config::parse(VALID, "", &[format!("{key}={value}")]) else { return None };
    let Error::Config { problems, .. } = error else { panic!("{error}") };
    let start = format!("`--set {key}`: expected ");
    let problem = problems.iter().find_map(|problem| problem.strip_prefix(&start))?;
    Some(problem.split(", found").next().unwrap_or_default().to_owned())
}

/// The enum of a key's values.
fn find_choice(name: &str) -> Option<source::Item> {
    CHOICES.iter().find_map(|file| source::find(file, name))
}

/// Names and meanings of a choice's values.
fn values(choice: &str) -> Vec<(String, String)> {
    let item = find_choice(choice).unwrap_or_else(|| panic!("none of {CHOICES:?} has {choice}"));
    let Body::Enum(variants) = item.body else { panic!("{choice} is no enum") };
    let name = |variant: &Variant| match (&variant.renamed, variant.payload.is_empty()) {
        (Some(name), _) => name.clone(),
        (None, true) => variant.name.to_lowercase(),
        (None, false) => format!("{}[:n]", variant.name.to_lowercase()),
    };
    let values: Vec<_> = variants.iter().map(|v| (name(v), v.doc.clone())).collect();
    if choice == "DeviceChoice" {
        for (name, _) in &values {
            name.trim_end_matches("[:n]").parse::<DeviceChoice>().unwrap_or_else(|e| panic!("{name}: {e}"));
        }
    }
    values
}

/// The value of a dotted key.
pub fn lookup<'a>(table: &'a Table, key: &str) -> Option<&'a Value> {
    match key.split_once('.') {
        None => table.get(key),
        Some((first, rest)) => lookup(table.get(first)?.as_table()?, rest),
    }
}

/// What the marker `<!-- from WHAT -->` stands for: `the configuration`, or `FILE: ITEM`.
pub fn render(what: &str) -> String {
    if what == "the configuration" {
        return config();
    }
    let (file, name) = what.split_once(": ").unwrap_or_else(|| panic!("from {what}: expected FILE: ITEM"));
    let item = source::find(file, name).unwrap_or_else(|| panic!("{file} has no {name}"));
    let serialised = item.attributes.iter().any(|a| a.starts_with("#[derive(") && a.contains("Serialize"));
    assert!(serialised, "{file}: {name} is not what a file holds: it is not Serialize");
    match item.body {
        Body::Struct(fields) => field_table(&fields),
        Body::Enum(variants) => variant_table(&variants, &item.attributes.concat()),
    }
}

fn config() -> String {
    let mut out = String::new();
    for Section { title, keys } in sections() {
        let rows = keys.iter().map(|key| {
            let default = key.default.as_ref().map_or("required".to_owned(), |d| format!("`{d}`"));
            [format!("`{}`", key.name), key.values(), default, key.meaning.clone()]
        });
        write!(out, "## {title}\n\n{}", table(["key", "values", "default", "meaning"], rows)).unwrap();
        for key in keys.iter().filter(|key| find_choice(&key.ty).is_some()) {
            let rows = values(&key.ty).into_iter().map(|(name, doc)| [format!("`\"{name}\"`"), doc]);
            write!(out, "\n{}", table([&format!("`{}`", key.name), "meaning"], rows)).unwrap();
        }
        out.push('\n');
    }
    out.trim_end().to_owned() + "\n"
}

fn field_table(fields: &[Field]) -> String {
    let rows = fields.iter().filter_map(|field| {
        let attributes = field.attributes.concat();
        let name = match rename(&attributes) {
            _ if attributes.contains("serde(skip)") => return None,
            _ if attributes.contains("flatten") && field.ty.starts_with("BTreeMap") => "others".to_owned(),
            _ if attributes.contains("flatten") => format!("the fields of `{}`", field.ty),
            Some(name) => format!("`{name}`"),
            None => format!("`{}`", field.name),
        };
        Some([name, json_type(&field.ty), field.doc.clone()])
    });
    table(["field", "type", "meaning"], rows)
}

fn rename(attributes: &str) -> Option<&str> {
    quoted(attributes, "rename = \"")
}

fn quoted<'a>(text: &'a str, before: &str) -> Option<&'a str> {
    text.split_once(before)?.1.split('"').next()
}

fn variant_table(variants: &[Variant], attributes: &str) -> String {
    let tag = quoted(attributes, "tag = \"").map_or("value".to_owned(), |tag| format!("`{tag}`"));
    let rows = variants.iter().map(|variant| {
        let snake = snake(&variant.name);
        let name = match quoted(attributes, "rename_all = \"") {
            Some("snake_case") => snake,
            Some("SCREAMING_SNAKE_CASE") => snake.to_uppercase(),
            None => variant.name.clone(),
            Some(other) => panic!("rename_all = {other:?} is not known here"),
        };
        if variant.name == "Other" && variant.payload == ["String"] {
            return ["any other text".to_owned(), variant.doc.clone()];
        }
        let with: Vec<_> = variant.payload.iter().map(|field| format!("`{field}`")).collect();
        let with = if with.is_empty() { String::new() } else { format!(", with {}", with.join(", ")) };
        [format!("`\"{name}\"`{with}"), variant.doc.clone()]
    });
    table([&tag, "meaning"], rows)
}

fn snake(name: &str) -> String {
    let mut out = String::new();
    for c in name.chars() {
        if c.is_uppercase() && !out.is_empty() {
            out.push('_');
        }
        out.extend(c.to_lowercase());
    }
    out
}

/// A Rust type in JSON's words.
fn json_type(ty: &str) -> String {
    let inner = |before: &str| ty.strip_prefix(before).and_then(|rest| rest.strip_suffix('>'));
    if let Some(inner) = inner("Option<") {
        return format!("{} or null", json_type(inner));
    }
    if let Some(inner) = inner("Vec<") {
        return format!("list of {}", plural(&json_type(inner)));
    }
    if let Some(inner) = ty.strip_prefix('[').and_then(|rest| rest.strip_suffix("; 2]")) {
        return format!("list of 2 {}", plural(&json_type(inner)));
    }
    match ty {
        "String" => "text".into(),
        "bool" => "true or false".into(),
        "f64" | "f32" => "number".into(),
        "usize" | "u64" | "u32" => "whole number".into(),
        "BTreeMap<String, Value>" => "any".into(),
        _ if ty.chars().all(char::is_alphanumeric) => format!("`{ty}`"),
        _ => panic!("the type {ty} is not known here"),
    }
}

fn plural(words: &str) -> String {
    match words {
        "text" | "number" | "whole number" => format!("{words}s"),
        _ => words.replacen("list of", "lists of", 1),
    }
}

fn table<const N: usize>(head: [&str; N], rows: impl Iterator<Item = [String; N]>) -> String {
    let line =
        |cells: [String; N]| format!("| {} |\n", cells.map(|cell| cell.replace('|', "\\|")).join(" | "));
    let rule = format!("|{}\n", "---|".repeat(N));
    std::iter::once(line(head.map(str::to_owned)) + &rule).chain(rows.map(line)).collect()
}

#[test]
fn types_are_told_in_json_s_words() {
    for (ty, words) in [
        ("Vec<Vec<usize>>", "list of lists of whole numbers"),
        ("Option<[f64; 2]>", "list of 2 numbers or null"),
        ("Vec<Prediction>", "list of `Prediction`"),
    ] {
        assert_eq!(json_type(ty), words);
    }
    assert_eq!(snake("StoppedEarly"), "stopped_early");
}
