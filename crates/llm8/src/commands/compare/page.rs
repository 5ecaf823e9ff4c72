//! The comparison as a page.

use maud::{Markup, html};

use super::Run;
use super::report::Report;
use crate::page;

/// The page, which needs nothing beside itself and follows the reader's light or dark scheme.
pub fn html(report: &Report) -> String {
    let (f16, int8) = (&report.f16, &report.int8);
    page::html(
        &format!("{}: {} and {}", f16.model, f16.precision, int8.precision),
        &html! {
            h1 { (f16.model) }
            p { "The weights take " (crate::output::bytes(int8.memory.weight_bytes)) " at " (int8.precision) ", "
                (format!("{:.2}", f16.memory.weight_bytes as f64 / int8.memory.weight_bytes as f64))
                " times less than at " (f16.precision) "." }
            (bars(report))
            h2 { "Figures" }
            div class="wide" { table {
                tr { th {} th { (f16.precision) } th { (int8.precision) } }
                @for (name, [f16, int8]) in report.lines() { tr { th { (name) } td { (f16) } td { (int8) } } }
            } }
            h2 { "Agreement" }
            div class="wide" { table {
                @for (name, value) in report.agreement() { tr { th { (name) } td { (value) } } }
            } }
            h2 { "Texts" }
            @for run in [f16, int8] { (text(run, report.first_difference)) }
        },
    )
}

/// One bar a figure and precision, the longest of each figure over the whole width.
fn bars(report: &Report) -> Markup {
    let (f16, int8) = (&report.f16, &report.int8);
    let figure = |value: fn(&Run) -> f64| [value(f16), value(int8)];
    let figures = [
        ("weights", figure(|run| run.memory.weight_bytes as f64)),
        ("peak memory", figure(|run| run.memory.peak_rss_bytes.unwrap_or_default() as f64)),
        ("prompt", figure(|run| run.timings.prompt_tokens_per_second)),
        ("generation", figure(|run| run.timings.generation_tokens_per_second)),
    ];
    let labels = report.lines();
    let label = |name: &str, index: usize| {
        labels.iter().find(|(line, _)| *line == name).map(|(_, cells)| cells[index].clone()).unwrap_or_default()
    };
    html! {
        @for (name, values) in figures {
            div class="bars" role="img" aria-label=(format!("{name}: {} and {}", label(name, 0), label(name, 1))) {
                span { (name) }
                @for (index, run) in [f16, int8].into_iter().enumerate() {
                    div class=(if index == 0 { "bar pale" } else { "bar" }) {
                        i style=(format!("width: {:.1}%", 60.0 * values[index] / values[0].max(values[1]).max(f64::MIN_POSITIVE))) {}
                        (run.precision) " " (label(name, index))
                    }
                }
            }
        }
    }
}

/// A run's text, and where it parts from the other.
fn text(run: &Run, first_difference: Option<usize>) -> Markup {
    let note = match first_difference {
        Some(index) => format!("{}: the two part at token {index}", run.precision),
        None => run.precision.to_string(),
    };
    html! { h3 { (note) } pre { (run.text) } }
}
