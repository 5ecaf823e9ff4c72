//! How far a download has come: bars on a terminal, else a line now and then.

use std::io::IsTerminal;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::output;

/// Between two lines where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// The progress of several files.
pub struct Progress {
    display: Display,
    /// Bytes that are in the cache, and of all files.
    held: AtomicU64,
    size: u64,
    start: Instant,
    /// Bytes that came in this run.
    received: AtomicU64,
}

enum Display {
    Nothing,
    /// When the last line was written.
    Lines(Mutex<Instant>),
    Bars {
        all: MultiProgress,
        total: ProgressBar,
    },
}

impl Progress {
    /// For files of `size` bytes in all.
    pub fn new(size: u64, quiet: bool) -> Self {
        let display = if quiet {
            Display::Nothing
        } else if std::io::stderr().is_terminal() {
            let all = MultiProgress::new();
            let total = all.add(bar(size, "in all"));
            Display::Bars { all, total }
        } else {
            Display::Lines(Mutex::new(Instant::now()))
        };
        Self { display, held: AtomicU64::new(0), size, start: Instant::now(), received: AtomicU64::new(0) }
    }

    /// The progress of one of the files.
    pub fn file(&self, name: &str, size: u64) -> FileProgress<'_> {
        let bar = match &self.display {
            Display::Bars { all, total } => Some(all.insert_before(total, bar(size, name))),
            _ => None,
        };
        FileProgress { progress: self, name: name.to_string(), bar }
    }

    /// Takes the bars away; lines that were begun get a last one.
    pub fn finish(&self) {
        match &self.display {
            Display::Nothing => {}
            Display::Lines(_) if self.start.elapsed() < LINE_INTERVAL => {}
            Display::Lines(_) => output::say(&format!("fetched {}", output::bytes(self.held() as usize))),
            Display::Bars { all, .. } => drop(all.clear()),
        }
    }

    /// Bytes that are in the cache.
    fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    fn write_line(&self) {
        let Display::Lines(last) = &self.display else { return };
        let Ok(mut last) = last.try_lock() else { return };
        if last.elapsed() < LINE_INTERVAL {
            return;
        }
        *last = Instant::now();
        let held = self.held();
        let rate = output::rate(self.received.load(Ordering::Relaxed) as usize, self.start.elapsed());
        let left = match rate as u64 {
            0 => String::new(),
            rate => format!(
                ", {} left",
                indicatif::HumanDuration(Duration::from_secs(self.size.saturating_sub(held) / rate))
            ),
        };
        let (held_bytes, size) = (output::bytes(held as usize), output::bytes(self.size as usize));
        let percent = held as f64 * 100.0 / self.size.max(1) as f64;
        output::say(&format!(
            "fetched {held_bytes} of {size} ({percent:.0} %), {}/s{left}",
            output::bytes(rate as usize)
        ));
    }
}

fn bar(size: u64, name: &str) -> ProgressBar {
    // Fits 80 columns, with a bar of what they leave.
    let template =
        "{msg:24!} {wide_bar} {decimal_bytes:>9}/{decimal_total_bytes:9} {decimal_bytes_per_sec:>11} {eta:>4}";
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(size).with_style(style).with_message(name.to_string())
}

/// The progress of one file; it is done when this is dropped.
pub struct FileProgress<'a> {
    progress: &'a Progress,
    name: String,
    bar: Option<ProgressBar>,
}

impl FileProgress<'_> {
    /// So many bytes were found in the cache.
    pub fn found(&self, bytes: u64) {
        self.progress.held.fetch_add(bytes, Ordering::Relaxed);
        if let (Display::Bars { total, .. }, Some(bar)) = (&self.progress.display, &self.bar) {
            total.inc(bytes);
            bar.inc(bytes);
            // Rates are of what comes, not of what was there.
            total.reset_eta();
            bar.reset_eta();
        }
    }

    /// So many bytes came.
    pub fn advance(&self, bytes: u64) {
        self.progress.held.fetch_add(bytes, Ordering::Relaxed);
        self.progress.received.fetch_add(bytes, Ordering::Relaxed);
        if let (Display::Bars { total, .. }, Some(bar)) = (&self.progress.display, &self.bar) {
            total.inc(bytes);
            bar.inc(bytes);
        }
        self.progress.write_line();
    }

    /// So many bytes were of no use.
    pub fn retreat(&self, bytes: u64) {
        self.progress.held.fetch_sub(bytes, Ordering::Relaxed);
        if let (Display::Bars { total, .. }, Some(bar)) = (&self.progress.display, &self.bar) {
            total.dec(bytes);
            bar.dec(bytes);
        }
    }

    /// Says something about the file.
    pub fn note(&self, text: &str) {
        let line = format!("{}: {text}", self.name);
        match &self.progress.display {
            Display::Nothing => {}
            Display::Lines(_) => output::say(&line),
            Display::Bars { all, .. } => all.suspend(|| output::say(&line)),
        }
    }
}

impl Drop for FileProgress<'_> {
    fn drop(&mut self) {
        if let (Display::Bars { all, .. }, Some(bar)) = (&self.progress.display, &self.bar) {
            bar.finish_and_clear();
            all.remove(bar);
        }
    }
}
