//! The lookup on the CPU, in f32 or f64.

use super::{EmbedLookup, virtual_row};
use crate::Result;
use crate::ops::cpu::{self, Real, UninitBuffer, View, with_real};
use candle_core::{DType, Tensor, WithDType};
use half::{bf16, f16};
use num_traits::Zero;

pub(super) fn forward(embedding: &Tensor, prompts: &Tensor, lookup: &EmbedLookup) -> Result<Tensor> {
    with_real!("embed", prompts.dtype(), T => match embedding.dtype() {
        DType::F16 => gather::<T, f16>(embedding, prompts, lookup, f16::to_f64),
        DType::BF16 => gather::<T, bf16>(embedding, prompts, lookup, bf16::to_f64),
        _ => gather::<T, T>(embedding, prompts, lookup, |x| x.as_f64()),
    })
}

/// The lookup in `T`, with the embedding stored in `W`.
fn gather<T: Real, W: WithDType>(
    embedding: &Tensor,
    prompts: &Tensor,
    lookup: &EmbedLookup,
    to_f64: impl Fn(W) -> f64 + Sync,
) -> Result<Tensor> {
    let (_, c) = embedding.dims2()?;
    let (e, p) = (View::<W>::new("embed", embedding)?, View::<T>::new("embed", prompts)?);
    let (e, p): (&[W], &[T]) = (&e, &p);
    let (m, ids) = (lookup.multiplier, lookup.ids.host());
    let mut out = UninitBuffer::<T>::new(ids.len() * c);
    cpu::par_rows(
        out.as_slice(),
        c,
        #[inline(always)]
        |first, rows, _| {
            for (row, &id) in rows.chunks_exact_mut(c).zip(&ids[first..]) {
                match virtual_row(id) {
                    None => {
                        let token = &e[id as usize * c..][..c];
                        row.iter_mut().zip(token).for_each(|(y, &x)| _ = y.write(T::nearest(m * to_f64(x))));
                    }
                    Some(j) => {
                        let prompt = &p[j * c..][..c];
                        row.iter_mut()
                            .zip(prompt)
                            .for_each(|(y, &x)| _ = y.write(T::nearest(m * x.as_f64())));
                    }
                }
            }
        },
    );
    // SAFETY: each row of C elements was written from a row of C elements.
    unsafe { out.into_tensor((ids.len(), c)) }
}

pub(super) fn backward(dx: &Tensor, virtual_tokens: usize, lookup: &EmbedLookup) -> Result<Tensor> {
    let (_, c) = dx.dims2()?;
    with_real!("embed backward", dx.dtype(), T => {
        let dx = View::<T>::new("embed backward", dx)?;
        let mut out = vec![T::zero(); virtual_tokens * c];
        let m = T::nearest(lookup.multiplier);
        let ids = lookup.ids.host();
        let rows = dx.chunks_exact(c).zip(ids).filter_map(|(row, id)| Some((row, virtual_row(*id)?)));
        for (row, j) in rows {
            out[j * c..(j + 1) * c].iter_mut().zip(row).for_each(|(y, &x)| *y += m * x);
        }
        cpu::tensor(out, (virtual_tokens, c))
    })
}
