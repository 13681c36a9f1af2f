//! Embedding lookup over the vocabulary and the soft prompts.
//!
//! ```text
//! x[t] = embedding_multiplier * E[ids[t]]             ids[t] <  V: a token
//! x[t] = embedding_multiplier * prompts[ids[t] - V]   ids[t] >= V: a virtual token
//! ```
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

/// Which rows to look up, and what to scale them by.
pub struct Lookup<'a> {
    /// One id a row of the batch; see the module.
    pub ids: IndexView<'a>,
    /// Granite's `embedding_multiplier`.
    pub multiplier: f64,
}

gpu::parameters!(EmbedParameters {
    rows: u32,
    width: u32,
    vocab: u32,
    virtual_tokens: u32,
    multiplier: f32,
    aligned: u32,
});

/// Looks up rows of `embedding` [V, C] (f32, f64, f16 or bf16) and `prompts` [n, C] (f32, or f64 on the CPU).
/// Returns [T, C]: on the CPU in the dtype of `prompts`, on a GPU in that of `embedding`.
///
/// # Errors
/// An id beyond both matrices, or shapes that do not fit.
pub fn forward(embedding: &Tensor, prompts: &Tensor, lookup: &Lookup) -> Result<Tensor> {
    let _timed = profile::scope("embed", embedding.device());
    let (vocab, width) = embedding.dims2()?;
    let (virtual_tokens, prompt_width) = prompts.dims2()?;
    let bound = vocab + virtual_tokens;
    if prompt_width != width {
        return Err(Error::Shape {
            op: "embed",
            expected: format!("prompts of width {width}"),
            found: format!("{prompt_width}"),
        });
    }
    if let Some(id) = lookup.ids.host().iter().find(|&&id| id as usize >= bound) {
        return Err(Error::Shape {
            op: "embed",
            expected: format!("ids under {bound} ({vocab} tokens and {virtual_tokens} virtual tokens)"),
            found: format!("{id}"),
        });
    }
    match gpu::route(embedding) {
        Route::Cpu => with_real!("embed", prompts.dtype(), T => match embedding.dtype() {
            DType::F16 => gather::<T, half::f16>(embedding, prompts, lookup, half::f16::to_f64),
            DType::BF16 => gather::<T, half::bf16>(embedding, prompts, lookup, half::bf16::to_f64),
            _ => gather::<T, T>(embedding, prompts, lookup, |x| x.wide()),
        }),
        Route::Kernel => {
            let rows = lookup.ids.host().len();
            let x = gpu::empty((rows, width), embedding.dtype(), embedding)?;
            let parameters = lookup.parameters(rows, width, vocab, virtual_tokens, &[embedding, prompts]);
            let kernel = Kernel::new("embed", "embed_forward", rows, row_threads(width));
            let ids = lookup.ids.on(embedding.device())?;
            gpu::launch(&kernel, embedding.dtype(), &[embedding, prompts, &ids, &x], &parameters)?;
            Ok(x)
        }
        Route::Reference => reference(embedding, prompts, lookup),
    }
}

/// Threads of a block that makes a part of a virtual token's gradient, 8 elements each.
const BACKWARD_THREADS: usize = 128;

/// Threads that work on a row, 8 elements each at a time.
fn row_threads(width: usize) -> usize {
    width.div_ceil(8).next_multiple_of(32).min(256)
}

