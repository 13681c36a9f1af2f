//! Plots: well-formed SVG, PNG of the right size with something on it, few enough points.

use crate::odd;
use gneiss::report::plot::{self, RangePoint, Size};
use gneiss::report::{self, CURVE_PNG, CURVE_SVG, REPORT};
use gneiss::run::Run;
use std::fs;
use tiny_skia::{Pixmap, PremultipliedColorU8};

type Plot = fn(&Run, Size) -> gneiss::Result<Option<String>>;

const PLOTS: [(&str, Plot); 5] = [
    ("learning curve", plot::learning_curve),
    ("learning rate", plot::learning_rate),
    ("gradient norm", plot::gradient_norm),
    ("loss over time", plot::loss_over_time),
    ("throughput", plot::throughput),
];

/// Width of a picture in pixels. It is XML, and has no elements and no numbers that a browser would not draw.
fn width(svg: &str) -> f32 {
    let tree = roxmltree::Document::parse(svg).unwrap_or_else(|e| panic!("{e} in {svg}"));
    for element in tree.descendants().filter(roxmltree::Node::is_element) {
        let name = element.tag_name().name();
        assert!(
            ["svg", "title", "rect", "line", "polyline", "polygon", "circle", "text"].contains(&name),
            "{name} in {svg}"
        );
        for key in ["x", "y", "x1", "y1", "x2", "y2", "cx", "cy", "r", "width", "height", "stroke-width"] {
            let value = element.attribute(key).unwrap_or("0");
            assert!(value.parse::<f32>().is_ok_and(f32::is_finite), "{key}={value} in {svg}");
        }
    }
    tree.root_element().attribute("width").and_then(|width| width.parse().ok()).unwrap()
}

#[test]
fn every_plot_of_every_run_is_a_picture() {
    let folder = tempfile::tempdir().unwrap();
    for (name, content) in odd::all() {
        let run = content.run(folder.path(), name);
        for (what, plot) in PLOTS {
            for size in [Size::WIDE, Size::HALF, Size::PHONE] {
                let Some(svg) = plot(&run, size).unwrap() else {
                    assert!(run.steps.is_empty(), "{name} has no {what}");
                    continue;
                };
                assert_eq!(width(&svg), size.width as f32, "{name}, {what}");
                assert!(svg.contains("role=\"img\" aria-label=\""), "{name}, {what}");
                assert!(!svg.contains("NaN") && !svg.contains("inf"), "{name}, {what}: {svg}");
                assert!(svg.len() < 60_000, "{name}, {what}: {} bytes", svg.len());
            }
        }
    }
}

/// Points of the faint line: of 30,000 steps so many as 480 columns can show, and the extremes among them.
#[test]
fn a_long_run_is_thinned_out() {
    let folder = tempfile::tempdir().unwrap();
    let (_, content) = odd::all().into_iter().find(|(name, _)| *name == "long").unwrap();
    let run = content.run(folder.path(), "long");
    let svg = plot::throughput(&run, Size::WIDE).unwrap().unwrap();
    let lines = svg.lines().filter(|line| line.starts_with("<polyline") && line.contains("#8FC3E6"));
    let points: Vec<(i32, i32)> = lines
        .map(|line| line.split("points=\"").nth(1).unwrap().trim_end_matches("\"/>"))
        .max_by_key(|points| points.len())
        .unwrap()
        .split_whitespace()
        .map(|point| point.split_once(',').map(|(x, y)| (x.parse().unwrap(), y.parse().unwrap())).unwrap())
        .collect();
    assert!((960..=1920).contains(&points.len()), "{}", points.len());
    assert!(points.is_sorted_by(|a, b| a.0 <= b.0));
    // Each step's rate by the plot's own scale: 0 and the highest tick are where their grid lines are.
    let rates: Vec<f64> = content.steps.iter().map(|s| s.examples as f64 / s.seconds).collect();
    let [low, high] = [f64::min, f64::max].map(|f| rates.iter().copied().reduce(f).unwrap());
    let heights: Vec<i32> = points.iter().map(|p| p.1).collect();
    let (top, bottom) = (*heights.iter().min().unwrap(), *heights.iter().max().unwrap());
    let axis = f64::from(Size::WIDE.height * 10) - 35.0 * f64::from(Size::WIDE.font);
    let ratio = (axis - f64::from(bottom)) / (axis - f64::from(top));
    assert!((ratio - low / high).abs() < 0.01, "{ratio} is not {}", low / high);
}

