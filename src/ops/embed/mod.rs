//! Embedding lookup over the vocabulary and the soft prompts.
//!
//! ```text
//! x[t] = embedding_multiplier * E[ids[t]]               ids[t] < V: a token
//! x[t] = embedding_multiplier * prompts[j]              ids[t] = VIRTUAL | j: a virtual token
//! ```
//!
//! The two kinds of ids never overlap, so a token that the embedding has no row for is an error and not a virtual token.
//!
//! Granite multiplies embeddings after the lookup (transformers `modeling_granite.py`,
//! `GraniteModel.forward`), so a soft prompt is stored before the multiplier.

use super::IndexView;
use super::cpu::{self, Real, View, with_real};
use super::gpu::{self, Kernel, Route};
use super::profile;
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use num_traits::Zero;

/// The bit that a virtual token's id has and no token's has: a vocabulary of 2^31 tokens does not exist.
/// `kernels/embed.cu` has the same constant.
pub const VIRTUAL: u32 = 1 << 31;

/// The id of the virtual token whose vector is row `row` of the matrix of prompts.
pub const fn virtual_id(row: u32) -> u32 {
    VIRTUAL | row
}

/// The row of the matrix of prompts that `id` names; none if it is a token of the vocabulary.
pub const fn virtual_row(id: u32) -> Option<usize> {
    if id & VIRTUAL == 0 { None } else { Some((id & !VIRTUAL) as usize) }
}

/// Which rows to look up, and what to scale them by.
pub struct Lookup<'a> {
    /// One id a row of the batch; see the module.
    pub ids: IndexView<'a>,
    /// Granite's `embedding_multiplier`.
    pub multiplier: f64,
}

gpu::parameters!(EmbedParameters { rows: u32, width: u32, multiplier: f32, aligned: u32 });

/// Looks up rows of `embedding` [V, C] (f32, f64, f16 or bf16) and `prompts` [n, C] (f32, or f64 on the CPU).
/// Returns [T, C]: on the CPU in the dtype of `prompts`, on a GPU in that of `embedding`.
///
/// # Errors
/// An id beyond the matrix that it names, or shapes that do not fit.
pub fn forward(embedding: &Tensor, prompts: &Tensor, lookup: &Lookup) -> Result<Tensor> {
    let _timed = profile::scope("embed", embedding.device());
    let (vocab, width) = embedding.dims2()?;
    let (virtual_tokens, prompt_width) = prompts.dims2()?;
    if prompt_width != width {
        return Err(Error::Shape {
            op: "embed",
            expected: format!("prompts of width {width}"),
            found: format!("{prompt_width}"),
        });
    }
    check(lookup.ids.host(), vocab, virtual_tokens)?;
    match gpu::route(embedding) {
        Route::Cpu => with_real!("embed", prompts.dtype(), T => match embedding.dtype() {
            DType::F16 => gather::<T, half::f16>(embedding, prompts, lookup, half::f16::to_f64),
            DType::BF16 => gather::<T, half::bf16>(embedding, prompts, lookup, half::bf16::to_f64),
            _ => gather::<T, T>(embedding, prompts, lookup, |x| x.wide()),
        }),
        Route::Kernel => {
            let rows = lookup.ids.host().len();
            let x = gpu::empty((rows, width), embedding.dtype(), embedding)?;
            let parameters = lookup.parameters(rows, width, &[embedding, prompts]);
            let kernel = Kernel::new("embed", "embed_forward", rows, row_threads(width));
            let ids = lookup.ids.on(embedding.device())?;
            gpu::launch(&kernel, embedding.dtype(), &[embedding, prompts, &ids, &x], &parameters)?;
            Ok(x)
        }
        Route::Reference => reference(embedding, prompts, lookup),
    }
}

/// Refuses an id beyond the embedding's `vocab` rows or the prompts' `virtual_tokens`.
fn check(ids: &[u32], vocab: usize, virtual_tokens: usize) -> Result<()> {
    let beyond = |id: u32| virtual_row(id).map_or(id as usize >= vocab, |row| row >= virtual_tokens);
    let Some(id) = ids.iter().copied().find(|id| beyond(*id)) else { return Ok(()) };
    let (expected, found) = match virtual_row(id) {
        None => (format!("token ids under {vocab}"), id.to_string()),
        Some(row) => (format!("virtual tokens under {virtual_tokens}"), row.to_string()),
    };
    Err(Error::Shape { op: "embed", expected, found })
}

