//! A chart: axes, lines, marks, and a legend above the data, never on it.

use super::axis::{Axis, Scale};
use super::raster;
use super::series::{Point, thin};
use super::svg::{self, Ink, UNITS};
use crate::{Error, Result};
use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// Size of a picture, pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Width, pixels.
    pub width: u32,
    /// Height, pixels.
    pub height: u32,
    /// Font size, pixels.
    pub font: u32,
}

impl Size {
    /// The width of a page.
    pub const WIDE: Self = Self { width: 960, height: 400, font: 15 };
    /// Half the width of a page; readable on a phone.
    pub const HALF: Self = Self { width: 480, height: 320, font: 16 };
    /// The full width of a phone.
    pub const PHONE: Self = Self { width: 420, height: 380, font: 15 };
}

/// The shape of a point's mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PointMark {
    Dot,
    Square,
    Triangle,
    Ring,
}

/// Points drawn in the same way.
#[derive(Debug, Clone)]
pub(super) struct Series {
    /// Its name in the legend; `None` leaves it out.
    pub name: Option<String>,
    pub points: Vec<Point>,
    pub ink: Ink,
    /// Line width in pixels; 0 for points that are not joined.
    pub width: f64,
    /// The mark at each point.
    pub mark: Option<PointMark>,
}

/// A chart of some lines.
#[derive(Debug, Clone)]
pub(super) struct Chart {
    pub title: String,
    /// The quantity on the y axis, with its unit.
    pub y_label: &'static str,
    pub x_label: String,
    pub x: Scale,
    pub y: Scale,
    /// Drawn in this order, the last on top.
    pub series: Vec<Series>,
    /// Vertical lines at these x, below the data, with their name in the legend.
    pub verticals: Option<(Vec<f64>, &'static str)>,
    /// A horizontal line at this y, with its name in the legend.
    pub limit: Option<(f64, String)>,
}

type Root<B> = DrawingArea<B, Shift>;
type Plane<'a, B> = ChartContext<'a, B, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// The places of a chart's parts, pixels.
struct ChartLayout {
    /// Size of the picture: a long legend makes the picture higher, not the plot lower.
    size: Size,
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
    /// Row and left end of each entry of the legend.
    legend: Vec<(usize, f64)>,
    /// Baseline of the legend's first row.
    legend_top: f64,
}

/// An entry of the legend.
struct LegendEntry<'a> {
    name: &'a str,
    ink: Ink,
    width: f64,
    mark: Option<PointMark>,
}

fn units(pixels: f64) -> i32 {
    (pixels * f64::from(UNITS)).round() as i32
}

impl Chart {
    /// The chart as a standalone SVG; `None` if there is nothing to show.
    pub fn svg(&self, size: Size) -> Result<Option<String>> {
        let Some((axes, layout)) = self.layout(size) else { return Ok(None) };
        let Size { width, height, .. } = layout.size;
        let mut drawing = String::new();
        let area = (width * UNITS as u32, height * UNITS as u32);
        self.draw_on(SVGBackend::with_string(&mut drawing, area), &axes, &layout)?;
        Ok(Some(svg::finish(&drawing, (width, height), &self.about())))
    }

    /// The chart as a PNG of twice the size; `None` if there is nothing to show.
    pub fn png(&self, size: Size) -> Result<Option<Vec<u8>>> {
        let Some((axes, layout)) = self.layout(size) else { return Ok(None) };
        let Size { width, height, .. } = layout.size;
        raster::png((width, height), |canvas| self.draw_on(canvas, &axes, &layout)).map(Some)
    }

    fn layout(&self, size: Size) -> Option<((Axis, Axis), ChartLayout)> {
        let is_empty = self.series.iter().all(|series| series.points.is_empty());
        (!is_empty).then(|| {
            let (x, y) = self.axes(size);
            let layout = ChartLayout::new(size, (&x, &y), &self.entries());
            ((x, y), layout)
        })
    }

