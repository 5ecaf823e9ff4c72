//! Ctrl-C: the first asks the token loop to end, which it does at the next token or block of the model;
//! the second ends the program at once.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::output;

/// The exit code of an interrupted program: 128 and the number of SIGINT.
pub const EXIT_CODE: u8 = 130;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From now on Ctrl-C is noted, and said unless `quiet`; where it cannot be listened to, it ends the
/// program as it ends any other.
pub fn listen(quiet: bool) {
    let note = move || {
        if INTERRUPTED.swap(true, Ordering::Relaxed) {
            std::process::exit(EXIT_CODE.into());
        }
        if !quiet {
            output::say("\ninterrupted: ending; Ctrl-C again ends at once");
        }
    };
    let _ = ctrlc::set_handler(note);
}

/// Whether the program has been asked to end.
pub fn is_requested() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}
