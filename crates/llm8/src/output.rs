//! Words and numbers for people.

use std::io::{Read, Write};
use std::path::Path;
use std::time::Duration;

use tempfile::NamedTempFile;

use crate::failure::Failure;

/// Writes a line to stderr. Where nobody can read it, that is no reason to fail.
///
/// Control characters, which a name in a hostile file may hold, are written as escapes.
pub fn say(text: &str) {
    let is_plain = |c: char| !c.is_control() || c == '\n';
    let escaped: String = match text.chars().all(is_plain) {
        true => text.to_string(),
        false => {
            text.chars().map(|c| if is_plain(c) { c.to_string() } else { c.escape_default().to_string() }).collect()
        }
    };
    let _ = writeln!(std::io::stderr(), "{escaped}");
}

/// Bytes in decimal units, three digits: `5.83 MB`.
pub fn bytes(bytes: usize) -> String {
    let units = ["B", "kB", "MB", "GB", "TB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    let digits = if unit == 0 || value >= 99.95 {
        0
    } else if value >= 9.995 {
        1
    } else {
        2
    };
    format!("{value:.digits$} {}", units[unit])
}

/// Bytes in decimal units, as tables of sizes have them: `14.14 GB`, `352.5 GB`.
pub fn precise_bytes(bytes: u64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB", "PB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 999.95 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    let digits = match value {
        _ if unit == 0 => 0,
        99.995.. => 1,
        _ => 2,
    };
    format!("{value:.digits$} {}", units[unit])
}

/// A whole number with its thousands apart: `250,880`.
pub fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Writes a file as a whole: under another name first, so that whatever fails leaves what was there.
pub fn write_file(path: &Path, content: &str) -> anyhow::Result<()> {
    let mut file = temporary_beside(path)?;
    let written = file.write_all(content.as_bytes()).map_err(|error| unwritable(path, &error));
    written.and_then(|()| file.persist(path).map_err(|error| unwritable(path, &error.error)))?;
    Ok(())
}

/// An error when a file could not be written: asked before the work that is to be written.
pub fn check_writable(path: &Path) -> anyhow::Result<()> {
    Ok(temporary_beside(path).map(drop)?)
}

fn temporary_beside(path: &Path) -> Result<NamedTempFile, Failure> {
    if path.metadata().is_ok_and(|metadata| !metadata.is_file()) {
        return Err(unwritable(path, &"it is not a plain file"));
    }
    // A slip of the hand must not cost a model's weights: what is replaced is an older page or picture.
    let mut first = [b'<'];
    if let Ok(mut old) = std::fs::File::open(path)
        && old.read(&mut first).is_ok()
        && first != [b'<']
    {
        return Err(unwritable(path, &"it is there already, and no page or picture"));
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if folder.metadata().is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound) {
        return Err(unwritable(path, &format!("there is no folder {}", folder.display())));
    }
    let mut builder = tempfile::Builder::new();
    // Like any new file, and not for the owner alone: the umask takes from this what it should.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    // The kind alone: the whole error names the temporary file, which tells the user nothing.
    builder.tempfile_in(folder).map_err(|error| unwritable(path, &error.kind()))
}

fn unwritable(path: &Path, error: &dyn std::fmt::Display) -> Failure {
    Failure::new(format!("{}: cannot be written: {error}", path.display()))
}

/// Things a second; 0 when no time has passed.
pub fn rate(count: usize, duration: Duration) -> f64 {
    if duration.is_zero() { 0.0 } else { count as f64 / duration.as_secs_f64() }
}

/// Begins a new count of [`peak_rss_bytes`], where the system can do that.
pub fn reset_peak_rss() {
    // What has been freed goes back to the system first: it would count as what comes next.
    // SAFETY: the allocator may be asked at any time, from any thread.
    unsafe { libmimalloc_sys::mi_collect(true) };
    // proc_pid_clear_refs(5): 5 sets VmHWM to what is resident now.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// The largest resident memory the process has had, as the kernel counts it.
pub fn peak_rss_bytes() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kilobytes: usize = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_three_digits() {
        let cases = [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.00 kB"),
            (14_138_000_000, "14.1 GB"),
            (999_600_000, "1.00 GB"),
            (352_500_000_000, "352 GB"),
        ];
        for (count, text) in cases {
            assert_eq!(bytes(count), text);
        }
    }

    #[test]
    fn precise_bytes_are_those_of_published_tables() {
        let cases = [
            (999, "999 B"),
            (1_065_000, "1.06 MB"),
            (14_138_032_128, "14.14 GB"),
            (352_494_542_848, "352.5 GB"),
            (99_996_000_000, "100.0 GB"),
            (999_960_000_000, "1.00 TB"),
        ];
        for (count, text) in cases {
            assert_eq!(precise_bytes(count), text);
        }
    }

    #[test]
    fn thousands_are_set_apart() {
        for (number, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (7_069_016_064, "7,069,016,064")] {
            assert_eq!(thousands(number), text);
        }
    }

    #[test]
    fn a_rate_over_no_time_is_zero() {
        assert_eq!(rate(5, Duration::ZERO), 0.0);
        assert_eq!(rate(5, Duration::from_millis(500)), 10.0);
    }
}
