//! Ctrl-C: the first asks the token loop to end, the second ends the program.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;

/// The exit code of an interrupted program: 128 and the number of SIGINT.
pub const EXIT_CODE: u8 = 130;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From now on Ctrl-C is noted.
pub fn listen() -> anyhow::Result<()> {
    let note = || {
        if INTERRUPTED.swap(true, Ordering::Relaxed) {
            std::process::exit(EXIT_CODE.into());
        }
    };
    ctrlc::set_handler(note).context("Ctrl-C cannot be listened to")
}

/// Whether the program has been asked to end.
pub fn is_requested() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}