    /// The chart in a sentence.
    fn about(&self) -> String {
        let names: Vec<&str> = self.entries().into_iter().map(|entry| entry.name).collect();
        let lines = if names.is_empty() { String::new() } else { format!(": {}", names.join(", ")) };
        format!("{}. {} against {}{lines}.", self.title, self.y_label, self.x_label)
    }

    fn entries(&self) -> Vec<LegendEntry<'_>> {
        let series = self.series.iter().filter_map(|s| {
            let Series { name, ink, width, mark, .. } = s;
            name.as_deref().map(|name| LegendEntry { name, ink: *ink, width: *width, mark: *mark })
        });
        let line = |name, ink| LegendEntry { name, ink, width: 1.2, mark: None };
        let limit = self.limit.iter().map(|(_, name)| line(name.as_str(), Ink::Limit));
        let verticals = self.verticals.iter().map(|(_, name)| line(name, Ink::Epoch));
        series.chain(limit).chain(verticals).collect()
    }

    fn axes(&self, size: Size) -> (Axis, Axis) {
        let all = || self.series.iter().flat_map(|series| &series.points);
        let ys = all().map(|p| p.1).chain(self.limit.iter().map(|(y, _)| *y));
        let x_ticks = size.width as usize / (6 * size.font as usize);
        (Axis::new(self.x, all().map(|p| p.0), x_ticks), Axis::new(self.y, ys, 5))
    }

    fn draw_on<B: DrawingBackend>(
        &self,
        backend: B,
        (x, y): &(Axis, Axis),
        layout: &ChartLayout,
    ) -> Result<()> {
        let drawn = self.draw(&backend.into_drawing_area(), (x, y), layout);
        drawn.map_err(|e| Error::Invalid(format!("plot {:?}: {e}", self.title)))
    }

    fn draw<B: DrawingBackend>(
        &self,
        root: &Root<B>,
        (x, y): (&Axis, &Axis),
        layout: &ChartLayout,
    ) -> Drawn<B> {
        root.fill(&Ink::Ground.colour())?;
        let &ChartLayout { size, left, right, top, bottom, .. } = layout;
        let plot = root.clone().shrink((units(left), units(top)), (units(right - left), units(bottom - top)));
        let plane = ChartBuilder::on(&plot).build_cartesian_2d(x.min..x.max, y.min..y.max)?;
        let pen = Pen { root, font: f64::from(size.font) };
        pen.labels(self, layout)?;
        pen.axes(&plane, (x, y), layout)?;
        for at in self.verticals.iter().flat_map(|(at, _)| at) {
            let (at, _) = plane.backend_coord(&(*at, y.min));
            pen.line([(at, units(top)), (at, units(bottom))], Ink::Epoch, 1.2)?;
        }
        if let Some(at) = self.limit.as_ref().and_then(|(limit, _)| y.position(*limit)) {
            let (_, at) = plane.backend_coord(&(x.min, at));
            pen.line([(units(left), at), (units(right), at)], Ink::Limit, 1.2)?;
        }
        for series in &self.series {
            let at = |(px, py): &Point| Some(plane.backend_coord(&(x.position(*px)?, y.position(*py)?)));
            // More points than two per pixel column can't be told apart.
            let places: Vec<(f64, f64)> =
                series.points.iter().filter_map(at).map(|(x, y)| (f64::from(x), f64::from(y))).collect();
            let places = thin(&places, size.width as usize / 2);
            let places: Vec<(i32, i32)> = places.into_iter().map(|(x, y)| (x as i32, y as i32)).collect();
            if series.width > 0.0 && places.len() > 1 {
                pen.path(places.clone(), series.ink, series.width)?;
            }
            let lone = (places.len() == 1).then_some(PointMark::Dot);
            for (mark, at) in series.mark.or(lone).iter().flat_map(|m| places.iter().map(move |p| (*m, *p))) {
                pen.mark(mark, at, series.ink)?;
            }
        }
        root.present()
    }
}

