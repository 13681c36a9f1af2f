//! The tables against the page of the documentation that shows them: `GNEISS_WRITE_DOCS=1 cargo test --lib fields::pages`
//! writes the page's parts again.

use super::*;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

const PAGE: &str = "docs/src/request-fields.md";
const END: &str = "<!-- end of fields -->";

/// The tables of a part: a route, or several that have much in common.
fn part(name: &str) -> Vec<&'static FieldTable> {
    match name {
        "openai" => vec![&COMPLETIONS, &CHAT, &RESPONSES],
        "watsonx" => vec![&GENERATION, &WATSONX_CHAT, &TOKENIZATION],
        "gneiss" => vec![&CLASSIFY],
        other => panic!("there are no fields of {other}"),
    }
}

fn joined(mut names: Vec<String>) -> String {
    names.sort_unstable();
    names.join(", ")
}

fn names(lists: &[&'static [&'static str]]) -> Vec<&'static str> {
    lists.iter().flat_map(|list| list.iter().copied()).collect()
}

fn spans(names: &[&str]) -> String {
    joined(names.iter().map(|name| format!("`{name}`")).collect())
}

/// The name of a refused field, and how it is refused.
type Refusal = (&'static str, &'static RefusedFields);

/// The refused fields of a table that it does not obey.
fn refusals(table: &FieldTable) -> Vec<Refusal> {
    table.refusals().filter(|(name, _)| !lists(table.obeyed, name)).collect()
}

/// A field with what means that it is off, beside what always does.
fn shown((name, refused): Refusal, prefix: &str) -> String {
    let name = format!("{prefix}{name}");
    match refused.off {
        Off::Number(number) => format!("`{name}` ({number})"),
        Off::Words(words) => format!("`{name}` ({})", words.join(", ")),
        Off::True => format!("`{name}` (true)"),
        _ => format!("`{name}`"),
    }
}

/// Rows of fields that get the same answer.
fn rows(refused: &[Refusal], prefix: &str) -> String {
    let mut rows = BTreeMap::<&str, Vec<String>>::new();
    for one in refused {
        rows.entry(one.1.hint).or_default().push(shown(*one, prefix));
    }
    let mut out = String::new();
    for (hint, names) in rows {
        writeln!(out, "| {} | {hint} |", joined(names)).unwrap();
    }
    out
}

/// What a section says: fields obeyed, without effect, refused, and those of fields that are objects.
#[derive(Default)]
struct Section {
    obeyed: Vec<&'static str>,
    without_effect: Vec<&'static str>,
    refused: Vec<Refusal>,
    nested: Vec<(&'static str, &'static FieldTable)>,
}

impl Section {
    fn new(table: &FieldTable) -> Self {
        Self {
            obeyed: names(table.obeyed),
            without_effect: names(table.without_effect),
            refused: refusals(table),
            nested: table.nested.to_vec(),
        }
    }

    /// What is in all of `others` too, or what is not.
    fn shared(&self, others: &[Self], shared: bool) -> Self {
        let all = |holds: &dyn Fn(&Self) -> bool| others.iter().all(holds) == shared;
        let alike = |a: Refusal, b: Refusal| (a.0, a.1.hint) == (b.0, b.1.hint);
        let keep = |list: &[&'static str], of: fn(&Self) -> &Vec<&'static str>| {
            list.iter().copied().filter(|name| all(&|other| of(other).contains(name))).collect()
        };
        Self {
            obeyed: keep(&self.obeyed, |section| &section.obeyed),
            without_effect: keep(&self.without_effect, |section| &section.without_effect),
            refused: (self.refused.iter().copied())
                .filter(|one| all(&|other| other.refused.iter().any(|two| alike(*one, *two))))
                .collect(),
            nested: (self.nested.iter().copied())
                .filter(|(key, _)| all(&|other| other.nested.iter().any(|(name, _)| name == key)))
                .collect(),
        }
    }

    fn render(&self, title: &str, out: &mut String) {
        writeln!(out, "### {title}\n").unwrap();
        for (what, names) in [("Obeyed", &self.obeyed), ("Of no effect on the answer", &self.without_effect)]
        {
            if !names.is_empty() {
                writeln!(out, "{what}: {}.\n", spans(names)).unwrap();
            }
        }
        let nested = self.nested.iter().map(|(key, table)| (format!("Of `{key}`, obeyed"), table));
        let nested: Vec<(String, &&FieldTable)> = nested.collect();
        for (what, table) in &nested {
            writeln!(out, "{what}: {}.\n", spans(&names(table.obeyed))).unwrap();
        }
        let mut refused = rows(&self.refused, "");
        for (key, table) in &self.nested {
            refused += &rows(&refusals(table), &format!("{key}."));
        }
        if !refused.is_empty() {
            writeln!(out, "| refused | what the refusal says |\n|---|---|\n{refused}").unwrap();
        }
    }
}

fn render(name: &str) -> String {
    let tables = part(name);
    let sections: Vec<Section> = tables.iter().map(|table| Section::new(table)).collect();
    let mut out = String::new();
    if let ([first, _, ..], routes) = (&sections[..], tables.iter().map(|table| table.request)) {
        let title = format!("All of {}", routes.collect::<Vec<_>>().join(", "));
        first.shared(&sections, true).render(&title, &mut out);
    }
    for (table, section) in tables.iter().zip(&sections) {
        let own = if tables.len() > 1 { section.shared(&sections, false) } else { section.shared(&[], true) };
        own.render(table.request, &mut out);
    }
    out.trim_end().to_owned()
}

#[test]
fn the_page_shows_the_tables() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(PAGE);
    let text = std::fs::read_to_string(&path).unwrap();
    let (mut made, mut rest, mut parts) = (String::new(), text.as_str(), 0);
    while let Some(at) = rest.find("<!-- fields of ") {
        let name = rest[at + "<!-- fields of ".len()..].split(" -->").next().unwrap();
        let end = rest.find(END).expect("a part has an end");
        made += &format!("{}<!-- fields of {name} -->\n\n{}\n\n{END}", &rest[..at], render(name));
        rest = &rest[end + END.len()..];
        parts += 1;
    }
    made += rest;
    assert_eq!(parts, 3);
    if std::env::var_os("GNEISS_WRITE_DOCS").is_some() {
        std::fs::write(&path, &made).unwrap();
    } else {
        assert!(
            made == text,
            "{PAGE} is not as in the source: GNEISS_WRITE_DOCS=1 cargo test --lib fields::pages"
        );
    }
}
