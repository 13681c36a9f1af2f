//! The results as tables, as JSON, and as rows of a CSV file.

use super::disturbance::Steps;
use super::packing::{self, ByTurns};
use super::text;
use gneiss::bench::canary::CanaryRate;
use gneiss::bench::{Case, Launches, MatmulPeak, Measured, OpShare, StepProducts};
use gneiss::config::PromptKind;
use gneiss::{Error, Result};
use serde::Serialize;
use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};

/// All cases of a command.
#[derive(Serialize)]
pub struct BenchReport {
    pub version: &'static str,
    pub date: String,
    pub model: String,
    /// The format of the weights, or `random`.
    pub weights: String,
    pub parameters: usize,
    pub weight_bytes: usize,
    pub device: &'static str,
    pub device_name: String,
    /// dtype of the weights.
    pub dtype: &'static str,
    pub activations: &'static str,
    pub examples: String,
    pub steps: usize,
    pub warmup: usize,
    pub matmul_peak: MatmulPeak,
    /// `null` on the CPU, and if the GPU has no memory for them.
    pub step_products: Option<StepProducts>,
    /// `null` on the CPU.
    pub launches: Option<Launches>,
    /// The canary that tells quiet steps from disturbed ones; `null` on a GPU.
    pub canary: Option<CanaryRate>,
    pub cases: Vec<CaseReport>,
}

/// One case.
#[derive(Serialize)]
pub struct CaseReport {
    #[serde(flatten)]
    pub measured: Measured,
    /// The same prompts in one step after another; `null` if there is one.
    pub by_turns: Option<ByTurns>,
    /// The most memory of the device in use after a step, by any process; `null` on the CPU and on Metal.
    pub device_memory_bytes: Option<u64>,
    /// `null` without `--profile`.
    pub ops: Option<Vec<OpShare>>,
    /// Number of profiled steps during which the machine was disturbed, which are not left out; `null` without
    /// `--profile` and on a GPU.
    pub disturbed_profiled_steps: Option<usize>,
}

/// A case's sizes as text.
pub fn label(case: Case) -> String {
    let Case { batch_size, accumulate_steps, prompts, .. } = case;
    let of_one = format!(
        "batch {batch_size}, accumulation {accumulate_steps}, {} virtual tokens",
        virtual_tokens(case)
    );
    if prompts == 1 { of_one } else { format!("{of_one}, {prompts} prompts") }
}

/// A case's sizes in a table.
pub(super) fn sizes(case: Case) -> String {
    let Case { batch_size, accumulate_steps, prompts, .. } = case;
    let of_one = format!("{batch_size} x {accumulate_steps}, {}", virtual_tokens(case));
    if prompts == 1 { of_one } else { format!("{of_one}, {prompts} prompts") }
}

/// The number of virtual tokens, and their kind if they are no embeddings.
fn virtual_tokens(case: Case) -> String {
    match case.prompt_kind {
        PromptKind::Embeddings => case.num_virtual_tokens.to_string(),
        PromptKind::Prefix => format!("{} (keys and values)", case.num_virtual_tokens),
    }
}

impl BenchReport {
    /// Prints it to stdout.
    pub fn print(&self, json: bool) -> anyhow::Result<()> {
        if json {
            println!("{}", serde_json::to_string(self)?);
            return Ok(());
        }
        println!(
            "gneiss {}: {} ({} parameters, weights {}, {}), {} on {}: {}",
            self.version,
            self.model,
            si(self.parameters as f64, ""),
            self.weights,
            text::bytes(self.weight_bytes as u64),
            self.dtype,
            self.device,
            self.device_name
        );
        println!("examples: {}; {} steps after {} of warm-up", self.examples, self.steps, self.warmup);
        println!("{}", self.peak());
        if let Some(CanaryRate { work, threads, flops_per_second, quiet_share }) = self.canary {
            let rate = si(flops_per_second, "FLOP/s");
            println!(
                "canary: {rate} per thread at best, {threads} threads ({work}); a step is quiet if each thread reaches \
                 {quiet_share} of that before and after it"
            );
        }
        println!();
        println!("{}", text::table(&self.rows()));
        for line in self.launch_lines() {
            println!("{line}");
        }
        if let Some(rows) = packing::rows(&self.cases) {
            println!("\n{}", text::table(&rows));
        }
        for case in &self.cases {
            if let Some(ops) = &case.ops {
                println!("\n{}, profiled\n{}", label(case.measured.case), text::table(&op_rows(ops)));
            }
        }
        Ok(())
    }

