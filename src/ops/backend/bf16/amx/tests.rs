//! Everything of a product on AMX except its instructions, on a model of the tile registers.

use super::super::kernel::amx::{Model, TileProgram, multiply as multiply_block};
use super::super::kernel::{Bf16Matrix, BlockProduct, PanelsMut};
use super::super::tests::{Random, assert_near, exact, pack, uninit};
use super::super::{PANEL, PackedWeight, pack_sums};
use super::*;

/// An instruction set for packing; `None` if the CPU has none, or not the instructions that write the sums.
fn isa() -> Option<Isa> {
    Isa::all().first().copied().filter(|_| is_x86_feature_detected!("avx512bf16"))
}

/// Rows, output features, input features: edges of a register, a block, a step, the cache (20 steps) and a cut.
const SHAPES: [(usize, usize, usize); 11] = [
    (1, 1, 1),
    (15, 16, 31),
    (16, 17, 32),
    (17, 33, 33),
    (31, 48, 1),
    (32, 16, 0),
    (33, 33, 640),
    (33, 48, 672),
    (17, 20, 2049),
    (20, 3072, 33),
    (367, 33, 64),
];

const EPILOGUES: [Epilogue; 2] = [Epilogue::WRITE, Epilogue { alpha: 0.22, accumulate: true }];

/// The value of an output before the product.
fn before(epilogue: Epilogue) -> f32 {
    if epilogue.accumulate { 0.5 } else { f32::NAN }
}

/// A weight in the forms that a product reads: packed, packed with its transpose, in rows.
struct TestWeight {
    k: usize,
    values: Vec<bf16>,
    packed: PackedWeight,
    with_transpose: PackedWeight,
}

impl TestWeight {
    fn new(isa: Isa, (n, k): (usize, usize), values: Vec<bf16>) -> Self {
        let with_transpose = pack(isa, (n, k), &values);
        with_transpose.pack_transpose();
        Self { k, packed: pack(isa, (n, k), &values), with_transpose, values }
    }

    fn all(&self) -> [Right<'_>; 3] {
        [Right::Packed(&self.packed), Right::Packed(&self.with_transpose), Right::Rows(&self.values, self.k)]
    }
}

/// A product of either direction on [`Model`]; like its callers, it does nothing if there is no output.
fn product<O: OutputElement>(
    isa: Isa,
    is_forward: bool,
    (left, w): (&[bf16], Right),
    out: &mut [O],
    epilogue: Epilogue,
) {
    if out.is_empty() {
        return;
    }
    match is_forward {
        true => forward::<Model, O>(isa, left, w, uninit(out), epilogue),
        false => backward::<Model, O>(isa, left, w, uninit(out), epilogue),
    }
}

#[test]
fn products_are_the_sums_of_f64_in_both_directions() {
    let Some(isa) = isa() else { return };
    let mut random = Random(31);
    for (m, n, k) in SHAPES {
        let weight = TestWeight::new(isa, (n, k), random.values(n * k));
        let w = &weight.values;
        for (is_forward, depth, width) in [(true, k, n), (false, n, k)] {
            let left = random.values(m * depth);
            let sum = |i: usize| {
                let (row, column) = (i / width, i % width);
                exact(depth, |j| {
                    let w = if is_forward { w[column * k + j] } else { w[j * k + column] };
                    (left[row * depth + j], w)
                })
            };
            let sums: Vec<_> = (0..m * width).map(sum).collect();
            for (form, right) in weight.all().into_iter().enumerate() {
                // Rows of no values do not say how many they are.
                if k == 0 && matches!(right, Right::Rows(..)) {
                    continue;
                }
                for epilogue in EPILOGUES {
                    let what = format!("{m} {n} {k} forward {is_forward} form {form} {epilogue:?}");
                    let mut out = vec![before(epilogue); m * width];
                    product(isa, is_forward, (&left, right), &mut out, epilogue);
                    for (&y, &sum) in out.iter().zip(&sums) {
                        assert_near(&what, y, sum, epilogue, 0.5);
                    }
                    let mut rounded = vec![bf16::from_f32(before(epilogue)); m * width];
                    product(isa, is_forward, (&left, right), &mut rounded, epilogue);
                    let same = rounded.iter().zip(&out).all(|(a, b)| *a == bf16::from_f32(*b));
                    assert!(same, "{what}: an output in bf16 is the one in f32, rounded");
                }
            }
        }
    }
}

