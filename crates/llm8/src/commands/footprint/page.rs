//! The report as a page: the picture, and all tables.

use int8_models::Component;
use maud::{Markup, PreEscaped, html};

use super::picture;
use super::report::{PRECISIONS, Report};
use super::text::{count_of, describe_cache, describe_disk, describe_needs};
use crate::output::{precise_bytes, thousands};
use crate::page;

/// The page, which needs nothing beside itself and follows the reader's light or dark scheme.
pub fn html(report: &Report) -> anyhow::Result<String> {
    let picture = picture::svg(report)?;
    let content = html! {
        h1 { (report.model) }
        p { (report.architecture) ", " (thousands(report.parameters)) " parameters. " (describe_disk(report)) "." }
        (PreEscaped(picture))
        h2 { "Weights" }
        (weights(report))
        h2 { "Cache" }
        p { (describe_cache(report)) "." }
        h2 { "What holds it" }
        p { (describe_needs(report)) ": how many of each are needed." }
        (devices(report))
    };
    Ok(page::html(&format!("{}: memory", report.model), &content))
}

/// A table with one column for each precision.
fn by_precision(rows: &[Markup]) -> Markup {
    html! {
        div class="wide" { table {
            tr { th {} @for name in PRECISIONS { th { (name) } } }
            @for row in rows { (row) }
        } }
    }
}

fn row(name: &str, cells: [String; 4], is_total: bool) -> Markup {
    html! { tr class=[is_total.then_some("total")] { th { (name) } @for cell in cells { td { (cell) } } } }
}

fn weights(report: &Report) -> Markup {
    let weights = report.precisions.each_ref();
    let mut rows: Vec<Markup> = Component::ALL
        .iter()
        .map(|component| {
            row(component.name(), weights.map(|weights| precise_bytes(weights.components[component.key()])), false)
        })
        .collect();
    rows.push(row("weights", weights.map(|weights| precise_bytes(weights.total_bytes)), true));
    rows.push(row("smaller than 16-bit", report.ratios(), false));
    by_precision(&rows)
}

fn devices(report: &Report) -> Markup {
    let mut rows = vec![row("needed", report.needed_bytes.each_ref().map(|bytes| precise_bytes(*bytes)), true)];
    rows.extend(
        report.gpus.iter().map(|gpu| row(gpu.name, gpu.needed.each_ref().map(|count| count_of(*count)), false)),
    );
    by_precision(&rows)
}
