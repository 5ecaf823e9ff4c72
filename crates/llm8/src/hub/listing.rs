//! A model's revision as the Hub lists it: its commit and the names of its files.

use std::collections::BTreeSet;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use anyhow::Context;
use hf_hub::repository::ModelInfo;
use hf_hub::{HFClient, HFClientSync, HFResult};

use super::cache::is_commit;
use super::errors;
use super::http::{Patience, interrupted};
use super::settings::Settings;
use crate::failure::Failure;
use crate::interrupt;

/// How long the list as a whole may take, in time-outs of a single read.
const TIMEOUTS: u32 = 3;

pub struct Listing {
    pub commit: String,
    pub files: BTreeSet<String>,
}

/// Asks the Hub, up to `max_tries` times; the inner error says that it could not be reached.
pub fn list(
    id: &str,
    revision: &str,
    settings: &Settings,
    max_tries: u32,
    say: impl Fn(&str),
) -> anyhow::Result<Result<Listing, Failure>> {
    let client = client(settings)?;
    let mut patience = Patience::new(max_tries);
    let info = loop {
        let trouble = match ask(&client, id, revision)? {
            Ok(info) => break info,
            Err(error) => errors::of_info(error, settings, id, revision),
        };
        let is_passing = matches!(trouble, super::http::Trouble::Passing { .. });
        match patience.wait(trouble, &say, check_interrupt) {
            Ok(()) => {}
            Err(error) if is_passing && !interrupt::is_requested() => {
                return Ok(Err(errors::unreachable(&error.to_string(), settings)));
            }
            Err(error) => return Err(error),
        }
    };
    let files = info.siblings.unwrap_or_default().into_iter().map(|file| file.rfilename).collect();
    match info.sha.filter(|sha| is_commit(sha)) {
        Some(commit) => Ok(Ok(Listing { commit, files })),
        None => {
            let failure = Failure::new(format!("{}: the answer names no commit", settings.endpoint_text()));
            Err(failure.with_hint("is HF_ENDPOINT right?").into())
        }
    }
}

/// hf-hub's client with time-outs; how often is asked again is decided here.
fn client(settings: &Settings) -> anyhow::Result<HFClientSync> {
    let http = reqwest::Client::builder()
        .user_agent(super::USER_AGENT)
        .connect_timeout(settings.timeout)
        .read_timeout(settings.timeout)
        .timeout(settings.timeout * TIMEOUTS)
        .build()
        .context("the HTTP client cannot be set up")?;
    let client = HFClient::builder()
        .endpoint(settings.endpoint_text())
        .cache_dir(&settings.cache_dir)
        .client(http)
        .retry_max_attempts(0)
        // Without one, hf-hub would look for a token by rules of its own; no header can hold this.
        .token(settings.token.as_deref().unwrap_or("\n"));
    client.build_sync().context("the Hub's client cannot be set up")
}

/// One request, which Ctrl-C need not wait for.
fn ask(client: &HFClientSync, id: &str, revision: &str) -> anyhow::Result<HFResult<ModelInfo>> {
    let (sender, receiver) = mpsc::channel();
    let (client, id, revision) = (client.clone(), id.to_string(), revision.to_string());
    thread::spawn(move || {
        let (owner, name) = hf_hub::split_id(&id);
        // Nobody listens after Ctrl-C.
        let _ = sender.send(client.model(owner, name).info().revision(revision).send());
    });
    loop {
        match receiver.recv_timeout(Duration::from_millis(50)) {
            Ok(info) => return Ok(info),
            Err(RecvTimeoutError::Timeout) => check_interrupt()?,
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Failure::new("the request for the list of files failed").into());
            }
        }
    }
}

fn check_interrupt() -> anyhow::Result<()> {
    if interrupt::is_requested() { Err(interrupted()) } else { Ok(()) }
}
