//! Checks a device at the sizes of real models against plain candle ops: every op of a tuning step over the rows of a
//! real batch, and a whole step in one pass and in several.
//!
//! The CPU would take too long at these sizes. The expected values come from the formula in plain candle ops in f32 on
//! the same device, for inputs rounded to the dtype under test. An op may err by the multiple of plain ops' error in
//! that dtype that [`super`] states. In f32 both sides are rounded: 2e-5 of the largest value.

mod attention;
mod experts;
mod mamba2;
mod ops;
mod shapes;
mod step;

use super::{CheckTarget, Comparison, OPS, ResultKind};
use crate::device::{free_memory, is_out_of_memory};
use crate::{Error, Result};
use candle_core::{DType, Shape, Tensor};
use mamba2::MAMBA2_SHAPES;
use rand::SeedableRng;
use rand::distr::{Distribution, Uniform};
use serde::Serialize;
use shapes::{Batch, SHAPES};
use std::ops::Range;

/// Name of the check of a whole step, in addition to those of [`OPS`].
pub const STEP: &str = "step";

/// Rows for which plain ops compute the expected values at once.
const CHUNK: usize = 2048;

/// Period of the random inputs: a prime, so that no two rows of a matrix are equal.
const PERIOD: usize = 1_048_583;

/// Largest fraction of the free memory that a case may need.
const SHARE_OF_FREE: f64 = 0.9;

/// A case that was not run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NotRun {
    /// Name of the op.
    pub op: &'static str,
    /// Shape of the case.
    pub case: String,
    /// The reason.
    pub why: String,
}

/// The result of [`large`].
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct LargeResults {
    /// All comparisons.
    pub comparisons: Vec<Comparison>,
    /// Cases that did not fit into the device's memory.
    pub not_run: Vec<NotRun>,
}

/// Checks the op of this name, or [`STEP`], at the shapes of three Granite models that have it, over the 8,166 rows of a step
/// of 256 reviews; `scale` divides all sizes except that of a head.
///
/// # Errors
/// Returns an error if the name is unknown or a device operation fails. Lack of memory is not an error but a case that
/// was not run.
pub fn large(target: &CheckTarget, name: &str, scale: usize) -> Result<LargeResults> {
    let Some(op) = OPS.into_iter().chain([STEP]).find(|op| *op == name) else {
        return Err(Error::Invalid(format!("expected {STEP} or one of {OPS:?}, found {name}")));
    };
    let mut large = Large { target, op, model: "", seed: 0, unit: 1e-3, found: LargeResults::default() };
    if let "conv" | "ssd" | "gated_norm" = op {
        mamba2_layers(&mut large, scale)?;
        return Ok(large.found);
    }
    for shape in &SHAPES {
        let shape = shape.scaled(scale);
        let batch = Batch::new(&shape, scale);
        large.model = shape.name;
        match op {
            "embed" => ops::embed(&mut large, &shape, &batch)?,
            "linear" => ops::linear(&mut large, &shape, &batch)?,
            "rms_norm" => ops::rms_norm(&mut large, &shape, &batch)?,
            "rope" => ops::rope(&mut large, &shape, &batch)?,
            "attention" => attention::check(&mut large, &shape, &batch)?,
            "swiglu" => ops::swiglu(&mut large, &shape, &batch)?,
            "experts" => experts::check(&mut large, &shape, &batch)?,
            "cross_entropy" => ops::cross_entropy(&mut large, &shape, &batch)?,
            "distillation" => ops::distillation(&mut large, &shape, &batch)?,
            "adamw" => ops::adamw(&mut large, &shape, &batch)?,
            "rows" => ops::rows(&mut large, &shape, &batch)?,
            STEP => step::check(&mut large, &shape, scale)?,
            other => unreachable!("{other} has no case here"),
        }
    }
    Ok(large.found)
}

