//! Each instruction set that this machine has, against sums in f64.

use super::kernel::{self, Left, Line, Out};
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

pub(super) fn pack(isa: Isa, (n, k): (usize, usize), rows: &[bf16]) -> Panels {
    let read = |range: Range<usize>, out: &mut [bf16]| -> Result<(), Infallible> {
        out.copy_from_slice(&rows[range.start * k..range.end * k]);
        Ok(())
    };
    match Panels::pack(isa, (n, k), read) {
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
pub(super) fn assert_near(what: &str, found: f32, (sum, size): (f64, f64), then: Then, old: f32) {
    let expected = f64::from(then.scale) * sum + if then.add { f64::from(old) } else { 0.0 };
    // Sums in f32 of so many products round to a few parts in a million of their size.
    let allowed = 4e-6 * (size + f64::from(old.abs())) + 1e-30;
    assert!(
        (f64::from(found) - expected).abs() <= allowed,
        "{what}: {found}, expected {expected} within {allowed}"
    );
}

#[test]
fn both_directions_are_the_sums_of_f64() {
    for &isa in Isa::all() {
        let mut random = Random(12345);
        for (m, n, k) in SHAPES {
            let (x, dy, w) = (random.values(m * k), random.values(m * n), random.values(n * k));
            let panels = pack(isa, (n, k), &w);
            for right in [Right::Panels(&panels), Right::Rows(&w, k)] {
                for then in [Then { scale: 1.0, add: false }, Then { scale: 0.22, add: true }] {
                    let what = format!("{isa:?} {m} {n} {k} {then:?}");
                    let mut y = vec![if then.add { 0.5 } else { f32::NAN }; m * n];
                    forward(isa, &x, right, &mut y, then);
                    for (i, &y) in y.iter().enumerate() {
                        let (row, column) = (i / n, i % n);
                        let sum = exact(k, |j| (x[row * k + j], w[column * k + j]));
                        assert_near(&format!("forward {what} at {row}, {column}"), y, sum, then, 0.5);
                    }
                    let mut dx = vec![if then.add { 0.5 } else { f32::NAN }; m * k];
                    backward(isa, &dy, right, &mut dx, then);
                    for (i, &dx) in dx.iter().enumerate() {
                        let (row, column) = (i / k, i % k);
                        let sum = exact(n, |j| (dy[row * n + j], w[j * k + column]));
                        assert_near(&format!("backward {what} at {row}, {column}"), dx, sum, then, 0.5);
                    }
                }
            }
        }
    }
}

#[test]
fn an_output_in_bf16_is_the_other_rounded() {
    for &isa in Isa::all() {
        let mut random = Random(5);
        for (m, n, k) in [(1, 1, 1), (17, 5000, 47), (100, 130, 34), (600, 40, 40), (3, 20, 5000)] {
            let (x, w, bias) = (random.values(m * k), random.values(n * k), random.values(m * n));
            for then in [Then::WRITE, Then { scale: 0.22, add: true }] {
                let mut wide: Vec<f32> = bias.iter().map(|b| b.to_f32()).collect();
                forward(isa, &x, Right::Panels(&pack(isa, (n, k), &w)), &mut wide, then);
                let mut narrow = bias.clone();
                forward(isa, &x, Right::Panels(&pack(isa, (n, k), &w)), &mut narrow, then);
                assert!(
                    narrow.iter().zip(&wide).all(|(a, b)| *a == bf16::from_f32(*b)),
                    "{isa:?} {m} {n} {k}"
                );
            }
        }
    }
}

#[test]
fn operands_need_no_alignment() {
    for &isa in Isa::all() {
        let (m, n, k) = (9, 21, 37);
        let mut random = Random(7);
        let (x, w) = (random.values(m * k + 1), random.values(n * k + 1));
        let mut out = vec![0.0; m * n + 1];
        forward(isa, &x[1..], Right::Rows(&w[1..], k), &mut out[1..], Then::WRITE);
        for (i, &y) in out[1..].iter().enumerate() {
            let sum = exact(k, |j| (x[1 + i / n * k + j], w[1 + i % n * k + j]));
            assert_near("unaligned", y, sum, Then::WRITE, 0.0);
        }
    }
}

#[test]
fn nothing_makes_nothing_and_sums_of_nothing_are_zero() {
    for &isa in Isa::all() {
        let mut none: [f32; 0] = [];
        let w = vec![bf16::ONE; 12];
        forward(isa, &[], Right::Rows(&w, 4), &mut none, Then::WRITE);
        backward(isa, &[], Right::Panels(&pack(isa, (3, 4), &w)), &mut none, Then::WRITE);
        let mut out = [f32::NAN; 6];
        forward(isa, &[], Right::Panels(&pack(isa, (3, 0), &[])), &mut out, Then::WRITE);
        assert_eq!(out, [0.0; 6]);
        out.fill(f32::NAN);
        backward(isa, &[], Right::Panels(&pack(isa, (0, 3), &[])), &mut out, Then::WRITE);
        assert_eq!(out, [0.0; 6]);
    }
}

#[test]
fn what_is_not_finite_stays_in_its_row_and_column() {
    for &isa in Isa::all() {
        let (m, n, k) = (8, 20, 5);
        let mut x = vec![bf16::ONE; m * k];
        let mut w = vec![bf16::ONE; n * k];
        (x[3 * k + 4], w[7 * k]) = (bf16::NAN, bf16::INFINITY);
        let mut out = vec![0.0; m * n];
        forward(isa, &x, Right::Panels(&pack(isa, (n, k), &w)), &mut out, Then::WRITE);
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
fn panels_give_back_what_was_packed() {
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
fn a_reader_s_error_is_the_packing_s() {
    for &isa in Isa::all() {
        let failed =
            Panels::pack(isa, (40, 4), |rows, _| if rows.contains(&20) { Err("row 20") } else { Ok(()) });
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
        let mut lines = vec![Line::ZERO; 2 * 16];
        kernel::pack_columns(isa, &b, width, rows, width, &mut lines, 16);
        let mut out = vec![0.0; columns * width];
        let left = Left::interleaved(&interleaved, 2 * columns);
        let right = kernel::Panels::new(&lines, 16);
        kernel::block(isa, left, right, rows, &mut Out::new(&mut out, columns, width, width), Then::WRITE);
        for (i, &y) in out.iter().enumerate() {
            let sum = exact(rows, |r| (a[r * columns + i / width], b[r * width + i % width]));
            assert_near("interleaved", y, sum, Then::WRITE, 0.0);
        }
    }
}

#[test]
#[should_panic(expected = "values on the left")]
fn a_short_operand_panics() {
    let Some(isa) = Isa::best() else { panic!("no values on the left to be short of") };
    let (x, lines, mut out) = ([bf16::ONE; 5], [Line::ZERO; 16], [0.0; 2]);
    let out = &mut Out::new(&mut out, 2, 1, 1);
    kernel::block(isa, Left::rows(&x, 3), kernel::Panels::new(&lines, 16), 3, out, Then::WRITE);
}

#[test]
fn tasks_keep_threads_busy() {
    let narrow = Costs { panels: 4, copy: 0.0, turn: 5.0 };
    assert_eq!(task(385, 36, narrow, 2), (385, 2), "9 groups of 4 panels on 2 threads: 18 of 2 instead");
    assert_eq!(task(385, 192, narrow, 2), (385, 4), "48 groups are enough");
    assert_eq!(task(16, 3072, narrow, 2), (16, 4), "few rows");
    assert_eq!(task(4096, 512, narrow, 2), (512, 4), "no more rows than stay in the cache");
    assert_eq!(task(385, 36, narrow, 64), (55, 4), "as many tasks as there are threads");
    assert_eq!(task(1, 1, narrow, 64), (1, 2));
    let wide = Costs { panels: 24, copy: 0.4, turn: 9.0 };
    assert_eq!(
        task(367, 36, wide, 2),
        (367, 18),
        "a half each: rows of the left are copied once for all its panels"
    );
    assert_eq!(task(367, 192, wide, 2), (367, 24));
    assert_eq!(task(16, 36, wide, 2), (16, 18), "too few rows to cut");
}

#[test]
fn blocks_cover_the_depth_in_whole_steps() {
    for costs in Isa::all().iter().filter_map(|isa| isa.costs()) {
        for depth in [0, 1, 31, 32, 33, 4096, 5000, 100_000] {
            let blocks: Vec<_> = blocks(costs, depth).collect();
            assert_eq!(blocks.last().map(|b| b.end), Some(depth));
            assert!(blocks.windows(2).all(|w| w[0].end == w[1].start && w[0].len().is_multiple_of(STEP)));
        }
    }
}
