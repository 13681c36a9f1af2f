//! The files in docs/src/cluster: they are well formed, and their commands are ones that the program has.

use super::commands::Help;
use super::markdown::root;
#[path = "../common/python.rs"]
mod python;
use std::process::Command;

/// The files, and the commands of gneiss in them.
const FILES: [(&str, &[&str]); 5] = [
    ("tune.sbatch", &["tune"]),
    ("sweep.sbatch", &["sweep", "sweep"]),
    ("mpijob.yaml", &["tune"]),
    ("sky.yaml", &["tune"]),
    ("haproxy.cfg", &["serve", "serve"]),
];

fn read(name: &str) -> String {
    std::fs::read_to_string(root().join("docs/src/cluster").join(name)).unwrap()
}

/// Commands of gneiss with their flags; other words after its name are prose. The arguments of an MPIJob are a list.
fn commands(text: &str) -> Vec<(String, Vec<String>)> {
    let text: String = text.replace("\\\n", " ").replace(['"', ',', '[', ']'], " ");
    let (known, mut found) = (Help::commands(), Vec::new());
    for line in text.lines() {
        let mut words = line
            .split_whitespace()
            .skip_while(|word| *word != "gneiss" && !word.ends_with("/gneiss"))
            .skip(1);
        if let Some(command) = words.next().filter(|word| known.iter().any(|known| known == word)) {
            let flags = words.filter(|word| word.starts_with("--")).map(str::to_owned).collect();
            found.push((command.to_owned(), flags));
        }
    }
    found
}

#[test]
fn commands_of_the_cluster_files_are_the_programs() {
    let mut names: Vec<String> = std::fs::read_dir(root().join("docs/src/cluster"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let mut expected = FILES.map(|(name, _)| name).to_vec();
    expected.sort_unstable();
    assert_eq!(names, expected);
    for (name, expected) in FILES {
        let found = commands(&read(name));
        assert_eq!(found.iter().map(|(command, _)| command.as_str()).collect::<Vec<_>>(), expected, "{name}");
        for (command, flags) in found {
            let help = Help::of(&command);
            assert!(!flags.is_empty(), "{name}: gneiss {command}");
            for flag in flags {
                assert!(help.has(&flag), "{name}: gneiss {command} has no {flag}");
            }
        }
    }
}

#[test]
fn batch_scripts_are_shell() {
    for name in ["tune.sbatch", "sweep.sbatch"] {
        let path = root().join("docs/src/cluster").join(name);
        let output = Command::new("bash").arg("-n").arg(&path).output().unwrap();
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        // Slurm reads options up to the first command.
        let text = read(name);
        let options = text.lines().take_while(|line| line.starts_with('#') || line.is_empty());
        let options: Vec<&str> = options.filter_map(|line| line.strip_prefix("#SBATCH ")).collect();
        assert!(options.len() >= 5 && options.iter().all(|option| option.starts_with("--")), "{options:?}");
        assert_eq!(options.len(), text.matches("#SBATCH").count(), "{name}: options after a command");
    }
}

/// Parsed by PyYAML, which transformers depends on; the shell in them by bash.
#[test]
fn job_files_are_yaml() {
    let Some(python) = python::python_with(&["yaml"], "GNEISS_REQUIRE_PEFT") else { return };
    let script = r#"
import subprocess, sys, yaml
job = yaml.safe_load(open("docs/src/cluster/mpijob.yaml"))
assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v2beta1", "MPIJob")
replicas = job["spec"]["mpiReplicaSpecs"]
assert replicas["Launcher"]["replicas"] == 1 and replicas["Launcher"]["restartPolicy"] == "OnFailure"
ranks = replicas["Worker"]["replicas"] * job["spec"]["slotsPerWorker"]
container = replicas["Launcher"]["template"]["spec"]["containers"][0]
assert container["command"] == ["mpirun"] and container["args"][:2] == ["-n", str(ranks)], container
for spec in replicas.values():
    pod = spec["template"]["spec"]
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} <= {volume["name"] for volume in pod["volumes"]}
sky = yaml.safe_load(open("docs/src/cluster/sky.yaml"))
assert sky["num_nodes"] > 1 and set(sky) <= {"name", "num_nodes", "resources", "workdir", "file_mounts", "setup", "run"}, sky
for part in ("setup", "run"):
    subprocess.run(["bash", "-n"], input=sky[part], text=True, check=True)
"#;
    let output = Command::new(python).current_dir(root()).args(["-c", script]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
