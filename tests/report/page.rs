//! What the page holds: every section that has data and no other, and every text escaped.

use crate::{odd, runs};
use gneiss::report;
use std::collections::BTreeMap;

/// The elements of a page by name, and its texts: a small reader of the HTML that the template writes, which fails on
/// an element that the template has not, on tags that do not match, and on an attribute that is no name and value.
struct Html {
    elements: BTreeMap<String, usize>,
    ids: Vec<String>,
    text: String,
}

const VOID: [&str; 4] = ["meta", "link", "br", "img"];
const KNOWN: [&str; 58] = [
    "html", "head", "meta", "link", "title", "style", "body", "header", "main", "footer", "nav", "section",
    "article", "h1", "h2", "h3", "p", "a", "ul", "li", "dl", "dt", "dd", "div", "span", "strong", "small",
    "em", "i", "bdi", "time", "figure", "table", "caption", "thead", "tbody", "tr", "th", "td", "details",
    "summary", "pre", "code", "svg", "text", "line", "polyline", "polygon", "circle", "rect", "colgroup",
    "col", "b", "br", "sub", "sup", "q", "s",
];
const ATTRIBUTES: [&str; 46] = [
    "lang", "charset", "name", "content", "http-equiv", "rel", "href", "class", "id", "style", "aria-label",
    "role", "dir", "open", "scope", "colspan", "rowspan", "title", "xmlns", "viewBox", "width", "height",
    "stroke-linejoin", "stroke-dasharray", "stroke", "stroke-width", "fill", "opacity", "points", "x", "y",
    "x1", "y1", "x2", "y2", "cx", "cy", "r", "dx", "dy", "text-anchor", "font-size", "font-family",
    "font-weight", "transform", "font-style",
];

impl Html {
    fn read(page: &str) -> Self {
        let mut html = Self { elements: BTreeMap::new(), ids: Vec::new(), text: String::new() };
        let mut open: Vec<String> = Vec::new();
        let mut rest = page.strip_prefix("<!doctype html>\n").unwrap_or_else(|| panic!("{:.80}", page));
        while let Some((text, tail)) = rest.split_once('<') {
            assert!(
                !text.contains('>') || open.last().is_some_and(|e| e == "style"),
                "a stray > in {text:?}"
            );
            html.text.push_str(text);
            let (tag, tail) = tail.split_once('>').expect("an end of the tag");
            rest = tail;
            if let Some(name) = tag.strip_prefix('/') {
                assert_eq!(open.pop().as_deref(), Some(name), "</{name}>");
                continue;
            }
            let closed = tag.ends_with('/');
            let (name, attributes) = tag.trim_end_matches('/').split_once(' ').unwrap_or((tag, ""));
            let name = name.trim_end_matches('/');
            assert!(KNOWN.contains(&name), "<{tag}>");
            *html.elements.entry(name.into()).or_default() += 1;
            html.attributes(attributes, tag);
            if !closed && !VOID.contains(&name) {
                open.push(name.into());
            }
        }
        assert!(open.is_empty(), "left open: {open:?}");
        html
    }

    fn attributes(&mut self, attributes: &str, tag: &str) {
        let mut rest = attributes.trim();
        while !rest.is_empty() {
            let end = rest.find(['=', ' ']).unwrap_or(rest.len());
            let name = &rest[..end];
            assert!(ATTRIBUTES.contains(&name), "attribute {name:?} in <{tag}>");
            rest = rest[end..].trim_start();
            if let Some(value) = rest.strip_prefix("=\"") {
                let (value, tail) = value.split_once('"').expect("an end of the value");
                if name == "id" {
                    assert!(!self.ids.contains(&value.to_owned()), "two elements {value:?}");
                    self.ids.push(value.into());
                }
                rest = tail.trim_start();
            }
        }
    }

    fn count(&self, name: &str) -> usize {
        self.elements.get(name).copied().unwrap_or(0)
    }
}

fn page(content: &runs::Content, name: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    report::page(&content.run(folder.path(), name)).unwrap()
}

