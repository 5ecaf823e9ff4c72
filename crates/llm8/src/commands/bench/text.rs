//! The rows as a table for a terminal, and as comma-separated values.

use anyhow::Context;
use comfy_table::{CellAlignment, Table, presets};

use super::limits::median;
use super::report::Row;
use crate::commands::model;
use crate::output::{precise_bytes, thousands};

/// Columns that hold words, and are not set to the right.
const WORDS: [&str; 3] = ["", "cache", "test"];

pub fn table(rows: &[Row]) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    let heading = [
        "",
        "threads",
        "batch",
        "cache",
        "test",
        "tokens/s",
        "min",
        "max",
        "first token",
        "a token",
        "of the limit",
        "in products",
        "their limit",
    ];
    let percent = |share: Option<f64>| share.map_or("-".to_string(), |share| format!("{:.0} %", share * 100.0));
    table.add_row(heading);
    table.add_rows(rows.iter().map(|row| {
        [
            precision(row),
            row.threads.to_string(),
            row.batch.to_string(),
            row.cache_dtype.clone(),
            test(row),
            rate(row.median),
            rate(row.min),
            rate(row.max),
            row.first_token_seconds.map_or(String::new(), seconds),
            row.token_seconds.map_or(String::new(), seconds),
            percent(row.share_of_limit),
            percent(row.bounded_share),
            percent(row.products_share_of_limit),
        ]
    }));
    table.column_iter_mut().take(1).for_each(|column| {
        column.set_padding((0, 1));
    });
    for (column, heading) in table.column_iter_mut().zip(heading) {
        if !WORDS.contains(&heading) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    [heading_line(rows), table.trim_fmt(), loads(rows), limits(rows)].join("\n\n")
}

fn heading_line(rows: &[Row]) -> String {
    let Some(row) = rows.first() else { return String::new() };
    let weights = if row.dummy_weights { ", random weights" } else { "" };
    let runs = if row.repetitions == 1 { "1 run".to_string() } else { format!("medians of {} runs", row.repetitions) };
    let device = match &row.device_name {
        Some(name) => format!(" on {}, {name}", row.device),
        None => String::new(),
    };
    format!("{}{weights}, {runs}{device}", row.model)
}

fn precision(row: &Row) -> String {
    model::with_head(&row.precision, row.int8_head)
}

fn test(row: &Row) -> String {
    match (row.test.as_str(), row.context) {
        ("prefill", _) => format!("prompt of {}", row.prompt_len),
        (_, 0) => format!("{} tokens", row.gen_len),
        (_, context) => format!("{} tokens after {context}", row.gen_len),
    }
}

/// What each load took, a line for each that there was.
fn loads(rows: &[Row]) -> String {
    let mut lines = Vec::<String>::new();
    for group in rows.chunk_by(|one, other| one.threads == other.threads && precision(one) == precision(other)) {
        let row = &group[0];
        let bytes = |bytes: usize| precise_bytes(bytes as u64);
        let peak = group.iter().filter_map(|row| row.peak_rss_bytes).max();
        let peaks = match (row.load_peak_rss_bytes, peak) {
            (Some(load), Some(peak)) => format!(", peak memory {}, then {}", bytes(load), bytes(peak)),
            _ => String::new(),
        };
        let device_peak = group.iter().filter_map(|row| row.peak_device_bytes).max();
        let on_device = match (row.device_bytes, device_peak) {
            (Some(weights), Some(peak)) => format!(", {} on {}, at most {}", bytes(weights), row.device, bytes(peak)),
            _ => String::new(),
        };
        lines.push(format!(
            "{}, {}: {} of weights loaded in {}, {} read for each token{peaks}{on_device}",
            precision(row),
            threads(row.threads),
            bytes(row.weight_bytes),
            seconds(row.load_seconds),
            bytes(row.weight_bytes_per_token),
        ));
    }
    lines.join("\n")
}

/// The machine's limits with each number of threads.
fn limits(rows: &[Row]) -> String {
    let groups = rows.chunk_by(|one, other| one.threads == other.threads);
    let lines = groups.map(|group| {
        let row = &group[0];
        let median_of = |figure: fn(&Row) -> Option<f64>| group.iter().map(figure).collect::<Option<_>>().map(median);
        let bytes = |bandwidth: f64| precise_bytes(bandwidth as u64);
        let Some(bandwidth) = median_of(|row| row.read_bandwidth).map(bytes) else {
            let copied = median_of(|row| row.copy_bandwidth).map_or("not measured".to_string(), |bandwidth| {
                format!("a copy reads and writes {} a second", bytes(bandwidth))
            });
            let peak = |figure, dtype| {
                let tera =
                    |peak: f64| format!(", a large matmul in {dtype} does {:.0} trillion operations", peak / 1e12);
                median_of(figure).map_or(String::new(), tera)
            };
            let (int8, f16) = (peak(|row| row.int8_matmul_peak, "int8"), peak(|row| row.f16_matmul_peak, "f16"));
            return format!("limits of {}: {copied}{int8}{f16}", row.device);
        };
        let dots = median_of(|row| row.int8_dot_peak).map_or(String::new(), |peak| {
            format!(" and {} billion int8 operations", thousands((peak / 1e9).round() as u64))
        });
        format!("limits of {}, {}: reads {bandwidth}{dots} a second", threads(row.threads), row.instruction_set)
    });
    lines.collect::<Vec<_>>().join("\n")
}

pub fn threads(count: usize) -> String {
    if count == 1 { "1 thread".to_string() } else { format!("{count} threads") }
}

/// Three digits, or all before the point.
pub fn rate(rate: f64) -> String {
    let digits = match rate {
        99.95.. => 0,
        9.995.. => 1,
        _ => 2,
    };
    format!("{rate:.digits$}")
}

/// A time in the unit that suits it.
fn seconds(seconds: f64) -> String {
    match seconds {
        ..1e-3 => format!("{:.0} µs", seconds * 1e6),
        ..1.0 => format!("{} ms", rate(seconds * 1e3)),
        _ => format!("{} s", rate(seconds)),
    }
}

/// A header line, then a line for each row; what is null is empty.
pub fn csv(rows: &[Row]) -> anyhow::Result<String> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    rows.iter().try_for_each(|row| writer.serialize(row))?;
    let bytes = writer.into_inner().map_err(|error| error.into_error()).context("comma-separated values")?;
    Ok(String::from_utf8(bytes)?)
}
