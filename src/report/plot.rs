//! The plots of a run.

use super::axis::{Scale, wants_log};
use super::chart::{Chart, PointMark, Series};
use super::series::{Point, smoothed};
use super::svg::Ink;
use super::text::number;
use crate::Result;
use crate::run::{LossKind, Run};

pub use super::chart::Size;
pub use crate::tune::RangePoint;

const TRAINING: Ink = Ink::Line(0);
const VALIDATION: Ink = Ink::Line(1);

/// Training loss of each step and its smoothed curve, validation loss of each epoch, the best epoch, ends of epochs, as
/// SVG. `None` before the first step.
pub fn learning_curve(run: &Run, size: Size) -> Result<Option<String>> {
    losses_by_step(run).svg(size)
}

/// [`learning_curve`] as PNG, of twice the size.
pub fn learning_curve_png(run: &Run, size: Size) -> Result<Option<Vec<u8>>> {
    losses_by_step(run).png(size)
}

/// The same losses against wall time. `None` if the times are unknown.
pub fn loss_over_time(run: &Run, size: Size) -> Result<Option<String>> {
    let Some((unit, label)) = clock(run) else { return Ok(None) };
    losses(run, "Loss over time", label, |_, elapsed| elapsed / unit).svg(size)
}

/// Learning rate of each step. `None` before the first step.
pub fn learning_rate(run: &Run, size: Size) -> Result<Option<String>> {
    let points = run.steps.iter().map(|s| (s.step as f64, s.learning_rate)).collect();
    let mut chart = by_step("Learning rate", "learning rate", Scale::FromZero);
    chart.series.push(line(None, points, TRAINING));
    chart.svg(size)
}

/// Norm of the prompt's gradient at each step, and the norm to which it is clipped. `None` before the first step.
pub fn gradient_norm(run: &Run, size: Size) -> Result<Option<String>> {
    let points: Vec<Point> = run.steps.iter().map(|s| (s.step as f64, s.grad_norm)).collect();
    let limit = run.config.train.max_grad_norm;
    let log = points.iter().any(|p| p.1 > 0.0);
    let mut chart =
        by_step("Gradient norm", "L2 norm before clipping", if log { Scale::Log } else { Scale::FromZero });
    chart.limit = (limit > 0.0 && !points.is_empty()).then(|| (limit, format!("clipped to {limit}")));
    chart.series = with_smoothed(points, log, "each step");
    chart.svg(size)
}

/// Examples per second of each step. `None` if the times are unknown.
pub fn throughput(run: &Run, size: Size) -> Result<Option<String>> {
    let Some((unit, label)) = clock(run) else { return Ok(None) };
    let timed = run.steps.iter().filter(|s| s.seconds > 0.0);
    let points = timed.map(|s| (s.elapsed / unit, s.examples as f64 / s.seconds)).collect();
    let mut chart = by_step("Throughput", "examples per second", Scale::FromZero);
    (chart.x, chart.x_label) = (Scale::FromZero, label);
    chart.series = with_smoothed(points, false, "each step");
    chart.svg(size)
}

/// Loss against the learning rates of a range test, and the suggested rate, as a standalone SVG. `None` without points.
pub fn range_test(points: &[RangePoint], suggestion: Option<f64>, size: Size) -> Result<Option<String>> {
    losses_by_rate(points, suggestion).svg(size)
}

/// [`range_test`] as PNG, of twice the size.
pub fn range_test_png(points: &[RangePoint], suggestion: Option<f64>, size: Size) -> Result<Option<Vec<u8>>> {
    losses_by_rate(points, suggestion).png(size)
}

fn losses_by_rate(points: &[RangePoint], suggestion: Option<f64>) -> Chart {
    let of = |loss: fn(&RangePoint) -> f64| -> Vec<Point> {
        points
            .iter()
            .map(|p| (p.learning_rate, loss(p)))
            .filter(|p| p.0.is_finite() && p.1.is_finite())
            .collect()
    };
    let smoothed = of(|p| p.smoothed);
    let mut chart = by_step("Learning-rate range test", "nats per target token", Scale::FromZero);
    (chart.x, chart.x_label) = (Scale::Log, "learning rate, log scale".into());
    chart.y = scale([&of(|p| p.loss)[..], &smoothed]);
    let marked = suggestion.and_then(|rate| {
        let loss = |p: &&Point| (p.0.ln() - rate.ln()).abs();
        let at = smoothed.iter().min_by(|a, b| loss(a).total_cmp(&loss(b)))?;
        Some(ring(format!("suggested: {}", rate_text(rate)), *at))
    });
    chart.series = vec![
        Series { width: 1.2, ..line(Some("each step"), of(|p| p.loss), Ink::Faint) },
        line(Some("smoothed"), smoothed, TRAINING),
    ];
    chart.series.extend(marked);
    chart
}

