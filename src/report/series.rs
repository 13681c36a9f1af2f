//! Points of a line: thinned out to what is visible, and smoothed.

/// A point of a line.
pub(super) type Point = (f64, f64);

/// At most as many points as `buckets` columns of a plot can show: of each column the first, the smallest, the largest
/// and the last, so that the thinned line covers the same pixels as the full one. `points` ascend in x.
pub(super) fn thin(points: &[Point], buckets: usize) -> Vec<Point> {
    let (Some(first), Some(last)) = (points.first(), points.last()) else { return Vec::new() };
    if points.len() <= 4 * buckets {
        return points.to_vec();
    }
    let width = (last.0 - first.0) / buckets as f64;
    let bucket = |p: &Point| (((p.0 - first.0) / width) as usize).min(buckets - 1);
    let mut thinned = Vec::with_capacity(4 * buckets);
    for column in points.chunk_by(|a, b| bucket(a) == bucket(b)) {
        let by_y = |a: &usize, b: &usize| column[*a].1.total_cmp(&column[*b].1);
        let least = (0..column.len()).min_by(by_y).unwrap_or(0);
        let greatest = (0..column.len()).max_by(by_y).unwrap_or(0);
        let mut chosen = [0, least, greatest, column.len() - 1];
        chosen.sort_unstable();
        let mut before = None;
        for i in chosen.into_iter().filter(|i| before.replace(*i) != Some(*i)) {
            thinned.push(column[i]);
        }
    }
    thinned
}

/// A weighted mean around each value; the weights fall by a factor e every `reach` values to both sides. It has no lag,
/// and no pull towards zero at the ends.
pub(super) fn smooth(values: &[f64], reach: f64) -> Vec<f64> {
    let keep = (-1.0 / reach).exp();
    let sums = |values: &mut dyn Iterator<Item = &f64>| -> Vec<(f64, f64)> {
        let (mut sum, mut weight) = (0.0, 0.0);
        let mut step = |value: &f64| {
            (sum, weight) = (sum * keep + value, weight * keep + 1.0);
            (sum, weight)
        };
        values.map(&mut step).collect()
    };
    let ahead = sums(&mut values.iter());
    let back = sums(&mut values.iter().rev());
    let both = values.iter().zip(ahead).zip(back.into_iter().rev());
    both.map(|((value, a), b)| (a.0 + b.0 - value) / (a.1 + b.1 - 1.0)).collect()
}

/// The smoothed curve of a line; `None` if it is too short. On a logarithmic axis logarithms are averaged, so that the
/// smoothed line runs through the middle of the visible points.
pub(super) fn smoothed(points: &[Point], log: bool) -> Option<Vec<Point>> {
    if points.len() < 20 {
        return None;
    }
    // One value that is not finite would spoil the mean of all others.
    let shown = |p: &Point| p.1.is_finite() && (!log || p.1 > 0.0);
    let positive: Vec<Point> = points.iter().copied().filter(shown).collect();
    let values: Vec<f64> = positive.iter().map(|p| if log { p.1.ln() } else { p.1 }).collect();
    let means = smooth(&values, (points.len() as f64 / 50.0).max(2.0));
    Some(positive.iter().zip(means).map(|(p, mean)| (p.0, if log { mean.exp() } else { mean })).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_line_stays_as_it_is() {
        let points = [(0.0, 1.0), (1.0, 5.0), (1.5, 2.0)];
        assert_eq!(thin(&points, 10), points);
        assert_eq!(thin(&[], 10), []);
    }

    #[test]
    fn a_long_line_keeps_its_ends_and_every_peak() {
        let mut points: Vec<Point> = (0..100_000).map(|i| (f64::from(i), f64::from(i % 7))).collect();
        points[54_321].1 = 1000.0;
        points[12_345].1 = -1000.0;
        let thinned = thin(&points, 300);
        assert!((300..=1200).contains(&thinned.len()), "{}", thinned.len());
        assert_eq!((thinned.first(), thinned.last()), (points.first(), points.last()));
        assert!(thinned.contains(&(54_321.0, 1000.0)) && thinned.contains(&(12_345.0, -1000.0)));
        assert!(thinned.is_sorted_by(|a, b| a.0 < b.0), "in order, none twice");
    }

    #[test]
    fn points_of_one_place_are_one_column() {
        let points: Vec<Point> = (0..500).map(|i| (3.0, f64::from(i))).collect();
        assert_eq!(thin(&points, 10), [(3.0, 0.0), (3.0, 499.0)]);
    }

    /// numpy: w = exp(-abs(i - j) / 2); (w @ x) / w.sum(1) for x = 1 2 4 8 16.
    #[test]
    fn smoothing_weighs_both_sides() {
        let found = smooth(&[1.0, 2.0, 4.0, 8.0, 16.0], 2.0);
        let expected = [3.272_778_488, 4.117_503_343, 5.534_164_846, 7.521_030_257, 9.818_508_622];
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-6, "{found} {expected}");
        }
    }

    #[test]
    fn a_level_line_stays_level() {
        assert!(smooth(&[2.5; 40], 3.0).iter().all(|v| (v - 2.5).abs() < 1e-12));
        let points: Vec<Point> = (0..40).map(|i| (f64::from(i), 0.01)).collect();
        assert!(smoothed(&points, true).unwrap().iter().all(|p| (p.1 - 0.01).abs() < 1e-12));
        assert_eq!(smoothed(&points[..19], false), None);
    }
}
