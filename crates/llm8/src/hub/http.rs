//! Requests for a model's files: redirects, the token, and patience with a server or a line in trouble.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context;
use reqwest::header::{ACCEPT_ENCODING, HeaderMap, HeaderName, IF_RANGE, LOCATION, RANGE, RETRY_AFTER};
use reqwest::{Method, StatusCode, Url, blocking};

use super::errors;
use super::settings::Settings;
use crate::failure::Failure;
use crate::interrupt;

const MAX_REDIRECTS: usize = 10;

/// The way to the files of one model.
pub struct Http {
    client: blocking::Client,
    settings: Settings,
    /// The model's id.
    id: String,
    /// Set when one of several transfers has failed: the others need not go on.
    is_stopped: AtomicBool,
}

/// Why a request came to nothing.
pub enum Trouble {
    /// Another try may do; after the pause that the server asks for.
    Passing {
        why: String,
        pause: Option<Duration>,
    },
    Final(anyhow::Error),
}

impl<E: Into<anyhow::Error>> From<E> for Trouble {
    fn from(error: E) -> Self {
        Self::Final(error.into())
    }
}

impl Trouble {
    pub fn passing(why: impl Into<String>) -> Self {
        Self::Passing { why: why.into(), pause: None }
    }
}

/// Which bytes of a file are asked for.
pub enum Part<'a> {
    Whole,
    /// Between the two, the last one included.
    Between(u64, u64),
    /// From this byte on, if the file is still the one of this etag; an etag that is a hash need not be
    /// asked about.
    From(u64, Option<&'a str>),
}

impl Http {
    pub fn new(settings: &Settings, id: &str) -> anyhow::Result<Self> {
        // Redirects are followed here, so that the token goes to the endpoint alone. The time-out is
        // that of a single read, not of a whole file.
        let client = blocking::Client::builder()
            .user_agent(super::USER_AGENT)
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(settings.timeout)
            .timeout(settings.timeout)
            .build()
            .context("the HTTP client cannot be set up")?;
        Ok(Self { client, settings: settings.clone(), id: id.to_string(), is_stopped: AtomicBool::new(false) })
    }

    /// Where the file `name` of a commit is.
    pub fn url(&self, commit: &str, name: &str) -> Url {
        let mut url = self.settings.endpoint.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().extend(self.id.split('/')).push("resolve").push(commit).push(name);
        }
        url
    }

    /// Asks for a file's headers: of the answer that describes it, which may be a redirect, for the store
    /// that a large file is redirected to does not know its etag.
    pub fn head(&self, url: &Url, name: &str) -> Result<HeaderMap, Trouble> {
        self.send(Method::HEAD, url, name, HeaderMap::new()).map(|response| response.headers().clone())
    }

    /// Asks for a part of a file's content; the server may send the whole all the same.
    pub fn get(&self, url: &Url, name: &str, part: Part) -> Result<blocking::Response, Trouble> {
        let (range, etag) = match part {
            Part::Whole => (None, None),
            Part::Between(first, last) => (Some(format!("bytes={first}-{last}")), None),
            Part::From(first, etag) => (Some(format!("bytes={first}-")), etag),
        };
        let mut headers = HeaderMap::new();
        let mut set = |name: HeaderName, value: Option<String>| -> Result<(), Trouble> {
            if let Some(value) = value {
                headers.insert(name, value.parse().context("a header of a request")?);
            }
            Ok(())
        };
        set(RANGE, range)?;
        set(IF_RANGE, etag.map(|etag| format!("\"{etag}\"")))?;
        self.send(Method::GET, url, name, headers)
    }

    fn send(&self, method: Method, url: &Url, name: &str, headers: HeaderMap) -> Result<blocking::Response, Trouble> {
        let mut url = url.clone();
        for _ in 0..MAX_REDIRECTS {
            let request = self.client.request(method.clone(), url.clone()).headers(headers.clone());
            let mut request = request.header(ACCEPT_ENCODING, "identity");
            let is_endpoint = self.settings.endpoint.origin() == url.origin();
            if let (Some(token), true) = (&self.settings.token, is_endpoint) {
                request = request.bearer_auth(token);
            }
            let response = request.send().map_err(|error| match error.is_builder() {
                true => Trouble::from(Failure::new(format!("{url}: cannot be asked for: {}", errors::cause(&error)))),
                false => Trouble::passing(errors::cause(&error)),
            })?;
            let status = response.status();
            let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
            let is_described = method == Method::HEAD && header("x-linked-etag").is_some();
            let is_answer = status.is_success() || status == StatusCode::RANGE_NOT_SATISFIABLE;
            if is_answer || (status.is_redirection() && is_described) {
                return Ok(response);
            }
            if let (true, Some(location)) = (status.is_redirection(), header(LOCATION.as_str())) {
                url = url.join(location).with_context(|| format!("{url}: redirects to `{location}`"))?;
                continue;
            }
            if errors::is_passing(status) || (!is_endpoint && is_expired(status)) {
                let pause = header(RETRY_AFTER.as_str()).and_then(|seconds| seconds.parse().ok());
                let why = format!("{} answers {status}", url.host_str().unwrap_or_default());
                return Err(Trouble::Passing { why, pause: pause.map(Duration::from_secs) });
            }
            return Err(errors::refusal(status, header("x-error-code"), &self.settings, &self.id, Some(name)).into());
        }
        Err(Failure::new(format!("{url}: more than {MAX_REDIRECTS} redirects")).into())
    }

    /// Lets all transfers end: one of them has failed.
    pub fn stop(&self) {
        self.is_stopped.store(true, Ordering::Relaxed);
    }

    /// An error when transfers are to end, by Ctrl-C or because another has failed.
    pub fn check_interrupt(&self) -> anyhow::Result<()> {
        if interrupt::is_requested() || self.is_stopped.load(Ordering::Relaxed) { Err(interrupted()) } else { Ok(()) }
    }
}

