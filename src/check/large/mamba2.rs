//! The ops of a Mamba2 layer at the sizes of a model: a prefix and its sequences in one pass, and the sequences after the state of a
//! prefix of another pass. Expected values of the scan are those of whole segments as products, without chunks.

use super::shapes::Batch;
use super::{CHUNK, Large, Result};
use crate::check::ResultKind::{Gradient, Value};
use crate::ops::conv::{self, ConvInputs, ConvWeights};
use crate::ops::gated_norm::GatedNorm;
use crate::ops::ssd::{self, SsdInputs, SsdShape, SsdWeights};
use crate::ops::{ScanPlan, ScanStart, autograd};
use candle_core::{DType, Tensor, Var};
use std::ops::Range;

/// State size, N, of all three models.
pub(super) const STATE: usize = 128;

/// Taps of the convolution, W, of all three models.
pub(super) const TAPS: usize = 4;

/// Sizes of the Mamba2 layers of a model with one group; a test compares them with the files of `configs/models`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Mamba2Shape {
    /// Name of the file in `configs/models`.
    pub(super) name: &'static str,
    /// Heads, M.
    pub(super) heads: usize,
    /// Values of a head, R.
    pub(super) head_dim: usize,
}

pub(super) const MAMBA2_SHAPES: [Mamba2Shape; 3] = [
    Mamba2Shape { name: "granite-4.0-h-350m", heads: 48, head_dim: 32 },
    Mamba2Shape { name: "granite-4.0-h-1b", heads: 48, head_dim: 64 },
    Mamba2Shape { name: "granite-4.0-h-small", heads: 128, head_dim: 64 },
];

impl Mamba2Shape {
    /// The shape with the number of heads divided by `scale`.
    pub(super) fn scaled(self, scale: usize) -> Self {
        Self { heads: (self.heads / scale.max(1)).max(1), ..self }
    }

    fn ssd(&self) -> SsdShape {
        SsdShape { heads: self.heads, head_dim: self.head_dim, state: STATE, groups: 1 }
    }

    /// y [T, M R] of the scan in candle's ops: each segment is one product with a triangle, where the recurrence has a step for each row.
    fn scan(&self, inputs: SsdInputs, weights: &SsdWeights) -> Result<Tensor> {
        let (rows, heads, device) = (inputs.xbc.dims()[0], self.heads, inputs.xbc.device());
        let inner = heads * self.head_dim;
        let (x, b) = (inputs.xbc.narrow(1, 0, inner)?, inputs.xbc.narrow(1, inner, STATE)?);
        let c = inputs.xbc.narrow(1, inner + STATE, STATE)?;
        let x = x.reshape((rows, heads, self.head_dim))?.transpose(0, 1)?.contiguous()?;
        // The softplus of values that are never large.
        let dt = (inputs.dt.broadcast_add(&weights.dt_bias)?.exp()? + 1.0)?.log()?.t()?.contiguous()?;
        let decay = dt.broadcast_mul(&weights.a.unsqueeze(1)?)?;
        let scaled = x.broadcast_mul(&dt.unsqueeze(2)?)?;
        let shape = (heads, self.head_dim, STATE);
        let (mut outputs, mut ends) = (Vec::new(), Vec::<Tensor>::new());
        for segment in inputs.plan.iter() {
            let (first, n) = (segment.rows.start, segment.rows.len());
            let state = match (segment.start, inputs.states) {
                (ScanStart::State(i), Some(states)) => states.get(i)?.reshape(shape)?,
                (ScanStart::Segment(i), _) => ends[i].clone(),
                _ => Tensor::zeros(shape, DType::F32, device)?,
            };
            let (b, c) = (b.narrow(0, first, n)?, c.narrow(0, first, n)?);
            let scaled = scaled.narrow(1, first, n)?;
            let l = decay.narrow(1, first, n)?.cumsum(1)?;
            let between = l.unsqueeze(2)?.broadcast_sub(&l.unsqueeze(1)?)?;
            let lower = Tensor::tril2(n, DType::U8, device)?.broadcast_as((heads, n, n))?;
            let hidden = Tensor::new(f32::NEG_INFINITY, device)?.broadcast_as((heads, n, n))?;
            let weights = lower.where_cond(&between, &hidden)?.exp()?.broadcast_mul(&c.matmul(&b.t()?)?)?;
            let of_state =
                c.broadcast_left(heads)?.contiguous()?.matmul(&state.transpose(1, 2)?.contiguous()?)?;
            outputs.push((weights.matmul(&scaled)? + of_state.broadcast_mul(&l.exp()?.unsqueeze(2)?)?)?);
            let last = l.narrow(1, n - 1, 1)?;
            let to_end = last.broadcast_sub(&l)?.exp()?.unsqueeze(2)?;
            let added = scaled.broadcast_mul(&to_end)?.transpose(1, 2)?.contiguous()?;
            let added = added.matmul(&b.broadcast_left(heads)?.contiguous()?)?;
            ends.push((state.broadcast_mul(&last.exp()?.unsqueeze(2)?)? + added)?);
        }
        let skipped = x.broadcast_mul(&weights.d.reshape((heads, 1, 1))?)?;
        let y = (Tensor::cat(&outputs, 1)? + skipped)?;
        Ok(y.transpose(0, 1)?.contiguous()?.reshape((rows, inner))?)
    }
}