#[test]
fn products_do_not_depend_on_the_number_of_threads() {
    let Some(isa) = isa() else { return };
    let mut random = Random(32);
    for (m, n, k) in [(100, 70, 33), (33, 65, 2100)] {
        let weight = TestWeight::new(isa, (n, k), random.values(n * k));
        for (is_forward, depth, width) in [(true, k, n), (false, n, k)] {
            let left = random.values(m * depth);
            let mut outputs = Vec::new();
            for threads in [1, 2, 3, 5] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                for right in weight.all() {
                    let (mut sums, mut rounded) = (vec![0.0f32; m * width], vec![bf16::ZERO; m * width]);
                    pool.install(|| {
                        product(isa, is_forward, (&left, right), &mut sums, Epilogue::WRITE);
                        product(isa, is_forward, (&left, right), &mut rounded, Epilogue::WRITE);
                    });
                    outputs.push((sums, rounded));
                }
            }
            assert!(outputs.iter().all(|pair| *pair == outputs[0]), "{m} {n} {k} forward {is_forward}");
        }
    }
}

/// Rows of a weight, some of which begin or end within a step of the transpose.
#[test]
fn products_with_a_part_of_the_rows_do_not_see_the_others() {
    let Some(isa) = isa() else { return };
    let (n, k, m) = (80, 40, 3);
    for range in [0..16, 0..32, 0..64, 16..48, 16..80, 32..80, 48..80, 32..70, 32..71, 0..1, 64..64] {
        let mut values = vec![bf16::NAN; n * k];
        values[range.start * k..range.end * k].copy_from_slice(&Random(33).values(range.len() * k));
        let matrix = pack(isa, (n, k), &values);
        matrix.pack_transpose();
        let part = matrix.rows(range.clone()).unwrap();
        let dy = Random(34).values(m * range.len());
        let mut dx = vec![f32::NAN; m * k];
        backward::<Model, f32>(isa, &dy, Right::Packed(&part), uninit(&mut dx), Epilogue::WRITE);
        for (i, &y) in dx.iter().enumerate() {
            let sum =
                exact(range.len(), |j| (dy[i / k * range.len() + j], values[(range.start + j) * k + i % k]));
            assert_near(&format!("{range:?}"), y, sum, Epilogue::WRITE, 0.0);
        }
        // Steps of the transpose are cut at multiples of 32 rows of what is read, or end with zeros.
        let is_full = range.len().is_multiple_of(32) || (range.end == n && range.start.is_multiple_of(32));
        assert_eq!(part.transpose().is_some(), is_full, "{range:?}");
    }
}

#[test]
fn multiply_runs_the_program_of_the_block() {
    use TileProgram::{BothStream, HalfHeight, PanelsStay};
    let Some(isa) = isa() else { return };
    let cases: [(usize, usize, &[TileProgram]); 7] = [
        (1, 32, &[HalfHeight]),
        (16, 3000, &[HalfHeight]),
        (17, 640, &[PanelsStay]),
        (17, 641, &[BothStream]),
        (48, 640, &[PanelsStay, HalfHeight]),
        (49, 640, &[PanelsStay]),
        (48, 672, &[BothStream, HalfHeight]),
    ];
    for (rows, depth, programs) in cases {
        let (x, lines) =
            (vec![bf16::ONE; rows * depth], vec![PanelRow::ZERO; depth.next_multiple_of(32) / 2]);
        let mut out = vec![f32::NAN; rows];
        let ran = Model::programs(|| {
            let (left, right) = (Left::rows(&x, depth), Panels::new(&lines, lines.len()));
            let product = BlockProduct { left, right, depth, epilogue: Epilogue::WRITE };
            multiply_block::<Model>(isa, product, &mut OutputBlock::new(&mut out, rows, 1, 1));
        });
        assert_eq!(ran, programs, "{rows} rows of {depth}");
        assert!(out.iter().all(|y| *y == 0.0));
    }
}

