//! Where the Hub is, who asks, and where its files are kept: flags first, then the environment that
//! Python's tools share (huggingface_hub/constants.py).

use std::fs::File;
use std::io::Read;
use std::path::PathBuf;
use std::time::Duration;

use reqwest::Url;

use crate::args::HubArgs;
use crate::failure::Failure;

const ENDPOINT: &str = "https://huggingface.co";
/// Seconds without a byte after which a connection is given up; as in huggingface_hub.
const TIMEOUT_SECONDS: u64 = 10;

/// No token is longer.
const MAX_TOKEN_FILE: u64 = 1 << 16;

/// How the Hub is asked.
#[derive(Clone)]
pub struct Settings {
    pub endpoint: Url,
    pub token: Option<String>,
    pub cache_dir: PathBuf,
    pub offline: bool,
    /// How long a connection may take, and stay silent.
    pub timeout: Duration,
}

impl Settings {
    /// The endpoint as text, without a slash at its end.
    pub fn endpoint_text(&self) -> &str {
        self.endpoint.as_str().trim_end_matches('/')
    }

    pub fn new(args: &HubArgs) -> anyhow::Result<Self> {
        let token = match &args.token {
            Some(token) if token.is_empty() => return Err(Failure::usage("--token is empty").into()),
            Some(token) => Some(token.clone()),
            None => stored_token(),
        };
        if token.as_ref().is_some_and(|token| !token.chars().all(|c| c.is_ascii_graphic())) {
            let failure = Failure::new("the token for the Hub holds characters that no token has");
            return Err(failure.with_hint("look at --token, HF_TOKEN and the file that HF_TOKEN_PATH names").into());
        }
        let cache_dir = args.cache_dir.clone().unwrap_or_else(cache_dir);
        Ok(Self {
            endpoint: endpoint()?,
            token,
            cache_dir: std::path::absolute(&cache_dir).unwrap_or(cache_dir),
            offline: args.offline
                || flag(if variable("HF_HUB_OFFLINE").is_some() { "HF_HUB_OFFLINE" } else { "TRANSFORMERS_OFFLINE" }),
            timeout: timeout()?,
        })
    }
}

/// Where the Hub, or what stands in for it, is.
fn endpoint() -> anyhow::Result<Url> {
    let text = variable("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_string());
    let text = text.trim().trim_end_matches('/');
    let wrong =
        |what: &str| Failure::new(format!("HF_ENDPOINT {what}")).with_hint(format!("the Hub itself is {ENDPOINT}"));
    let url = Url::parse(text).ok().filter(|url| ["http", "https"].contains(&url.scheme()) && url.has_host());
    let url = url.ok_or_else(|| wrong(&format!("is `{text}`, wanted a URL that begins with http:// or https://")))?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err(wrong("holds a user name or a password: give a token with --token or HF_TOKEN").into());
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(wrong(&format!("is `{text}`, wanted a URL without `?` and `#`")).into());
    }
    Ok(url)
}

/// A variable of the environment that is there, and not empty.
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// A path from the environment; `~` stands for the home folder, as in Python.
fn path(name: &str) -> Option<PathBuf> {
    let value = PathBuf::from(std::env::var_os(name).filter(|value| !value.is_empty())?);
    Some(match value.strip_prefix("~") {
        Ok(rest) => home().join(rest),
        Err(_) => value,
    })
}

fn flag(name: &str) -> bool {
    variable(name).is_some_and(|value| ["1", "on", "yes", "true"].contains(&value.to_lowercase().as_str()))
}

fn home() -> PathBuf {
    std::env::home_dir().unwrap_or_default()
}

fn hf_home() -> PathBuf {
    let in_cache = || path("XDG_CACHE_HOME").unwrap_or_else(|| home().join(".cache")).join("huggingface");
    path("HF_HOME").unwrap_or_else(in_cache)
}

fn cache_dir() -> PathBuf {
    path("HF_HUB_CACHE").or_else(|| path("HUGGINGFACE_HUB_CACHE")).unwrap_or_else(|| hf_home().join("hub"))
}

/// The token of the environment, or the one that `hf auth login` has stored.
fn stored_token() -> Option<String> {
    if flag("HF_HUB_DISABLE_IMPLICIT_TOKEN") {
        return None;
    }
    let from_file = || {
        let file = path("HF_TOKEN_PATH").unwrap_or_else(|| hf_home().join("token"));
        let mut token = String::new();
        File::open(file).ok()?.take(MAX_TOKEN_FILE).read_to_string(&mut token).ok().map(|_| token)
    };
    let token = variable("HF_TOKEN").or_else(|| variable("HUGGING_FACE_HUB_TOKEN")).or_else(from_file)?;
    Some(token.trim().to_string()).filter(|token| !token.is_empty())
}

fn timeout() -> anyhow::Result<Duration> {
    const NAME: &str = "HF_HUB_DOWNLOAD_TIMEOUT";
    let Some(value) = variable(NAME) else { return Ok(Duration::from_secs(TIMEOUT_SECONDS)) };
    match value.parse() {
        Ok(seconds @ 1..=86_400) => Ok(Duration::from_secs(seconds)),
        _ => Err(Failure::new(format!("{NAME} is `{value}`, wanted seconds from 1 to 86400")).into()),
    }
}
