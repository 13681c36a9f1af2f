//! Markdown pages, read as far as the checks need: code, spans, links, headings.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The repository.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A page of the repository.
pub struct Page {
    /// Relative to the repository.
    pub path: PathBuf,
    pub text: String,
}

/// Something at a line, counted from 1.
#[derive(Debug, PartialEq)]
pub struct At<T> {
    pub line: usize,
    pub what: T,
}

/// Lines of code, fenced or indented by four spaces.
#[derive(Debug, PartialEq)]
pub struct Code {
    pub language: String,
    pub text: String,
}

#[derive(Debug, PartialEq)]
pub struct Heading {
    pub level: usize,
    pub text: String,
}

impl Page {
    pub fn new(path: &str, text: &str) -> Self {
        Self { path: path.into(), text: text.into() }
    }

    pub fn read(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        let text = std::fs::read_to_string(root().join(&path));
        Self { text: text.unwrap_or_else(|e| panic!("{}: {e}", path.display())), path }
    }

    /// All pages below `docs/`, in the order of their names.
    pub fn of_docs() -> Vec<Self> {
        let mut paths = Vec::new();
        let mut folders = vec![PathBuf::from("docs")];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(root().join(&folder)).unwrap() {
                let path = folder.join(entry.unwrap().file_name());
                if root().join(&path).is_dir() {
                    folders.push(path);
                } else if path.extension().is_some_and(|e| e == "md") {
                    paths.push(path);
                }
            }
        }
        paths.sort();
        paths.into_iter().map(Self::read).collect()
    }

    /// `PATH:LINE: WHAT`.
    pub fn problem(&self, line: usize, what: &str) -> String {
        format!("{}:{line}: {what}", self.path.display())
    }

    fn split(&self) -> (Vec<At<Code>>, Vec<At<&str>>) {
        let (mut code, mut prose) = (Vec::<At<Code>>::new(), Vec::new());
        let mut fence: Option<(&str, At<Code>)> = None;
        let mut before = ""; // The line before, "" also for one of prose.
        for (line, text) in self.text.lines().enumerate().map(|(i, text)| (i + 1, text)) {
            let trimmed = text.trim_start();
            let ticks = &trimmed[..trimmed.len() - trimmed.trim_start_matches('`').len()];
            if let Some((open, mut block)) = fence.take() {
                if trimmed == open {
                    code.push(block);
                } else {
                    block.what.text += text;
                    block.what.text.push('\n');
                    fence = Some((open, block));
                }
                before = "";
            } else if ticks.len() >= 3 {
                let language = trimmed[ticks.len()..].trim().to_owned();
                fence = Some((ticks, At { line: line + 1, what: Code { language, text: String::new() } }));
            } else if text.starts_with("    ") && (before.is_empty() || before.starts_with("    ")) {
                match code.last_mut() {
                    Some(block) if before.starts_with("    ") => block.what.text += &format!("{trimmed}\n"),
                    _ => {
                        let text = format!("{trimmed}\n");
                        code.push(At { line, what: Code { language: String::new(), text } });
                    }
                }
                before = text;
            } else {
                prose.push(At { line, what: text });
                before = text;
            }
        }
        assert!(fence.is_none(), "{}: a code block is not closed", self.path.display());
        (code, prose)
    }

    /// Blocks of code, each with its first line.
    pub fn code(&self) -> Vec<At<Code>> {
        self.split().0
    }

    /// Paragraphs of prose on one line each, with their first lines; headings and table rows are paragraphs too.
    fn paragraphs(&self) -> Vec<At<String>> {
        let mut all: Vec<At<String>> = Vec::new();
        let mut open = false;
        for At { line, what: text } in self.split().1 {
            let alone =
                text.starts_with(['#', '|']) || text.trim_start().starts_with("- ") || text.starts_with("* ");
            if text.trim().is_empty() {
                open = false;
                continue;
            }
            match all.last_mut() {
                Some(last) if open && !alone => last.what += &format!(" {}", text.trim()),
                _ => all.push(At { line, what: text.to_owned() }),
            }
            open = !text.starts_with(['#', '|']);
        }
        all
    }

    /// Code spans.
    pub fn spans(&self) -> Vec<At<String>> {
        let of = |p: At<String>| {
            let spans = split_spans(&p.what).1;
            spans.into_iter().map(move |what| At { line: p.line, what })
        };
        self.paragraphs().into_iter().flat_map(of).collect()
    }

    /// Targets of links and pictures.
    pub fn links(&self) -> Vec<At<String>> {
        let mut links = Vec::new();
        for At { line, what } in self.paragraphs() {
            let text = split_spans(&what).0;
            for (open, close) in [("](", ')'), ("src=\"", '"'), ("href=\"", '"')] {
                for (at, _) in text.match_indices(open) {
                    let rest = &text[at + open.len()..];
                    let end =
                        rest.find(close).unwrap_or_else(|| panic!("{}", self.problem(line, "open link")));
                    links.push(At { line, what: rest[..end].to_owned() });
                }
            }
        }
        links
    }

    pub fn headings(&self) -> Vec<At<Heading>> {
        let heading = |p: At<String>| {
            let level = p.what.len() - p.what.trim_start_matches('#').len();
            let text = p.what[level..].trim().to_owned();
            (level > 0).then_some(At { line: p.line, what: Heading { level, text } })
        };
        self.paragraphs().into_iter().filter_map(heading).collect()
    }

    /// Anchors of the headings, as mdBook and code hosts make them.
    pub fn anchors(&self) -> BTreeSet<String> {
        let mut seen = BTreeMap::<String, usize>::new();
        let anchor = |heading: At<Heading>| {
            let slug = slug(&heading.what.text);
            let count = seen.entry(slug.clone()).or_default();
            *count += 1;
            if *count == 1 { slug } else { format!("{slug}-{}", *count - 1) }
        };
        self.headings().into_iter().map(anchor).collect()
    }

    /// The text from a heading that contains `part` to the next one of its level or above.
    pub fn section(&self, part: &str) -> Option<Page> {
        let headings = self.headings();
        let at = headings.iter().position(|h| h.what.text.contains(part))?;
        let level = headings[at].what.level;
        let end =
            headings[at + 1..].iter().find(|h| h.what.level <= level).map_or(usize::MAX, |h| h.line - 1);
        let first = headings[at].line;
        // Blank lines before it keep the line numbers.
        let line = |(i, text)| if i + 1 < first { "" } else { text };
        let lines: Vec<&str> = self.text.lines().enumerate().take(end).map(line).collect();
        Some(Page { path: self.path.clone(), text: lines.join("\n") })
    }
}

