//! `gneiss check`: checks that a device computes the same as the CPU.

mod large;

use super::text;
use clap::Args;
use gneiss::check::{self, CheckTarget, Comparison, Curves, OPS, RunSize};
use gneiss::config::DtypeChoice;
use gneiss::device::DeviceChoice;
use gneiss::session;

use candle_core::{DType, Device};

/// Compares every op of a tuning step on a device with the CPU in f64, then a short tuning run with the same run on the
/// CPU. Needs no model and no files. Exit code 1 if a difference is larger than allowed.
#[derive(Args)]
pub struct Check {
    /// auto, cpu, cuda[:n] or metal.
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
    /// dtypes of the activations, such as f32,bf16; on the CPU only f32. Default: all that the device has.
    #[arg(long, value_delimiter = ',')]
    dtype: Vec<DtypeChoice>,
    /// Ops to compare. Default: all.
    #[arg(long, value_delimiter = ',')]
    op: Vec<String>,
    /// Optimizer steps of the runs; 0 leaves them out.
    #[arg(long, default_value_t = 30)]
    steps: usize,
    /// Compare at the sizes of real models instead, with plain ops on the same device in f32, and a step of 8,300 rows
    /// in several passes with the same step in one. Cases that do not fit into the device's memory are listed.
    #[arg(long, conflicts_with = "steps")]
    large: bool,
    /// Divide the sizes of --large by this.
    #[arg(long, value_name = "N", default_value_t = 1, requires = "large", value_parser = scale)]
    scale: usize,
    /// Print every comparison as JSON.
    #[arg(long)]
    json: bool,
}

fn scale(text: &str) -> Result<usize, String> {
    // With a larger scale, the smallest model has too few feed-forward columns for kernels that read 8 elements at
    // once.
    text.trim().parse().ok().filter(|n| (1..=64).contains(n)).ok_or_else(|| "expected 1 to 64".into())
}

/// The results in one dtype.
#[derive(serde::Serialize)]
struct DtypeResults {
    dtype: &'static str,
    comparisons: Vec<Comparison>,
    runs: Vec<Curves>,
}

impl Check {
    /// Runs the subcommand.
    pub fn run(self) -> anyhow::Result<()> {
        let device = super::device(self.device)?;
        let all = if device.is_cpu() { vec![DType::F32] } else { vec![DType::F32, DType::BF16, DType::F16] };
        let mut dtypes: Vec<DType> = self.dtype.iter().map(|d| session::dtype(*d, &device)).collect();
        if dtypes.is_empty() {
            dtypes.clone_from(&all);
        }
        if let Some(other) = dtypes.iter().find(|d| !all.contains(d)) {
            let expected = all.iter().map(|d| d.as_str()).collect::<Vec<_>>().join(", ");
            let problem = format!("--dtype: expected of {expected} on this device, found {}", other.as_str());
            anyhow::bail!(gneiss::Error::Invalid(problem));
        }
        if std::env::var_os("NVIDIA_TF32_OVERRIDE").is_some_and(|v| v != "0") && !device.is_cpu() {
            status!("NVIDIA_TF32_OVERRIDE is set: products in f32 are computed in TF32, with errors of 1e-3");
        }
        if self.large {
            return large::run(&self, &device, &dtypes);
        }
        let found = dtypes.iter().map(|d| self.one(&device, *d)).collect::<anyhow::Result<Vec<_>>>()?;
        if self.json {
            println!("{}", serde_json::to_string_pretty(&found)?);
        } else {
            println!("device  {}, {}\n", gneiss::device::kind(&device), gneiss::device::name(&device));
            let by_dtype: Vec<(&str, &[Comparison])> =
                found.iter().map(|f| (f.dtype, &f.comparisons[..])).collect();
            println!("{}", text::table(&ops_table(&OPS, &by_dtype)));
            if self.steps > 0 {
                println!("\n{}", text::table(&runs_table(&found)));
            }
            println!("\n{}", summary(&found));
        }
        let wrong: usize = found.iter().map(DtypeResults::wrong).sum();
        if wrong > 0 {
            anyhow::bail!("{wrong} comparisons with the CPU do not hold");
        }
        Ok(())
    }