#[test]
fn a_run_that_has_not_begun_has_no_plots() {
    let folder = tempfile::tempdir().unwrap();
    let run = crate::runs::under_way(0).run(folder.path(), "none");
    for (what, plot) in PLOTS {
        assert_eq!(plot(&run, Size::HALF).unwrap(), None, "{what}");
    }
    let written = report::write(&run).unwrap();
    assert_eq!(written, [run.path.join(REPORT)]);
}

#[test]
fn the_files_of_a_report() {
    let folder = tempfile::tempdir().unwrap();
    let run = crate::runs::tutorial().run(folder.path(), "tutorial");
    let started = std::time::Instant::now();
    let written = report::write(&run).unwrap();
    eprintln!("written in {:.2} s", started.elapsed().as_secs_f64());
    assert_eq!(written, [REPORT, CURVE_SVG, CURVE_PNG].map(|name| run.path.join(name)));
    assert_eq!(fs::read_to_string(run.path.join(REPORT)).unwrap(), report::page(&run).unwrap());
    let svg = fs::read_to_string(run.path.join(CURVE_SVG)).unwrap();
    assert!(!svg.contains("var(--"), "the file stands alone");
    let png = fs::read(run.path.join(CURVE_PNG)).unwrap();
    let out = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("report");
    fs::create_dir_all(&out).unwrap();
    fs::write(out.join("curve.png"), &png).unwrap();
    let png = Pixmap::decode_png(&png).unwrap();
    assert_eq!((png.width(), png.height()), (2 * Size::WIDE.width, 2 * Size::WIDE.height));
    let share = |colour: [u8; 3]| {
        let like = |p: &&PremultipliedColorU8| {
            let found = [p.red(), p.green(), p.blue()];
            p.alpha() == 255 && found.iter().zip(colour).all(|(a, b)| a.abs_diff(b) < 12)
        };
        png.pixels().iter().filter(like).count() as f64 / png.pixels().len() as f64
    };
    assert!(share([255, 255, 255]) > 0.7, "on white");
    for (what, colour, least) in [
        ("training", [0x00, 0x72, 0xB2], 2e-3),
        ("validation", [0xD5, 0x5E, 0x00], 1e-3),
        // Letters: none without a font.
        ("title", [0x1C, 0x23, 0x30], 1e-4),
        ("labels", [0x59, 0x62, 0x73], 5e-4),
    ] {
        assert!(share(colour) > least, "{what}: {}", share(colour));
    }
}

#[test]
fn a_range_test() {
    let points: Vec<RangePoint> = (0..100)
        .map(|i| {
            let learning_rate = 1e-5 * 10f64.powf(f64::from(i) / 20.0);
            let smoothed =
                if learning_rate < 0.3 { 3.0 / (1.0 + 30.0 * learning_rate) } else { learning_rate * 4.0 };
            RangePoint { learning_rate, loss: smoothed * (1.0 + 0.1 * f64::from(i % 3 - 1)), smoothed }
        })
        .collect();
    let svg = plot::range_test(&points, Some(0.0316), Size::WIDE).unwrap().unwrap();
    width(&svg);
    for part in
        ["suggested: 0.0316", "learning rate, log scale", "nats per target token", ">\n1e-4\n<", ">\n0.1\n<"]
    {
        assert!(svg.contains(part), "{part} in {svg}");
    }
    let out = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("report");
    fs::create_dir_all(&out).unwrap();
    let png = plot::range_test_png(&points, Some(0.0316), Size::WIDE).unwrap().unwrap();
    fs::write(out.join("range-test.png"), png).unwrap();
    let alone = plot::range_test(&points[..1], None, Size::HALF).unwrap().unwrap();
    assert!(!alone.contains("suggested"));
    assert_eq!(plot::range_test(&[], Some(0.1), Size::HALF).unwrap(), None);
    let infinite = RangePoint { learning_rate: 1.0, loss: f64::INFINITY, smoothed: f64::NAN };
    width(&plot::range_test(&[points[0], infinite], Some(1e-5), Size::HALF).unwrap().unwrap());
}
