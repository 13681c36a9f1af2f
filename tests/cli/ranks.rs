//! Starting under a launcher, `--resume auto`, and signals; several processes of MPI are tested in `tests/mpi`.

use super::resume::{WEIGHTS, ended};
use super::*;

const LONG: [&str; 6] =
    ["tune", "dogs.toml", "--set", "train.num_epochs=40", "--set", "train.checkpoint_steps=2"];

/// Runs `gneiss` as a launcher would that started several.
fn under(place: &Place, variables: &[(&str, &str)], args: &[&str]) -> Assert {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gneiss"));
    command.current_dir(place.0.path()).env("HF_HUB_OFFLINE", "1").envs(variables.iter().copied());
    command.args(args).assert()
}

#[test]
fn several_processes_without_mpi_are_refused() {
    let place = Place::new();
    for variable in ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"] {
        for (args, what) in [
            (&["generate", "--model", "model", "x"][..], "gneiss generate"),
            (&["inspect", "dogs.toml"], "gneiss inspect"),
            (&["sweep", "--collect", "runs/dogs"], "gneiss sweep --collect"),
            (&["tune", "dogs.toml"], "this build of gneiss"),
            (&["sweep", "dogs.toml"], "this build of gneiss"),
            (&["eval", "dogs.toml", "--adapter", "x"], "this build of gneiss"),
        ] {
            if cfg!(feature = "mpi") && what.starts_with("this") {
                continue;
            }
            let (_, stderr) = texts(&under(&place, &[(variable, "3")], args).code(2));
            let expected = format!("{what}: expected one process, found 3 ({variable}=3)");
            assert!(stderr.contains(&expected) && stderr.contains("hint: "), "{stderr}");
        }
    }
    assert!(!place.path("runs").exists(), "nothing was written");
    // One process is no matter of a launcher, nor is a batch script of a job of four.
    let alone = [("OMPI_COMM_WORLD_SIZE", "1"), ("SLURM_NTASKS", "4")];
    under(&place, &alone, &["inspect", "dogs.toml"]).success();
}

/// The same command starts a run, goes on with it, and does nothing when it has ended.
#[cfg(unix)]
#[test]
fn resume_auto_starts_a_run_or_goes_on() {
    let place = Place::new();
    place.gneiss(LONG.into_iter().chain(["--set", "name=whole"])).success();
    let auto: Vec<&str> = LONG.into_iter().chain(["--resume", "auto"]).collect();
    for records in [20, 90] {
        let child = place.spawn(&auto);
        super::resume::signal_after(&place, &child, records, libc::SIGKILL);
        ended(child);
    }
    let (_, stderr) = texts(&place.gneiss(auto.clone()).success());
    assert!(stderr.contains("resumed    after step"), "{stderr}");
    assert_eq!(place.records("runs/dogs"), place.records("runs/whole"));
    let weights = |run: &str| std::fs::read(place.path(run).join(WEIGHTS)).unwrap();
    assert_eq!(weights("runs/dogs"), weights("runs/whole"));
    let (_, stderr) = texts(&place.gneiss(auto.clone()).success());
    assert!(stderr.contains("after step 120 of 120"), "{stderr}");
    // Settings that a run under way can't change are refused, not taken from either side.
    place.refuses(
        auto.into_iter().chain(["--set", "train.seed=9"]),
        &["--resume", "train.seed", "start a new run"],
    );
    place.refuses(["tune", "--resume", "auto"], &["--resume auto", "configuration"]);
    place.refuses(["tune", "dogs.toml", "--resume", "runs/dogs"], &["--resume", "dogs.toml", "auto"]);
    assert!(!place.path("runs/dogs~1").exists(), "the run was not started again");
}

#[cfg(unix)]
#[test]
fn a_user_signal_ends_the_run_after_its_step() {
    let place = Place::new();
    place.gneiss(LONG.into_iter().chain(["--set", "name=whole"])).success();
    let child = place.spawn(&LONG);
    super::resume::signal_after(&place, &child, 20, libc::SIGUSR1);
    let (status, stderr) = ended(child);
    assert_eq!(status.code(), Some(130), "{stderr}");
    assert!(stderr.contains("go on with: gneiss tune --resume runs/dogs"), "{stderr}");
    place.gneiss(["tune", "--resume", "runs/dogs"]).success();
    assert_eq!(place.records("runs/dogs"), place.records("runs/whole"));
}

/// A run of long steps and no checkpoint before its end is killed right after SIGTERM: it goes on from the step before.
#[cfg(unix)]
#[test]
fn sigterm_writes_the_last_step_at_once() {
    let place = Place::new();
    place.write("train.csv", &reviews(240));
    let args = ["tune", "dogs.toml", "--set", "train.batch_size=40", "--set", "train.num_epochs=2"];
    place.gneiss(args.into_iter().chain(["--set", "name=whole"])).success();
    let mut child = place.spawn(&args);
    super::resume::signal_after(&place, &child, 2, libc::SIGTERM);
    let checkpoint = place.path("runs/dogs/checkpoint.safetensors");
    let until = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while !checkpoint.is_file() {
        assert!(std::time::Instant::now() < until, "no checkpoint within a minute");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    // It may have ended by itself.
    let _ended_before = child.kill();
    ended(child);
    let (_, stderr) = texts(&place.gneiss(["tune", "--resume", "runs/dogs"]).success());
    assert!(!stderr.contains("after step 0"), "{stderr}");
    assert_eq!(place.records("runs/dogs"), place.records("runs/whole"));
    let weights = |run: &str| std::fs::read(place.path(run).join(WEIGHTS)).unwrap();
    assert_eq!(weights("runs/dogs"), weights("runs/whole"));
}
