//! The page of a sweep.

use crate::runs::tutorial;
use gneiss::config::Config;
use gneiss::layout::{CONFIG, SWEEP, TRIALS, VALIDATION};
use gneiss::report;
use gneiss::run::Status;
use gneiss::sweep::{SweepRecord, SweepResult, ValidationRows};
use std::fs;
use std::path::{Path, PathBuf};

const PARAMETERS: &str = "\n[sweep.parameters]\n\
    \"train.learning_rate\" = { min = 0.001, max = 0.1, log = true, count = 4 }\n\
    \"prompt.num_virtual_tokens\" = { values = [25, 100] }\n\
    \"prompt.init_text\" = { values = [\"Is the customer satisfied? 1 or 0.\", \"Say <b>1</b> or 0.\"] }\n";

/// 16 trials, of which 11 were pruned after two epochs and one failed; only the first `begun` have begun.
pub fn folder(under: &Path, begun: usize) -> PathBuf {
    let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
    let text = fs::read_to_string(configs.join("tutorial.toml")).unwrap() + PARAMETERS;
    let mut config = Config::parse(&text, "sweep", &[]).unwrap();
    let path = under.join("sixteen");
    (config.name, config.runs) = ("sixteen".into(), under.display().to_string());
    fs::create_dir_all(path.join(TRIALS)).unwrap();
    fs::write(path.join(CONFIG), config.to_toml().unwrap()).unwrap();
    let stays = [3, 5, 7, 11, 13];
    for (i, trial) in config.trials().unwrap().into_iter().enumerate().take(begun) {
        let number = i + 1;
        let is_pruned = !stays.contains(&number) && number != 16;
        let mut content = tutorial();
        (content.config, content.evaluation) = (trial.config, None);
        let factor = if is_pruned { 1.3 + 0.4 * i as f64 } else { 0.8 + 0.012 * i as f64 };
        for epoch in &mut content.epochs {
            epoch.validation_loss = epoch.validation_loss.map(|loss| factor * loss);
        }
        let tokens = content.config.prompt.num_virtual_tokens;
        let summary = &mut content.summary;
        summary.num_virtual_tokens = tokens;
        if is_pruned {
            summary.status = Status::Pruned;
            (summary.epochs, summary.steps, summary.kept_epoch, summary.kept_step) = (2, 90, 2, 90);
            content.epochs.truncate(2);
            content.steps.truncate(90);
        }
        if number == 16 {
            let error = "step 1: the loss is NaN; a lower train.learning_rate may help".into();
            (summary.status, summary.validation_loss, summary.epochs) = (Status::Failed { error }, None, 0);
            (content.epochs, content.steps) = (Vec::new(), Vec::new());
        } else {
            summary.validation_loss =
                content.epochs.iter().filter_map(|epoch| epoch.validation_loss).reduce(f64::min);
        }
        let step = summary.kept_step;
        let loss = summary.validation_loss.unwrap_or(0.0);
        let run = content.write(&path.join(TRIALS), &format!("{number:03}"));
        let rows = ValidationRows {
            step,
            nll: (0..60).map(|row| 2.0 * loss * (0.5 + f64::from(row % 5) / 4.0)).collect(),
            target_tokens: vec![2; 60],
            correct: (0..60).map(|row| row >= if is_pruned { 9 } else { 2 + i / 4 }).collect(),
        };
        fs::write(run.join(VALIDATION), serde_json::to_string(&rows).unwrap()).unwrap();
        fs::write(run.join("report.html"), "").unwrap();
    }
    let pruned = (1..=15).filter(|number| !stays.contains(number)).collect();
    let mut records = vec![SweepRecord::Started { trials: 16, max_prompts: 1 }];
    if begun == 16 {
        records.push(SweepRecord::Rung { epoch: 2, kept: stays.to_vec(), pruned });
        let best =
            SweepRecord::Best { trial: 3, validation_loss: Some(0.037), validation_accuracy: Some(0.95) };
        records.push(best);
    }
    let lines = records.iter().map(|record| serde_json::to_string(record).unwrap() + "\n");
    fs::write(path.join(SWEEP), lines.collect::<String>()).unwrap();
    path
}

#[test]
fn a_page_has_all_trials_the_best_first() {
    let under = tempfile::tempdir().unwrap();
    let result = SweepResult::read(&folder(under.path(), 16)).unwrap();
    let numbers: Vec<usize> = result.trials.iter().map(|trial| trial.trial).collect();
    assert_eq!(numbers[..5], [3, 5, 7, 11, 13]);
    assert_eq!(numbers[15], 16, "a failed trial is the last");
    assert_eq!(result.best().unwrap().trial, 3);
    let near: Vec<usize> = result.trials.iter().filter(|t| t.is_near_best).map(|t| t.trial).collect();
    let best = result.trials[0].validation_loss.unwrap();
    for trial in &result.trials[1..5] {
        let distance = trial.validation_loss.unwrap().value - best.value;
        assert_eq!(near.contains(&trial.trial), distance <= best.standard_error, "{}", trial.trial);
    }
    assert!(!near.is_empty() && near.len() < 4, "{near:?}: some are told apart, and some are not");
    let page = report::sweep_page(&result).unwrap();
    for part in [
        "16 trials, 10 pruned, 1 failed",
        "not told apart",
        "Say &lt;b&gt;1&lt;&#x2f;b&gt; or 0.",
        "trials&#x2f;003&#x2f;report.html",
        "After epoch 2: trials 003, 005, 007, 011, 013 stayed",
        "learning_rate",
        "the loss is NaN",
    ] {
        assert!(page.contains(part), "{part}");
    }
    assert!(page.matches("<polyline").count() > 16 + 15, "a line a trial in both pictures");
    assert!(!page.contains("<script"));
    let written = report::write_sweep(&result).unwrap();
    assert_eq!(fs::read_to_string(written).unwrap(), page);
}

#[test]
fn a_sweep_that_has_hardly_begun_has_a_page() {
    let under = tempfile::tempdir().unwrap();
    for begun in [0, 3] {
        let result = SweepResult::read(&folder(under.path(), begun)).unwrap();
        assert!(result.best().is_none());
        let page = report::sweep_page(&result).unwrap();
        assert!(page.contains("not begun") && page.contains("gneiss sweep --resume"), "{page}");
    }
}
