//! Axes: their ranges, ticks and the ticks' labels.

use super::series::Point;

/// The scale of an axis.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Scale {
    /// Numbers from 0 on.
    FromZero,
    /// Whole numbers, such as steps.
    Whole,
    /// Positive numbers of several magnitudes.
    Log,
}

/// An axis. Positions are values, or decimal logarithms of values on a logarithmic axis.
#[derive(Debug, Clone)]
pub(super) struct Axis {
    /// The scale.
    pub kind: Scale,
    /// Position of its lower end.
    pub min: f64,
    /// Position of its upper end.
    pub max: f64,
    /// Positions of the ticks with their labels.
    pub ticks: Vec<(f64, String)>,
}

impl Axis {
    /// An axis for `values` with about `want` ticks. On a logarithmic axis values that are not positive have no
    /// position.
    pub fn new(kind: Scale, values: impl Iterator<Item = f64>, want: usize) -> Self {
        let shown = values.filter(|v| v.is_finite() && (kind != Scale::Log || *v > 0.0));
        let (min, max) = shown.fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(v), b.max(v)));
        let (min, max) = if min > max { (1.0, 1.0) } else { (min, max) };
        match kind {
            Scale::Log => Self::log(min.log10(), max.log10(), want),
            Scale::FromZero => {
                let room = if max > min.min(0.0) { 0.05 * (max - min.min(0.0)) } else { 1.0 };
                let end = if (max + room).is_finite() { max + room } else { max };
                Self::linear(kind, if min < 0.0 { min - room } else { 0.0 }, end, want)
            }
            Scale::Whole if min == max => Self::linear(kind, min - 1.0, max + 1.0, want),
            Scale::Whole => Self::linear(kind, min, max, want),
        }
    }

    fn linear(kind: Scale, min: f64, max: f64, want: usize) -> Self {
        let step = step((max - min) / want as f64, kind == Scale::Whole);
        let label = |v: f64| linear_label(v, step, max.abs().max(min.abs()));
        let ticks = multiples(min, max, step).into_iter().map(|v| (v, label(v))).collect();
        Self { kind, min, max, ticks }
    }

    fn log(min: f64, max: f64, want: usize) -> Self {
        let room = (0.05 * (max - min)).max(0.02);
        let (min, max) = (min - room, max + room);
        let span = max - min;
        let values = if span < 1.0 {
            // Within one order of magnitude, round steps.
            multiples(
                10f64.powf(min),
                10f64.powf(max),
                step((10f64.powf(max) - 10f64.powf(min)) / 4.0, false),
            )
        } else {
            let within: &[f64] = match span {
                ..1.5 => &[1.0, 2.0, 5.0],
                ..3.2 => &[1.0, 3.0],
                _ => &[1.0],
            };
            let every = (span / want as f64).ceil().max(1.0) as i32;
            let decades = (min.floor() as i32..=max.ceil() as i32).filter(|d| d.rem_euclid(every) == 0);
            decades.flat_map(|d| within.iter().map(move |m| m * 10f64.powi(d))).collect()
        };
        let places = values.into_iter().filter(|v| *v > 0.0).map(|v| (v.log10(), log_label(v)));
        Self {
            kind: Scale::Log,
            min,
            max,
            ticks: places.filter(|(at, _)| (min..=max).contains(at)).collect(),
        }
    }

    /// Position of a value; `None` if a logarithmic axis has none for it.
    pub fn position(&self, value: f64) -> Option<f64> {
        let at = if self.kind == Scale::Log { value.log10() } else { value };
        at.is_finite().then_some(at)
    }
}

/// Whether positive values have such a range that a linear axis would show most of them as flat.
pub(super) fn wants_log<'a>(points: impl IntoIterator<Item = &'a Point>) -> bool {
    let mut range = (f64::INFINITY, 0.0f64);
    for (_, y) in points.into_iter().filter(|(_, y)| y.is_finite()) {
        range = (range.0.min(*y), range.1.max(*y));
    }
    range.0 > 0.0 && range.1 / range.0 > 20.0
}

/// The round step near `about`: 1, 2 or 5 times a power of ten.
fn step(about: f64, integers: bool) -> f64 {
    if !about.is_finite() || about <= 0.0 {
        return 1.0;
    }
    let magnitude = 10f64.powf(about.log10().floor());
    let factor = match about / magnitude {
        ..1.5 => 1.0,
        ..3.5 => 2.0,
        ..7.5 => 5.0,
        _ => 10.0,
    };
    let step = factor * magnitude;
    if integers { step.max(1.0) } else { step }
}