impl ChartLayout {
    /// Title, legend, the label of the upward axis, the plot, ticks, the label of the other axis.
    fn new(size: Size, (x, y): (&Axis, &Axis), entries: &[LegendEntry]) -> Self {
        let font = f64::from(size.font);
        let label_width = |label: &String| text_width(label, 0.87 * font);
        let left = 14.0 + y.ticks.iter().map(|(_, label)| label_width(label)).fold(0.0, f64::max) + 8.0;
        // The last tick's label may extend beyond its tick.
        let room = x.ticks.last().map_or(0.0, |(at, label)| {
            label_width(label) / 2.0 + 4.0
                - (x.max - at) / (x.max - x.min) * (f64::from(size.width) - left - 16.0)
        });
        let right = f64::from(size.width) - room.max(16.0);
        let (mut row, mut at, mut legend) = (0usize, 14.0, Vec::new());
        for entry in entries {
            let entry_width = entry.sample() + 6.0 + text_width(entry.name, 0.93 * font) + 18.0;
            if at > 14.0 && at + entry_width - 18.0 > right {
                (row, at) = (row + 1, 14.0);
            }
            legend.push((row, at));
            at += entry_width;
        }
        let rows = if entries.is_empty() { 0 } else { row + 1 };
        let legend_top = 12.0 + 1.25 * font + 0.75 * font;
        let top = legend_top + 1.4 * font * rows as f64 + 1.9 * font;
        let more = 1.4 * font * rows.saturating_sub(2) as f64;
        let size = Size { height: size.height + more as u32, ..size };
        Self { size, left, right, top, bottom: f64::from(size.height) - 3.5 * font, legend, legend_top }
    }
}

impl LegendEntry<'_> {
    /// Length of the sample in the legend, pixels.
    fn sample(&self) -> f64 {
        if self.width > 0.0 { 26.0 } else { 15.0 }
    }
}

/// Approximate width of a text, pixels. The viewer chooses the font, so these are the widths of the widest usual fonts.
fn text_width(text: &str, font: f64) -> f64 {
    let letter = |c: char| match c {
        ' ' | '.' | ',' | ':' | '-' | '\'' | 'i' | 'j' | 'l' | 'f' | 't' | 'r' => 0.37,
        'm' | 'w' | 'M' | 'W' | '%' | '@' => 0.96,
        'A'..='Z' => 0.7,
        '\0'..'\u{1100}' => 0.62,
        _ => 1.05,
    };
    text.chars().map(letter).sum::<f64>() * font
}

/// Draws on a picture, in units of 1/[`UNITS`] pixel.
struct Pen<'a, B: DrawingBackend> {
    root: &'a Root<B>,
    font: f64,
}

type Drawn<B> = std::result::Result<(), DrawingAreaErrorKind<<B as DrawingBackend>::ErrorType>>;

