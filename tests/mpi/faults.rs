//! Ranks that die, and signals.

use super::place::{Place, Running};
use std::time::{Duration, Instant};

const TUNE: [&str; 2] = ["tune", "dogs.toml"];
/// Enough steps that a run is still under way when its launcher kills it, a second after it was asked to end: 3 an epoch, a
/// checkpoint every 2.
const LONG: [&str; 4] = ["--set", "train.num_epochs=100", "--set", "train.checkpoint_steps=2"];
/// Records of such a run: 3 steps and a validation an epoch.
const RECORDS: usize = 400;

fn whole(place: &Place) {
    place.mpirun(2, &[&TUNE[..], &LONG, &["--set", "name=whole"]].concat());
}

fn is_the_whole_run(place: &Place) {
    assert_eq!(place.records("runs/dogs"), place.records("runs/whole"));
    assert_eq!(place.adapter_bytes("runs/dogs"), place.adapter_bytes("runs/whole"), "another prompt");
}

/// The same command starts the run and goes on with it.
fn auto(place: &Place) -> Running {
    place.start(2, &[&TUNE[..], &LONG, &["--resume", "auto"]].concat())
}

#[test]
fn a_run_of_which_a_rank_was_killed_goes_on_bit_for_bit() {
    let Some(place) = Place::new() else { return };
    whole(&place);
    for (rank, records) in [(1, 16), (0, 45), (1, 80)] {
        let running = auto(&place);
        running.wait_for(&place, "runs/dogs", records);
        let killed = Instant::now();
        running.kill(rank, libc::SIGKILL);
        let (code, stderr) = running.ended();
        assert_ne!(code, Some(0), "{stderr}");
        assert!(killed.elapsed() < Duration::from_secs(10), "the job ended after {:?}", killed.elapsed());
        assert!(place.lines("runs/dogs") < RECORDS, "it had not ended by itself");
    }
    let (code, stderr) = auto(&place).ended();
    assert_eq!(code, Some(0), "{stderr}");
    assert!(stderr.contains("resumed    after step"), "{stderr}");
    is_the_whole_run(&place);
}

/// mpirun is asked to end, as a scheduler does at the end of the time: it kills its ranks a moment later.
#[test]
fn a_run_whose_launcher_was_asked_to_end_goes_on_bit_for_bit() {
    let Some(place) = Place::new() else { return };
    whole(&place);
    let running = auto(&place);
    running.wait_for(&place, "runs/dogs", 50);
    running.signal(libc::SIGTERM);
    let (code, stderr) = running.ended();
    assert_ne!(code, Some(0), "{stderr}");
    let lines = place.lines("runs/dogs");
    assert!(lines < RECORDS, "it had not ended by itself");
    let (code, stderr) = auto(&place).ended();
    assert_eq!(code, Some(0), "{stderr}");
    is_the_whole_run(&place);
}

/// SIGUSR1 to mpirun reaches the ranks: all end after the same step.
#[test]
fn a_user_signal_ends_all_ranks_after_the_step() {
    let Some(place) = Place::new() else { return };
    whole(&place);
    let running = auto(&place);
    running.wait_for(&place, "runs/dogs", 50);
    running.signal(libc::SIGUSR1);
    let (code, stderr) = running.ended();
    assert_eq!(code, Some(130), "{stderr}");
    assert!(stderr.contains("interrupted after step"), "{stderr}");
    let summary = place.json("runs/dogs/summary.json");
    assert_eq!(summary["status"]["state"], "interrupted");
    let (code, stderr) = auto(&place).ended();
    assert_eq!(code, Some(0), "{stderr}");
    is_the_whole_run(&place);
}
