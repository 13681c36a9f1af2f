//! Parallel coordinates: an axis for each key in which runs differ and one for what they are compared by; a line for each
//! run.

use super::svg::{self, Ink, UNITS};
use super::text;
use std::fmt::Write;

/// Size of the picture, pixels.
const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 380.0;
/// Ends of the axes, pixels.
const TOP: f64 = 84.0;
const BOTTOM: f64 = 340.0;
/// Room for labels beside the first and the last axis, pixels.
const SIDE: f64 = 132.0;
/// Most letters of a label.
const LETTERS: usize = 14;
/// Most letters of an axis's name.
const NAME_LETTERS: usize = 22;
/// A number with more digits is rounded in its label.
const DIGITS: usize = 8;

/// An axis: the values of all runs, in their order.
pub(super) struct ParallelAxis {
    pub name: String,
    pub values: Vec<String>,
}

/// A run's line.
pub(super) struct ParallelLine {
    pub ink: Ink,
    /// Pixels.
    pub width: f64,
}

/// Where values stand on their axis, 0 (low) to 1, and the labels of some places.
struct Places {
    of_values: Vec<Option<f64>>,
    labels: Vec<(f64, String)>,
}

/// The picture as a standalone SVG; the lines are drawn in their order, the last on top.
pub(super) fn draw(title: &str, axes: &[ParallelAxis], lines: &[ParallelLine]) -> String {
    let places: Vec<Places> = axes.iter().map(|axis| Places::new(&axis.values)).collect();
    let x = |i: usize| SIDE + (WIDTH - 2.0 * SIDE) * i as f64 / (axes.len().max(2) - 1) as f64;
    let mut body = format!(
        "<svg><rect width=\"{}\" height=\"{}\" {}/>\n",
        units(WIDTH),
        units(HEIGHT),
        fill(Ink::Ground)
    );
    for i in 0..axes.len() {
        stroke(&mut body, Ink::Axis, 1.2, &[(x(i), TOP), (x(i), BOTTOM)]);
    }
    for (line, ParallelLine { ink, width }) in lines.iter().enumerate() {
        let points =
            places.iter().enumerate().filter_map(|(i, places)| Some((x(i), y(places.of_values[line]?))));
        stroke(&mut body, *ink, *width, &points.collect::<Vec<_>>());
    }
    label(&mut body, title, (14.0, 26.0), ("start", 165), Ink::Text);
    for (i, (axis, places)) in axes.iter().zip(&places).enumerate() {
        // Names of neighbours stand at two heights, so that they do not overlap.
        let height = if i % 2 == 0 { 66.0 } else { 50.0 };
        label(&mut body, &short(&axis.name, NAME_LETTERS), (x(i), height), ("middle", 130), Ink::Text);
        for (at, name) in &places.labels {
            let is_last = i + 1 == axes.len();
            let (anchor, dx) = if is_last { ("start", 9.0) } else { ("end", -9.0) };
            label(&mut body, &short(name, LETTERS), (x(i) + dx, y(*at) + 4.5), (anchor, 120), Ink::Muted);
        }
    }
    body += "</svg>\n";
    let names: Vec<&str> = axes.iter().map(|axis| axis.name.as_str()).collect();
    svg::finish(&body, (WIDTH as u32, HEIGHT as u32), &format!("{title}: {}.", names.join(", ")))
}

/// A line through points, pixels.
fn stroke(body: &mut String, ink: Ink, width: f64, points: &[(f64, f64)]) {
    let points: Vec<String> = points.iter().map(|(x, y)| format!("{},{}", units(*x), units(*y))).collect();
    let (colour, width, points) = (colour(ink), units(width), points.join(" "));
    let _ = writeln!(
        body,
        "<polyline fill=\"none\" opacity=\"1\" stroke=\"{colour}\" stroke-width=\"{width}\" points=\"{points}\"/>"
    );
}

