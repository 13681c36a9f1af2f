//! Comparison of numbers.

use candle_core::{DType, Tensor};

/// Fails unless each of `ours` differs from the expected value by at most `tolerance`.
#[track_caller]
pub fn assert_close(what: &str, ours: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(ours.len(), expected.len(), "{what}: numbers of values");
    for (i, (a, b)) in ours.iter().zip(expected).enumerate() {
        let error = (a - b).abs();
        assert!(
            error <= tolerance,
            "{what}: element {i} is {a}, expected {b} within {tolerance:e}: {error:e}"
        );
    }
}

/// Fails unless `ours` is within `relative` of `expected`, measured against the largest expected magnitude.
#[track_caller]
pub fn assert_tensors_close(what: &str, ours: &Tensor, expected: &Tensor, relative: f64) {
    assert_eq!(ours.dims(), expected.dims(), "{what}: shapes");
    let values =
        |t: &Tensor| t.flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap();
    let expected = values(expected);
    let largest = expected.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    assert!(largest > 0.0, "{what}: nothing to compare with");
    assert_close(what, &values(ours), &expected, relative * largest);
}
