//! The divergences on the CPU, in f32 or f64.

use super::{Divergences, Softmax};
use crate::Result;
use crate::ops::cpu::{self, Fma, Real, View, with_real};
use crate::ops::cross_entropy::{LossWeights, log_sum_exp};
use candle_core::{DType, Tensor};
use num_traits::Zero;
use rayon::prelude::*;

/// Differences of log-probabilities below this are small in f32 and f64: the series is exact to 4e-7 and 4e-14, and the direct
/// formula, which subtracts nearly equal numbers, to 2e-6 and 2e-12 above it.
const SMALL: [f64; 2] = [0.25, 0.01];

/// What makes log-probabilities of a row of logits of both.
#[derive(Clone, Copy)]
struct LogSoftmax<T> {
    scale: T,
    student_lse: T,
    teacher_lse: T,
}

pub(super) fn forward(student: &Tensor, teacher: &Tensor, softmax: Softmax) -> Result<Divergences> {
    const OP: &str = "distillation";
    let Softmax { vocab, scale } = softmax;
    let (rows, width) = student.dims2()?;
    with_real!(OP, student.dtype(), T => {
        let (student, teacher) = (View::<T>::new(OP, student)?, View::<T>::new(OP, teacher)?);
        let (student, teacher): (&[T], &[T]) = (&student, &teacher);
        let of_row = |(student, teacher): (&[T], &[T])| cpu::simd(#[inline(always)] |fma| {
            let (student, teacher) = (&student[..vocab], &teacher[..vocab]);
            let scale = T::nearest(scale);
            let [of_student, of_teacher] = [student, teacher].map(|row| log_sum_exp(row, scale, fma));
            let (student_lse, teacher_lse) = (T::nearest(of_student), T::nearest(of_teacher));
            let kl = divergence(student, teacher, LogSoftmax { scale, student_lse, teacher_lse }, fma);
            (kl, (of_student, of_teacher))
        });
        let of_rows: Vec<_> = student.par_chunks(width).zip(teacher.par_chunks(width)).map(of_row).collect();
        let (kl, (student_lse, teacher_lse)): (Vec<f64>, (Vec<f64>, Vec<f64>)) = of_rows.into_iter().unzip();
        Ok(Divergences {
            kl: cpu::tensor(kl, rows)?,
            student_lse: cpu::tensor(student_lse, rows)?,
            teacher_lse: cpu::tensor(teacher_lse, rows)?,
        })
    })
}

/// Replaces the student's logits by their gradient.
pub(super) fn backward(
    student: &Tensor,
    teacher: &Tensor,
    softmax: Softmax,
    divergences: &Divergences,
    dloss: &LossWeights,
) -> Result<()> {
    const OP: &str = "distillation backward";
    let Softmax { vocab, scale } = softmax;
    let (rows, width) = student.dims2()?;
    let dloss = dloss.on_host(rows)?;
    with_real!(OP, student.dtype(), T => {
        let factors: Vec<T> = dloss.iter().map(|dloss| T::nearest(scale * dloss)).collect();
        let scale = T::nearest(scale);
        let teacher = View::<T>::new(OP, teacher)?;
        let teacher: &[T] = &teacher;
        let lse = [&divergences.student_lse, &divergences.teacher_lse].map(|lse| View::<f64>::new(OP, lse));
        let [student_lse, teacher_lse] = lse;
        let (student_lse, teacher_lse) = (student_lse?, teacher_lse?);
        let (student_lse, teacher_lse): (&[f64], &[f64]) = (&student_lse, &teacher_lse);
        cpu::in_place::<T>(student, |student| {
            let rows = student.par_chunks_mut(width).zip(teacher.par_chunks(width)).zip(&factors);
            rows.zip(student_lse.par_iter().zip(teacher_lse)).for_each(|(((row, teacher), &factor), (of_student, of_teacher))| {
                let (of_student, of_teacher) = (T::nearest(*of_student), T::nearest(*of_teacher));
                let (row, padding) = row.split_at_mut(vocab);
                padding.fill(T::zero());
                cpu::simd(#[inline(always)] |fma| {
                    row.iter_mut().zip(teacher).for_each(|(z, &t)| {
                        let q = fma.mul_add(*z, scale, -of_student).fast_exp(fma);
                        *z = factor * (q - fma.mul_add(t, scale, -of_teacher).fast_exp(fma));
                    });
                });
            });
        })
    })
}

/// Divergence of a row, summed in 32 lanes over blocks of 4,096, the blocks' sums in f64.
#[inline(always)]
fn divergence<T: Real>(student: &[T], teacher: &[T], of: LogSoftmax<T>, fma: Fma) -> f64 {
    let mut sum = 0.0;
    for (student, teacher) in student.chunks(4096).zip(teacher.chunks(4096)) {
        let mut lanes = [T::zero(); 32];
        let (mut student, mut teacher) = (student.chunks_exact(32), teacher.chunks_exact(32));
        for (student, teacher) in (&mut student).zip(&mut teacher) {
            lanes
                .iter_mut()
                .zip(student.iter().zip(teacher))
                .for_each(|(lane, (&s, &t))| *lane += term(s, t, of, fma));
        }
        let tail = student.remainder().iter().zip(teacher.remainder());
        let tail: T = tail.map(|(&s, &t)| term(s, t, of, fma)).sum();
        sum += (lanes.into_iter().sum::<T>() + tail).as_f64();
    }
    sum
}

/// `p * (d + exp(-d) - 1)` of a student's and a teacher's logit.
#[inline(always)]
fn term<T: Real>(student: T, teacher: T, of: LogSoftmax<T>, fma: Fma) -> T {
    let log_p = fma.mul_add(teacher, of.scale, -of.teacher_lse);
    let log_q = fma.mul_add(student, of.scale, -of.student_lse);
    let (p, d) = (log_p.fast_exp(fma), log_p - log_q);
    let mut series = T::nearest(1.0 / 720.0);
    for factor in [-1.0 / 120.0, 1.0 / 24.0, -1.0 / 6.0, 0.5] {
        series = fma.mul_add(series, d, T::nearest(factor));
    }
    let direct = fma.mul_add(p, d, log_q.fast_exp(fma) - p);
    let small = T::nearest(SMALL[usize::from(T::DTYPE == DType::F64)]);
    if d.abs() < small { p * d * d * series } else { direct }
}