/// The quantity in an overlay of runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Overlay {
    Training,
    Validation,
}

/// Losses of several runs by name, against the step or against wall time.
pub(super) fn overlay(
    runs: &[(&str, &Run)],
    what: Overlay,
    by_time: bool,
    size: Size,
) -> Result<Option<String>> {
    let clock = runs.iter().filter_map(|(_, run)| clock(run)).max_by(|a, b| a.0.total_cmp(&b.0));
    let (unit, label) = match (by_time, clock) {
        (true, None) => return Ok(None),
        (true, Some(clock)) => clock,
        (false, _) => (1.0, "optimizer step".into()),
    };
    let x = |step: usize, elapsed: f64| if by_time { elapsed / unit } else { step as f64 };
    let points = |run: &Run| -> Vec<Point> {
        match what {
            Overlay::Training => run.steps.iter().map(|s| (x(s.step, s.elapsed), s.loss)).collect(),
            Overlay::Validation => validation(run, x),
        }
    };
    let all: Vec<Vec<Point>> = runs.iter().map(|(_, run)| points(run)).collect();
    let title = match what {
        Overlay::Training => "Training loss, smoothed",
        Overlay::Validation => "Validation loss",
    };
    let kinds: Vec<LossKind> = runs.iter().map(|(_, run)| run.summary.loss).collect();
    let unit = match kinds.iter().all(|kind| *kind == kinds[0]) {
        true => kinds.first().copied().unwrap_or_default().unit(),
        false => "nats per target token; KL divergence in runs with a teacher",
    };
    let mut chart = by_step(title, unit, scale(all.iter().map(Vec::as_slice)));
    (chart.x, chart.x_label) = (if by_time { Scale::FromZero } else { Scale::Whole }, label);
    for (i, ((name, _), points)) in runs.iter().zip(all).enumerate() {
        let shown = match what {
            Overlay::Training => smoothed(&points, chart.y == Scale::Log).unwrap_or(points),
            Overlay::Validation => points,
        };
        let mark = [PointMark::Dot, PointMark::Triangle, PointMark::Square][i / Ink::LINES % 3];
        let mark = (what == Overlay::Validation).then_some(mark);
        let name = super::text::cut(name, 28).unwrap_or_else(|| (*name).to_owned());
        if !shown.is_empty() {
            chart.series.push(Series { mark, ..line(Some(&name), shown, Ink::Line(i)) });
        }
    }
    chart.svg(size)
}

/// A trial in the plot of a sweep.
pub(super) struct SweepCurve<'a> {
    /// Its name in the legend.
    pub name: Option<String>,
    pub run: &'a Run,
    pub ink: Ink,
    pub is_best: bool,
}

/// Validation losses of a sweep's trials against the epoch; `None` before the first epoch's end.
pub(super) fn sweep(curves: &[SweepCurve], size: Size) -> Result<Option<String>> {
    let points = |curve: &SweepCurve| -> Vec<Point> {
        let point = |e: &crate::tune::EpochRecord| Some((e.epoch as f64, e.validation_loss?));
        curve.run.epochs.iter().filter_map(point).collect()
    };
    let all: Vec<Vec<Point>> = curves.iter().map(points).collect();
    let unit = curves.first().map_or(LossKind::default(), |curve| curve.run.summary.loss).unit();
    let mut chart = by_step("Validation loss", unit, scale(all.iter().map(Vec::as_slice)));
    chart.x_label = "epoch".into();
    for (curve, points) in curves.iter().zip(all).filter(|(_, points)| !points.is_empty()) {
        let SweepCurve { name, ink, is_best, .. } = curve;
        let width = if *is_best { 3.4 } else { 1.6 };
        let mark = (*ink != Ink::Axis).then_some(PointMark::Dot);
        chart.series.push(Series { width, mark, ..line(name.as_deref(), points, *ink) });
    }
    chart.svg(size)
}

