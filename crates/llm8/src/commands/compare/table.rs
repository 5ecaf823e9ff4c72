//! The comparison as a table for a terminal, and both texts.

use comfy_table::{CellAlignment, Table, presets};

use super::report::Report;

pub fn text(report: &Report) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.add_row(["", report.f16.precision, report.int8.precision]);
    for (name, [f16, int8]) in report.lines() {
        table.add_row([name, &f16, &int8]);
    }
    table.column_iter_mut().skip(1).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    let mut agreement = Table::new();
    agreement.load_style(presets::NOTHING);
    for (name, value) in report.agreement() {
        agreement.add_row([name, &value]);
    }
    let text = |run: &super::Run| format!("{}: {}", run.precision, run.text);
    [table.trim_fmt(), agreement.trim_fmt(), text(&report.f16), text(&report.int8)].join("\n\n")
}
