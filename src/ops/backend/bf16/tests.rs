//! Each instruction set that this machine has, against sums in f64.

use super::isa::Costs;
use super::kernel::{self, BlockProduct, Left, OutputBlock, Panels};
use super::tasks::{blocks, task_size};
use super::*;
use std::convert::Infallible;

/// Rows, output features, input features: every edge of a tile, a panel, a pair, a step and a block.
const SHAPES: [(usize, usize, usize); 14] = [
    (1, 1, 1),
    (1, 16, 2),
    (2, 17, 3),
    (3, 64, 32),
    (5, 7, 9),
    (6, 65, 33),
    (7, 15, 64),
    (13, 33, 5000),
    (17, 5000, 47),
    (33, 47, 65),
    (49, 96, 31),
    (100, 130, 34),
    (121, 576, 192),
    (600, 40, 40),
];

/// [`super::forward`] with the output and the epilogue apart.
fn forward<O: OutputElement>(isa: Isa, x: &[bf16], w: Right, out: &mut [O], epilogue: Epilogue) {
    super::forward(isa, x, w, epilogue.alpha, output(out, epilogue));
}

/// [`super::backward`] with the output and the epilogue apart.
fn backward<O: OutputElement>(isa: Isa, dy: &[bf16], w: Right, out: &mut [O], epilogue: Epilogue) {
    super::backward(isa, dy, w, epilogue.alpha, output(out, epilogue));
}

fn output<O: OutputElement>(out: &mut [O], epilogue: Epilogue) -> ProductOutput<'_, O> {
    match epilogue.accumulate {
        true => ProductOutput::Accumulate(out),
        false => ProductOutput::Write(uninit(out)),
    }
}

/// The elements, which products overwrite.
pub(super) fn uninit<O>(out: &mut [O]) -> &mut [MaybeUninit<O>] {
    // SAFETY: both have one layout; products write nothing but values.
    unsafe { &mut *(std::ptr::from_mut(out) as *mut [MaybeUninit<O>]) }
}

pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn value(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub(super) fn values(&mut self, n: usize) -> Vec<bf16> {
        (0..n).map(|_| bf16::from_f32(self.value())).collect()
    }
}

pub(super) fn pack(isa: Isa, (n, k): (usize, usize), rows: &[bf16]) -> PackedWeight {
    let read = |range: Range<usize>, out: &mut [bf16]| -> Result<(), Infallible> {
        out.copy_from_slice(&rows[range.start * k..range.end * k]);
        Ok(())
    };
    match PackedWeight::pack(isa, (n, k), read) {
        Ok(panels) => panels,
    }
}

/// Sum and sum of magnitudes of `depth` products.
pub(super) fn exact(depth: usize, product: impl Fn(usize) -> (bf16, bf16)) -> (f64, f64) {
    let products = (0..depth).map(|i| {
        let (a, b) = product(i);
        a.to_f64() * b.to_f64()
    });
    products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()))
}

#[track_caller]
pub(super) fn assert_near(what: &str, found: f32, (sum, size): (f64, f64), epilogue: Epilogue, old: f32) {
    let expected = f64::from(epilogue.alpha) * sum + if epilogue.accumulate { f64::from(old) } else { 0.0 };
    // Sums in f32 of so many products round to a few parts in a million of their size.
    let allowed = 4e-6 * (size + f64::from(old.abs())) + 1e-30;
    assert!(
        (f64::from(found) - expected).abs() <= allowed,
        "{what}: {found}, expected {expected} within {allowed}"
    );
}

#[test]
fn forward_and_backward_are_the_sums_of_f64() {
    for &isa in Isa::all() {
        let mut random = Random(12345);
        for (m, n, k) in SHAPES {
            let (x, dy, w) = (random.values(m * k), random.values(m * n), random.values(n * k));
            let panels = pack(isa, (n, k), &w);
            for right in [Right::Packed(&panels), Right::Rows(&w, k)] {
                for epilogue in
                    [Epilogue { alpha: 1.0, accumulate: false }, Epilogue { alpha: 0.22, accumulate: true }]
                {
                    let what = format!("{isa:?} {m} {n} {k} {epilogue:?}");
                    let mut y = vec![if epilogue.accumulate { 0.5 } else { f32::NAN }; m * n];
                    forward(isa, &x, right, &mut y, epilogue);
                    for (i, &y) in y.iter().enumerate() {
                        let (row, column) = (i / n, i % n);
                        let sum = exact(k, |j| (x[row * k + j], w[column * k + j]));
                        assert_near(&format!("forward {what} at {row}, {column}"), y, sum, epilogue, 0.5);
                    }
                    let mut dx = vec![if epilogue.accumulate { 0.5 } else { f32::NAN }; m * k];
                    backward(isa, &dy, right, &mut dx, epilogue);
                    for (i, &dx) in dx.iter().enumerate() {
                        let (row, column) = (i / k, i % k);
                        let sum = exact(n, |j| (dy[row * n + j], w[j * k + column]));
                        assert_near(&format!("backward {what} at {row}, {column}"), dx, sum, epilogue, 0.5);
                    }
                }
            }
        }
    }
}

