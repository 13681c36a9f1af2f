//! `gneiss sweep --shard` and `--collect`: the trials of a sweep on several machines.

use super::*;

const SWEEP: &str = r#"
[sweep]
reduction_factor = 1

[sweep.parameters]
"train.learning_rate" = { values = [0.02, 0.08, 0.005] }
"prompt.num_virtual_tokens" = { values = [3, 5] }
"#;

/// Two shards that do not know of each other give the sweep that one process gives: the same prompts, the same choice.
#[test]
fn shards_are_the_sweep_of_one_process() {
    let place = Place::new();
    place.write("sweep.toml", &format!("{CONFIG}{SWEEP}"));
    place.gneiss(["sweep", "sweep.toml", "--set", "name=one"]).success();
    let shard = |shard: &'static str| ["sweep", "sweep.toml", "--set", "name=two", "--shard", shard];
    let (stdout, stderr) = texts(&place.gneiss(shard("1/2")).success());
    assert!(stderr.contains("shard      1/2: 3 of 6 trials"), "{stderr}");
    assert!(stdout.contains("gneiss sweep --collect runs/two"), "{stdout}");
    let has_begun = |trial: usize| place.path(&format!("runs/two/trials/{trial:03}")).exists();
    assert_eq!((1..=6).map(has_begun).collect::<Vec<_>>(), [false, true, false, true, false, true]);
    place.refuses(["sweep", "--collect", "runs/two"], &["found 3 that have not", "001, 003, 005"]);
    place.gneiss(shard("0/2")).success();
    // Started again there is nothing left to do, and nothing is moved aside.
    place.gneiss(shard("0/2")).success();
    assert!(!place.path("runs/two~1").exists() && !place.path("runs/two/best").exists());
    let (stdout, _) = texts(&place.gneiss(["sweep", "--collect", "runs/two"]).success());
    assert!(stdout.contains("best       runs/two/best"), "{stdout}");
    let best = |run: &str| std::fs::read_link(place.path(run).join("best")).unwrap();
    assert_eq!(best("runs/one"), best("runs/two"));
    for trial in 1..=6 {
        let weights = |run: &str| {
            let path = format!("{run}/trials/{trial:03}/adapter/adapter_model.safetensors");
            std::fs::read(place.path(&path)).unwrap()
        };
        assert_eq!(weights("runs/one"), weights("runs/two"), "trial {trial}");
    }
    assert!(place.path("runs/two/sweep.html").is_file());
}

#[test]
fn bad_shards_are_refused() {
    let place = Place::new();
    place.write("sweep.toml", &format!("{CONFIG}{SWEEP}"));
    let pruning = ["sweep", "sweep.toml", "--shard", "0/2", "--set", "sweep.reduction_factor=2"];
    place.refuses(pruning, &["sweep.reduction_factor", "--shard", "found 2"]);
    place.refuses(["sweep", "sweep.toml", "--shard", "2/2"], &["I/N", "2/2"]);
    assert!(!place.path("runs").exists());
    place.gneiss(["sweep", "sweep.toml", "--shard", "0/6"]).success();
    let other = ["sweep", "sweep.toml", "--shard", "1/6", "--set", "train.seed=5"];
    place.refuses(other, &["config.toml", "another", "new name"]);
    place.refuses(["sweep", "--collect", "runs"], &["sweep"]);
}
