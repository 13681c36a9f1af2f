//! Error messages that the documentation shows, made again by the program from the files that bring them about.

use super::markdown::Page;
use std::process::Command;

/// Files and their bytes. Each message stands word for word in the page on data formats.
const BAD: [(&str, &[u8]); 17] = [
    ("columns.csv", b"text,label\n\"a, b\",1\n"),
    ("rows.csv", b"input,output\nFast and gentle, lovely place,1\n\"She said \"hello\" to my dog\",1\n,0\n   ,0\nGood,1\n"),
    ("semicolon.csv", b"text;output\na;1\n"),
    ("unclosed.csv", b"input,output\n\"Never closed,1\nNext,0\n"),
    ("headonly.csv", b"input,output\n"),
    ("empty.csv", b""),
    ("latin.csv", b"input,output\ncaf\xe9,1\n"),
    ("utf16.csv", b"\xff\xfei\0n\0"),
    (
        "rows.jsonl",
        b"{\"input\": \"a\", \"output\": NaN}\n{\"input\": \"b\"}\n{\"input\": \"c\", \"outptu\": \"0\"}\n{\"input\": \"d\",\n",
    ),
    ("object.json", b"{\"name\": \"tickets\", \"splits\": {\"train\": 2}}\n"),
    (
        "splits.json",
        b"{\"train\": [{\"input\": \"a\", \"output\": \"1\"}], \"test\": [{\"input\": \"b\", \"output\": \"0\"}]}\n",
    ),
    (
        "chat.jsonl",
        b"{\"messages\": [{\"role\": \"system\", \"content\": \"a\"}, {\"role\": \"user\", \"content\": \"b\"}, {\"role\": \"assistant\", \"content\": \"1\"}]}\n",
    ),
    ("book.csv", b"PK\x03\x04\x14\0\x06\0[Content_Types].xml"),
    ("packed.csv", b"\x1f\x8b\x08\0"),
    ("nul.csv", b"input,output\na\0b,1\n"),
    ("cut.json", b"[{\"input\": \"a\", \"output\": \"1\"},\n {\"input\": \"b\", \"output\": \"0\"},\n"),
    (
        "types.json",
        b"[{\"input\": \"a\", \"output\": \"1\"}, {\"input\": \"b\", \"output\": [\"1\"]}, {\"input\": \"c\", \"output\": null}]\n",
    ),
];

/// The configuration whose problems the page on configuration shows.
const CONFIG: &str = "name = \"x\"\n[model]\nid = \"m\"\n[prompt]\ninit_text = \"Say 1 or 0\"\n[data]\n\
                      task = \"clasification\"\ntrain = \"train.csv\"\nverbalizer = \"classify {input}\"\n[train]\n\
                      learning_rat = 0.01\nbatch_size = 0\nnum_epochs = \"5\"\n";

/// What `gneiss inspect FILE` says in `folder`; it has to refuse the file.
fn refusal(folder: &std::path::Path, file: &str) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gneiss"));
    let output =
        command.args(["inspect", file]).current_dir(folder).env("HF_HUB_OFFLINE", "1").output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{file}");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn error_messages_are_shown_word_for_word() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("bad")).unwrap();
    let (data, config) = (Page::read("docs/src/data-formats.md"), Page::read("docs/src/configuration.md"));
    let mut missing = Vec::new();
    for (name, bytes) in BAD {
        let file = format!("bad/{name}");
        std::fs::write(folder.path().join(&file), bytes).unwrap();
        let message = refusal(folder.path(), &file);
        if !data.text.contains(message.trim_end()) {
            missing.push(message);
        }
    }
    std::fs::write(folder.path().join("bad.toml"), CONFIG).unwrap();
    let message = refusal(folder.path(), "bad.toml");
    if !config.text.contains(message.trim_end()) {
        missing.push(message);
    }
    assert!(missing.is_empty(), "not in the documentation:\n{}", missing.concat());
    // One more message is in no page, so that the search is seen to fail.
    std::fs::write(folder.path().join("bad/nothing.csv"), "a,b\n").unwrap();
    assert!(!data.text.contains(refusal(folder.path(), "bad/nothing.csv").trim_end()));
}
