use gneiss::data::Template;
use proptest::prelude::*;

fn fault(verbalizer: &str) -> String {
    Template::parse(verbalizer).expect_err("the verbalizer is faulty").to_string()
}

#[test]
fn single_braces_are_literal() {
    let template = Template::parse("classify {0, 1} {{input}}\n}} {x}").unwrap();
    assert_eq!((template.head(), template.tail()), ("classify {0, 1} ", "\n}} {x}"));
    assert_eq!(template.render("a {{input}} b"), "classify {0, 1} a {{input}} b\n}} {x}");
}

#[test]
fn of_three_braces_the_innermost_count() {
    let template = Template::parse("{{{input}}}").unwrap();
    assert_eq!((template.head(), template.tail()), ("{", "}"));
}

#[test]
fn missing() {
    assert_eq!(
        fault("classify {input}"),
        "verbalizer: expected {{input}} once, found no {{input}} in `classify {input}`; it marks \
         the input's place"
    );
}

#[test]
fn duplicate() {
    assert_eq!(
        fault("é {{input}} and {{input}}"),
        "verbalizer: expected {{input}} once, found it at character 3 and again at character 17"
    );
}

#[test]
fn unknown() {
    assert_eq!(
        fault("é {{text}} {{input}}"),
        "verbalizer: unknown placeholder {{text}} at character 3; the only one is {{input}}"
    );
    assert_eq!(
        fault("{{ input }}"),
        "verbalizer: 2 problems\
         \n  unknown placeholder {{ input }} at character 1; the only one is {{input}}\
         \n  expected {{input}} once, found no {{input}} in `{{ input }}`; it marks \
         the input's place"
    );
}

#[test]
fn unclosed() {
    assert_eq!(
        fault("{{input}} {{input"),
        "verbalizer: the {{ at character 11 has no closing }}; a single { is literal text"
    );
}

proptest! {
    #[test]
    fn head_and_tail_come_back(
        head in "([^{}]|\\{[^{}]|\\}){0,12}",
        tail in "([^{}]|\\{[^{}]|\\}){0,12}",
        input in ".{0,8}",
    ) {
        let template = Template::parse(&format!("{head}{{{{input}}}}{tail}")).unwrap();
        prop_assert_eq!(template.head(), &head);
        prop_assert_eq!(template.tail(), &tail);
        prop_assert_eq!(template.render(&input), format!("{head}{input}{tail}"));
    }

    #[test]
    fn any_text_is_parsed_or_refused(text in "[{}inputé]{0,20}") {
        if let Ok(template) = Template::parse(&text) {
            prop_assert_eq!(template.render("{{input}}"), text);
        }
    }
}