/// An operand with NaN around and between its rows, and one in memory that ends with it.
#[test]
#[cfg(unix)]
fn multiply_reads_and_writes_its_operands_only() {
    let Some(isa) = isa() else { return };
    let mut random = Random(35);
    for (m, n, k) in [(1, 1, 1), (17, 33, 31), (33, 48, 65), (40, 20, 2050)] {
        let (stride, width) = (k + 3, n + 2);
        let mut values = vec![bf16::NAN; 1 + m * stride];
        for row in 0..m {
            values[1 + row * stride..][..k].copy_from_slice(&random.values(k));
        }
        let panels = pack(isa, (n, k), &random.values(n * k));
        let w = panels.unpack();
        // The operand ends with its last value, at an odd address of bf16.
        let guarded = Guarded::ending_with(&values[..1 + (m - 1) * stride + k]);
        let left = Left::rows(&guarded.values()[1..], stride);
        let mut out = vec![f32::from_bits(0x7fc0_1234); 1 + m * width];
        let extent = (m - 1) * width + n;
        let to = &mut OutputBlock::new(&mut out[1..1 + extent], m, n, width);
        let product = BlockProduct { left, right: panels.panels(0), depth: k, epilogue: Epilogue::WRITE };
        multiply_block::<Model>(isa, product, to);
        for (i, &y) in out.iter().enumerate() {
            let (row, column) = ((i.max(1) - 1) / width, (i.max(1) - 1) % width);
            if i == 0 || column >= n {
                assert_eq!(y.to_bits(), 0x7fc0_1234, "{m} {n} {k}: element {i} is not the block's");
                continue;
            }
            let sum = exact(k, |j| (values[1 + row * stride + j], w[column * k + j]));
            assert_near("a part of a matrix", y, sum, Epilogue::WRITE, 0.0);
        }
    }
}

/// Interleaved rows, whose last pair may lack its second value, in memory that ends with them.
#[test]
#[cfg(unix)]
fn multiply_transposes_interleaved_rows() {
    let Some(isa) = isa() else { return };
    let mut random = Random(36);
    for (rows, depth) in
        [(1, 1), (1, 2), (15, 31), (16, 32), (17, 33), (31, 64), (32, 65), (33, 128), (20, 2049), (50, 7)]
    {
        let (width, stride) = (19, 2 * rows + 2);
        let mut pairs = vec![bf16::NAN; (depth - 1) / 2 * stride + 2 * (rows - 1) + 2 - depth % 2];
        let index = |row: usize, value: usize| value / 2 * stride + 2 * row + value % 2;
        for row in 0..rows {
            for value in 0..depth {
                pairs[index(row, value)] = bf16::from_f32(random.value());
            }
        }
        let b = random.values(depth * width);
        let panel_stride = depth.next_multiple_of(32) / 2 + 3;
        let mut lines = vec![PanelRow::ZERO; 2 * panel_stride];
        let from = Bf16Matrix { values: &b, stride: width, rows: depth, columns: width };
        pack_sums(isa, from, &mut PanelsMut { lines: &mut lines, stride: panel_stride });
        let guarded = Guarded::ending_with(&pairs);
        let mut out = vec![f32::NAN; rows * width];
        let (left, right) = (Left::interleaved(guarded.values(), stride), Panels::new(&lines, panel_stride));
        let product = BlockProduct { left, right, depth, epilogue: Epilogue::WRITE };
        multiply_block::<Model>(isa, product, &mut OutputBlock::new(&mut out, rows, width, width));
        for (i, &y) in out.iter().enumerate() {
            let sum = exact(depth, |j| (pairs[index(i / width, j)], b[j * width + i % width]));
            assert_near(&format!("{rows} rows of {depth}"), y, sum, Epilogue::WRITE, 0.0);
        }
    }
}

