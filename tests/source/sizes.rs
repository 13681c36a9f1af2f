//! Sizes of the source: lines of a file and of a function, parameters, and one name for one type. The source is formatted by
//! rustfmt, so that a function ends at the first line with its own indentation and a closing brace.

use super::{SourceFile, source};
use std::collections::BTreeMap;

/// Lines of a file at most.
const FILE_LINES: usize = 400;
/// Lines of a function at most, from `fn` to the closing brace.
const FUNCTION_LINES: usize = 60;
/// Parameters at most, `self` not counted.
const PARAMETERS: usize = 5;
/// Functions with more, as a trait of another crate has them: `ttf_parser::OutlineBuilder`.
const GIVEN: [&str; 1] = ["curve_to"];

/// A function of the source.
#[derive(Debug, PartialEq)]
struct Function {
    name: String,
    /// Counted from 1.
    line: usize,
    lines: usize,
    parameters: usize,
}

fn indentation(line: &str) -> usize {
    line.len() - line.trim_start().len()
}

/// What follows the visibility and the words that may stand before `fn` or a type.
fn without_qualifiers(line: &str) -> &str {
    let mut rest = line.trim_start();
    loop {
        let before = rest;
        if let Some(visible) = rest.strip_prefix("pub") {
            rest = match visible.strip_prefix('(') {
                Some(scope) => scope.split_once(") ").map_or("", |(_, rest)| rest),
                None => visible.trim_start(),
            };
        }
        for word in ["const ", "async ", "unsafe ", "extern \"C\" "] {
            rest = rest.strip_prefix(word).unwrap_or(rest);
        }
        if rest == before {
            return rest;
        }
    }
}

fn identifier(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

/// Parameters between the parentheses that open first in `text`, without `self`.
fn parameters(text: &str) -> usize {
    let mut depth = 0usize;
    let mut angle = 0usize;
    let mut list = vec![String::new()];
    let mut before = ' ';
    for c in text.chars() {
        match c {
            '<' if depth == 0 => angle += 1,
            '>' if depth == 0 && before != '-' => angle = angle.saturating_sub(1),
            '(' if depth == 0 && angle > 0 => {}
            '(' | '[' | '{' => depth += 1,
            '<' => depth += 1,
            '>' if before != '-' && before != '=' && depth > 1 => depth -= 1,
            ')' if depth == 0 => {}
            ')' | ']' | '}' => {
                depth -= 1;
                if depth == 0 {
                    break;
                }
            }
            ',' if depth == 1 => list.push(String::new()),
            _ => {}
        }
        if depth > 0 && !(depth == 1 && c == ',') {
            list.last_mut().unwrap().push(c);
        }
        before = c;
    }
    let is_parameter = |text: &&String| {
        let text = text.trim_start_matches('(').trim();
        !text.is_empty() && !text.ends_with("self") && !text.starts_with("self:")
    };
    list.iter().filter(is_parameter).count()
}

fn functions(text: &str) -> Vec<Function> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (i, line) in lines.iter().enumerate() {
        let Some(rest) = without_qualifiers(line).strip_prefix("fn ") else { continue };
        let end = format!("{}}}", " ".repeat(indentation(line)));
        let is_end = |l: &&str| **l == end || (indentation(l) == indentation(line) && l.ends_with(';'));
        let one_line = line.ends_with(';') || line.ends_with('}');
        let lines_of = if one_line { 1 } else { lines[i + 1..].iter().position(is_end).unwrap() + 2 };
        let signature = lines[i..i + lines_of].join(" ");
        let name = identifier(rest);
        let after = signature.split_once(&format!("fn {name}")).unwrap().1;
        found.push(Function { name, line: i + 1, lines: lines_of, parameters: parameters(after) });
    }
    found
}

/// Names of the types that a text defines at its top.
fn types(text: &str) -> Vec<String> {
    let definitions = text.lines().filter(|line| indentation(line) == 0).filter_map(|line| {
        let line = without_qualifiers(line);
        let kinds = ["struct ", "enum ", "trait ", "union ", "type "];
        Some(identifier(kinds.iter().find_map(|kind| line.strip_prefix(kind))?))
    });
    definitions.collect()
}

#[test]
fn files_functions_and_parameter_lists_are_short() {
    let mut problems = Vec::new();
    for SourceFile { name, text } in source() {
        let lines = text.lines().count();
        if lines > FILE_LINES {
            problems.push(format!("{name}: {lines} lines, over {FILE_LINES}"));
        }
        for Function { name: function, line, lines, parameters } in functions(&text) {
            if lines > FUNCTION_LINES {
                problems.push(format!("{name}:{line}: {function} has {lines} lines, over {FUNCTION_LINES}"));
            }
            if parameters > PARAMETERS && !GIVEN.contains(&function.as_str()) {
                problems.push(format!(
                    "{name}:{line}: {function} has {parameters} parameters, over {PARAMETERS}"
                ));
            }
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

#[test]
fn a_name_has_one_type() {
    let mut files: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for file in source().iter().filter(|file| !file.is_of_tests()) {
        for found in types(file.product_text()) {
            files.entry(found).or_default().push(file.name.clone());
        }
    }
    let twice: Vec<String> = files
        .into_iter()
        .filter(|(_, files)| files.len() > 1)
        .map(|(name, files)| format!("{name}: {}", files.join(", ")))
        .collect();
    assert!(twice.is_empty(), "types of one name:\n{}", twice.join("\n"));
}

#[test]
fn functions_are_measured() {
    let text = "impl X {\n    pub(crate) unsafe fn long<F: Fn(u8) -> u8>(\n        &self,\n        (a, b): (u8, u8),\n        f: \
                impl Fn(u8, u8) -> u8,\n    ) -> u8 {\n        1\n    }\n    fn short(x: &[u8], y: BTreeMap<u8, u8>) {}\n}\n";
    let found: Vec<_> =
        functions(text).into_iter().map(|f| (f.name, f.line, f.lines, f.parameters)).collect();
    assert_eq!(found, [("long".to_owned(), 2, 7, 2), ("short".to_owned(), 9, 1, 2)]);
    assert_eq!(types("pub struct A<T> {}\n    struct B;\nenum C {}\n"), ["A", "C"]);
}