#[test]
fn forward_to_bf16_is_forward_to_f32_rounded() {
    for &isa in Isa::all() {
        let mut random = Random(5);
        for (m, n, k) in [(1, 1, 1), (17, 5000, 47), (100, 130, 34), (600, 40, 40), (3, 20, 5000)] {
            let (x, w, bias) = (random.values(m * k), random.values(n * k), random.values(m * n));
            for epilogue in [Epilogue::WRITE, Epilogue { alpha: 0.22, accumulate: true }] {
                let mut f32s: Vec<f32> = bias.iter().map(|b| b.to_f32()).collect();
                forward(isa, &x, Right::Packed(&pack(isa, (n, k), &w)), &mut f32s, epilogue);
                let mut bf16s = bias.clone();
                forward(isa, &x, Right::Packed(&pack(isa, (n, k), &w)), &mut bf16s, epilogue);
                assert!(
                    bf16s.iter().zip(&f32s).all(|(a, b)| *a == bf16::from_f32(*b)),
                    "{isa:?} {m} {n} {k}"
                );
            }
        }
    }
}

#[test]
fn forward_takes_unaligned_operands() {
    for &isa in Isa::all() {
        let (m, n, k) = (9, 21, 37);
        let mut random = Random(7);
        let (x, w) = (random.values(m * k + 1), random.values(n * k + 1));
        let mut out = vec![0.0; m * n + 1];
        forward(isa, &x[1..], Right::Rows(&w[1..], k), &mut out[1..], Epilogue::WRITE);
        for (i, &y) in out[1..].iter().enumerate() {
            let sum = exact(k, |j| (x[1 + i / n * k + j], w[1 + i % n * k + j]));
            assert_near("unaligned", y, sum, Epilogue::WRITE, 0.0);
        }
    }
}

#[test]
fn products_of_no_rows_are_empty_and_sums_of_no_values_are_zero() {
    for &isa in Isa::all() {
        let mut none: [f32; 0] = [];
        let w = vec![bf16::ONE; 12];
        forward(isa, &[], Right::Rows(&w, 4), &mut none, Epilogue::WRITE);
        backward(isa, &[], Right::Packed(&pack(isa, (3, 4), &w)), &mut none, Epilogue::WRITE);
        let mut out = [f32::NAN; 6];
        forward(isa, &[], Right::Packed(&pack(isa, (3, 0), &[])), &mut out, Epilogue::WRITE);
        assert_eq!(out, [0.0; 6]);
        out.fill(f32::NAN);
        backward(isa, &[], Right::Packed(&pack(isa, (0, 3), &[])), &mut out, Epilogue::WRITE);
        assert_eq!(out, [0.0; 6]);
    }
}

#[test]
fn forward_keeps_values_that_are_not_finite_in_their_row_and_column() {
    for &isa in Isa::all() {
        let (m, n, k) = (8, 20, 5);
        let mut x = vec![bf16::ONE; m * k];
        let mut w = vec![bf16::ONE; n * k];
        (x[3 * k + 4], w[7 * k]) = (bf16::NAN, bf16::INFINITY);
        let mut out = vec![0.0; m * n];
        forward(isa, &x, Right::Packed(&pack(isa, (n, k), &w)), &mut out, Epilogue::WRITE);
        for (i, &y) in out.iter().enumerate() {
            match (i / n, i % n) {
                (3, _) => assert!(y.is_nan()),
                (_, 7) => assert_eq!(y, f32::INFINITY),
                _ => assert_eq!(y, k as f32),
            }
        }
    }
}

#[test]
fn unpack_returns_the_packed_values() {
    for &isa in Isa::all() {
        for (n, k) in [(1, 1), (16, 32), (17, 33), (40, 7)] {
            let w = Random(9).values(n * k);
            let panels = pack(isa, (n, k), &w);
            assert_eq!(panels.unpack(), w);
            if let Some(part) = panels.rows(n / 16 * 16..n) {
                assert_eq!(part.unpack(), w[n / 16 * 16 * k..]);
            }
            assert!(n < 2 || panels.rows(1..n).is_none(), "a panel begins at a multiple of 16 rows");
        }
    }
}

