//! Commands and flags that the documentation names, against the program's own help.

use super::markdown::{At, Page};
use super::{assert_none, known_keys, pages};
use std::collections::BTreeSet;
use std::process::Command;

/// The page that describes every command.
const REFERENCE: &str = "docs/src/command-line.md";

/// What `gneiss COMMAND --help` lists.
pub struct Help {
    flags: BTreeSet<String>,
}

fn help(command: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_gneiss")).args(command).arg("--help").output().unwrap();
    assert!(
        output.status.success(),
        "gneiss {command:?} --help: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

impl Help {
    /// Flags of every command, which the page describes once.
    fn is_global(flag: &str) -> bool {
        ["--help", "--quiet", "--progress"].contains(&flag)
    }

    /// Names of all subcommands but `help`.
    pub fn commands() -> Vec<String> {
        let text = help(&[]);
        let list = text.split_once("Commands:\n").expect("the help lists the commands").1;
        let names = list.lines().take_while(|line| !line.is_empty()).filter(|line| !line.starts_with("   "));
        let names = names.filter_map(|line| line.split_whitespace().next()).filter(|name| *name != "help");
        names.map(str::to_owned).collect()
    }

    /// Of a subcommand; of the program where `command` is empty.
    pub fn of(command: &str) -> Self {
        let text = if command.is_empty() { help(&[]) } else { help(&[command]) };
        // Descriptions are indented further.
        let options =
            text.lines().filter(|line| line.trim_start().starts_with('-') && !line.starts_with("       "));
        let long =
            |line: &str| line.split_whitespace().find(|word| word.starts_with("--")).map(str::to_owned);
        Self { flags: options.filter_map(long).collect() }
    }

    pub fn has(&self, flag: &str) -> bool {
        self.flags.contains(flag)
    }
}

#[test]
fn help_is_read() {
    let commands = Help::commands();
    assert!(
        ["tune", "eval", "generate", "inspect", "bench", "check"]
            .iter()
            .all(|c| commands.iter().any(|d| d == c))
    );
    let tune = Help::of("tune");
    assert!(
        ["--set", "--model", "--device", "--dtype", "--json", "--help"].iter().all(|flag| tune.has(flag))
    );
    assert!(!tune.has("--adapter") && Help::of("eval").has("--adapter") && Help::of("").has("--version"));
}

/// Commands with flags that the page describes and the program lacks, and the other way round.
fn undescribed(page: &Page) -> Vec<String> {
    let mut problems = Vec::new();
    for command in Help::commands() {
        let Some(section) = page.section(&format!("`gneiss {command}`")) else {
            problems.push(format!("{REFERENCE}: no heading `gneiss {command}`"));
            continue;
        };
        let help = Help::of(&command);
        let spans = section.spans();
        let flag = |span: &At<String>| span.what.split([' ', '=']).next().unwrap_or_default().to_owned();
        let described: BTreeSet<String> =
            spans.iter().map(flag).filter(|flag| flag.starts_with("--")).collect();
        let there = help.flags.iter().filter(|flag| !Help::is_global(flag)).cloned().collect();
        for flag in described.symmetric_difference(&there) {
            problems.push(match there.contains(flag) {
                true => format!("{REFERENCE}: {flag} of `gneiss {command}` is not described"),
                false => format!("{REFERENCE}: `gneiss {command}` has no {flag}"),
            });
        }
    }
    problems
}

#[test]
fn every_command_and_flag_is_described() {
    let page = Page::read(REFERENCE);
    let spans: BTreeSet<_> = page.spans().into_iter().map(|span| span.what).collect();
    for flag in Help::of("").flags {
        assert!(spans.iter().any(|span| span.split(' ').next() == Some(&flag)), "{flag} is not described");
    }
    assert_none(undescribed(&page));
    let text = "# `gneiss tune`\n\n`--set KEY=VALUE`, `--model M`, `--device D`, `--dtype D`, `--jsen`\n";
    let problems = undescribed(&Page::new(REFERENCE, text)).join("\n");
    for expected in
        ["no heading `gneiss eval`", "`gneiss tune` has no --jsen", "--json of `gneiss tune` is not"]
    {
        assert!(problems.contains(expected), "{problems}");
    }
    assert!(!problems.contains("--set of"), "{problems}");
}

/// Lines that a shell is to run, and code spans that begin with the program's name.
fn command_lines(page: &Page) -> Vec<At<String>> {
    let mut lines = page.spans();
    for At { line, what: code } in page.code() {
        if ["", "sh", "console", "text"].contains(&code.language.as_str()) {
            let joined = code.text.replace("\\\n", " ");
            lines.extend(joined.lines().map(|text| At { line, what: text.to_owned() }));
        }
    }
    let program = |text: &str| {
        let text = text.trim_start_matches("$ ");
        let rest = text.strip_prefix("gneiss ").or_else(|| text.strip_prefix("target/release/gneiss "))?;
        Some(rest.split(" #").next().unwrap_or_default().trim().to_owned())
    };
    lines.into_iter().filter_map(|At { line, what }| Some(At { line, what: program(&what)? })).collect()
}

/// Command lines that the program would not take.
fn impossible(page: &Page) -> Vec<String> {
    let (commands, keys) = (Help::commands(), known_keys().0);
    let mut problems = Vec::new();
    for At { line, what } in command_lines(page) {
        let words: Vec<&str> =
            what.split_whitespace().map(|word| word.trim_matches(['[', ']', '(', ')', '.', ','])).collect();
        let (command, rest) = match words[0] {
            flag if flag.starts_with("--") => ("", words.as_slice()),
            placeholder if placeholder.chars().all(char::is_uppercase) => continue,
            command => (command, &words[1..]),
        };
        if !command.is_empty() && !commands.iter().any(|there| there == command) {
            problems.push(page.problem(line, &format!("gneiss {what}: there is no command {command}")));
            continue;
        }
        let help = Help::of(command);
        for (i, word) in rest.iter().enumerate().filter(|(_, word)| word.starts_with("--") && word.len() > 2)
        {
            let flag = word.split('=').next().unwrap_or_default();
            if !help.has(flag) {
                problems.push(page.problem(line, &format!("gneiss {what}: {command} has no {flag}")));
            }
            let key = rest
                .get(i + 1)
                .and_then(|set| set.trim_matches(['\'', '"']).split_once('='))
                .map(|(key, _)| key);
            if flag == "--set" && key.is_some_and(|key| key != "key" && key != "KEY" && !keys.contains(key)) {
                problems.push(page.problem(line, &format!("gneiss {what}: there is no key {key:?}")));
            }
        }
    }
    problems
}

#[test]
fn command_lines_can_be_run() {
    assert_none(pages().iter().flat_map(impossible).collect());
    let lines = pages().iter().map(|page| command_lines(page).len()).sum::<usize>();
    assert!(lines > 30, "found {lines} command lines");
    for bad in [
        "`gneiss tun x`", "    $ gneiss tune x --sets a=b", "`gneiss tune x --set train.sead=1`",
        "`gneiss --jsom`",
    ] {
        assert_eq!(impossible(&Page::new("x.md", bad)).len(), 1, "{bad}");
    }
    for good in [
        "`gneiss COMMAND --help`",
        "`gneiss`",
        "    gneiss tune X [--set key=value]...  # --no",
        "gneiss --what",
    ] {
        assert_eq!(impossible(&Page::new("x.md", good)), Vec::<String>::new(), "{good}");
    }
}
