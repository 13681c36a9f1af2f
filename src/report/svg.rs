//! From the plotting crate's SVG to pictures: colours of a page, dashes, names for screen readers.

use plotters::style::RGBColor;

/// Drawing units per pixel: the plotting crate has only integer units, and a pixel is too coarse for a line.
pub(super) const UNITS: i32 = 10;

/// The colour of an element. Until [`finish`] its colour on white identifies it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ink {
    /// The picture's background.
    Ground,
    /// Titles and marks.
    Text,
    /// Labels.
    Muted,
    /// Grid lines.
    Grid,
    /// The lines of the axes.
    Axis,
    /// Ends of epochs.
    Epoch,
    /// A limit.
    Limit,
    /// Measured values below their smoothed line.
    Faint,
    /// The n-th line, by colour and dash.
    Line(usize),
}

/// Colours of Okabe and Ito's palette, which are distinguishable with colour blindness, without its yellow, which is
/// too pale on white. Each has its own dash (pixels), and its name in the page's style.
const LINES: [(u32, &str, &str); 7] = [
    (0x0072B2, "blue", ""),
    (0xD55E00, "red", "7 3"),
    (0x009E73, "green", "2 2"),
    (0xB4629A, "purple", "8 3 2 3"),
    (0xE69F00, "orange", "12 4"),
    (0x56B4E9, "sky", "5 5"),
    (0x6B4E2E, "brown", "3 3 8 3"),
];

impl Ink {
    const FIXED: [Self; 8] = [
        Self::Ground,
        Self::Text,
        Self::Muted,
        Self::Grid,
        Self::Axis,
        Self::Epoch,
        Self::Limit,
        Self::Faint,
    ];

    /// Number of distinguishable lines.
    pub const LINES: usize = LINES.len();

    /// Colour on white, name in the page's style, dash in pixels.
    const fn look(self) -> (u32, &'static str, &'static str) {
        match self {
            Self::Ground => (0xFFFFFF, "card", ""),
            Self::Text => (0x1C2330, "ink", ""),
            Self::Muted => (0x596273, "muted", ""),
            Self::Grid => (0xE6E9EE, "grid", ""),
            Self::Axis => (0x9AA4B1, "axis", ""),
            Self::Epoch => (0xCDD3DB, "epoch", "2 3"),
            Self::Limit => (0x6B7280, "limit", "6 4"),
            Self::Faint => (0x8FC3E6, "faint", ""),
            Self::Line(n) => LINES[n % LINES.len()],
        }
    }

    /// Its colour on white.
    pub const fn colour(self) -> RGBColor {
        let (rgb, ..) = self.look();
        RGBColor((rgb >> 16) as u8, (rgb >> 8) as u8, rgb as u8)
    }

    /// Its name in the page's style.
    pub const fn name(self) -> &'static str {
        self.look().1
    }

    /// Lengths of the dashes and gaps of lines in this colour (0xRRGGBB), drawing units; none for a continuous line.
    pub fn dash(rgb: u32) -> impl Iterator<Item = i32> {
        let dash = Self::all().map(Self::look).find(|look| look.0 == rgb).map_or("", |look| look.2);
        dash.split(' ').filter_map(|n| n.parse::<i32>().ok()).map(|n| n * UNITS)
    }

    fn all() -> impl Iterator<Item = Self> {
        Self::FIXED.into_iter().chain((0..LINES.len()).map(Self::Line))
    }
}

/// Makes a drawing of `width` by `height` pixels a standalone picture on white: its size, its name for screen readers,
/// dashes.
pub(super) fn finish(drawing: &str, (width, height): (u32, u32), about: &str) -> String {
    let body = drawing.split_once('>').map_or(drawing, |(_, body)| body);
    let about = escaped(about);
    let (units_x, units_y) = (width * UNITS as u32, height * UNITS as u32);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {units_x} {units_y}\" width=\"{width}\" \
         height=\"{height}\" role=\"img\" aria-label=\"{about}\" stroke-linejoin=\"round\">\n<title>{about}</title>{body}"
    );
    for ink in Ink::all() {
        let (rgb, ..) = ink.look();
        let units: Vec<String> = Ink::dash(rgb).map(|n| n.to_string()).collect();
        if !units.is_empty() {
            let stroke = format!("stroke=\"#{rgb:06X}\"");
            for tag in ["<polyline fill=\"none\" opacity=\"1\" ", "<line opacity=\"1\" "] {
                let dashed = format!("{tag}stroke-dasharray=\"{}\" {stroke}", units.join(" "));
                svg = svg.replace(&format!("{tag}{stroke}"), &dashed);
            }
        }
    }
    // Font families with many weights; the last is the one with which PNGs are rendered.
    svg.replace(
        "font-family=\"sans-serif\"",
        "font-family=\"system-ui, 'Segoe UI', Roboto, Ubuntu, sans-serif\"",
    )
}

/// A finished picture as a part of a page: it takes the page's colours and fonts.
pub(super) fn inline(svg: &str) -> String {
    let mut page = svg
        .replace(" font-family=\"system-ui, 'Segoe UI', Roboto, Ubuntu, sans-serif\"", "")
        .replace(" opacity=\"1\"", "");
    for ink in Ink::all() {
        let (rgb, name, _) = ink.look();
        for what in ["stroke", "fill"] {
            page = page.replace(&format!("{what}=\"#{rgb:06X}\""), &format!("{what}=\"var(--{name})\""));
        }
    }
    page
}

/// Text as the content or an attribute of XML, without the control characters that XML does not allow.
pub(super) fn escaped(text: &str) -> String {
    let clean: String = text.chars().filter(|c| !c.is_control()).collect();
    clean.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_ink_has_a_colour_of_its_own() {
        let mut colours: Vec<u32> = Ink::all().map(|ink| ink.look().0).collect();
        colours.sort_unstable();
        colours.dedup();
        assert_eq!(colours.len(), Ink::all().count());
    }

    #[test]
    fn names_are_escaped() {
        let svg = finish("<svg><rect/></svg>", (4, 2), "a <b> & \"c\"\u{8}");
        assert!(svg.contains("aria-label=\"a &lt;b&gt; &amp; &quot;c&quot;\""), "{svg}");
        assert!(roxmltree::Document::parse(&svg).is_ok(), "{svg}");
    }
}
