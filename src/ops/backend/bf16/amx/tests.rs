//! All of a product on AMX but its instructions, on a model of the tile registers.

use super::super::kernel::amx::{Model, Text, block};
use super::super::tests::{Random, assert_near, exact, pack};
use super::super::{PANEL, Panels, pack_sums};
use super::*;

/// Some instructions that packing knows; `None` if the CPU has none, or not those that write the sums.
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

const THENS: [Then; 2] = [Then::WRITE, Then { scale: 0.22, add: true }];

/// The value of an output before the product.
fn before(then: Then) -> f32 {
    if then.add { 0.5 } else { f32::NAN }
}

/// A weight, and the ways in which a product may get it: packed, packed with its transpose, in rows.
struct Weight {
    k: usize,
    values: Vec<bf16>,
    packed: Panels,
    with_transpose: Panels,
}

impl Weight {
    fn new(isa: Isa, (n, k): (usize, usize), values: Vec<bf16>) -> Self {
        let with_transpose = pack(isa, (n, k), &values);
        with_transpose.pack_transpose();
        Self { k, packed: pack(isa, (n, k), &values), with_transpose, values }
    }

    fn all(&self) -> [Right<'_>; 3] {
        [Right::Panels(&self.packed), Right::Panels(&self.with_transpose), Right::Rows(&self.values, self.k)]
    }
}

/// A product of either direction, as [`Model`] makes it; nothing if there is no output, as its callers do.
fn product<O: Element>(isa: Isa, is_forward: bool, left: &[bf16], w: Right, out: &mut [O], then: Then) {
    if out.is_empty() {
        return;
    }
    match is_forward {
        true => forward::<Model, O>(isa, left, w, out, then),
        false => backward::<Model, O>(isa, left, w, out, then),
    }
}

