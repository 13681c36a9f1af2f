//! The host's cost of launches: if a step on a GPU is shorter than the host needs to launch it, the GPU waits for the
//! host.

use super::examples::Lengths;
use super::measure::{Bench, Case, ExampleSource};
use super::sustained::seconds_per_call;
use crate::Result;
use crate::config::PromptKind;
use crate::device::PeakMemory;
use crate::ops::rope::Rope;
use crate::ops::{Indices, RopeTable};
use candle_core::{DType, Device, Tensor};
use serde::Serialize;

/// Time for which a small kernel is launched, s.
const SECONDS: f64 = 0.2;

/// Size of the head that the small kernel rotates, in place and without an allocation.
const HEAD_DIM: usize = 64;

/// Tokens of the only example in a step of very few rows.
const TOKENS: usize = 16;

/// Steps that are timed, and steps before them.
const STEPS: usize = 20;
const WARMUP: usize = 3;

/// A step is not bound by launches if it takes at least this many times as long as the step of few rows.
const UNBOUND: f64 = 1.5;

/// The launches that the host can do.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Launches {
    /// Launches of a small kernel per second, one after the other.
    pub per_second: f64,
    /// Wall time of a step of [`Launches::rows`] rows, s, median. It is the time of the launches, because the device
    /// finishes so few rows before the next launch.
    pub step_seconds: f64,
    /// Rows of that step.
    pub rows: f64,
}

impl Launches {
    /// Measures them with the model of `bench`; `None` on a CPU, which has no launches.
    ///
    /// # Errors
    /// Returns the errors of [`Bench::measure`].
    pub fn measure(bench: &Bench) -> Result<Option<Self>> {
        let device = bench.model.device();
        if device.is_cpu() {
            return Ok(None);
        }
        let per_second = per_second(device, bench.model.dtype())?;
        let (step_seconds, rows) = few_rows(bench)?;
        Ok(Some(Self { per_second, step_seconds, rows }))
    }

    /// Fraction of a step of this many seconds that the host needs for its launches.
    pub fn launch_share(&self, step_seconds: f64) -> f64 {
        self.step_seconds / step_seconds
    }

    /// Whether a step of this many seconds is bound by its launches.
    pub fn bound(&self, step_seconds: f64) -> bool {
        step_seconds < UNBOUND * self.step_seconds
    }
}

/// Calls per second of the rotation of one row.
fn per_second(device: &Device, dtype: DType) -> Result<f64> {
    let table = RopeTable::new(&Rope::new(1e4), HEAD_DIM, 1, DType::F32, device)?;
    let (x, position) = (Tensor::zeros((1, HEAD_DIM), dtype, device)?, Indices::from(vec![0]));
    let mut launch = || -> Result<()> {
        table.forward(x.clone(), 1, (&position).into(), dtype)?;
        Ok(())
    };
    Ok(1.0 / seconds_per_call(device, SECONDS, &mut launch)?)
}

/// Median time and rows of a step with one short example after one virtual token.
fn few_rows(bench: &Bench) -> Result<(f64, f64)> {
    let bench = Bench {
        model: bench.model,
        source: ExampleSource::Made(Lengths::uniform(TOKENS)?),
        max_rows: bench.max_rows,
        steps: STEPS,
        warmup: WARMUP,
        peak: bench.peak,
        canary: None,
    };
    let case = Case {
        batch_size: 1,
        accumulate_steps: 1,
        prompt_kind: PromptKind::Embeddings,
        num_virtual_tokens: 1,
        prompts: 1,
    };
    let found = bench.measure(case, &mut NoMemory)?;
    Ok((found.figures.step_seconds.median, found.figures.rows_per_step))
}

struct NoMemory;

impl PeakMemory for NoMemory {
    fn forget(&mut self) {}
    fn step(&mut self) {}
    fn peak(&self) -> Option<u64> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::MatmulPeak;
    use crate::checkpoint::ModelConfig;
    use crate::model::{Decoder, Dtypes};
    use std::path::Path;

    #[test]
    fn a_step_of_few_rows_is_a_step_and_the_cpu_launches_nothing() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/granite/config.json");
        let config = ModelConfig::from_json(&path).unwrap();
        let dtypes = Dtypes::for_weights(DType::F32, &Device::Cpu).unwrap();
        let model = Decoder::random(&config, dtypes, &Device::Cpu, 1).unwrap();
        let peak = MatmulPeak {
            size: 1,
            dtype: "f32",
            instructions: None,
            flops_per_second: 1e9,
            sustained_seconds: None,
            data_sheet_flops_per_second: None,
            quiet: None,
        };
        let source = ExampleSource::Given(Vec::new());
        let bench = Bench { model: &model, source, max_rows: 0, steps: 1, warmup: 0, peak, canary: None };
        assert_eq!(Launches::measure(&bench).unwrap(), None);
        let (seconds, rows) = few_rows(&bench).unwrap();
        // One virtual token and 16 of the example, whose last has no row.
        assert!(seconds > 0.0 && rows == 16.0, "{seconds}, {rows}");
        assert!(per_second(&Device::Cpu, DType::F32).unwrap() > 100.0);
    }

    #[test]
    fn a_step_is_bound_by_launches_if_it_takes_little_longer() {
        let launches = Launches { per_second: 3e5, step_seconds: 0.004, rows: 16.0 };
        assert!(launches.bound(0.0041) && launches.bound(0.0059) && !launches.bound(0.0061));
        assert!((launches.launch_share(0.16) - 0.025).abs() < 1e-12);
    }
}