/// A prefix, or the state of one, and the sequences after it.
struct PrefixedRows {
    plan: ScanPlan,
    /// Rows of the prefix; 0 for the state of one.
    prefix: usize,
    /// Rows of sequences, each with its own plan after the same prefix.
    parts: Vec<(Range<usize>, ScanPlan)>,
}

impl PrefixedRows {
    /// The sequences of a batch of one group, after the prefix's rows or after state 0.
    fn new(batch: &Batch, has_prefix: bool) -> Self {
        let prefix = if has_prefix { batch.packed.prefix_rows } else { 0 };
        let plan = |lengths: &[usize]| {
            let start = if has_prefix { ScanStart::Segment(0) } else { ScanStart::State(0) };
            let prefix = has_prefix.then_some((prefix, ScanStart::Zero));
            let sequences = lengths.iter().map(|length| (*length, start));
            ScanPlan::with_lengths(&prefix.into_iter().chain(sequences).collect::<Vec<_>>(), &[])
        };
        let sequences = batch.packed.segments.iter().filter(|segment| segment.prefix.is_some());
        let lengths: Vec<usize> = sequences.map(|segment| segment.keys.len()).collect();
        // A small batch has parts too.
        let most = CHUNK.min(batch.rows() / 2);
        let (mut parts, mut first, mut next) = (Vec::new(), 0, prefix);
        while first < lengths.len() {
            let mut sum = 0;
            let taken = lengths[first..].iter().take_while(|length| {
                sum += **length;
                sum <= most
            });
            let last = first + taken.count().max(1);
            let rows: usize = lengths[first..last].iter().sum();
            parts.push((next..next + rows, plan(&lengths[first..last])));
            (first, next) = (last, next + rows);
        }
        Self { plan: plan(&lengths), prefix, parts }
    }

    fn rows(&self) -> usize {
        self.parts.last().map_or(self.prefix, |(rows, _)| rows.end)
    }

    /// The rows of the prefix, if there are any: a GPU makes no matrix of no rows.
    fn prefix_of(&self, matrix: &Tensor) -> Result<Option<Tensor>> {
        Ok((self.prefix > 0).then(|| matrix.narrow(0, 0, self.prefix)).transpose()?)
    }

    /// `f` of the plan, of `inputs` [T, ..] and of a given state [1, ..], all in f32; then the gradients of each from `dy` [T, ..].
    fn expected(
        &self,
        inputs: &[&Tensor],
        state: Option<&Tensor>,
        dy: &Tensor,
        f: impl Fn(&ScanPlan, &[Var]) -> Result<Tensor>,
    ) -> Result<Vec<Tensor>> {
        let mut results: Vec<Collected> = (0..=inputs.len()).map(|_| Collected::default()).collect();
        let mut dstate = Collected::default();
        for (i, (rows, plan)) in self.parts.iter().enumerate() {
            let part = |matrix: &Tensor, prefix: Option<Tensor>| -> Result<Tensor> {
                let own = matrix.narrow(0, rows.start, rows.len())?;
                let all: Vec<Tensor> = prefix.into_iter().chain([own]).collect();
                Ok(Tensor::cat(&all, 0)?.to_dtype(DType::F32)?)
            };
            let mut given =
                inputs.iter().map(|input| part(input, self.prefix_of(input)?)).collect::<Result<Vec<_>>>()?;
            given.extend(state.map(|state| state.to_dtype(DType::F32)).transpose()?);
            // The gradient of the prefix's own output counts once.
            let of_prefix = self.prefix_of(dy)?.map(|dy| if i == 0 { Ok(dy) } else { dy.zeros_like() });
            let dy = part(dy, of_prefix.transpose()?)?;
            let mut y = dy.clone();
            let mut gradients = autograd(&given.iter().collect::<Vec<_>>(), &dy, |leaves| {
                let out = f(plan, leaves)?;
                y = out.detach();
                Ok(out)
            })?;
            if state.is_some() {
                gradients.pop().map_or(Ok(()), |gradient| dstate.add_prefix(&gradient))?;
            }
            for (k, (result, found)) in results.iter_mut().zip([y].iter().chain(&gradients)).enumerate() {
                if let (Some(prefix), true) = (self.prefix_of(found)?, i == 0 || k > 0) {
                    result.add_prefix(&prefix)?;
                }
                result.rows.push(found.narrow(0, self.prefix, rows.len())?);
            }
        }
        results.into_iter().chain(state.is_some().then_some(dstate)).map(Collected::all).collect()
    }
}

