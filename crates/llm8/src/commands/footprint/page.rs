//! The report as a page: the picture, and all tables.

use int8_models::Component;
use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::picture;
use super::report::{PRECISIONS, Report};
use super::text::{count_of, describe_cache, describe_disk, describe_needs};
use crate::output::{precise_bytes, thousands};

const STYLE: &str = "
  :root { color-scheme: light dark; --paper: #ffffff; --ink: #1f2328; --pale: #59636e; --line: #d8dee4 }
  @media (prefers-color-scheme: dark) { :root { --paper: #0d1117; --ink: #f0f6fc; --pale: #9198a1; --line: #30363d } }
  body { max-width: 900px; margin: 2em auto; padding: 0 1em; background: var(--paper); color: var(--ink);
    font: 16px/1.5 system-ui, sans-serif }
  h1 { font-size: 1.5em; margin-bottom: 0; overflow-wrap: anywhere } h2 { font-size: 1.2em; margin-top: 2em }
  p { color: var(--pale) }
  svg { width: 100%; height: auto }
  .wide { overflow-x: auto }
  table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
  th, td { padding: 0.3em 0.8em; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
  th:first-child { text-align: left } th { font-weight: normal; color: var(--pale) }
  .total th, .total td { font-weight: 600; color: var(--ink) }
";

/// The page, which needs nothing beside itself and follows the reader's light or dark scheme.
pub fn html(report: &Report) -> anyhow::Result<String> {
    let picture = picture::svg(report)?;
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { (report.model) ": memory" }
                style { (PreEscaped(STYLE)) }
            }
            body {
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
            }
        }
    };
    Ok(page.into_string())
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