/// The text with its code spans blanked, and the spans.
fn split_spans(text: &str) -> (String, Vec<String>) {
    let (mut prose, mut spans, mut rest) = (String::new(), Vec::new(), text);
    while let Some(at) = rest.find('`') {
        let ticks = rest[at..].len() - rest[at..].trim_start_matches('`').len();
        let (before, inner) = (&rest[..at], &rest[at + ticks..]);
        prose += before;
        let Some(end) = closing(inner, ticks) else {
            prose += &rest[at..];
            return (prose, spans);
        };
        spans.push(inner[..end].trim().to_owned());
        rest = &inner[end + ticks..];
    }
    (prose + rest, spans)
}

/// Where a run of exactly `ticks` backticks begins.
fn closing(text: &str, ticks: usize) -> Option<usize> {
    let mut from = 0;
    while let Some(at) = text[from..].find('`').map(|at| from + at) {
        let run = text[at..].len() - text[at..].trim_start_matches('`').len();
        if run == ticks {
            return Some(at);
        }
        from = at + run;
    }
    None
}

fn slug(heading: &str) -> String {
    let kept = |c: char| match c {
        ' ' => Some('-'),
        '-' | '_' => Some(c),
        _ if c.is_alphanumeric() => Some(c),
        _ => None,
    };
    heading.to_lowercase().chars().filter_map(kept).collect()
}

#[test]
fn a_page_is_taken_apart() {
    let text = "# One `two`, three\n\nA [link](x.md#y) and `a\nspan` and ``b ` c``.\n\n    gneiss tune X\n    more\n\n\
                ## One `two`, three\n```sh\nls [no](link)\n```\n| `[no](link)` | ![p](p.svg) |\n";
    let page = Page::new("x.md", text);
    let what = |all: Vec<At<String>>| all.into_iter().map(|at| (at.line, at.what)).collect::<Vec<_>>();
    assert_eq!(what(page.links()), [(3, "x.md#y".into()), (13, "p.svg".into())]);
    let spans = what(page.spans()).into_iter().map(|(_, span)| span).collect::<Vec<_>>();
    assert_eq!(spans, ["two", "a span", "b ` c", "two", "[no](link)"]);
    let code: Vec<_> = page.code().into_iter().map(|at| (at.line, at.what.language, at.what.text)).collect();
    let (indented, fenced) = ("gneiss tune X\nmore\n", "ls [no](link)\n");
    assert_eq!(code, [(6, "".into(), indented.into()), (11, "sh".into(), fenced.into())]);
    assert_eq!(page.anchors(), ["one-two-three".into(), "one-two-three-1".into()].into());
    assert!(page.section("One `two`").unwrap().text.starts_with("# One"));
    assert!(page.section("Two").is_none());
}