/// Threads of a block that makes a part of a virtual token's gradient, 8 elements each.
const BACKWARD_THREADS: usize = 128;

/// Threads that work on a row, 8 elements each at a time.
fn row_threads(width: usize) -> usize {
    width.div_ceil(8).next_multiple_of(32).min(256)
}

impl Lookup<'_> {
    fn parameters(&self, rows: usize, width: usize, tensors: &[&Tensor]) -> EmbedParameters {
        EmbedParameters {
            rows: gpu::uint(rows),
            width: gpu::uint(width),
            multiplier: self.multiplier as f32,
            aligned: gpu::aligned(&[width], tensors),
        }
    }
}

fn gather<T: Real, W: candle_core::WithDType>(
    embedding: &Tensor,
    prompts: &Tensor,
    lookup: &Lookup,
    widen: impl Fn(W) -> f64 + Sync,
) -> Result<Tensor> {
    let (_, c) = embedding.dims2()?;
    let (e, p) = (View::<W>::new("embed", embedding)?, View::<T>::new("embed", prompts)?);
    let (e, p): (&[W], &[T]) = (&e, &p);
    let (m, ids) = (lookup.multiplier, lookup.ids.host());
    let out = cpu::overwrite::<T>(ids.len() * c, |out| {
        cpu::par_rows(
            out,
            c,
            #[inline(always)]
            |first, rows, _| {
                for (row, &id) in rows.chunks_exact_mut(c).zip(&ids[first..]) {
                    match virtual_row(id) {
                        None => {
                            let token = &e[id as usize * c..];
                            row.iter_mut().zip(token).for_each(|(y, &x)| *y = T::of(m * widen(x)));
                        }
                        Some(j) => {
                            let prompt = &p[j * c..];
                            row.iter_mut().zip(prompt).for_each(|(y, &x)| *y = T::of(m * x.wide()));
                        }
                    }
                }
            },
        );
    });
    cpu::tensor(out, (ids.len(), c))
}

/// Gradient of `prompts` [n, C] from that of the rows `dx` [T, C]: rows that hold the same virtual token
/// add up; rows that hold a token of the vocabulary, which is frozen, get nothing. On a GPU it is f32.
///
/// # Errors
/// Fewer rows in `dx` than ids.
pub fn backward(dx: &Tensor, virtual_tokens: usize, lookup: &Lookup) -> Result<Tensor> {
    let _timed = profile::scope("embed backward", dx.device());
    let (rows, c) = dx.dims2()?;
    let ids = lookup.ids.host();
    if rows != ids.len() {
        return Err(Error::Shape {
            op: "embed backward",
            expected: format!("{} rows", ids.len()),
            found: format!("{rows}"),
        });
    }
    if gpu::route(dx) == Route::Kernel {
        let dprompts = gpu::empty((virtual_tokens, c), DType::F32, dx)?;
        let parameters = lookup.parameters(rows, c, &[dx]);
        let mut kernel = Kernel::new("embed", "embed_backward", virtual_tokens, BACKWARD_THREADS);
        kernel.grid[1] = c.div_ceil(8 * BACKWARD_THREADS);
        gpu::launch(&kernel, dx.dtype(), &[dx, &lookup.ids.on(dx.device())?, &dprompts], &parameters)?;
        return Ok(dprompts);
    }
    if !dx.device().is_cpu() {
        let rows = (0u32..).zip(ids).filter_map(|(t, id)| Some((t, virtual_row(*id)? as u32)));
        let (at, to): (Vec<u32>, Vec<u32>) = rows.unzip();
        let (n, device) = (at.len(), dx.device());
        let picked = dx.index_select(&Tensor::from_vec(at, n, device)?, 0)?;
        let zeros = Tensor::zeros((virtual_tokens, c), dx.dtype(), device)?;
        return Ok((zeros.index_add(&Tensor::from_vec(to, n, device)?, &picked, 0)? * lookup.multiplier)?);
    }
    with_real!("embed backward", dx.dtype(), T => {
        let dx = View::<T>::new("embed backward", dx)?;
        let mut out = vec![T::zero(); virtual_tokens * c];
        let m = T::of(lookup.multiplier);
        let rows = dx.chunks_exact(c).zip(ids).filter_map(|(row, id)| Some((row, virtual_row(*id)?)));
        for (row, j) in rows {
            let at = j * c;
            out[at..at + c].iter_mut().zip(row).for_each(|(y, &x)| *y += m * x);
        }
        cpu::tensor(out, (virtual_tokens, c))
    })
}

