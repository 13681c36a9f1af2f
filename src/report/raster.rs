//! A chart as PNG: the drawing calls of the plotting crate in pixels, with the dashes and letters that its SVG has.

use super::svg::{Ink, UNITS};
use crate::{Error, Result};
use plotters_backend::text_anchor::{HPos, VPos};
use plotters_backend::{
    BackendColor, BackendCoord, BackendStyle, BackendTextStyle, DrawingBackend, DrawingErrorKind,
};
use std::io;
use tiny_skia::{FillRule, LineJoin, Paint, Path, PathBuilder, Pixmap, Rect, Stroke, StrokeDash, Transform};
use ttf_parser::{Face, OutlineBuilder};

/// Pixels of the PNG for each pixel of the SVG.
const SCALE: u32 = 2;

/// A picture on which the plotting crate draws.
pub(super) struct Canvas<'a> {
    pixels: &'a mut Pixmap,
    /// The program's own, so that letters look the same on every machine. The second has what the first has not.
    fonts: [Face<'static>; 2],
}

/// The PNG of a picture of `width` by `height` pixels that `draw` fills, at twice that size.
pub(super) fn png(
    (width, height): (u32, u32),
    draw: impl FnOnce(Canvas<'_>) -> Result<()>,
) -> Result<Vec<u8>> {
    let invalid = |what: String| Error::Invalid(format!("picture of {width} x {height} pixels: {what}"));
    let mut pixels =
        Pixmap::new(SCALE * width, SCALE * height).ok_or_else(|| invalid("expected 1 x 1 or more".into()))?;
    let font = |data| Face::parse(data, 0).map_err(|e| invalid(format!("font: {e}")));
    let fonts = [font(epaint_default_fonts::UBUNTU_LIGHT)?, font(epaint_default_fonts::HACK_REGULAR)?];
    draw(Canvas { pixels: &mut pixels, fonts })?;
    pixels.encode_png().map_err(|e| invalid(e.to_string()))
}

type DrawnOnCanvas = std::result::Result<(), DrawingErrorKind<io::Error>>;

impl Canvas<'_> {
    /// From drawing units to pixels.
    fn transform() -> Transform {
        let scale = SCALE as f32 / UNITS as f32;
        Transform::from_scale(scale, scale)
    }

    /// A path without an area or length is `None`, and nothing of it is seen.
    fn fill(&mut self, path: Option<Path>, color: BackendColor) {
        if let Some(path) = path {
            self.pixels.fill_path(&path, &paint(color), FillRule::Winding, Self::transform(), None);
        }
    }

    fn stroke(&mut self, path: Option<Path>, style: &impl BackendStyle, dash: Option<StrokeDash>) {
        let width = style.stroke_width() as f32;
        let stroke = Stroke { width, line_join: LineJoin::Round, dash, ..Stroke::default() };
        if let Some(path) = path {
            self.pixels.stroke_path(&path, &paint(style.color()), &stroke, Self::transform(), None);
        }
    }

    /// A closed path, filled or its line alone.
    fn shape(&mut self, path: Option<Path>, style: &impl BackendStyle, fill: bool) {
        match fill {
            true => self.fill(path, style.color()),
            false => self.stroke(path, style, None),
        }
    }

    /// The first font that has the letter, and the letter's number there.
    fn glyph(&self, letter: char) -> (&Face<'static>, ttf_parser::GlyphId) {
        let found = self.fonts.iter().find_map(|face| Some((face, face.glyph_index(letter)?)));
        found.unwrap_or((&self.fonts[0], ttf_parser::GlyphId(0)))
    }

    /// The outlines of a text whose baseline begins at `(0, 0)`, and its width, for letters of the size `em`.
    fn outlines(&self, text: &str, em: f32) -> (PathBuilder, f32) {
        let mut pen = Outline { path: PathBuilder::new(), left: 0.0, scale: 1.0 };
        for letter in text.chars() {
            let (face, glyph) = self.glyph(letter);
            pen.scale = em / f32::from(face.units_per_em());
            face.outline_glyph(glyph, &mut pen);
            pen.left += f32::from(face.glyph_hor_advance(glyph).unwrap_or(0)) * pen.scale;
        }
        (pen.path, pen.left)
    }
}