impl Places {
    /// Numbers stand where they are, on a logarithmic axis if they span magnitudes; other values stand evenly, in order.
    fn new(values: &[String]) -> Self {
        let numbers: Vec<Option<f64>> = values.iter().map(|value| value.parse::<f64>().ok()).collect();
        let shown = || numbers.iter().flatten().copied().filter(|number| number.is_finite());
        let are_numbers =
            numbers.iter().zip(values).all(|(number, value)| number.is_some() || value.is_empty());
        let (min, max) = shown().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(v), b.max(v)));
        if !are_numbers || min > max {
            let mut names: Vec<&String> = values.iter().filter(|value| !value.is_empty()).collect();
            names.sort();
            names.dedup();
            let at = |value: &String| {
                let place = names.iter().position(|name| *name == value)?;
                Some(if names.len() > 1 { place as f64 / (names.len() - 1) as f64 } else { 0.5 })
            };
            let labels = names.iter().filter_map(|name| Some((at(name)?, (*name).clone())));
            return Self { of_values: values.iter().map(at).collect(), labels: spread(labels.collect()) };
        }
        let is_log = min > 0.0 && max / min >= 20.0;
        let scaled = |number: f64| if is_log { number.ln() } else { number };
        let (low, high) = (scaled(min), scaled(max));
        let at = |number: f64| if high > low { (scaled(number) - low) / (high - low) } else { 0.5 };
        let name = |value: &String, number: f64| {
            if value.len() <= DIGITS { value.clone() } else { text::number(number) }
        };
        let named = values.iter().zip(&numbers).filter_map(|(value, number)| Some(((*number)?, value)));
        let mut distinct: Vec<(f64, &String)> = named.filter(|(number, _)| number.is_finite()).collect();
        distinct.sort_by(|a, b| a.0.total_cmp(&b.0));
        distinct.dedup_by(|a, b| a.0 == b.0);
        let labels = distinct.iter().map(|(number, value)| (at(*number), name(value, *number))).collect();
        let place = |number: &Option<f64>| number.filter(|number| number.is_finite()).map(at);
        Self { of_values: numbers.iter().map(place).collect(), labels: spread(labels) }
    }
}

/// The labels that have room: both ends, and others that are not too close to one before them.
fn spread(labels: Vec<(f64, String)>) -> Vec<(f64, String)> {
    const ROOM: f64 = 0.09;
    let last = labels.last().map_or(1.0, |(at, _)| *at);
    let mut shown: Vec<(f64, String)> = Vec::new();
    for (at, name) in labels {
        let has_room = shown.last().is_none_or(|(before, _)| at - before >= ROOM);
        if has_room && (at == last || last - at >= ROOM) {
            shown.push((at, name));
        } else if at == last {
            shown.pop();
            shown.push((at, name));
        }
    }
    shown
}

fn y(at: f64) -> f64 {
    BOTTOM - (BOTTOM - TOP) * at
}

fn units(pixels: f64) -> i32 {
    (pixels * f64::from(UNITS)).round() as i32
}

fn colour(ink: Ink) -> String {
    let plotters::style::RGBColor(r, g, b) = ink.colour();
    format!("#{r:02X}{g:02X}{b:02X}")
}

fn fill(ink: Ink) -> String {
    format!("fill=\"{}\"", colour(ink))
}

fn short(name: &str, letters: usize) -> String {
    text::cut(name, letters).unwrap_or_else(|| name.to_owned())
}

/// A text with a border of the background's colour, so that it can be read over lines; its size in units.
fn label(body: &mut String, text: &str, at: (f64, f64), (anchor, size): (&str, u32), ink: Ink) {
    let (x, y, border) = (units(at.0), units(at.1), colour(Ink::Ground));
    let _ = writeln!(
        body,
        "<text x=\"{x}\" y=\"{y}\" text-anchor=\"{anchor}\" font-family=\"sans-serif\" font-size=\"{size}\" \
         paint-order=\"stroke\" stroke=\"{border}\" stroke-width=\"50\" {}>{}</text>",
        fill(ink),
        svg::escaped(text)
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(values: &[&str]) -> Places {
        Places::new(&values.iter().map(|value| (*value).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn magnitudes_stand_by_their_logarithms() {
        let found = places(&["0.001", "0.01", "0.1", ""]);
        let expected = [Some(0.0), Some(0.5), Some(1.0), None];
        for (found, expected) in found.of_values.iter().zip(expected) {
            assert!(
                found
                    .zip(expected)
                    .map_or(found.is_none() && expected.is_none(), |(a, b)| (a - b).abs() < 1e-9)
            );
        }
        assert_eq!(places(&["1", "2", "5"]).of_values[1], Some(0.25));
        assert_eq!(places(&["7", "7"]).of_values, [Some(0.5), Some(0.5)]);
    }

    #[test]
    fn names_stand_evenly_and_have_labels() {
        let found = places(&["text", "vocab", "random", "text"]);
        assert_eq!(found.of_values, [Some(0.5), Some(1.0), Some(0.0), Some(0.5)]);
        let labels: Vec<&str> = found.labels.iter().map(|(_, name)| name.as_str()).collect();
        assert_eq!(labels, ["random", "text", "vocab"]);
    }

    #[test]
    fn labels_leave_room_and_the_ends_are_shown() {
        let of = |places: &[f64]| {
            let labels = places.iter().map(|at| (*at, String::new())).collect();
            spread(labels).into_iter().map(|(at, _)| at).collect::<Vec<_>>()
        };
        assert_eq!(of(&[0.0, 0.01, 0.5, 0.98, 1.0]), [0.0, 0.5, 1.0]);
        assert_eq!(of(&[0.5]), [0.5]);
        assert_eq!(of(&[]), [0.0; 0]);
    }
}