#[test]
fn products_are_the_sums_of_f64_in_both_directions() {
    let Some(isa) = isa() else { return };
    let mut random = Random(31);
    for (m, n, k) in SHAPES {
        let weight = Weight::new(isa, (n, k), random.values(n * k));
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
            for (way, right) in weight.all().into_iter().enumerate() {
                // Rows of no values do not say how many they are.
                if k == 0 && matches!(right, Right::Rows(..)) {
                    continue;
                }
                for then in THENS {
                    let what = format!("{m} {n} {k} forward {is_forward} way {way} {then:?}");
                    let mut out = vec![before(then); m * width];
                    product(isa, is_forward, &left, right, &mut out, then);
                    for (&y, &sum) in out.iter().zip(&sums) {
                        assert_near(&what, y, sum, then, 0.5);
                    }
                    let mut rounded = vec![bf16::from_f32(before(then)); m * width];
                    product(isa, is_forward, &left, right, &mut rounded, then);
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
        let weight = Weight::new(isa, (n, k), random.values(n * k));
        for (is_forward, depth, width) in [(true, k, n), (false, n, k)] {
            let left = random.values(m * depth);
            let mut found = Vec::new();
            for threads in [1, 2, 3, 5] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                for right in weight.all() {
                    let (mut wide, mut rounded) = (vec![0.0f32; m * width], vec![bf16::ZERO; m * width]);
                    pool.install(|| {
                        product(isa, is_forward, &left, right, &mut wide, Then::WRITE);
                        product(isa, is_forward, &left, right, &mut rounded, Then::WRITE);
                    });
                    found.push((wide, rounded));
                }
            }
            assert!(found.iter().all(|outputs| *outputs == found[0]), "{m} {n} {k} forward {is_forward}");
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
        let whole = pack(isa, (n, k), &values);
        whole.pack_transpose();
        let part = whole.rows(range.clone()).unwrap();
        let dy = Random(34).values(m * range.len());
        let mut dx = vec![f32::NAN; m * k];
        backward::<Model, f32>(isa, &dy, Right::Panels(&part), &mut dx, Then::WRITE);
        for (i, &y) in dx.iter().enumerate() {
            let sum =
                exact(range.len(), |j| (dy[i / k * range.len() + j], values[(range.start + j) * k + i % k]));
            assert_near(&format!("{range:?}"), y, sum, Then::WRITE, 0.0);
        }
        // Steps of the transpose are cut at multiples of 32 rows of what is read, or end with zeros.
        let is_whole = range.len().is_multiple_of(32) || (range.end == n && range.start.is_multiple_of(32));
        assert_eq!(part.transpose().is_some(), is_whole, "{range:?}");
    }
}

#[test]
fn blocks_take_the_text_of_their_height_and_depth() {
    use Text::{BothStream, HalfHeight, PanelsStay};
    let Some(isa) = isa() else { return };
    let cases: [(usize, usize, &[Text]); 7] = [
        (1, 32, &[HalfHeight]),
        (16, 3000, &[HalfHeight]),
        (17, 640, &[PanelsStay]),
        (17, 641, &[BothStream]),
        (48, 640, &[PanelsStay, HalfHeight]),
        (49, 640, &[PanelsStay]),
        (48, 672, &[BothStream, HalfHeight]),
    ];
    for (rows, depth, texts) in cases {
        let (x, lines) = (vec![bf16::ONE; rows * depth], vec![Line::ZERO; depth.next_multiple_of(32) / 2]);
        let mut out = vec![f32::NAN; rows];
        let ran = Model::texts(|| {
            let right = kernel::Panels::new(&lines, lines.len());
            let out = &mut Out::new(&mut out, rows, 1, 1);
            block::<Model>(isa, Left::rows(&x, depth), depth, right, out, Then::WRITE);
        });
        assert_eq!(ran, texts, "{rows} rows of {depth}");
        assert!(out.iter().all(|y| *y == 0.0));
    }
}

/// An operand with NaN around and between its rows, and one in memory that ends with it.
#[test]
#[cfg(unix)]
fn blocks_read_and_write_nothing_but_their_operands() {
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
        let to = &mut Out::new(&mut out[1..1 + extent], m, n, width);
        block::<Model>(isa, left, k, panels.operand(0), to, Then::WRITE);
        for (i, &y) in out.iter().enumerate() {
            let (row, column) = ((i.max(1) - 1) / width, (i.max(1) - 1) % width);
            if i == 0 || column >= n {
                assert_eq!(y.to_bits(), 0x7fc0_1234, "{m} {n} {k}: element {i} is not the block's");
                continue;
            }
            let sum = exact(k, |j| (values[1 + row * stride + j], w[column * k + j]));
            assert_near("in the midst of others", y, sum, Then::WRITE, 0.0);
        }
    }
}

/// Interleaved rows, whose last pair may lack its second value, in memory that ends with them.
#[test]
#[cfg(unix)]
fn interleaved_rows_are_transposed() {
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
        let mut lines = vec![Line::ZERO; 2 * panel_stride];
        pack_sums(isa, &b, (depth, width), width, &mut lines, panel_stride);
        let guarded = Guarded::ending_with(&pairs);
        let mut out = vec![f32::NAN; rows * width];
        block::<Model>(
            isa,
            Left::interleaved(guarded.values(), stride),
            depth,
            kernel::Panels::new(&lines, panel_stride),
            &mut Out::new(&mut out, rows, width, width),
            Then::WRITE,
        );
        for (i, &y) in out.iter().enumerate() {
            let sum = exact(depth, |j| (pairs[index(i / width, j)], b[j * width + i % width]));
            assert_near(&format!("{rows} rows of {depth}"), y, sum, Then::WRITE, 0.0);
        }
    }
}

#[test]
fn values_that_are_not_finite_stay_in_their_row_and_column() {
    let Some(isa) = isa() else { return };
    let (m, n, k) = (37, 40, 45);
    let (mut x, mut w) = (vec![bf16::ONE; m * k], vec![bf16::ONE; n * k]);
    (x[33 * k + 44], w[7 * k]) = (bf16::NAN, bf16::INFINITY);
    let weight = Weight::new(isa, (n, k), w);
    for right in weight.all() {
        let mut out = vec![0.0; m * n];
        forward::<Model, f32>(isa, &x, right, &mut out, Then::WRITE);
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
        backward::<Model, f32>(isa, &dy, right, &mut dx, Then::WRITE);
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
fn a_transpose_is_counted_and_shared_with_parts() {
    let Some(isa) = isa() else { return };
    let (n, k) = (48, 70);
    let whole = pack(isa, (n, k), &Random(37).values(n * k));
    let part = whole.rows(0..32).unwrap();
    assert!(whole.bytes() == Panels::bytes_of(n, k) && part.transpose().is_none());
    whole.pack_transpose();
    // Panels of 24 pairs of 16 columns each, in whole steps of 32, and a line between; 96 columns.
    assert_eq!(whole.bytes() - Panels::bytes_of(n, k), 96 / PANEL * (64 / 2 + 1) * 64);
    assert!(part.transpose().is_some() && part.bytes() > Panels::bytes_of(32, k));
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