#[test]
fn every_text_is_escaped() {
    let folder = tempfile::tempdir().unwrap();
    let mut all = Vec::new();
    for (name, content) in odd::all() {
        let run = content.run(folder.path(), name);
        let html = Html::read(&report::page(&run).unwrap());
        for absent in ["script", "img", "b"] {
            assert_eq!(html.count(absent), 0, "{name}: {absent}");
        }
        all.push(run);
    }
    Html::read(&report::compare(&all).unwrap());
    let (name, hostile) = odd::all().into_iter().find(|(name, _)| name.contains("hostile")).unwrap();
    let page = page(&hostile, name);
    for text in odd::HOSTILE {
        let escaped = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
        let escaped = escaped.replace('"', "&quot;").replace('\'', "&#x27;").replace('/', "&#x2f;");
        let found = page.matches(&escaped).count() + page.matches(&escaped.replace("&#x2f;", "/")).count();
        assert!(found > 0, "{escaped} is not in the page");
    }
}

#[test]
fn the_reader_finds_a_stray_tag() {
    for bad in ["<p>a<script>x</script></p>", "<p>a</div>", "<p onclick=\"x\">a</p>", "<p>a > b</p>", "<p>"] {
        let read = std::panic::catch_unwind(|| Html::read(&format!("<!doctype html>\n{bad}")));
        assert!(read.is_err(), "{bad}");
    }
}

#[test]
fn sections_appear_with_their_data_alone() {
    let all = ["summary", "curves", "evaluation", "examples", "tokens", "epochs", "again"];
    assert_eq!(Html::read(&page(&runs::tutorial(), "a")).ids, all);
    assert_eq!(Html::read(&page(&runs::under_way(0), "a")).ids, ["summary", "again"]);
    assert_eq!(Html::read(&page(&runs::under_way(1), "a")).ids, ["summary", "curves", "again"]);
    let mut content = runs::tutorial();
    (content.evaluation, content.summary.warnings) = (None, vec!["the loss has not moved".into()]);
    let ids = Html::read(&page(&content, "a")).ids;
    assert_eq!(ids, ["warnings", "summary", "curves", "tokens", "epochs", "again"]);
    // A link for each section but the warnings, and no other.
    for content in [content, runs::tutorial(), runs::under_way(1)] {
        let page = page(&content, "a");
        let ids = Html::read(&page).ids;
        let links: Vec<&str> =
            page.split("<a href=\"#").skip(1).map(|a| a.split_once('"').unwrap().0).collect();
        assert_eq!(links, ids.iter().filter(|id| *id != "warnings").collect::<Vec<_>>());
    }
}

#[test]
fn the_numbers_of_a_run() {
    let page = page(&runs::tutorial(), "grooming").replace('\u{a0}', " ");
    for part in [
        "<bdi>grooming</bdi> <span class=\"badge completed\">completed</span>",
        "2026-11-22 20:44 UTC",
        "<strong>96.6 %</strong><span class=\"note\">91.5 to 98.7; base 2.6 % (0.9 to 7.3)",
        "<strong>0.0447</strong>",
        "<strong>25</strong><span class=\"note\">14,400 parameters, 0.011 %",
        "<bdi>14,400</bdi><span class=\"note\">, 0.011 % of 134,515,008",
        "970 MB",
        "225 of 225",
        "over the base by generated answer",
        "over the base by label likelihood",
        "<q dir=\"auto\">Extract the satisfaction from the comment.</q>",
        "Rows fixed: 112, broken: 0; exact McNemar",
        "3.9e-34",
        "in predictions.csv",
        "from_pretrained(&quot;models&quot;, gguf_file=&quot;SmolLM2-135M-Instruct.Q4_1.gguf&quot;)",
        "verbalizer = &quot;classify {0, 1} {{input}}&quot;",
        "And 90 more",
    ] {
        assert!(page.contains(part), "{part}");
    }
    // 113 answers of the base are no label; the tuned prompt's all are, so its matrix has no such column.
    let tables: Vec<&str> = page.split("<table class=\"confusion\">").skip(1).collect();
    let columns = |table: &str| table.split_once("</thead>").unwrap().0.contains("no label");
    assert_eq!(tables.into_iter().map(columns).collect::<Vec<_>>(), [true, false, false, false]);
}

