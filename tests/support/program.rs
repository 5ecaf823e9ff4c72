//! The program as a process.
#![allow(dead_code)] // each test binary uses its own part

use std::io::Write;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// `llm8` with arguments, its standard streams apart; what is expected of it is what the CPU gives.
pub fn llm8<A: AsRef<std::ffi::OsStr>>(args: &[A]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_llm8"));
    command.args(args).stdin(Stdio::null()).env_remove("LLM8_INSTRUCTION_SET").env("CUDA_VISIBLE_DEVICES", "");
    command
}

/// Runs it with this on its standard input.
pub fn with_stdin(mut command: Command, input: &[u8]) -> Output {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    child.wait_with_output().unwrap()
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// The output of a run that succeeds.
pub fn succeeds<A: AsRef<std::ffi::OsStr>>(args: &[A]) -> Output {
    let output = llm8(args).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    output
}

/// The JSON object that a run writes.
pub fn json_of<A: AsRef<std::ffi::OsStr>>(args: &[A]) -> Value {
    serde_json::from_slice(&succeeds(args).stdout).unwrap()
}

/// Checks how a failure is told: the exit code, nothing on stdout, one line on stderr (and perhaps a
/// hint) that holds every one of these parts.
pub fn check_failure(output: &Output, code: i32, parts: &[&str]) {
    let stderr = stderr(output);
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert_eq!(stdout(output), "", "{stderr}");
    let lines: Vec<_> = stderr.lines().collect();
    assert!(lines[0].starts_with("error: "), "{stderr}");
    assert!(lines.len() == 1 || (lines.len() == 2 && lines[1].starts_with("hint: ")), "{stderr}");
    for part in parts {
        assert!(stderr.contains(part), "`{part}` is not in: {stderr}");
    }
}
