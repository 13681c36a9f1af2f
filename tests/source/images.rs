//! The Dockerfiles: they are never built by the tests, so what can be read is read.

use super::root;
use std::process::Command;

/// An instruction: its name, and the words after it.
struct Instruction {
    name: String,
    words: Vec<String>,
}

/// The instructions of a Dockerfile.
fn instructions(file: &str) -> Vec<Instruction> {
    let text = std::fs::read_to_string(root(file)).unwrap_or_else(|error| panic!("{file}: {error}"));
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let parse = |line: &str| {
        let mut words = line.split_whitespace().map(str::to_owned);
        Instruction { name: words.next().unwrap(), words: words.collect() }
    };
    lines.map(parse).collect()
}

/// What is wrong with an image of a FROM, which names a stage above or a tag that does not move to another version.
fn image_problem(image: &str, stages: &[String], rust_version: &str) -> Option<String> {
    if stages.iter().any(|stage| stage == image) {
        return None;
    }
    let Some((name, tag)) = image.split_once(':') else { return Some(format!("{image}: no tag")) };
    if tag.split('.').count() < 2 || !tag.starts_with(|first: char| first.is_ascii_digit()) {
        return Some(format!("{image}: expected a tag with a version"));
    }
    let is_rust = name == "rust" && !tag.starts_with(&format!("{rust_version}."));
    is_rust.then(|| format!("{image}: expected {rust_version}, the rust-version of Cargo.toml"))
}

/// What is wrong with the sources of a COPY.
fn copy_problems(words: &[String], stages: &[String], ignored: &[&str]) -> Vec<String> {
    let from = words.iter().find_map(|word| word.strip_prefix("--from="));
    let sources: Vec<&String> = words.iter().filter(|word| !word.starts_with("--")).collect();
    let Some((_, sources)) = sources.split_last() else { return vec!["COPY without a path".to_owned()] };
    if let Some(stage) = from {
        let is_known = stages.iter().any(|known| known == stage);
        return if is_known { Vec::new() } else { vec![format!("COPY --from={stage}: no such stage above")] };
    }
    let wrong = sources.iter().filter(|path| !root(path).exists() || ignored.contains(&path.as_str()));
    wrong.map(|path| format!("COPY {path}: not in the repository, or in .dockerignore")).collect()
}

/// Everything that is wrong with a Dockerfile.
fn problems(file: &str) -> Vec<String> {
    let manifest: toml::Table = std::fs::read_to_string(root("Cargo.toml")).unwrap().parse().unwrap();
    let rust_version = manifest["package"]["rust-version"].as_str().unwrap();
    let ignore = std::fs::read_to_string(root(".dockerignore")).unwrap();
    let ignored: Vec<&str> = ignore.lines().collect();
    let (mut stages, mut found, mut user) = (Vec::new(), Vec::new(), None);
    let mut programs = Vec::new();
    for Instruction { name, words } in instructions(file) {
        match name.as_str() {
            "FROM" => {
                found.extend(image_problem(&words[0], &stages, rust_version));
                stages.extend(words.get(2).cloned());
                (user, programs) = (None, Vec::new());
            }
            "COPY" => {
                found.extend(copy_problems(&words, &stages, &ignored));
                programs.extend(words.last().cloned());
            }
            "USER" => user = words[0].parse::<u32>().ok(),
            "RUN" if words.iter().any(|word| word == "cargo") => {
                let is_locked = words.iter().any(|word| word == "--locked");
                found.extend((!is_locked).then(|| "cargo without --locked".to_owned()));
            }
            "ENTRYPOINT" if !programs.iter().any(|path| path.ends_with("/bin/gneiss")) => {
                found.push("the last stage has no gneiss".to_owned());
            }
            _ => {}
        }
    }
    if user.is_none_or(|user| user == 0) {
        found.push("the last stage has no user other than root, by number".to_owned());
    }
    found
}

#[test]
fn dockerfiles_have_pinned_images_known_stages_and_a_user() {
    let mut found = Vec::new();
    for file in ["Dockerfile", "Dockerfile.cuda"] {
        found.extend(problems(file).into_iter().map(|problem| format!("{file}: {problem}")));
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn faults_of_a_dockerfile_are_found() {
    let stages = ["build".to_owned()];
    for (image, part) in [
        ("debian", "no tag"),
        ("debian:latest", "a version"),
        ("rust:12", "a version"),
        ("rust:1.2.3", "1.89"),
    ] {
        let problem = image_problem(image, &stages, "1.89").unwrap_or_default();
        assert!(problem.contains(part), "{image}: {problem}");
    }
    for image in ["build", "rust:1.89.0-slim", "nvidia/cuda:13.0.1-devel"] {
        assert_eq!(image_problem(image, &stages, "1.89"), None);
    }
    let copy = |words: &str| {
        let words: Vec<String> = words.split_whitespace().map(str::to_owned).collect();
        copy_problems(&words, &stages, &["src"]).len()
    };
    assert_eq!([copy("--from=build /x /y"), copy("Cargo.toml kernels /y"), copy(". .")], [0; 3]);
    assert_eq!([copy("--from=other /x /y"), copy("src /y"), copy("none Cargo.toml /y")], [1; 3]);
}

/// `make oracle` installs hadolint; with GNEISS_REQUIRE_HADOLINT the test fails without it.
#[test]
fn hadolint_finds_nothing() {
    let own = root(".venv/bin/hadolint");
    let hadolint = if own.is_file() { own } else { "hadolint".into() };
    let ran = Command::new(&hadolint).args(["Dockerfile", "Dockerfile.cuda"]).current_dir(root("")).output();
    match ran {
        Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout)),
        Err(error) if std::env::var_os("GNEISS_REQUIRE_HADOLINT").is_some() => {
            panic!("{}: {error}", hadolint.display())
        }
        Err(error) => eprintln!("skipped: {}: {error}; `make oracle` installs it", hadolint.display()),
    }
}