/// Multiples of `step` in [`min`, `max`], at most a hundred.
fn multiples(min: f64, max: f64, step: f64) -> Vec<f64> {
    let first = (min / step - 1e-9).ceil();
    (0..100).map(|i| (first + f64::from(i)) * step).take_while(|v| *v <= max + step * 1e-9).collect()
}

fn linear_label(value: f64, step: f64, largest: f64) -> String {
    if value == 0.0 {
        return "0".into();
    }
    if !(1e-3..1e7).contains(&largest) {
        return scientific(value);
    }
    let decimals = (-step.log10() - 1e-9).ceil().max(0.0) as usize;
    super::text::grouped(&format!("{value:.decimals$}"))
}

fn log_label(value: f64) -> String {
    if !(1e-3 * (1.0 - 1e-9)..1e5).contains(&value) {
        return scientific(value);
    }
    let text = format!("{value:.6}");
    super::text::grouped(text.trim_end_matches('0').trim_end_matches('.'))
}

/// `2.5e-4`.
fn scientific(value: f64) -> String {
    let text = format!("{value:.2e}");
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    format!("{}e{exponent}", mantissa.trim_end_matches('0').trim_end_matches('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(kind: Scale, values: &[f64], want: usize) -> Vec<String> {
        Axis::new(kind, values.iter().copied(), want).ticks.into_iter().map(|(_, label)| label).collect()
    }

    #[test]
    fn round_steps() {
        assert_eq!(labels(Scale::Whole, &[1.0, 225.0], 5), ["50", "100", "150", "200"]);
        assert_eq!(labels(Scale::Whole, &[1.0, 3.0], 5), ["1", "2", "3"]);
        assert_eq!(labels(Scale::Whole, &[1.0, 20_000.0], 4), ["5,000", "10,000", "15,000", "20,000"]);
        assert_eq!(
            labels(Scale::FromZero, &[0.0, 0.01], 5),
            ["0", "0.002", "0.004", "0.006", "0.008", "0.010"]
        );
        assert_eq!(labels(Scale::FromZero, &[0.0, 0.000_3], 3), ["0", "1e-4", "2e-4", "3e-4"]);
        assert_eq!(labels(Scale::FromZero, &[3.0e9], 3), ["0", "1e9", "2e9", "3e9"]);
    }

    #[test]
    fn magnitudes() {
        assert_eq!(labels(Scale::Log, &[0.04, 6.0], 5), ["0.1", "0.3", "1", "3"]);
        assert_eq!(labels(Scale::Log, &[0.2, 3.0], 5), ["0.2", "0.5", "1", "2"]);
        assert_eq!(labels(Scale::Log, &[1e-4, 10.0], 6), ["1e-4", "0.001", "0.01", "0.1", "1", "10"]);
        assert_eq!(labels(Scale::Log, &[1e-30, 1e30], 5).len(), 5);
        assert_eq!(labels(Scale::Log, &[2.0, 3.9], 5), ["2", "2.5", "3", "3.5", "4"]);
    }

    #[test]
    fn a_single_value_has_an_axis() {
        for kind in [Scale::FromZero, Scale::Whole, Scale::Log] {
            for value in [1.0, 0.07, 1e-12, 1e12] {
                let axis = Axis::new(kind, [value].into_iter(), 5);
                let at = axis.position(value).unwrap();
                assert!(axis.min < axis.max && axis.min <= at && at <= axis.max, "{kind:?} {value} {axis:?}");
            }
        }
        assert!(Axis::new(Scale::FromZero, [0.0, 0.0].into_iter(), 5).max > 0.0);
        assert!(Axis::new(Scale::Log, [0.0].into_iter(), 5).position(0.0).is_none());
        assert!(!Axis::new(Scale::Log, std::iter::empty(), 5).min.is_nan());
    }

    #[test]
    fn labels_fall_within_their_axis() {
        for (kind, values) in
            [(Scale::Whole, [1.0, 97.0]), (Scale::FromZero, [0.2, 33.0]), (Scale::Log, [0.3, 700.0])]
        {
            let axis = Axis::new(kind, values.into_iter(), 6);
            assert!(axis.ticks.len() >= 3, "{axis:?}");
            assert!(axis.ticks.iter().all(|(at, _)| (axis.min..=axis.max).contains(at)), "{axis:?}");
        }
    }

    #[test]
    fn log_where_a_linear_axis_would_press_values_flat() {
        assert!(wants_log(&[(0.0, 6.0), (1.0, 0.04)]));
        assert!(!wants_log(&[(0.0, 6.0), (1.0, 1.04)]));
        assert!(!wants_log(&[(0.0, 6.0), (1.0, 0.0)]));
        assert!(!wants_log(&[]));
    }
}