/// Checks an op of the Mamba2 layers of three models; the rows of a step are those of the first shape.
fn mamba2_layers(large: &mut Large, scale: usize) -> Result<()> {
    let batch = Batch::new(&SHAPES[0].scaled(scale), scale);
    for shape in MAMBA2_SHAPES {
        let shape = shape.scaled(scale);
        large.model = shape.name;
        match large.op {
            "conv" => mamba2::conv(large, &shape, &batch)?,
            "ssd" => mamba2::ssd(large, &shape, &batch)?,
            _ => mamba2::gated_norm(large, &shape, &batch)?,
        }
    }
    Ok(())
}

/// The checks so far.
struct Large<'a> {
    target: &'a CheckTarget<'a>,
    op: &'static str,
    /// The model whose shape is being checked.
    model: &'static str,
    seed: u64,
    /// Least magnitude to which an f32 error is compared, for expected values that are all smaller.
    unit: f64,
    found: LargeResults,
}

/// The errors of a result that is compared part by part.
#[derive(Clone, Copy, Default)]
struct Errors {
    ours: f64,
    naive: f64,
    largest: f64,
}

impl Large<'_> {
    /// Runs a case that needs about `bytes` of memory, or records why it was not run.
    fn case(
        &mut self,
        name: &str,
        bytes: usize,
        check: impl FnOnce(&mut Self, &str) -> Result<()>,
    ) -> Result<()> {
        let case = format!("{}: {name}", self.model);
        let mut not_run = |why| self.found.not_run.push(NotRun { op: self.op, case: case.clone(), why });
        if let Some(free) = free_memory(self.target.device)?
            && bytes as f64 > SHARE_OF_FREE * free as f64
        {
            let gib = |bytes: usize| bytes as f64 / f64::from(1 << 30);
            not_run(format!("expected {:.1} GiB of free memory, found {:.1}", gib(bytes), gib(free)));
            return Ok(());
        }
        match check(self, &case) {
            Err(error) if is_out_of_memory(&error) => {
                self.found.not_run.push(NotRun { op: self.op, case, why: error.to_string() });
                Ok(())
            }
            result => result,
        }
    }

    /// Uniform values of variance `scale²` on the device, in the dtype under test.
    fn random(&mut self, shape: impl Into<Shape>, scale: f64) -> Result<Tensor> {
        self.random_in(shape, scale, self.target.dtype)
    }

    /// As [`Large::random`], in another dtype. The values repeat after [`PERIOD`].
    fn random_in(&mut self, shape: impl Into<Shape>, scale: f64, dtype: DType) -> Result<Tensor> {
        let shape: Shape = shape.into();
        let n = shape.elem_count();
        self.seed += 1;
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(self.seed);
        let bound = (scale * 3f64.sqrt()) as f32;
        let uniform = Uniform::new_inclusive(-bound, bound)
            .map_err(|e| Error::Invalid(format!("random values of ±{bound}: {e}")))?;
        let values: Vec<f32> = uniform.sample_iter(&mut rng).take(n.min(PERIOD)).collect();
        let device = self.target.device;
        let period = Tensor::from_vec(values, n.min(PERIOD), device)?.to_dtype(dtype)?;
        if n <= PERIOD {
            return Ok(period.reshape(shape)?);
        }
        // A buffer of exactly this many values: an access beyond it is beyond an allocation.
        let exact = period.repeat(n.div_ceil(PERIOD))?.narrow(0, 0, n)?.force_contiguous()?;
        Ok(exact.reshape(shape)?)
    }

    /// Runs `f` on the device under test.
    fn run<R>(&self, f: impl FnMut() -> Result<R>) -> Result<R> {
        self.target.result(f)
    }

    /// Compares `ours` [rows, ..] with `expected`, called for each range of rows: the value in f32, and the result of
    /// plain ops in the dtype under test, if that differs from the rounded value.
    fn compare_rows(
        &mut self,
        (case, what, kind): (&str, &'static str, ResultKind),
        ours: &Tensor,
        mut expected: impl FnMut(Range<usize>) -> Result<(Tensor, Option<Tensor>)>,
    ) -> Result<()> {
        let rows = ours.dims()[0];
        let mut errors = Errors { largest: self.unit, ..Errors::default() };
        for start in (0..rows).step_by(CHUNK) {
            let range = start..(start + CHUNK).min(rows);
            let (exact, naive) = expected(range.clone())?;
            let naive = match naive {
                Some(naive) => naive,
                None => exact.to_dtype(ours.dtype())?,
            };
            errors.add(&ours.narrow(0, range.start, range.len())?, &exact, &naive)?;
        }
        self.judge((case, what, kind), errors);
        Ok(())
    }

    /// Compares all of `ours` with `exact`, in f32; plain ops lose only its rounding.
    fn compare(
        &mut self,
        about: (&str, &'static str, ResultKind),
        ours: &Tensor,
        exact: &Tensor,
    ) -> Result<()> {
        self.compare_with(about, ours, exact, &exact.to_dtype(ours.dtype())?)
    }

    /// As [`Large::compare`], with the result of plain ops in the dtype under test.
    fn compare_with(
        &mut self,
        about: (&str, &'static str, ResultKind),
        ours: &Tensor,
        exact: &Tensor,
        naive: &Tensor,
    ) -> Result<()> {
        if ours.dims() != exact.dims() {
            return Err(Error::shape(
                self.op,
                format!("{} of {:?}", about.1, exact.dims()),
                format!("{:?}", ours.dims()),
            ));
        }
        self.compare_rows(about, ours, |rows| {
            let part = |t: &Tensor| t.narrow(0, rows.start, rows.len());
            // The result has the dtype of `ours`, whatever dtype plain ops used in between.
            Ok((part(exact)?, Some(part(naive)?.to_dtype(ours.dtype())?)))
        })
    }

    fn judge(&mut self, (case, what, kind): (&str, &'static str, ResultKind), errors: Errors) {
        let allowed = errors.allowed(kind, self.target.dtype);
        let case = case.to_owned();
        self.found.comparisons.push(Comparison { op: self.op, what, case, error: errors.ours, allowed });
    }
}

impl Errors {
    fn add(&mut self, ours: &Tensor, exact: &Tensor, naive: &Tensor) -> Result<()> {
        let exact = exact.to_dtype(DType::F32)?;
        let difference = |t: &Tensor| largest(&(t.to_dtype(DType::F32)? - &exact)?);
        // NaN stays NaN.
        let more = |a: f64, b: f64| if a.is_nan() || b <= a { a } else { b };
        self.ours = more(self.ours, difference(ours)?);
        self.naive = more(self.naive, difference(naive)?);
        self.largest = more(self.largest, largest(&exact)?);
        Ok(())
    }

    fn allowed(&self, kind: ResultKind, dtype: DType) -> f64 {
        if dtype == DType::F32 {
            return 2e-5 * self.largest;
        }
        let times = if let ResultKind::Value = kind { 2.0 } else { 3.0 };
        times * self.naive + 2e-5 * self.largest
    }
}

/// Largest magnitude, on the device; NaN if a value is not finite.
fn largest(t: &Tensor) -> Result<f64> {
    if t.elem_count() == 0 {
        return Ok(0.0);
    }
    let rows = t.abs()?.flatten_from(1.min(t.rank() - 1))?;
    let one = |t: Tensor| -> Result<f64> { Ok(f64::from(t.to_scalar::<f32>()?)) };
    let (columns, sums) = match rows.rank() {
        1 => (rows.clone(), rows),
        _ => (rows.max(1)?, rows.sum(1)?),
    };
    // The maximum may ignore a NaN; a sum does not.
    let (most, sum) = (one(columns.max(0)?)?, one(sums.sum(0)?)?);
    Ok(if sum.is_finite() { most } else { f64::NAN })
}

#[cfg(test)]
mod tests;
