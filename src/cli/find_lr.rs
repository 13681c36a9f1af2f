//! `gneiss tune --find-lr`: finds a learning rate before the run.

use super::{interrupt, progress, text};
use gneiss::config::Config;
use gneiss::files::{write_atomically, write_json};
use gneiss::report::plot::{self, Size};
use gneiss::run::Tuning;
use gneiss::session::Session;
use gneiss::tune::range_test::{RANGE, STEPS};
use gneiss::tune::{Limits, Observer, RangeTest, StepRecord, Task, TeacherExamples, range_test};
use gneiss::{Error, Result};
use indicatif::ProgressBar;
use std::path::{Path, PathBuf};

/// Runs the test and writes it with its curve into `RUNS/NAME.find-lr/`; returns the test and the folder.
pub fn run(config: &Config, session: &Session) -> anyhow::Result<(RangeTest, PathBuf)> {
    let tuning = Tuning::prepare(config, session, None)?;
    tuning.data.notes.iter().for_each(|text| status!("note       {text}"));
    tuning.data.warnings.iter().for_each(super::warn);
    let task = Task {
        model: &session.model,
        train: &tuning.data.train.1.examples,
        validation: &[],
        teacher: tuning
            .data
            .teacher
            .as_ref()
            .map(|teacher| TeacherExamples { validation: &[], ..teacher.examples() }),
        options: &config.train,
        limits: tuning.plan.limits,
    };
    let _guard = interrupt::Guard::new()?;
    let bar = progress::bar(STEPS, "find-lr", "{prefix:>10} {bar:30} {pos}/{len} {msg}, {eta} left");
    let mut watch = RangeTestProgress { bar };
    let found = range_test(task, &tuning.initial, &mut watch)?;
    watch.bar.finish_and_clear();
    let folder = Path::new(&config.runs).join(format!("{}.find-lr", config.name));
    std::fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
    write_json(&folder.join("range_test.json"), &found)?;
    if let Some(svg) = plot::range_test(&found.points, found.suggestion, Size::WIDE)? {
        write_atomically(&folder.join("range_test.svg"), |out| out.write_all(svg.as_bytes()))?;
    }
    if let Some(png) = plot::range_test_png(&found.points, found.suggestion, Size::WIDE)? {
        write_atomically(&folder.join("range_test.png"), |out| out.write_all(&png))?;
    }
    Ok((found, folder))
}

/// Prints every ninth rate, and the suggestion.
pub fn print(found: &RangeTest, folder: &Path) {
    let mut rows = vec![["learning rate", "loss", "smoothed"].map(str::to_owned).to_vec()];
    let last = found.points.len().saturating_sub(1);
    for (_, point) in found.points.iter().enumerate().filter(|(i, _)| i % 9 == 0 || *i == last) {
        rows.push(vec![
            format!("{:.1e}", point.learning_rate),
            format!("{:.4}", point.loss),
            format!("{:.4}", point.smoothed),
        ]);
    }
    println!("{}", text::table(&rows));
    match found.suggestion {
        Some(rate) => println!("\nsuggested  --set train.learning_rate={rate:.1e}"),
        None => {
            println!("\nthe loss never fell between {:e} and {:e}: no rate to suggest", RANGE[0], RANGE[1])
        }
    }
    println!("curve      {}", folder.join("range_test.png").display());
}

struct RangeTestProgress {
    bar: ProgressBar,
}

impl Observer for RangeTestProgress {
    fn step(&mut self, record: &StepRecord) -> Result<()> {
        self.bar.set_message(format!("lr {:.1e}, loss {:.4}", record.learning_rate, record.loss));
        self.bar.inc(1);
        Ok(())
    }

    fn skipped(&mut self, step: usize, what: &str, value: f64) -> Result<()> {
        progress::line(&self.bar, &format!("step {step}: {what} is {value}: the test ends here"));
        Ok(())
    }

    fn out_of_memory(&mut self, limits: Limits) -> Result<()> {
        progress::out_of_memory(&self.bar, limits);
        Ok(())
    }

    fn interrupted(&self) -> bool {
        interrupt::asked()
    }
}
