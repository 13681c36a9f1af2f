use super::*;

fn numbers(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..n).map(|_| next()).collect()
}

/// Rows, outputs and inputs: of tiles of every height, parts of a panel and of a block, and several of each.
const SIZES: [(usize, usize, usize); 9] = [
    (2, 32, 33),
    (7, 64, 64),
    (9, 77, 130),
    (24, 256, 128),
    (31, 100, 515),
    (48, 136, 1040),
    (97, 264, 1500),
    (200, 40, 3000),
    (300, 323, 67),
];

/// Writes a product over old values and compares it with sums in f64. `term(row, column, i)` are the factors of term i.
fn check(product: FewRows, scale: f32, term: impl Fn(usize, usize, usize) -> (f32, f32)) {
    let (m, columns, depth) = product.size;
    let old = numbers(m * columns, 3);
    for accumulate in [false, true] {
        let fill = |&old: &f32| if accumulate { MaybeUninit::new(old) } else { MaybeUninit::uninit() };
        let mut out: Vec<MaybeUninit<f32>> = old.iter().map(fill).collect();
        // SAFETY: `out` is initialised if the product is added to it.
        unsafe { product.write(scale, &mut out, accumulate) };
        for (i, (y, old)) in out.iter().zip(&old).enumerate() {
            let (row, column) = (i / columns, i % columns);
            let sum: f64 =
                (0..depth).map(|i| term(row, column, i)).map(|(a, b)| f64::from(a) * f64::from(b)).sum();
            let exact = f64::from(scale) * sum + if accumulate { f64::from(*old) } else { 0.0 };
            // SAFETY: every element was written.
            let y = f64::from(unsafe { y.assume_init() });
            let limit = 1e-6 * (depth as f64).sqrt();
            assert!(
                (y - exact).abs() < limit,
                "{:?}, row {row}, column {column}: {y}, not {exact}",
                product.size
            );
        }
    }
}

#[test]
fn products_are_those_in_f64() {
    for (m, n, k) in SIZES {
        let (x, w, dy) = (numbers(m * k, 1), numbers(n * k, 2), numbers(m * n, 4));
        if let Some(product) = FewRows::forward(&x, &w, (m, n, k)) {
            check(product, 1.0, |row, column, i| (x[row * k + i], w[column * k + i]));
        }
        if let Some(product) = FewRows::backward(&dy, &w, (m, n, k)) {
            check(product, 0.25, |row, column, i| (dy[row * n + i], w[i * k + column]));
        }
        let is_taken = |weight_rows: WeightRows| has_instructions() && weight_rows.few().contains(&m);
        assert_eq!(FewRows::forward(&x, &w, (m, n, k)).is_some(), is_taken(WeightRows::Columns));
        assert_eq!(FewRows::backward(&dy, &w, (m, n, k)).is_some(), is_taken(WeightRows::Terms));
    }
}

#[test]
fn a_sum_does_not_depend_on_the_rows() {
    let (m, n, k) = (200, 96, 700);
    let (x, w) = (numbers(m * k, 1), numbers(n * k, 2));
    let write = |product: FewRows| {
        let mut out = vec![MaybeUninit::uninit(); product.size.0 * product.size.1];
        // SAFETY: the product replaces `out`.
        unsafe { product.write(1.0, &mut out, false) };
        // SAFETY: every element was written.
        out.into_iter().map(|y| unsafe { y.assume_init() }.to_bits()).collect::<Vec<u32>>()
    };
    let (Some(all), Some(dall)) =
        (FewRows::forward(&x, &w, (m, n, k)), FewRows::backward(&x[..m * n], &w, (m, n, k)))
    else {
        assert!(!has_instructions());
        return;
    };
    let (all, dall) = (write(all), write(dall));
    for rows in [8, 9, 61, 199] {
        let few = write(FewRows::forward(&x[..rows * k], &w, (rows, n, k)).unwrap());
        assert!(few == all[..rows * n], "{rows} rows forward");
        let few = write(FewRows::backward(&x[..rows * n], &w, (rows, n, k)).unwrap());
        assert!(few == dall[..rows * k], "{rows} rows backward");
    }
}

#[test]
fn other_sizes_are_left_to_gemm() {
    let (x, w) = (numbers(301 * 64, 1), numbers(64 * 64, 2));
    for (m, n, k) in [(1, 64, 64), (301, 64, 64), (24, 31, 64), (24, 64, 0)] {
        assert!(FewRows::forward(&x[..m * k], &w[..n * k], (m, n, k)).is_none(), "{m} x {n} x {k} forward");
    }
    for (m, n, k) in [(7, 64, 64), (201, 64, 64), (24, 64, 31), (24, 0, 64)] {
        assert!(FewRows::backward(&x[..m * n], &w[..n * k], (m, n, k)).is_none(), "{m} x {n} x {k} backward");
    }
    assert!(
        FewRows::forward(&x[..24 * 64], &w[..64 * 63], (24, 64, 64)).is_none(),
        "a weight of another size"
    );
}
