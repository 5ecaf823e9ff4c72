//! How a failure is told: one line, a hint where there is one, an exit code.

use std::process::ExitCode;

use int8_models::Error;

use crate::{interrupt, output};

/// An error of the program's own, with what to do about it.
#[derive(Debug)]
pub struct Failure {
    message: String,
    hint: Option<String>,
    /// What the program exits with.
    code: u8,
}

impl Failure {
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), hint: None, code: 1 }
    }

    /// The command line was wrong, rather than what it led to.
    pub fn usage(message: impl Into<String>) -> Self {
        Self { code: 2, ..Self::new(message) }
    }

    /// Ctrl-C ended what was asked for.
    pub fn interrupted(message: impl Into<String>) -> Self {
        Self { code: interrupt::EXIT_CODE, ..Self::new(message) }
    }

    pub fn has_hint(&self) -> bool {
        self.hint.is_some()
    }

    pub fn is_interruption(&self) -> bool {
        self.code == interrupt::EXIT_CODE
    }

    pub fn with_hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// Tells the error on stderr and gives the exit code: 1 failed, 2 wrong usage; a reader that has
/// closed its pipe has what it wanted, and that is no failure.
pub fn report(error: &anyhow::Error) -> ExitCode {
    let is_closed_pipe = |cause: &(dyn std::error::Error + 'static)| {
        cause.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
    };
    if error.chain().any(is_closed_pipe) {
        return ExitCode::SUCCESS;
    }
    let code = error.downcast_ref::<Failure>().map_or(1, |failure| failure.code);
    let kind = if code == interrupt::EXIT_CODE { "interrupted" } else { "error" };
    output::say(&format!("{kind}: {}", format!("{error:#}").replace('\n', "\\n")));
    if let Some(hint) = hint(error) {
        output::say(&format!("hint: {}", hint.replace('\n', "\\n")));
    }
    ExitCode::from(code)
}

/// What to do about the error, where there is something to say.
pub fn hint(error: &anyhow::Error) -> Option<String> {
    let of_failure = error.downcast_ref::<Failure>().and_then(|failure| failure.hint.clone());
    of_failure.or_else(|| error.downcast_ref::<Error>()?.hint())
}