#[test]
fn a_generation_task() {
    let (_, content) = odd::all().into_iter().find(|(name, _)| *name == "generation").unwrap();
    let page = page(&content, "a").replace('\u{a0}', " ");
    for part in [
        "Exact match, tuned",
        "over the base by exact match",
        "over the base by token F1",
        "over the base by ROUGE-L",
        "Rows better: 3, worse: 0; sign test",
        "reads the rows without a prompt",
        "<td class=\"n\">0.610</td><td class=\"n\">0.583</td>",
    ] {
        assert!(page.contains(part), "{part}");
    }
    assert!(!page.contains("class=\"confusion\"") && !page.contains("Precision"));
}

#[test]
fn the_states_of_a_run() {
    let (_, failed) = odd::all().into_iter().find(|(name, _)| *name == "failed").unwrap();
    let failed = page(&failed, "a");
    for part in ["badge failed\">failed", "step 121: the loss is NaN", "step 120 of 225", "A warning"] {
        assert!(failed.contains(part), "{part}");
    }
    let mut content = runs::under_way(31);
    assert!(page(&content, "a").contains("step 31 of 225"));
    // How to go on is said where there is something to go on from.
    let folder = tempfile::tempdir().unwrap();
    let resumes = |content: &runs::Content| {
        report::page(&content.run(folder.path(), "a")).unwrap().contains("gneiss tune --resume ")
    };
    content.summary.status = gneiss::run::Status::Interrupted;
    assert!(!resumes(&content));
    std::fs::write(folder.path().join("a").join(gneiss::layout::CHECKPOINT), "").unwrap();
    assert!(resumes(&content) && resumes(&runs::under_way(1)));
    assert!(!resumes(&runs::tutorial()));
}

#[test]
fn runs_side_by_side() {
    let folder = tempfile::tempdir().unwrap();
    let first = runs::tutorial();
    let mut second = first.clone();
    second.config.train.learning_rate = 0.3;
    second.config.prompt.init_text = "Tell <me>".into();
    (second.summary.validation_loss, second.summary.examples_per_second) = (Some(0.5), 9.5);
    let mut all = vec![first.run(folder.path(), "first"), second.run(folder.path(), "second")];
    let page = report::compare(&all).unwrap();
    let html = Html::read(&page);
    assert_eq!(html.ids, ["results", "settings", "curves"]);
    assert_eq!(html.count("svg"), 4);
    let keys: Vec<&str> = page.split("<code>").skip(1).map(|k| k.split_once('<').unwrap().0).collect();
    assert_eq!(keys, ["prompt.init_text", "train.learning_rate"]);
    assert!(page.contains("0.0447 <span class=\"best\">best</span>"), "the lower loss");
    assert!(page.contains("9.50 <span class=\"best\">best</span>"), "the higher rate");
    assert_eq!(page.matches(">best<").count(), 2, "accuracy and time are the same");
    // Three more: runs are rows now; a run of another test file takes part in no comparison of shares.
    for name in ["third", "fourth"] {
        all.push(first.run(folder.path(), name));
    }
    let mut other = first.clone();
    let evaluation = other.evaluation.as_mut().unwrap();
    evaluation["test"] = "other.csv".into();
    evaluation["arms"][1]["answers"]["generated"]["accuracy"] = 1.0.into();
    all.push(other.run(folder.path(), "fifth"));
    let page = report::compare(&all).unwrap();
    assert_eq!(Html::read(&page).ids, ["results", "settings", "curves"]);
    assert!(!page.contains("</strong> <span class=\"best\">"));
    assert!(report::compare(&[]).unwrap_err().to_string().contains("at least one run"));
}