#[test]
fn values_that_are_not_finite_stay_in_their_row_and_column() {
    let Some(isa) = isa() else { return };
    let (m, n, k) = (37, 40, 45);
    let (mut x, mut w) = (vec![bf16::ONE; m * k], vec![bf16::ONE; n * k]);
    (x[33 * k + 44], w[7 * k]) = (bf16::NAN, bf16::INFINITY);
    let weight = TestWeight::new(isa, (n, k), w);
    for right in weight.all() {
        let mut out = vec![0.0; m * n];
        forward::<Model, f32>(isa, &x, right, uninit(&mut out), Epilogue::WRITE);
        for (i, &y) in out.iter().enumerate() {
            match (i / n, i % n) {
                (33, _) => assert!(y.is_nan()),
                (_, 7) => assert_eq!(y, f32::INFINITY),
                _ => assert_eq!(y, k as f32),
            }
        }
        // Rows of the weight are what is summed over: its column 0 is infinite.
        let mut dy = vec![bf16::ONE; m * n];
        dy[2 * n + 39] = bf16::NAN;
        let mut dx = vec![0.0; m * k];
        backward::<Model, f32>(isa, &dy, right, uninit(&mut dx), Epilogue::WRITE);
        for (i, &y) in dx.iter().enumerate() {
            match (i / k, i % k) {
                (2, _) => assert!(y.is_nan()),
                (_, 0) => assert_eq!(y, f32::INFINITY),
                _ => assert_eq!(y, n as f32),
            }
        }
    }
}

#[test]
fn bytes_count_a_transpose_that_parts_share() {
    let Some(isa) = isa() else { return };
    let (n, k) = (48, 70);
    let matrix = pack(isa, (n, k), &Random(37).values(n * k));
    let part = matrix.rows(0..32).unwrap();
    assert!(matrix.bytes() == PackedWeight::bytes_of(n, k) && part.transpose().is_none());
    matrix.pack_transpose();
    // Panels of 24 pairs of 16 columns each, in full steps of 32, and a panel row between; 96 columns.
    assert_eq!(matrix.bytes() - PackedWeight::bytes_of(n, k), 96 / PANEL * (64 / 2 + 1) * 64);
    assert!(part.transpose().is_some() && part.bytes() > PackedWeight::bytes_of(32, k));
}

/// Values in memory after which nothing may be read.
#[cfg(unix)]
struct Guarded {
    map: *mut libc::c_void,
    bytes: usize,
    first: *const bf16,
    len: usize,
}

#[cfg(unix)]
impl Guarded {
    fn ending_with(values: &[bf16]) -> Self {
        const PAGE: usize = 4096;
        let needed = size_of_val(values).next_multiple_of(PAGE);
        let bytes = needed + PAGE;
        // SAFETY: new pages, of which the last is made unreadable before anybody reads; the values fit before it.
        unsafe {
            let (read_write, private) =
                (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANON);
            let map = libc::mmap(std::ptr::null_mut(), bytes, read_write, private, -1, 0);
            assert_ne!(map, libc::MAP_FAILED);
            assert_eq!(libc::mprotect(map.byte_add(needed), PAGE, libc::PROT_NONE), 0);
            let first: *mut bf16 = map.byte_add(needed - size_of_val(values)).cast();
            first.copy_from_nonoverlapping(values.as_ptr(), values.len());
            Self { map, bytes, first, len: values.len() }
        }
    }

    fn values(&self) -> &[bf16] {
        // SAFETY: they were written, and live as long as the pages.
        unsafe { std::slice::from_raw_parts(self.first, self.len) }
    }
}

#[cfg(unix)]
impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: the pages are this value's.
        unsafe { libc::munmap(self.map, self.bytes) };
    }
}