fn losses_by_step(run: &Run) -> Chart {
    let x = |at: usize, _: f64| at as f64;
    let mut chart = losses(run, "Learning curve", "optimizer step".into(), x);
    chart.x = Scale::Whole;
    chart.verticals = epoch_ends(run, x);
    chart
}

/// Losses of a run; `x` gives the position of a record from its step and elapsed time.
fn losses(run: &Run, title: &str, label: String, x: impl Fn(usize, f64) -> f64 + Copy) -> Chart {
    let training: Vec<Point> = run.steps.iter().map(|s| (x(s.step, s.elapsed), s.loss)).collect();
    let validation = validation(run, x);
    let mut chart = by_step(title, run.summary.loss.unit(), scale([&training[..], &validation]));
    (chart.x, chart.x_label) = (Scale::FromZero, label);
    chart.series = with_smoothed(training, chart.y == Scale::Log, "training, each step");
    if !validation.is_empty() {
        let mark = Some(PointMark::Dot);
        chart.series.push(Series { mark, ..line(Some("validation"), validation, VALIDATION) });
    }
    if let Some((best, loss)) = run.best_epoch().and_then(|e| Some((e, e.validation_loss?))) {
        let name = format!("best: epoch {}, {}", best.epoch, number(loss));
        chart.series.push(ring(name, (x(best.step, best.elapsed), loss)));
    }
    chart
}

fn validation(run: &Run, x: impl Fn(usize, f64) -> f64) -> Vec<Point> {
    let point = |e: &crate::tune::EpochRecord| Some((x(e.step, e.elapsed), e.validation_loss?));
    run.epochs.iter().filter_map(point).collect()
}

/// Ends of epochs, if they are few enough to be told apart.
fn epoch_ends(run: &Run, x: impl Fn(usize, f64) -> f64) -> Option<(Vec<f64>, &'static str)> {
    let ends: Vec<f64> = run.epochs.iter().map(|e| x(e.step, e.elapsed)).collect();
    (2..=40).contains(&ends.len()).then_some((ends, "epoch ends"))
}

/// A logarithmic axis if the values need one.
fn scale<'a>(lines: impl IntoIterator<Item = &'a [Point]>) -> Scale {
    let points: Vec<&Point> = lines.into_iter().flatten().collect();
    if wants_log(points) { Scale::Log } else { Scale::FromZero }
}

/// The unit of wall time that suits a run, in seconds, and the axis's label.
fn clock(run: &Run) -> Option<(f64, String)> {
    let elapsed = run.steps.iter().map(|s| s.elapsed).chain(run.epochs.iter().map(|e| e.elapsed));
    let longest = elapsed.filter(|s| s.is_finite()).fold(0.0, f64::max);
    let (unit, name) = match longest {
        7200.0.. => (3600.0, "hours"),
        120.0.. => (60.0, "minutes"),
        _ => (1.0, "seconds"),
    };
    (longest > 0.0).then(|| (unit, format!("wall time, {name}")))
}

fn by_step(title: &str, y_label: &'static str, y: Scale) -> Chart {
    Chart {
        title: title.into(),
        y_label,
        x_label: "optimizer step".into(),
        x: Scale::Whole,
        y,
        series: Vec::new(),
        verticals: None,
        limit: None,
    }
}

fn line(name: Option<&str>, points: Vec<Point>, ink: Ink) -> Series {
    Series { name: name.map(str::to_owned), points, ink, width: 2.2, mark: None }
}

fn ring(name: String, at: Point) -> Series {
    Series { name: Some(name), points: vec![at], ink: Ink::Text, width: 0.0, mark: Some(PointMark::Ring) }
}

/// The measured values, faint below their smoothed curve; alone if there are too few for a curve.
fn with_smoothed(points: Vec<Point>, log: bool, name: &str) -> Vec<Series> {
    match smoothed(&points, log) {
        Some(course) => vec![
            Series { width: 1.2, ..line(Some(name), points, Ink::Faint) },
            line(Some("smoothed"), course, TRAINING),
        ],
        None => {
            let mark = (points.len() < 20).then_some(PointMark::Dot);
            vec![Series { mark, ..line(Some(name), points, TRAINING) }]
        }
    }
}

/// `0.01`, `3.2e-4`.
fn rate_text(rate: f64) -> String {
    if rate >= 1e-3 { format!("{rate:.4}").trim_end_matches('0').to_owned() } else { format!("{rate:.1e}") }
}
