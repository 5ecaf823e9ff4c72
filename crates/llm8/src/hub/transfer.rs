//! One file from the Hub into the cache: taken up where it broke, within a run and after one, and
//! checked before it counts.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use reqwest::header::{ACCEPT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, ETAG, LOCATION, RANGE, RETRY_AFTER};
use reqwest::{Method, StatusCode, Url, blocking};
use sha1::{Digest, Sha1};
use sha2::Sha256;

use super::cache::{RepoCache, make_parent};
use super::errors;
use super::progress::FileProgress;
use super::settings::Settings;
use crate::failure::Failure;
use crate::interrupt;
use crate::output;

/// Requests in a row that may come to nothing before a file is given up.
const MAX_TRIES: u32 = 6;
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
const MAX_REDIRECTS: usize = 10;

/// The way to the Hub's files.
pub struct Transfer {
    client: blocking::Client,
    settings: Settings,
    /// The model's id.
    id: String,
}

/// A file of a commit as the Hub describes it.
pub struct RemoteFile {
    pub name: String,
    /// In bytes.
    pub size: u64,
    /// Its name in the cache: the SHA-256 of a large file's content, Git's SHA-1 of a small one's.
    pub etag: String,
    url: Url,
}

/// Why a request came to nothing.
enum Trouble {
    /// Another try may do.
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
    fn passing(why: impl Into<String>) -> Self {
        Self::Passing { why: why.into(), pause: None }
    }
}

impl Transfer {
    pub fn new(settings: &Settings, id: &str) -> anyhow::Result<Self> {
        // Redirects are followed here, so that the token goes to the endpoint alone. The time-out is
        // that of a single read.
        let client = blocking::Client::builder()
            .user_agent(super::USER_AGENT)
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(settings.timeout)
            .timeout(settings.timeout)
            .build()
            .context("the HTTP client cannot be set up")?;
        Ok(Self { client, settings: settings.clone(), id: id.to_string() })
    }

    /// Asks for size and etag of the file `name` of a commit.
    pub fn describe(&self, commit: &str, name: &str) -> anyhow::Result<RemoteFile> {
        let url = self.url(commit, name)?;
        let mut tries = 0;
        loop {
            match self.headers(&url, name) {
                Ok(file) => return Ok(file),
                Err(trouble) => self.pause(name, trouble, &mut tries, None)?,
            }
        }
    }