/// What the parts give for a matrix: one sum for the rows of the prefix, and the rows of the sequences.
#[derive(Default)]
struct Collected {
    prefix: Option<Tensor>,
    rows: Vec<Tensor>,
}

impl Collected {
    fn add_prefix(&mut self, more: &Tensor) -> Result<()> {
        self.prefix = Some(match &self.prefix {
            Some(sum) => (sum + more)?,
            None => more.clone(),
        });
        Ok(())
    }

    fn all(self) -> Result<Tensor> {
        let parts: Vec<Tensor> = self.prefix.into_iter().chain(self.rows).collect();
        Ok(Tensor::cat(&parts, 0)?)
    }
}

/// Estimated memory: `values` of inputs and results with their expected ones, and the largest part with what autograd keeps of it,
/// `kept` values a row.
fn bytes(rows: &PrefixedRows, values: usize, kept: usize) -> usize {
    let part = rows.parts.iter().map(|(part, _)| part.len()).max().unwrap_or(0) + rows.prefix;
    16 * values + 4 * kept * part
}

/// Runs `check` for both kinds of rows.
fn cases(
    large: &mut Large,
    batch: &Batch,
    name: impl Fn(usize) -> String,
    memory: impl Fn(&PrefixedRows) -> usize,
    check: impl Fn(&mut Large, &str, &PrefixedRows) -> Result<()>,
) -> Result<()> {
    for (has_prefix, after) in [(true, "with their prefix"), (false, "after the state of another pass")] {
        let rows = PrefixedRows::new(batch, has_prefix);
        let name = format!("{}, {after}", name(rows.rows()));
        large.case(&name, memory(&rows), |large, case| check(large, case, &rows))?;
    }
    Ok(())
}

pub(super) fn conv(large: &mut Large, shape: &Mamba2Shape, batch: &Batch) -> Result<()> {
    let channels = shape.ssd().width();
    let memory = |rows: &PrefixedRows| bytes(rows, 4 * rows.rows() * channels, 20 * TAPS * channels);
    let name = |rows| format!("[{rows}, {channels}], {TAPS} taps");
    cases(large, batch, name, memory, |large, case, rows| {
        let t = rows.rows();
        let weights = ConvWeights {
            weight: large.random_in((channels, TAPS), 0.4, DType::F32)?,
            bias: large.random_in(channels, 1.0, DType::F32)?,
        };
        let (x, dy) = (large.random((t, channels), 1.0)?, large.random((t, channels), 1.0)?);
        let tail = large.random((1, TAPS - 1, channels), 1.0)?;
        let tail = (rows.prefix == 0).then_some(&tail);
        let inputs = ConvInputs { x: &x, plan: &rows.plan, tails: tail };
        let y = large.run(|| conv::forward(inputs, &weights, x.dtype()))?;
        let gradients = large.run(|| conv::backward((&dy, None), inputs, &weights))?;
        let expected = rows.expected(&[&x], tail, &dy, |plan, given| {
            let tails = given.get(1).map(Var::as_tensor);
            Ok(conv::reference(ConvInputs { x: &given[0], plan, tails }, &weights)?.0)
        })?;
        large.compare((case, "y", Value), &y, &expected[0])?;
        large.compare((case, "dx", Gradient), &gradients.x, &expected[1])?;
        large.compare_given((case, "dtails"), gradients.tails.as_ref(), expected.get(2))
    })
}