/// The formula in plain candle ops.
pub fn reference(embedding: &Tensor, prompts: &Tensor, lookup: &Lookup) -> Result<Tensor> {
    let table = Tensor::cat(&[&embedding.to_dtype(prompts.dtype())?, prompts], 0)?;
    let vocab = embedding.dims2()?.0;
    let row = |id: &u32| virtual_row(*id).map_or(*id, |row| (vocab + row) as u32);
    let ids: Vec<u32> = lookup.ids.host().iter().map(row).collect();
    let n = ids.len();
    let ids = Tensor::from_vec(ids, n, embedding.device())?;
    Ok((table.index_select(&ids, 0)? * lookup.multiplier)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{Indices, autograd, testing::*};

    #[test]
    fn forward_and_backward_agree_with_the_reference() -> Result<()> {
        for (t, c) in [(1, 4), (5, 123), (123, 5)] {
            let (e, p) = (randn(1, (17, c), DType::F32)?, randn(2, (6, c), DType::F32)?);
            let id = |i: u32| if i % 23 < 17 { i % 23 } else { virtual_id(i % 23 - 17) };
            let ids = Indices::from((0..t as u32).map(|i| id(i * 7 + 20)).collect::<Vec<_>>());
            let lookup = Lookup { ids: (&ids).into(), multiplier: 12.0 };
            let y = forward(&e, &p, &lookup)?;
            assert_close("embed", &y, &reference(&e, &p, &lookup)?, Tolerance::F32);
            let dy = randn(3, (t, c), DType::F32)?;
            let expected = autograd(&[&p], &dy, |v| reference(&e, v[0].as_tensor(), &lookup))?;
            let dp = backward(&dy, 6, &lookup)?;
            assert_close("embed backward", &dp, &expected[0], Tolerance::F32);
            assert!(max_abs(&dp)? > 0.0);
        }
        Ok(())
    }

    #[test]
    fn half_precision_weights_are_widened() -> Result<()> {
        let p = randn(2, (2, 8), DType::F32)?;
        for dtype in [DType::F16, DType::BF16] {
            let e = randn(1, (9, 8), DType::F32)?.to_dtype(dtype)?;
            let ids = Indices::from(vec![0, virtual_id(1), 8]);
            let lookup = Lookup { ids: (&ids).into(), multiplier: 3.0 };
            assert_close("embed", &forward(&e, &p, &lookup)?, &reference(&e, &p, &lookup)?, Tolerance::F32);
        }
        Ok(())
    }

    #[test]
    fn an_id_out_of_range_is_an_error() -> Result<()> {
        let (e, p) = (randn(1, (3, 4), DType::F32)?, randn(2, (2, 4), DType::F32)?);
        // 3 and 4 are beyond the embedding, and no virtual tokens.
        for (id, expected) in [
            (3, "embed: expected token ids under 3, found 3"),
            (4, "embed: expected token ids under 3, found 4"),
            (5, "embed: expected token ids under 3, found 5"),
            (virtual_id(2), "embed: expected virtual tokens under 2, found 2"),
            (u32::MAX, "embed: expected virtual tokens under 2, found 2147483647"),
        ] {
            let ids = Indices::from(vec![0, virtual_id(1), id]);
            let error = forward(&e, &p, &Lookup { ids: (&ids).into(), multiplier: 1.0 }).unwrap_err();
            assert_eq!(error.to_string(), expected);
        }
        Ok(())
    }
}