    /// The rates of products on the device, in a line or two.
    fn peak(&self) -> String {
        let MatmulPeak { size, dtype, instructions, flops_per_second, .. } = self.matmul_peak;
        let mut text = format!(
            "matmul peak: {}{}, of [{size}, {size}] x [{size}, {size}] in {dtype}{}",
            si(flops_per_second, "FLOP/s"),
            self.matmul_peak.sustained_seconds.map(|s| format!(" over {s} s")).unwrap_or_default(),
            instructions.map(|name| format!(" by {name}")).unwrap_or_default()
        );
        match self.matmul_peak.data_sheet_flops_per_second {
            Some(most) => {
                let share = 100.0 * flops_per_second / most;
                text += &format!("; {share:.1} % of the data sheet's {}", si(most, "FLOP/s"));
            }
            None if self.device == "cpu" => {}
            None => text += "; no data sheet's figure is known of this device in this dtype",
        }
        if let Some(step) = &self.step_products {
            let share = 100.0 * step.flops_per_second / flops_per_second;
            let rows = step.products.first().map_or(0, |p| p.shape[0]);
            text += &format!(
                "\nmatmul at a layer's shapes: {} over {} s, {share:.1} % of that peak, {rows} rows; forward / backward:",
                si(step.flops_per_second, "FLOP/s"),
                step.sustained_seconds
            );
            for p in &step.products {
                let rates = [p.forward_flops_per_second, p.backward_flops_per_second];
                let [forward, backward] = rates.map(|rate| si(rate, "FLOP/s"));
                text += &format!("\n  {:<8} {:?}  {forward} / {backward}", p.layer, p.shape);
            }
        }
        text
    }

    /// Whether the steps are bound by their launches, one line for each case.
    fn launch_lines(&self) -> Vec<String> {
        let Some(launches) = &self.launches else { return Vec::new() };
        let line = |CaseReport { measured: m, .. }: &CaseReport| {
            let sizes = sizes(m.case);
            let seconds = m.figures.step_seconds.median;
            format!(
                "launches: {} a second alone; those of a step of {} rows take {} ms, {:.1} % of {sizes}, which \
                 is {}bound by launches",
                digits(launches.per_second),
                launches.rows,
                digits(launches.step_seconds * 1e3),
                100.0 * launches.launch_share(seconds),
                if launches.bound(seconds) { "" } else { "not " }
            )
        };
        self.cases.iter().map(line).collect()
    }

    fn rows(&self) -> Vec<Vec<String>> {
        let head = [
            "batch x accumulation, virtual tokens", "step, ms (p10-p90)", "examples/s", "tokens/s", "rows/s",
            "rows a step", "at a time", "useful work a step", "a second", "of peak", "of data sheet",
            "peak memory", "disturbed steps",
        ];
        let row = |CaseReport { measured: m, .. }: &CaseReport| {
            vec![
                sizes(m.case),
                format!(
                    "{} ({}-{})",
                    digits(m.figures.step_seconds.median * 1e3),
                    digits(m.figures.step_seconds.p10 * 1e3),
                    digits(m.figures.step_seconds.p90 * 1e3)
                ),
                digits(m.figures.examples_per_second.median),
                digits(m.figures.tokens_per_second),
                digits(m.figures.rows_per_second),
                digits(m.figures.rows_per_step),
                match m.recompute {
                    0 => m.max_rows.to_string(),
                    blocks => format!("{}, {blocks} layers recomputed", m.max_rows),
                },
                si(m.figures.flops_per_step, "FLOP"),
                si(m.figures.flops_per_second, "FLOP/s"),
                format!("{:.1} %", 100.0 * m.share_of_peak),
                m.share_of_data_sheet.map_or("unknown".into(), |share| format!("{:.1} %", 100.0 * share)),
                m.peak_memory_bytes.map_or("unknown".into(), text::bytes),
                Steps { counted: self.steps, disturbed: m.disturbed_steps, used: m.used_steps }.cell(),
            ]
        };
        std::iter::once(head.map(str::to_owned).to_vec()).chain(self.cases.iter().map(row)).collect()
    }
}

fn op_rows(ops: &[OpShare]) -> Vec<Vec<String>> {
    let head = ["op", "calls a step", "ms a step", "share"].map(str::to_owned).to_vec();
    let row = |op: &OpShare| {
        vec![
            op.op.clone(),
            if op.calls_per_step > 0.0 { digits(op.calls_per_step) } else { String::new() },
            digits(op.seconds_per_step * 1e3),
            format!("{:.1} %", 100.0 * op.share),
        ]
    };
    std::iter::once(head).chain(ops.iter().map(row)).collect()
}

/// At least three digits, and no more decimals than needed.
pub(super) fn digits(value: f64) -> String {
    let decimals = if value.abs() >= 100.0 {
        0
    } else if value.abs() >= 10.0 {
        1
    } else {
        2
    };
    format!("{value:.decimals$}")
}