impl DrawingBackend for Canvas<'_> {
    type ErrorType = io::Error;

    fn get_size(&self) -> (u32, u32) {
        let units = |pixels: u32| pixels / SCALE * UNITS as u32;
        (units(self.pixels.width()), units(self.pixels.height()))
    }

    fn ensure_prepared(&mut self) -> DrawnOnCanvas {
        Ok(())
    }

    fn present(&mut self) -> DrawnOnCanvas {
        Ok(())
    }

    fn draw_pixel(&mut self, at: BackendCoord, color: BackendColor) -> DrawnOnCanvas {
        self.draw_rect(at, (at.0 + 1, at.1 + 1), &color, true)
    }

    fn draw_line<S: BackendStyle>(
        &mut self,
        from: BackendCoord,
        to: BackendCoord,
        style: &S,
    ) -> DrawnOnCanvas {
        self.draw_path([from, to], style)
    }

    fn draw_rect<S: BackendStyle>(
        &mut self,
        (left, top): BackendCoord,
        (right, bottom): BackendCoord,
        style: &S,
        fill: bool,
    ) -> DrawnOnCanvas {
        let path =
            Rect::from_ltrb(left as f32, top as f32, right as f32, bottom as f32).map(PathBuilder::from_rect);
        self.shape(path, style, fill);
        Ok(())
    }

    fn draw_path<S: BackendStyle, I: IntoIterator<Item = BackendCoord>>(
        &mut self,
        path: I,
        style: &S,
    ) -> DrawnOnCanvas {
        let (r, g, b) = style.color().rgb;
        let dash = Ink::dash(u32::from_be_bytes([0, r, g, b]));
        let dash: Vec<f32> = dash.map(|units| units as f32).collect();
        self.stroke(joined(path).finish(), style, StrokeDash::new(dash, 0.0));
        Ok(())
    }

    fn draw_circle<S: BackendStyle>(
        &mut self,
        (x, y): BackendCoord,
        radius: u32,
        style: &S,
        fill: bool,
    ) -> DrawnOnCanvas {
        let path = PathBuilder::from_circle(x as f32, y as f32, radius as f32);
        self.shape(path, style, fill);
        Ok(())
    }

    fn fill_polygon<S: BackendStyle, I: IntoIterator<Item = BackendCoord>>(
        &mut self,
        corners: I,
        style: &S,
    ) -> DrawnOnCanvas {
        let mut path = joined(corners);
        path.close();
        self.fill(path.finish(), style.color());
        Ok(())
    }

    /// Letters where the SVG of the same call has them: 1.24 times smaller than the line, the baseline 0.76 of a letter's
    /// size below the top, or half the height of an x from the middle and from the bottom.
    fn draw_text<S: BackendTextStyle>(
        &mut self,
        text: &str,
        style: &S,
        (x, y): BackendCoord,
    ) -> DrawnOnCanvas {
        let em = (style.size() / 1.24) as f32;
        let (path, width) = self.outlines(text, em);
        let left = match style.anchor().h_pos {
            HPos::Left => 0.0,
            HPos::Center => -width / 2.0,
            HPos::Right => -width,
        };
        let down = match style.anchor().v_pos {
            VPos::Top => 0.76 * em,
            VPos::Center => 0.25 * em,
            VPos::Bottom => -0.25 * em,
        };
        let place = Transform::from_translate(x as f32 + left, y as f32 + down);
        self.fill(path.finish().and_then(|path| path.transform(place)), style.color());
        Ok(())
    }
}

fn paint(color: BackendColor) -> Paint<'static> {
    let (r, g, b) = color.rgb;
    let mut paint = Paint::default();
    paint.set_color_rgba8(r, g, b, (255.0 * color.alpha).round() as u8);
    paint
}

/// Points joined by lines.
fn joined(points: impl IntoIterator<Item = BackendCoord>) -> PathBuilder {
    let mut path = PathBuilder::new();
    for (x, y) in points {
        match path.is_empty() {
            true => path.move_to(x as f32, y as f32),
            false => path.line_to(x as f32, y as f32),
        }
    }
    path
}

/// Takes the outline of a glyph, whose y axis points upwards.
struct Outline {
    path: PathBuilder,
    /// Where the glyph begins.
    left: f32,
    /// Size of a unit of the font.
    scale: f32,
}

impl Outline {
    fn at(&self, x: f32, y: f32) -> (f32, f32) {
        (self.left + x * self.scale, -y * self.scale)
    }
}

impl OutlineBuilder for Outline {
    fn move_to(&mut self, x: f32, y: f32) {
        let (x, y) = self.at(x, y);
        self.path.move_to(x, y);
    }

    fn line_to(&mut self, x: f32, y: f32) {
        let (x, y) = self.at(x, y);
        self.path.line_to(x, y);
    }

    fn quad_to(&mut self, x1: f32, y1: f32, x: f32, y: f32) {
        let ((x1, y1), (x, y)) = (self.at(x1, y1), self.at(x, y));
        self.path.quad_to(x1, y1, x, y);
    }

    fn curve_to(&mut self, x1: f32, y1: f32, x2: f32, y2: f32, x: f32, y: f32) {
        let ((x1, y1), (x2, y2), (x, y)) = (self.at(x1, y1), self.at(x2, y2), self.at(x, y));
        self.path.cubic_to(x1, y1, x2, y2, x, y);
    }

    fn close(&mut self) {
        self.path.close();
    }
}