#[test]
fn pack_returns_the_error_of_read() {
    for &isa in Isa::all() {
        let failed =
            PackedWeight::pack(
                isa,
                (40, 4),
                |rows, _| if rows.contains(&20) { Err("row 20") } else { Ok(()) },
            );
        assert_eq!(failed.map(|p| p.dims()), Err("row 20"));
    }
}

#[test]
fn interleaved_rows_multiply_as_their_transpose() {
    for &isa in Isa::all() {
        // A matrix of 10 rows and 7 columns, two rows of it interleaved: the product is over its rows.
        let (rows, columns, width) = (10, 7, 19);
        let (a, b) = (Random(3).values(rows * columns), Random(4).values(rows * width));
        let pair = |p: usize, c: usize| [a[2 * p * columns + c], a[(2 * p + 1) * columns + c]];
        let interleaved: Vec<bf16> =
            (0..rows / 2).flat_map(|p| (0..columns).flat_map(move |c| pair(p, c))).collect();
        let mut lines = vec![PanelRow::ZERO; 2 * 16];
        let from = Bf16Matrix { values: &b, stride: width, rows, columns: width };
        kernel::pack_columns(isa, from, &mut PanelsMut { lines: &mut lines, stride: 16 });
        let mut out = vec![0.0; columns * width];
        let left = Left::interleaved(&interleaved, 2 * columns);
        let right = Panels::new(&lines, 16);
        let product = BlockProduct { left, right, depth: rows, epilogue: Epilogue::WRITE };
        kernel::multiply(isa, product, &mut OutputBlock::new(&mut out, columns, width, width));
        for (i, &y) in out.iter().enumerate() {
            let sum = exact(rows, |r| (a[r * columns + i / width], b[r * width + i % width]));
            assert_near("interleaved", y, sum, Epilogue::WRITE, 0.0);
        }
    }
}

#[test]
#[should_panic(expected = "values on the left")]
fn multiply_panics_on_a_short_operand() {
    let Some(isa) = Isa::best() else { panic!("no values on the left to be short of") };
    let (x, lines, mut out) = ([bf16::ONE; 5], [PanelRow::ZERO; 16], [0.0; 2]);
    let out = &mut OutputBlock::new(&mut out, 2, 1, 1);
    let (left, right) = (Left::rows(&x, 3), Panels::new(&lines, 16));
    kernel::multiply(isa, BlockProduct { left, right, depth: 3, epilogue: Epilogue::WRITE }, out);
}

#[test]
fn task_size_keeps_threads_busy() {
    let few_panels = Costs { panels: 4, copy: 0.0, transpose: 5.0 };
    assert_eq!(
        task_size(385, 36, few_panels, 2),
        (385, 2),
        "9 groups of 4 panels on 2 threads: 18 of 2 instead"
    );
    assert_eq!(task_size(385, 192, few_panels, 2), (385, 4), "48 groups are enough");
    assert_eq!(task_size(16, 3072, few_panels, 2), (16, 4), "few rows");
    assert_eq!(task_size(4096, 512, few_panels, 2), (512, 4), "no more rows than stay in the cache");
    assert_eq!(task_size(385, 36, few_panels, 64), (55, 4), "as many tasks as there are threads");
    assert_eq!(task_size(1, 1, few_panels, 64), (1, 2));
    let many_panels = Costs { panels: 24, copy: 0.4, transpose: 9.0 };
    assert_eq!(
        task_size(367, 36, many_panels, 2),
        (367, 18),
        "a half each: rows of the left are copied once for all its panels"
    );
    assert_eq!(task_size(367, 192, many_panels, 2), (367, 24));
    assert_eq!(task_size(16, 36, many_panels, 2), (16, 18), "too few rows to cut");
}

#[test]
fn blocks_cover_the_depth_in_full_steps() {
    for costs in Isa::all().iter().filter_map(|isa| isa.costs()) {
        for depth in [0, 1, 31, 32, 33, 4096, 5000, 100_000] {
            let blocks: Vec<_> = blocks(costs, depth).collect();
            assert_eq!(blocks.last().map(|b| b.end), Some(depth));
            assert!(blocks.windows(2).all(|w| w[0].end == w[1].start && w[0].len().is_multiple_of(STEP)));
        }
    }
}