/// With an SI prefix before the unit.
fn si(value: f64, unit: &str) -> String {
    let prefixes = [(1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")];
    let found = prefixes.iter().find(|(power, _)| value >= *power);
    let (power, prefix) = found.copied().unwrap_or((1.0, ""));
    format!("{} {prefix}{unit}", digits(value / power)).trim_end().to_owned()
}

/// A file to which rows are appended.
pub struct Csv {
    path: PathBuf,
}

impl Csv {
    const HEADER: [&str; 38] = [
        "date", "version", "device", "device_name", "dtype", "model", "parameters", "batch_size",
        "accumulate_steps", "num_virtual_tokens", "prompt_kind", "prompts", "max_rows", "recompute", "steps",
        "disturbed_steps", "used_steps", "tokens_per_step", "rows_per_step", "step_seconds_p50",
        "step_seconds_p10", "step_seconds_p90", "examples_per_second_p50", "examples_per_second_p10",
        "examples_per_second_p90", "tokens_per_second", "rows_per_second", "flops_per_step",
        "flops_per_second", "matmul_peak_flops_per_second", "share_of_peak", "data_sheet_flops_per_second",
        "share_of_data_sheet", "step_products_flops_per_second", "launches_per_second",
        "launches_step_seconds", "peak_memory_bytes", "device_memory_bytes",
    ];

    /// Opens a file before the measurement: a new one gets its header, an existing one must have it.
    pub fn open(path: &Path) -> Result<Self> {
        let csv = Self { path: path.to_path_buf() };
        let length = csv.file()?.metadata().map_err(Error::io(path))?.len();
        if length == 0 {
            csv.write(Self::HEADER.map(str::to_owned))?;
            return Ok(csv);
        }
        let found = csv::Reader::from_path(path).and_then(|mut reader| reader.headers().cloned());
        let problem = match found {
            Ok(header) if header.iter().eq(Self::HEADER) => return Ok(csv),
            Ok(header) => format!("found `{}`", header.iter().collect::<Vec<_>>().join(",")),
            Err(error) => error.to_string(),
        };
        let expected = format!("expected a file of this version's columns (`{}`)", Self::HEADER.join(","));
        let problems = vec![format!("line 1: {expected}, {problem}; name another file")];
        Err(Error::Data { path: path.to_path_buf(), problems, more: 0 })
    }

    /// Appends the row of a case.
    pub fn append(&self, report: &BenchReport, case: &CaseReport) -> Result<()> {
        let m = &case.measured;
        let bytes = |bytes: Option<u64>| bytes.map_or_else(String::new, |n| n.to_string());
        let float = |value: Option<f64>| value.map_or_else(String::new, |x| x.to_string());
        self.write([
            report.date.clone(),
            report.version.to_owned(),
            report.device.to_owned(),
            report.device_name.clone(),
            report.dtype.to_owned(),
            report.model.clone(),
            report.parameters.to_string(),
            m.case.batch_size.to_string(),
            m.case.accumulate_steps.to_string(),
            m.case.num_virtual_tokens.to_string(),
            m.case.prompt_kind.to_string(),
            m.case.prompts.to_string(),
            m.max_rows.to_string(),
            m.recompute.to_string(),
            report.steps.to_string(),
            m.disturbed_steps.map_or_else(String::new, |n| n.to_string()),
            m.used_steps.to_string(),
            m.figures.tokens_per_step.to_string(),
            m.figures.rows_per_step.to_string(),
            m.figures.step_seconds.median.to_string(),
            m.figures.step_seconds.p10.to_string(),
            m.figures.step_seconds.p90.to_string(),
            m.figures.examples_per_second.median.to_string(),
            m.figures.examples_per_second.p10.to_string(),
            m.figures.examples_per_second.p90.to_string(),
            m.figures.tokens_per_second.to_string(),
            m.figures.rows_per_second.to_string(),
            m.figures.flops_per_step.to_string(),
            m.figures.flops_per_second.to_string(),
            report.matmul_peak.flops_per_second.to_string(),
            m.share_of_peak.to_string(),
            float(report.matmul_peak.data_sheet_flops_per_second),
            float(m.share_of_data_sheet),
            float(report.step_products.as_ref().map(|p| p.flops_per_second)),
            float(report.launches.map(|l| l.per_second)),
            float(report.launches.map(|l| l.step_seconds)),
            bytes(m.peak_memory_bytes),
            bytes(case.device_memory_bytes),
        ])
    }

    fn file(&self) -> Result<File> {
        OpenOptions::new().create(true).append(true).open(&self.path).map_err(Error::io(&self.path))
    }

    fn write(&self, row: [String; Self::HEADER.len()]) -> Result<()> {
        let mut writer = csv::Writer::from_writer(self.file()?);
        writer.write_record(&row).and_then(|()| Ok(writer.flush()?)).map_err(|error| Error::Data {
            path: self.path.clone(),
            problems: vec![error.to_string()],
            more: 0,
        })
    }
}