impl Lookup<'_> {
    fn parameters(
        &self,
        rows: usize,
        width: usize,
        vocab: usize,
        n: usize,
        tensors: &[&Tensor],
    ) -> EmbedParameters {
        EmbedParameters {
            rows: gpu::uint(rows),
            width: gpu::uint(width),
            vocab: gpu::uint(vocab),
            virtual_tokens: gpu::uint(n),
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
    let (vocab, c) = embedding.dims2()?;
    let (e, p) = (View::<W>::new("embed", embedding)?, View::<T>::new("embed", prompts)?);
    let (e, p): (&[W], &[T]) = (&e, &p);
    let (m, ids) = (lookup.multiplier, lookup.ids.host());
    let out = cpu::overwrite::<T>(ids.len() * c, |out| {
        cpu::par_rows(
            out,
            c,
            #[inline(always)]
            |first, rows| {
                for (row, &id) in rows.chunks_exact_mut(c).zip(&ids[first..]) {
                    let id = id as usize;
                    if id < vocab {
                        row.iter_mut().zip(&e[id * c..]).for_each(|(y, &x)| *y = T::of(m * widen(x)));
                    } else {
                        row.iter_mut()
                            .zip(&p[(id - vocab) * c..])
                            .for_each(|(y, &x)| *y = T::of(m * x.wide()));
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
pub fn backward(dx: &Tensor, vocab: usize, virtual_tokens: usize, lookup: &Lookup) -> Result<Tensor> {
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
        let parameters = lookup.parameters(rows, c, vocab, virtual_tokens, &[dx]);
        let mut kernel = Kernel::new("embed", "embed_backward", virtual_tokens, BACKWARD_THREADS);
        kernel.grid[1] = c.div_ceil(8 * BACKWARD_THREADS);
        gpu::launch(&kernel, dx.dtype(), &[dx, &lookup.ids.on(dx.device())?, &dprompts], &parameters)?;
        return Ok(dprompts);
    }
    if !dx.device().is_cpu() {
        let (at, to): (Vec<u32>, Vec<u32>) = (0u32..)
            .zip(ids)
            .filter(|(_, id)| **id as usize >= vocab)
            .map(|(t, id)| (t, id - vocab as u32))
            .unzip();
        let (n, device) = (at.len(), dx.device());
        let picked = dx.index_select(&Tensor::from_vec(at, n, device)?, 0)?;
        let zeros = Tensor::zeros((virtual_tokens, c), dx.dtype(), device)?;
        return Ok((zeros.index_add(&Tensor::from_vec(to, n, device)?, &picked, 0)? * lookup.multiplier)?);
    }
    with_real!("embed backward", dx.dtype(), T => {
        let dx = View::<T>::new("embed backward", dx)?;
        let mut out = vec![T::zero(); virtual_tokens * c];
        let m = T::of(lookup.multiplier);
        for (row, &id) in dx.chunks_exact(c).zip(ids).filter(|(_, id)| **id as usize >= vocab) {
            let at = (id as usize - vocab) * c;
            out[at..at + c].iter_mut().zip(row).for_each(|(y, &x)| *y += m * x);
        }
        cpu::tensor(out, (virtual_tokens, c))
    })
}

/// The formula in plain candle ops.
pub fn reference(embedding: &Tensor, prompts: &Tensor, lookup: &Lookup) -> Result<Tensor> {
    let table = Tensor::cat(&[&embedding.to_dtype(prompts.dtype())?, prompts], 0)?;
    let ids = lookup.ids.on(embedding.device())?;
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
            let ids = Indices::from((0..t as u32).map(|i| (i * 7 + 20) % 23).collect::<Vec<_>>());
            let lookup = Lookup { ids: (&ids).into(), multiplier: 12.0 };
            let y = forward(&e, &p, &lookup)?;
            assert_close("embed", &y, &reference(&e, &p, &lookup)?, Tolerance::F32);
            let dy = randn(3, (t, c), DType::F32)?;
            let expected = autograd(&[&p], &dy, |v| reference(&e, v[0].as_tensor(), &lookup))?;
            let dp = backward(&dy, 17, 6, &lookup)?;
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
            let ids = Indices::from(vec![0, 10, 8]);
            let lookup = Lookup { ids: (&ids).into(), multiplier: 3.0 };
            assert_close("embed", &forward(&e, &p, &lookup)?, &reference(&e, &p, &lookup)?, Tolerance::F32);
        }
        Ok(())
    }

    #[test]
    fn an_id_out_of_range_is_an_error() -> Result<()> {
        let (e, p) = (randn(1, (3, 4), DType::F32)?, randn(2, (2, 4), DType::F32)?);
        let ids = Indices::from(vec![5]);
        let error = forward(&e, &p, &Lookup { ids: (&ids).into(), multiplier: 1.0 }).unwrap_err();
        assert_eq!(error.to_string(), "embed: expected ids under 5 (3 tokens and 2 virtual tokens), found 5");
        Ok(())
    }
}