impl<B: DrawingBackend> Pen<'_, B> {
    fn text(&self, text: &str, at: (f64, f64), ink: Ink, (h, v): (HPos, VPos), size: f64) -> Drawn<B> {
        // The plotting crate expects a line's height and writes letters 1.24 times smaller.
        let colour = ink.colour();
        let style = TextStyle::from(("sans-serif", size * f64::from(UNITS) * 1.24).into_font());
        let style = style.color(&colour).pos(Pos::new(h, v));
        let text: String = text.chars().filter(|c| !c.is_control()).collect();
        self.root.draw_text(&text, &style, (units(at.0), units(at.1)))
    }

    fn line(&self, ends: [(i32, i32); 2], ink: Ink, width: f64) -> Drawn<B> {
        self.path(ends.to_vec(), ink, width)
    }

    fn path(&self, points: Vec<(i32, i32)>, ink: Ink, width: f64) -> Drawn<B> {
        let style = ink.colour().stroke_width(units(width) as u32);
        self.root.draw(&PathElement::new(points, style))
    }

    fn mark(&self, mark: PointMark, (x, y): (i32, i32), ink: Ink) -> Drawn<B> {
        let (r, colour, ground) = (units(3.6), ink.colour(), Ink::Ground.colour());
        match mark {
            PointMark::Dot => self.root.draw(&Circle::new((x, y), r, colour.filled())),
            PointMark::Square => {
                self.root.draw(&Rectangle::new([(x - r, y - r), (x + r, y + r)], colour.filled()))
            }
            PointMark::Triangle => {
                let (side, low) = (r * 6 / 5, r * 4 / 5);
                let corners = vec![(x, y - r * 13 / 10), (x + side, y + low), (x - side, y + low)];
                self.root.draw(&Polygon::new(corners, colour.filled()))
            }
            PointMark::Ring => {
                self.root.draw(&Circle::new((x, y), r * 2, colour.stroke_width(units(1.8) as u32)))?;
                // So that the content inside the ring is visible on any background.
                self.root.draw(&Circle::new((x, y), r * 3 / 2, ground.stroke_width(units(0.8) as u32)))
            }
        }
    }

    fn axes(&self, plane: &Plane<'_, B>, (x, y): (&Axis, &Axis), layout: &ChartLayout) -> Drawn<B> {
        let ChartLayout { left, right, bottom, .. } = *layout;
        let size = 0.87 * self.font;
        for (at, label) in &y.ticks {
            let (_, at) = plane.backend_coord(&(x.min, *at));
            self.line([(units(left), at), (units(right), at)], Ink::Grid, 1.0)?;
            let place = (left - 8.0, f64::from(at) / f64::from(UNITS));
            self.text(label, place, Ink::Muted, (HPos::Right, VPos::Center), size)?;
        }
        self.line([(units(left), units(bottom)), (units(right), units(bottom))], Ink::Axis, 1.2)?;
        for (at, label) in &x.ticks {
            let (at, _) = plane.backend_coord(&(*at, y.min));
            self.line([(at, units(bottom)), (at, units(bottom + 5.0))], Ink::Axis, 1.2)?;
            let place = (f64::from(at) / f64::from(UNITS), bottom + 9.0);
            self.text(label, place, Ink::Muted, (HPos::Center, VPos::Top), size)?;
        }
        Ok(())
    }

    fn labels(&self, chart: &Chart, layout: &ChartLayout) -> Drawn<B> {
        let (font, &ChartLayout { left, right, top, .. }) = (self.font, layout);
        self.text(&chart.title, (14.0, 12.0), Ink::Text, (HPos::Left, VPos::Top), 1.1 * font)?;
        let log = if chart.y == Scale::Log { ", log scale" } else { "" };
        let y_label = format!("{}{log}", chart.y_label);
        let low = top - 0.8 * font;
        self.text(&y_label, (14.0, low), Ink::Muted, (HPos::Left, VPos::Bottom), 0.87 * font)?;
        let place = ((left + right) / 2.0, f64::from(layout.size.height) - 0.55 * font);
        self.text(&chart.x_label, place, Ink::Muted, (HPos::Center, VPos::Bottom), 0.87 * font)?;
        for (entry, (row, at)) in chart.entries().iter().zip(&layout.legend) {
            let middle = layout.legend_top + 1.4 * font * *row as f64 + 0.5 * font;
            let (from, to) = (units(*at), units(at + entry.sample()));
            if entry.width > 0.0 {
                self.line([(from, units(middle)), (to, units(middle))], entry.ink, entry.width.max(1.2))?;
            }
            if let Some(mark) = entry.mark {
                self.mark(mark, ((from + to) / 2, units(middle)), entry.ink)?;
            }
            let place = (at + entry.sample() + 6.0, middle);
            self.text(entry.name, place, Ink::Muted, (HPos::Left, VPos::Center), 0.93 * font)?;
        }
        Ok(())
    }
}