pub(super) fn ssd(large: &mut Large, shape: &Mamba2Shape, batch: &Batch) -> Result<()> {
    let ssd = shape.ssd();
    let (heads, inner) = (ssd.heads, ssd.inner());
    // A segment has some 50 rows; candle keeps some triangles and states of each.
    let memory = |rows: &PrefixedRows| {
        bytes(rows, 4 * rows.rows() * ssd.width(), 40 * ssd.width() + 10 * heads * 64 + inner * STATE / 4)
    };
    let name = |rows| format!("{rows} rows, {heads} heads of {}, state {STATE}", ssd.head_dim);
    cases(large, batch, name, memory, |large, case, rows| {
        let t = rows.rows();
        let weights = SsdWeights {
            a: large.random_in(heads, 1.0, DType::F32)?.exp()?.neg()?,
            d: large.random_in(heads, 1.0, DType::F32)?,
            dt_bias: (large.random_in(heads, 1.0, DType::F32)? - 1.0)?,
            dt_limit: (0.0, f64::INFINITY),
        };
        let xbc = large.random((t, ssd.width()), 1.0)?;
        let dt = large.random_in((t, heads), 1.0, DType::F32)?;
        let dy = large.random((t, inner), 1.0)?;
        let state = large.random_in((1, inner, STATE), 1.0, DType::F32)?;
        let state = (rows.prefix == 0).then_some(&state);
        let inputs = SsdInputs { xbc: &xbc, dt: &dt, plan: &rows.plan, states: state };
        let output = large.run(|| ssd::forward(inputs, &ssd, &weights))?;
        let gradients = large.run(|| ssd::backward((&dy, None), inputs, &ssd, &weights))?;
        let expected = rows.expected(&[&xbc, &dt], state, &dy, |plan, given| {
            let states = given.get(2).map(Var::as_tensor);
            shape.scan(SsdInputs { xbc: &given[0], dt: &given[1], plan, states }, &weights)
        })?;
        large.compare((case, "y", Value), &output.y, &expected[0])?;
        for (first, columns, what) in [(0, inner, "dx"), (inner, ssd.width() - inner, "dB and dC")] {
            let part = |t: &Tensor| t.narrow(1, first, columns);
            large.compare((case, what, Gradient), &part(&gradients.xbc)?, &part(&expected[1])?)?;
        }
        large.compare((case, "dr", Gradient), &gradients.dt, &expected[2])?;
        large.compare_given((case, "dstates"), gradients.states.as_ref(), expected.get(3))
    })
}

pub(super) fn gated_norm(large: &mut Large, shape: &Mamba2Shape, batch: &Batch) -> Result<()> {
    let (t, width) = (batch.rows(), shape.ssd().inner());
    large.case(&format!("[{t}, {width}]"), 16 * 6 * t * width + 80 * CHUNK * width, |large, case| {
        let weight = large.random_in(width, 1.0, DType::F32)?;
        let norm = GatedNorm { weight, groups: 1, eps: 1e-5 };
        let (y, z) = (large.random((t, width), 1.0)?, large.random((t, width), 2.0)?);
        let dn = large.random((t, width), 1.0)?;
        let ours = large.run(|| norm.forward(&y, &z, y.dtype()))?;
        let part = |t: &Tensor, rows: &Range<usize>| -> Result<Tensor> {
            Ok(t.narrow(0, rows.start, rows.len())?.to_dtype(DType::F32)?)
        };
        large.compare_rows((case, "normed", Value), &ours.normed, |rows| {
            Ok((norm.reference(&part(&y, &rows)?, &part(&z, &rows)?)?.normed, None))
        })?;
        let gradients = large.run(|| norm.backward(&dn, &y, &z, &ours.rstd))?;
        for (i, (what, found)) in [("dy", &gradients.y), ("dz", &gradients.z)].into_iter().enumerate() {
            large.compare_rows((case, what, Gradient), found, |rows| {
                let given = [part(&y, &rows)?, part(&z, &rows)?];
                let exact = autograd(&[&given[0], &given[1]], &part(&dn, &rows)?, |v| {
                    Ok(norm.reference(&v[0], &v[1])?.normed)
                })?;
                Ok((exact[i].clone(), None))
            })?;
        }
        Ok(())
    })
}

impl Large<'_> {
    /// Compares the gradient of a given state, which both sides have, or neither.
    fn compare_given(
        &mut self,
        (case, what): (&str, &'static str),
        ours: Option<&Tensor>,
        exact: Option<&Tensor>,
    ) -> Result<()> {
        match (ours, exact) {
            (Some(ours), Some(exact)) => self.compare((case, what, Gradient), ours, exact),
            (None, None) => Ok(()),
            _ => Err(crate::Error::Invalid(format!("{case}: {what}: one side has none"))),
        }
    }
}