    fn url(&self, commit: &str, name: &str) -> anyhow::Result<Url> {
        let endpoint = &self.settings.endpoint;
        let mut url = Url::parse(endpoint).with_context(|| format!("HF_ENDPOINT is `{endpoint}`"))?;
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().extend(self.id.split('/')).push("resolve").push(commit).push(name);
        }
        Ok(url)
    }

    fn headers(&self, url: &Url, name: &str) -> Result<RemoteFile, Trouble> {
        let response = self.send(Method::HEAD, url, name, None)?;
        let header =
            |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_string);
        let etag = header("x-linked-etag").or_else(|| header(ETAG.as_str())).unwrap_or_default();
        let etag = etag.trim_start_matches("W/").trim_matches('"').to_string();
        let size = header("x-linked-size").or_else(|| header(CONTENT_LENGTH.as_str()));
        // The etag becomes a file's name.
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        match size.and_then(|size| size.parse().ok()) {
            Some(size) if !etag.is_empty() && etag.chars().all(is_name) => {
                Ok(RemoteFile { name: name.to_string(), size, etag, url: url.clone() })
            }
            _ => Err(Failure::new(format!("{url}: the answer tells no size, or no usable etag (`{etag}`)")).into()),
        }
    }

    /// Sends a request from byte `start` on, and follows redirects: a HEAD only until the file is
    /// described, for the store that a large file is redirected to does not know its etag.
    fn send(
        &self,
        method: Method,
        url: &Url,
        name: &str,
        range: Option<String>,
    ) -> Result<blocking::Response, Trouble> {
        let mut url = url.clone();
        for _ in 0..MAX_REDIRECTS {
            let mut request = self.client.request(method.clone(), url.clone()).header(ACCEPT_ENCODING, "identity");
            let is_endpoint = Url::parse(&self.settings.endpoint).is_ok_and(|home| home.origin() == url.origin());
            if let (Some(token), true) = (&self.settings.token, is_endpoint) {
                request = request.bearer_auth(token);
            }
            if let Some(range) = &range {
                request = request.header(RANGE, range);
            }
            let response = request.send().map_err(|error| Trouble::passing(errors::cause(&error)))?;
            let status = response.status();
            let is_described = method == Method::HEAD && response.headers().contains_key("x-linked-etag");
            if status.is_success() || (status.is_redirection() && is_described) {
                return Ok(response);
            }
            let location = response.headers().get(LOCATION).and_then(|location| location.to_str().ok());
            if let (true, Some(location)) = (status.is_redirection(), location) {
                url = url.join(location).with_context(|| format!("{url}: redirects to `{location}`"))?;
                continue;
            }
            let is_passing = status.is_server_error()
                || [StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_MANY_REQUESTS].contains(&status);
            // The store's addresses are signed for a while: a fresh one is asked for.
            if is_passing || !is_endpoint {
                let pause = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
                let why = format!("{} answers {status}", url.host_str().unwrap_or_default());
                return Err(Trouble::Passing { why, pause: pause.map(Duration::from_secs) });
            }
            let code = response.headers().get("x-error-code").and_then(|code| code.to_str().ok());
            return Err(errors::refusal(status, code, &self.settings, &self.id, Some(name)).into());
        }
        Err(Failure::new(format!("{url}: more than {MAX_REDIRECTS} redirects")).into())
    }

    /// Bytes `start..start + buffer.len()` of a file, or fewer at its end.
    pub fn read_range(&self, file: &RemoteFile, start: u64, buffer: &mut [u8]) -> anyhow::Result<usize> {
        let len = (buffer.len() as u64).min(file.size.saturating_sub(start)) as usize;
        let mut tries = 0;
        loop {
            match self.receive_range(file, start, &mut buffer[..len]) {
                Ok(()) => return Ok(len),
                Err(trouble) => self.pause(&file.name, trouble, &mut tries, None)?,
            }
        }
    }

    fn receive_range(&self, file: &RemoteFile, start: u64, buffer: &mut [u8]) -> Result<(), Trouble> {
        if buffer.is_empty() {
            return Ok(());
        }
        let range = format!("bytes={start}-{}", start + buffer.len() as u64 - 1);
        let mut response = self.send(Method::GET, &file.url, &file.name, Some(range))?;
        if response.status() != StatusCode::PARTIAL_CONTENT && buffer.len() as u64 != file.size {
            return Err(
                Failure::new(format!("{}: the server gives no part of a file, only the whole", file.url)).into()
            );
        }
        response.read_exact(buffer).map_err(|error| Trouble::passing(errors::cause(&error)))
    }

    /// Brings the file into the cache as a blob, unless it is there; waits for another process that is
    /// at it.
    pub fn fetch(&self, file: &RemoteFile, cache: &RepoCache, progress: &FileProgress) -> anyhow::Result<()> {
        let blob = cache.blob(&file.etag);
        if has_size(&blob, file.size) {
            progress.found(file.size);
            return Ok(());
        }
        let asked = Instant::now();
        let mut is_said = false;
        let lock = cache.lock(&file.etag, || {
            if !is_said && asked.elapsed() > Duration::from_secs(1) {
                is_said = true;
                progress.note("another process fetches it: waiting");
            }
            std::thread::sleep(Duration::from_millis(100));
            !interrupt::is_requested()
        })?;
        let Some(_lock) = lock else { return Err(interrupted()) };
        if has_size(&blob, file.size) {
            progress.found(file.size);
            return Ok(());
        }
        let mut partial = Partial::open(cache.incomplete(&file.etag), file)?;
        progress.found(partial.len);
        let (mut tries, mut is_second) = (0, false);
        loop {
            let before = partial.len;
            let trouble = match self.receive(file, &mut partial, progress) {
                Ok(()) if partial.is_right(file) => break,
                Ok(()) if is_second => {
                    partial.restart(file)?;
                    let message =
                        format!("{}: arrived twice with another content than its hash {}", file.name, file.etag);
                    let hint = "the way to the Hub changes files, or the file there is damaged: try again later";
                    return Err(Failure::new(message).with_hint(hint).into());
                }
                Ok(()) => {
                    is_second = true;
                    progress.retreat(partial.len);
                    partial.restart(file)?;
                    Trouble::passing("its content is not what its hash says")
                }
                Err(trouble) => trouble,
            };
            if partial.len > before {
                tries = 0;
            }
            self.pause(&file.name, trouble, &mut tries, Some((progress, &partial)))?;
        }
        partial.file.sync_all().with_context(|| partial.path.display().to_string())?;
        fs::rename(&partial.path, &blob).with_context(|| format!("{}: cannot be written", blob.display()))
    }

    /// What is left of the file, until it is whole or the connection breaks.
    fn receive(&self, file: &RemoteFile, partial: &mut Partial, progress: &FileProgress) -> Result<(), Trouble> {
        if partial.len == file.size {
            return Ok(());
        }
        let range = (partial.len > 0).then(|| format!("bytes={}-", partial.len));
        let mut response = self.send(Method::GET, &file.url, &file.name, range)?;
        let starts = |range: &str| range.strip_prefix("bytes ")?.split('-').next()?.parse::<u64>().ok();
        let start = match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                response.headers().get(CONTENT_RANGE).and_then(|range| starts(range.to_str().ok()?))
            }
            _ => Some(0),
        };
        if start != Some(partial.len) {
            // The whole file comes, or another part of it.
            progress.retreat(partial.len);
            partial.restart(file)?;
            if start != Some(0) {
                return Err(Trouble::passing("another part came than was asked for"));
            }
        }
        let mut buffer = vec![0; 1 << 18];
        while partial.len < file.size {
            if interrupt::is_requested() {
                return Err(interrupted().into());
            }
            let wanted = buffer.len().min((file.size - partial.len).try_into().unwrap_or(usize::MAX));
            match response.read(&mut buffer[..wanted]) {
                Ok(0) => return Err(Trouble::passing("the connection ended early")),
                Ok(count) => {
                    partial.push(&buffer[..count])?;
                    progress.advance(count as u64);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(Trouble::passing(errors::cause(&error))),
            }
        }
        Ok(())
    }

    /// Waits before another try, longer each time, and as long as the server asks for; an error when it
    /// is no use.
    fn pause(
        &self,
        name: &str,
        trouble: Trouble,
        tries: &mut u32,
        progress: Option<(&FileProgress, &Partial)>,
    ) -> anyhow::Result<()> {
        let (why, asked) = match trouble {
            Trouble::Final(error) => return Err(error),
            Trouble::Passing { why, pause } => (why, pause),
        };
        *tries += 1;
        if *tries == MAX_TRIES {
            let failure = Failure::new(format!("{}: {name}: {why}, {MAX_TRIES} times in a row", self.id));
            let kept = "what has been fetched is kept: the same command goes on from there";
            return Err(failure.with_hint(format!("check the connection and try again; {kept}")).into());
        }
        let pause = asked.unwrap_or(FIRST_PAUSE * 2u32.pow(*tries - 1)).min(LONGEST_PAUSE);
        if let Some((progress, partial)) = progress {
            let held = output::bytes(partial.len as usize);
            progress.note(&format!("{why}: going on from {held} in {:.1} s", pause.as_secs_f64()));
        }
        let until = Instant::now() + pause;
        while Instant::now() < until {
            if interrupt::is_requested() {
                return Err(interrupted());
            }
            std::thread::sleep(Duration::from_millis(50).min(pause));
        }
        Ok(())
    }
}