    fn one(&self, device: &Device, dtype: DType) -> anyhow::Result<DtypeResults> {
        let target = CheckTarget { device, dtype, run: &|f: &mut dyn FnMut()| f() };
        let names: Vec<&str> = match &self.op[..] {
            [] => OPS.to_vec(),
            some => some.iter().map(String::as_str).collect(),
        };
        let mut comparisons = Vec::new();
        for name in names {
            status!("{:<5} {name}", dtype.as_str());
            comparisons.extend(check::ops(&target, name)?);
        }
        let mut runs = Vec::new();
        if self.steps > 0 {
            for (head_dim, max_rows) in [(64, 8192), (64, 100), (128, 8192), (80, 8192)] {
                status!("{:<5} run with heads of {head_dim}, {max_rows} rows a pass", dtype.as_str());
                runs.push(check::run(
                    &target,
                    RunSize { steps: self.steps, examples: 8, max_rows, head_dim },
                )?);
            }
        }
        Ok(DtypeResults { dtype: dtype.as_str(), comparisons, runs })
    }
}

impl DtypeResults {
    fn allowed(&self) -> f64 {
        Curves::allowed(if self.dtype == "f32" { DType::F32 } else { DType::BF16 })
    }

    fn wrong(&self) -> usize {
        // A deviation that is NaN is wrong too.
        let runs = self.runs.iter().filter(|r| r.deviation().is_nan() || r.deviation() > self.allowed());
        self.comparisons.iter().filter(|c| !c.holds()).count() + runs.count()
    }
}

/// `error / allowed`; infinite if the error is not a number.
fn share(c: &Comparison) -> f64 {
    let share = if c.error == 0.0 { 0.0 } else { c.error / c.allowed };
    if share.is_nan() { f64::INFINITY } else { share }
}

/// The summary in one line.
fn summary(found: &[DtypeResults]) -> String {
    let comparisons: Vec<&Comparison> = found.iter().flat_map(|f| &f.comparisons).collect();
    let runs: Vec<f64> =
        found.iter().flat_map(|f| f.runs.iter().map(|r| r.deviation() / f.allowed())).collect();
    let dtypes = found.iter().map(|f| f.dtype).collect::<Vec<_>>().join(", ");
    let largest = |shares: &mut dyn Iterator<Item = f64>| {
        let shares = shares.map(|s| if s.is_nan() { f64::INFINITY } else { s });
        format!("{:.2}", shares.fold(0.0, f64::max))
    };
    format!(
        "{} comparisons and {} runs in {dtypes}: {} wrong; at most {} and {} of what is allowed",
        comparisons.len(),
        runs.len(),
        found.iter().map(DtypeResults::wrong).sum::<usize>(),
        largest(&mut comparisons.iter().map(|c| share(c))),
        largest(&mut runs.iter().copied()),
    )
}

fn ops_table(names: &[&str], found: &[(&str, &[Comparison])]) -> Vec<Vec<String>> {
    let header = ["op", "dtype", "comparisons", "wrong", "largest error / allowed", "of", "case"];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    for (dtype, comparisons) in found {
        for op in names {
            let all: Vec<&Comparison> = comparisons.iter().filter(|c| c.op == *op).collect();
            let Some(worst) = all.iter().max_by(|a, b| share(a).total_cmp(&share(b))) else { continue };
            rows.push(vec![
                (*op).to_owned(),
                (*dtype).to_owned(),
                all.len().to_string(),
                all.iter().filter(|c| !c.holds()).count().to_string(),
                format!("{:.3}", share(worst)),
                worst.what.to_owned(),
                worst.case.clone(),
            ]);
        }
    }
    rows
}

fn runs_table(found: &[DtypeResults]) -> Vec<Vec<String>> {
    let header = ["run", "dtype", "first loss", "last loss", "on the CPU", "deviation", "allowed"];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    for of in found {
        for run in &of.runs {
            let last = |curve: &[f64]| curve.last().map_or(String::new(), |l| format!("{l:.4}"));
            rows.push(vec![
                format!("heads of {}, {} rows a pass", run.size.head_dim, run.size.max_rows),
                of.dtype.to_owned(),
                run.device.first().map_or(String::new(), |l| format!("{l:.4}")),
                last(&run.device),
                last(&run.cpu),
                format!("{:.5}", run.deviation()),
                format!("{}", of.allowed()),
            ]);
        }
    }
    rows
}