/// The addresses in the store are signed for a while: a fresh one is asked for.
fn is_expired(status: StatusCode) -> bool {
    [StatusCode::BAD_REQUEST, StatusCode::FORBIDDEN, StatusCode::GONE].contains(&status)
}

pub fn interrupted() -> anyhow::Error {
    Failure::interrupted("what has been fetched is kept; the same command goes on from there").into()
}

/// How often, and how long, something that may pass is tried again.
pub struct Patience {
    tries: u32,
    max_tries: u32,
    /// When the first of the tries in a row failed.
    since: Instant,
    /// Whether the line has worked in this run: then a short outage is waited for.
    has_worked: bool,
}

impl Patience {
    const FIRST_PAUSE: Duration = Duration::from_millis(250);
    const LONGEST_PAUSE: Duration = Duration::from_secs(30);
    /// The longest pause that a server may ask for.
    const LONGEST_ASKED: Duration = Duration::from_secs(300);
    /// How long an outage is waited for once something has come.
    const OUTAGE: Duration = Duration::from_secs(300);

    pub fn new(max_tries: u32) -> Self {
        Self { tries: 0, max_tries, since: Instant::now(), has_worked: false }
    }

    /// Something has come: the count of failures begins again.
    pub fn has_worked(&mut self) {
        self.tries = 0;
        self.has_worked = true;
    }

    /// Waits before another try, longer each time, and as long as the server asks for; `say` is told why
    /// and for how long. An error when the trouble is final or has lasted too long, and when `check` says
    /// so meanwhile.
    pub fn wait(
        &mut self,
        trouble: Trouble,
        say: impl FnOnce(&str),
        check: impl Fn() -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let (why, asked) = match trouble {
            Trouble::Final(error) => return Err(error),
            Trouble::Passing { why, pause } => (why, pause),
        };
        if self.tries == 0 {
            self.since = Instant::now();
        }
        self.tries += 1;
        if self.tries >= self.max_tries && !(self.has_worked && self.since.elapsed() < Self::OUTAGE) {
            let times = if self.tries > 1 { format!(", {} times in a row", self.tries) } else { String::new() };
            return Err(Failure::new(format!("{why}{times}")).into());
        }
        let pause = match asked {
            Some(asked) => asked.min(Self::LONGEST_ASKED),
            // Not all of several transfers come back at the same instant.
            None => (Self::FIRST_PAUSE * 2u32.pow(self.tries.min(10) - 1)).min(Self::LONGEST_PAUSE).mul_f64(jitter()),
        };
        say(&format!("{why}: trying again in {:.1} s", pause.as_secs_f64()));
        let until = Instant::now() + pause;
        while Instant::now() < until {
            check()?;
            std::thread::sleep(Duration::from_millis(50).min(pause));
        }
        check()
    }
}

/// From 0.75 to 1.25, as the clock has it.
fn jitter() -> f64 {
    let nanoseconds = SystemTime::UNIX_EPOCH.elapsed().map_or(0, |now| now.subsec_nanos() % 1000);
    0.75 + f64::from(nanoseconds) / 2000.0
}