fn interrupted() -> anyhow::Error {
    Failure::interrupted("what has been fetched is kept; the same command goes on from there").into()
}

fn has_size(file: &Path, size: u64) -> bool {
    file.metadata().is_ok_and(|metadata| metadata.len() == size)
}

/// The part of a file that has come, hashed as it comes.
struct Partial {
    path: PathBuf,
    file: File,
    len: u64,
    hash: Hash,
}

impl Partial {
    /// What an earlier run has left, or nothing.
    fn open(path: PathBuf, remote: &RemoteFile) -> anyhow::Result<Self> {
        let unwritable = || format!("{}: cannot be written", path.display());
        make_parent(&path).with_context(unwritable)?;
        let mut file =
            File::options().create(true).read(true).write(true).truncate(false).open(&path).with_context(unwritable)?;
        let mut hash = Hash::of(remote);
        let len = io::copy(&mut file, &mut hash).with_context(|| format!("{}: cannot be read", path.display()))?;
        let mut partial = Self { path, file, len, hash };
        if len > remote.size {
            partial.restart(remote)?;
        }
        Ok(partial)
    }

    fn push(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        self.file.write_all(bytes).map_err(|error| match error.kind() {
            ErrorKind::StorageFull => Failure::new(format!("{}: the disk is full", self.path.display()))
                .with_hint("make room and try again")
                .into(),
            _ => anyhow::Error::new(error).context(format!("{}: cannot be written", self.path.display())),
        })?;
        self.hash.write_all(bytes)?;
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// Forgets what has come.
    fn restart(&mut self, remote: &RemoteFile) -> anyhow::Result<()> {
        let empty = self.file.set_len(0).and_then(|()| self.file.seek(SeekFrom::Start(0)));
        empty.with_context(|| format!("{}: cannot be written", self.path.display()))?;
        self.len = 0;
        self.hash = Hash::of(remote);
        Ok(())
    }

    /// Whether what has come is the whole file, unchanged.
    fn is_right(&self, remote: &RemoteFile) -> bool {
        self.len == remote.size && self.hash.clone().is(&remote.etag)
    }
}

/// The hash that a file's etag is.
#[derive(Clone)]
enum Hash {
    /// Of a large file's content.
    Sha256(Sha256),
    /// Git's, of a small file: `blob SIZE\0` and the content.
    Git(Sha1),
    /// A server with etags of its own.
    Unknown,
}

impl Hash {
    fn of(file: &RemoteFile) -> Self {
        match file.etag.len() {
            64 => Self::Sha256(Sha256::new()),
            40 => Self::Git(Sha1::new_with_prefix(format!("blob {}\0", file.size))),
            _ => Self::Unknown,
        }
    }

    fn is(self, etag: &str) -> bool {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        match self {
            Self::Sha256(hash) => hex(&hash.finalize()).eq_ignore_ascii_case(etag),
            Self::Git(hash) => hex(&hash.finalize()).eq_ignore_ascii_case(etag),
            Self::Unknown => true,
        }
    }
}

impl Write for Hash {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Sha256(hash) => hash.update(bytes),
            Self::Git(hash) => hash.update(bytes),
            Self::Unknown => {}
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
