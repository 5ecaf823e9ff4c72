//! The bytes of each precision as a picture: stacked bars by component.

use int8_models::Component;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::report::{PRECISIONS, Report};
use crate::output::precise_bytes;

const SIZE: (u32, u32) = (900, 360);
const FONT: &str = "system-ui, sans-serif";

const PAPER: RGBColor = RGBColor(0xff, 0xff, 0xff);
const INK: RGBColor = RGBColor(0x1f, 0x23, 0x28);
const PALE_INK: RGBColor = RGBColor(0x59, 0x63, 0x6e);
const GRID: RGBColor = RGBColor(0xd8, 0xde, 0xe4);
/// One for each component, told apart by the colour-blind too (after Okabe and Ito).
const FILLS: [RGBColor; 5] = [
    RGBColor(0x00, 0x72, 0xb2),
    RGBColor(0xe6, 0x9f, 0x00),
    RGBColor(0x00, 0x9e, 0x73),
    RGBColor(0xcc, 0x79, 0xa7),
    RGBColor(0xd5, 0x5e, 0x00),
];
/// Letters keep clear of the grid. On a dark page colours are others: style rules win over the
/// attributes that colours are drawn with.
const STYLE: &str = r##"<style>
  svg text { paint-order: stroke; stroke: #ffffff; stroke-width: 5px }
  @media (prefers-color-scheme: dark) {
    svg text { stroke: #0d1117 }
    svg [fill="#FFFFFF"] { fill: #0d1117 }
    svg [fill="#1F2328"] { fill: #f0f6fc }
    svg [fill="#59636E"] { fill: #9198a1 }
    svg [stroke="#D8DEE4"] { stroke: #30363d }
    svg [fill="#0072B2"] { fill: #4ba3dc }
    svg [fill="#009E73"] { fill: #1fb98d }
  }
</style>"##;

/// The longest name that fits into the title; of a longer one the end is shown.
const MAX_NAME_LEN: usize = 64;

/// The picture as an SVG document, which follows a page's light or dark scheme.
pub fn svg(report: &Report) -> anyhow::Result<String> {
    let mut svg = String::new();
    draw(report, SVGBackend::with_string(&mut svg, SIZE).into_drawing_area())?;
    // Behind the opening tag.
    let start = svg.find('>').map_or(0, |end| end + 1);
    svg.insert_str(start, STYLE);
    Ok(svg)
}

fn text(size: u32, color: &RGBColor, horizontal: HPos, vertical: VPos) -> TextStyle<'_> {
    (FONT, size).into_font().color(color).pos(Pos::new(horizontal, vertical))
}

fn draw(report: &Report, area: DrawingArea<SVGBackend, Shift>) -> anyhow::Result<()> {
    let longest = report.precisions.f32.total_bytes as f64;
    let (scale, unit) = unit_of(longest);
    area.fill(&PAPER)?;
    let name = match report.model.char_indices().rev().nth(MAX_NAME_LEN) {
        Some((start, _)) => format!("…{}", &report.model[start..]),
        None => report.model.clone(),
    };
    let title = format!("{name}: bytes of the weights");
    area.draw(&Text::new(title, (24, 20), text(20, &INK, HPos::Left, VPos::Top)))?;
    draw_legend(&area)?;

    let mut chart = ChartBuilder::on(&area)
        .margin_left(130)
        .margin_right(150)
        .margin_top(92)
        .x_label_area_size(44)
        .build_cartesian_2d(0.0..longest / scale, 0.0..PRECISIONS.len() as f64)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .disable_y_axis()
        .x_labels(7)
        .x_label_formatter(&|value| format!("{} {unit}", (value * 1000.0).round() / 1000.0))
        .x_label_style(text(14, &PALE_INK, HPos::Center, VPos::Top))
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(GRID)
        .draw()?;
    let columns = PRECISIONS.iter().zip(report.precisions.each_ref()).zip(report.ratios());
    for (row, ((name, weights), ratio)) in columns.enumerate() {
        let (bottom, top) = (3.2 - row as f64, 3.8 - row as f64);
        let mut end = 0.0;
        for (component, fill) in Component::ALL.iter().zip(&FILLS) {
            let start = end;
            end += weights.components[component.key()] as f64 / scale;
            chart.draw_series([Rectangle::new([(start, bottom), (end, top)], fill.filled())])?;
        }
        let (left, middle) = chart.backend_coord(&(0.0, (bottom + top) / 2.0));
        area.draw(&Text::new(*name, (left - 12, middle), text(16, &INK, HPos::Right, VPos::Center)))?;
        let (right, _) = chart.backend_coord(&(end, top));
        let separator = if ratio.is_empty() { "" } else { " · " };
        let bytes = format!("{}{separator}{ratio}", precise_bytes(weights.total_bytes));
        area.draw(&Text::new(bytes, (right + 10, middle), text(16, &INK, HPos::Left, VPos::Center)))?;
    }
    Ok(())
}

fn draw_legend(area: &DrawingArea<SVGBackend, Shift>) -> anyhow::Result<()> {
    let (mut x, y) = (24, 62);
    for (component, fill) in Component::ALL.iter().zip(&FILLS) {
        area.draw(&Rectangle::new([(x, y - 7), (x + 14, y + 7)], fill.filled()))?;
        area.draw(&Text::new(component.name(), (x + 20, y), text(14, &PALE_INK, HPos::Left, VPos::Center)))?;
        // Room for the widest letters of any system's font.
        x += 48 + 8 * component.name().len() as i32;
    }
    Ok(())
}

/// The bytes of the unit that an axis up to `longest` is labelled with, and its name.
fn unit_of(longest: f64) -> (f64, &'static str) {
    let units = [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")];
    units.into_iter().find(|(bytes, _)| longest >= *bytes).unwrap_or((1.0, "B"))
}
