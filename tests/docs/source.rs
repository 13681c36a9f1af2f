//! Structs and enums of this crate's source with their documentation, read line by line.
//!
//! A line that it does not know inside the item that is asked for is a panic: nothing is left out unseen.

use super::markdown::root;

/// A struct or an enum.
pub struct Item {
    pub doc: String,
    pub attributes: Vec<String>,
    pub body: Body,
}

pub enum Body {
    Struct(Vec<Field>),
    Enum(Vec<Variant>),
}

pub struct Field {
    pub name: String,
    pub ty: String,
    pub doc: String,
    pub attributes: Vec<String>,
}

pub struct Variant {
    pub name: String,
    /// What it is called in a file, where the source says so.
    pub renamed: Option<String>,
    pub doc: String,
    /// Names of its fields, or the type of its only one.
    pub payload: Vec<String>,
}

/// Documentation and attributes that stand before something.
#[derive(Default)]
struct Before {
    doc: Vec<String>,
    attributes: Vec<String>,
}

impl Before {
    /// Whether `line` is one of them.
    fn takes(&mut self, line: &str) -> bool {
        if let Some(doc) = line.strip_prefix("///") {
            self.doc.push(doc.trim().to_owned());
        } else if line.starts_with("#[") {
            self.attributes.push(line.to_owned());
        } else {
            return false;
        }
        true
    }

    fn take(&mut self) -> (String, Vec<String>) {
        let Self { doc, attributes } = std::mem::take(self);
        (plain(&doc.join(" ")), attributes)
    }
}

/// Documentation without the brackets of its links to code, and in the words of files.
fn plain(doc: &str) -> String {
    doc.replace("[`", "`").replace("`]", "`").replace("`None`", "null").trim().to_owned()
}

/// The struct or enum `name` of a source file, if it has one.
pub fn find(file: &str, name: &str) -> Option<Item> {
    let text = std::fs::read_to_string(root().join(file)).unwrap_or_else(|e| panic!("{file}: {e}"));
    find_in(&text, name)
}

fn find_in(text: &str, name: &str) -> Option<Item> {
    let mut before = Before::default();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let line = line.trim();
        let is = |start: &str| {
            let rest = line.strip_prefix(start).and_then(|rest| rest.strip_prefix(name));
            rest.is_some_and(|rest| rest == " {")
        };
        if before.takes(line) {
            continue;
        }
        let (doc, attributes) = before.take();
        if is("pub struct ") {
            return Some(Item { doc, attributes, body: Body::Struct(fields(name, &mut lines)) });
        }
        // The second is an enum of the macro `choices!`.
        if is("pub enum ") || is("") {
            return Some(Item { doc, attributes, body: Body::Enum(variants(name, &mut lines)) });
        }
    }
    None
}

fn fields<'a>(item: &str, lines: &mut impl Iterator<Item = &'a str>) -> Vec<Field> {
    let (mut fields, mut before) = (Vec::new(), Before::default());
    for line in lines.map(str::trim) {
        if before.takes(line) {
            continue;
        }
        if line == "}" {
            return fields;
        }
        let field = line.strip_suffix(',').and_then(|line| line.trim_start_matches("pub ").split_once(": "));
        let (name, ty) =
            field.unwrap_or_else(|| panic!("{item}: expected a field on one line, found {line:?}"));
        let (doc, attributes) = before.take();
        fields.push(Field { name: name.into(), ty: ty.into(), doc, attributes });
    }
    panic!("{item}: expected its end, found that of the file")
}

fn variants<'a>(item: &str, lines: &mut impl Iterator<Item = &'a str>) -> Vec<Variant> {
    let (mut variants, mut before): (Vec<Variant>, _) = (Vec::new(), Before::default());
    let mut inside = false; // A variant with fields of its own.
    for line in lines.map(str::trim) {
        if before.takes(line) {
            continue;
        }
        let (doc, _) = before.take();
        match (line.trim_end_matches(','), inside) {
            ("}", true) => inside = false,
            ("}", false) => return variants,
            (field, true) => {
                let name = field.split(": ").next().unwrap_or_default().to_owned();
                variants.last_mut().expect("it is inside of one").payload.push(name);
            }
            (line, false) => {
                let renamed = line.split_once(" = ").map(|(_, name)| name.trim_matches('"').to_owned());
                let name: String = line.chars().take_while(|c| c.is_alphanumeric()).collect();
                assert!(name.starts_with(char::is_uppercase), "{item}: expected a variant, found {line:?}");
                inside = line.ends_with(" {");
                let only = line.split_once('(').map(|(_, ty)| ty.trim_end_matches(')').to_owned());
                variants.push(Variant { name, renamed, doc, payload: only.into_iter().collect() });
            }
        }
    }
    panic!("{item}: expected its end, found that of the file")
}

#[test]
fn items_are_read() {
    let text = "/// Not this.\npub struct Ab {\n    pub x: u8,\n}\n\n/// About [`A`],\n/// in two lines.\n#[derive(Debug)]\n\
                pub struct A {\n    /// One.\n    #[serde(flatten)]\n    pub one: Vec<B>,\n    two: f64,\n}\n\nchoices! {\n\
                /// Of a choice.\n    C {\n        /// The first.\n        First = \"1st\",\n    }\n}\n\n\
                pub enum E {\n    Unit,\n    Tuple(usize),\n    Named {\n        /// Why.\n        error: String,\n    },\n}\n";
    let a = find_in(text, "A").unwrap();
    assert_eq!((a.doc.as_str(), a.attributes.len()), ("About `A`, in two lines.", 1));
    let Body::Struct(fields) = a.body else { panic!() };
    let fields: Vec<_> = fields.iter().map(|f| [&f.name, &f.ty, &f.doc].map(String::as_str)).collect();
    assert_eq!(fields, [["one", "Vec<B>", "One."], ["two", "f64", ""]]);
    let Body::Enum(c) = find_in(text, "C").unwrap().body else { panic!() };
    assert_eq!((c[0].renamed.as_deref(), c[0].doc.as_str()), (Some("1st"), "The first."));
    let Body::Enum(e) = find_in(text, "E").unwrap().body else { panic!() };
    let e: Vec<_> = e.iter().map(|v| (v.name.as_str(), v.payload.concat())).collect();
    assert_eq!(e, [("Unit", "".into()), ("Tuple", "usize".into()), ("Named", "error".into())]);
    assert!(find_in(text, "D").is_none());
}

#[test]
#[should_panic(expected = "expected a field on one line")]
fn a_field_that_is_not_understood_is_no_silence() {
    find_in("pub struct A {\n    pub one:\n        Vec<B>,\n}\n", "A");
}
