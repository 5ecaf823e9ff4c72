//! The report as tables and a bar chart for a terminal.

use comfy_table::{CellAlignment, Table, presets};
use int8_models::Component;

use super::report::{PRECISIONS, Report};
use crate::output::{precise_bytes, thousands};

/// Characters of the longest bar.
const BAR_WIDTH: u64 = 60;
/// What each component is drawn with, in the order of [`Component::ALL`]; the last two share one.
const FILLS: [char; 5] = ['█', '▓', '▒', '░', '░'];

pub fn table(report: &Report) -> String {
    let devices = format!("{}: how many of each hold it?\n{}", describe_needs(report), devices(report));
    let parts =
        [heading(report), weights(report), bars(report), describe_cache(report), devices, describe_disk(report)];
    parts.join("\n\n")
}

fn heading(report: &Report) -> String {
    format!("{}: {}, {} parameters", report.model, report.architecture, thousands(report.parameters))
}

/// A table with one column for each precision.
fn by_precision(rows: impl IntoIterator<Item = (String, [String; 4])>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    let line = |first: String, cells: [String; 4]| std::iter::once(first).chain(cells).collect::<Vec<_>>();
    table.add_row(line(String::new(), PRECISIONS.map(str::to_string)));
    table.add_rows(rows.into_iter().map(|(name, cells)| line(name, cells)));
    table.column_iter_mut().take(1).for_each(|column| {
        column.set_padding((0, 1));
    });
    table.column_iter_mut().skip(1).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    table.trim_fmt()
}

fn weights(report: &Report) -> String {
    let weights = report.precisions.each_ref();
    let components = Component::ALL.map(|component| {
        (component.name().to_string(), weights.map(|weights| precise_bytes(weights.components[component.key()])))
    });
    let total = ("weights".to_string(), weights.map(|weights| precise_bytes(weights.total_bytes)));
    let ratio = ("smaller than 16-bit".to_string(), report.ratios());
    by_precision(components.into_iter().chain([total, ratio]))
}

fn bars(report: &Report) -> String {
    let longest = report.precisions.f32.total_bytes;
    let mut lines = Vec::new();
    for (name, weights) in PRECISIONS.iter().zip(report.precisions.each_ref()) {
        let (mut bar, mut bytes, mut width) = (String::new(), 0, 0);
        for (component, fill) in Component::ALL.iter().zip(FILLS) {
            bytes += weights.components[component.key()];
            // Ends are rounded, not lengths: the bar is as long as the whole.
            let end = (bytes as f64 / longest as f64 * BAR_WIDTH as f64).round() as usize;
            bar.extend(std::iter::repeat_n(fill, end - width));
            width = end;
        }
        lines.push(format!("{name:<12} {bar} {}", precise_bytes(weights.total_bytes)));
    }
    let legend = [(FILLS[0], "embedding and head"), (FILLS[1], "attention"), (FILLS[2], "MLP"), (FILLS[3], "the rest")];
    lines.push(format!("{:<12} {}", "", legend.map(|(fill, name)| format!("{fill} {name}")).join("   ")));
    lines.join("\n")
}

pub fn describe_cache(report: &Report) -> String {
    let longest = match report.longest_context_is_a_limit {
        true => "the longest context",
        false => "the context it was trained on",
    };
    format!(
        "KV cache in {}: {} per 1,000 tokens, {} for {longest}, {} tokens",
        report.cache_dtype,
        precise_bytes(report.kv_cache_bytes_per_1000_tokens),
        precise_bytes(report.longest_context.kv_cache_bytes),
        thousands(report.longest_context.tokens as u64),
    )
}

/// What is needed, and which devices hold it.
fn devices(report: &Report) -> String {
    let needed = ("needed".to_string(), report.needed_bytes.each_ref().map(|bytes| precise_bytes(*bytes)));
    let machine = report.machine.as_ref().map(|machine| {
        let name = format!("this machine, {} free", precise_bytes(machine.available_bytes));
        (name, machine.holds.each_ref().map(|holds| if *holds { "yes" } else { "no" }.to_string()))
    });
    let device = report.device.as_ref().map(|device| {
        let name = format!("its {}, {} free", device.name, precise_bytes(device.free_bytes));
        (name, device.holds.each_ref().map(|holds| if *holds { "yes" } else { "no" }.to_string()))
    });
    let gpus =
        report.gpus.iter().map(|gpu| (gpu.name.to_string(), gpu.needed.each_ref().map(|count| count_of(*count))));
    by_precision([Some(needed), machine, device].into_iter().flatten().chain(gpus))
}

pub fn describe_needs(report: &Report) -> String {
    format!(
        "With the cache of {} tokens ({}{}) and {} for activations",
        thousands(report.context.tokens as u64),
        precise_bytes(report.context.kv_cache_bytes),
        if matches!(report.cache_dtype, "int8" | "int16") { "; GPUs: f16" } else { "" },
        precise_bytes(report.overhead_bytes),
    )
}

/// How many devices; a dash where no number of them will do.
pub fn count_of(devices: Option<u64>) -> String {
    devices.map_or("-".to_string(), thousands)
}

pub fn describe_disk(report: &Report) -> String {
    let Some(disk) = &report.disk else {
        return "No weight files here: computed from config.json".to_string();
    };
    let files = if disk.files.len() == 1 { "1 file" } else { &format!("{} files", disk.files.len()) };
    let dtypes = disk.bytes_by_dtype.iter().map(|(dtype, bytes)| format!("{dtype} {}", precise_bytes(*bytes)));
    format!(
        "On disk: {files}, {} tensors, {} ({}){};\ntheir headers agree with config.json",
        thousands(disk.tensors as u64),
        precise_bytes(disk.bytes),
        dtypes.collect::<Vec<_>>().join(", "),
        if disk.is_int8 { ", an int8 checkpoint" } else { "" },
    )
}
