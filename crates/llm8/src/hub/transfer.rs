//! One file from the Hub into the cache: taken up where it broke, within a run and after one, and
//! checked before it counts.

use std::io::{ErrorKind, Read};
use std::path::Path;
use std::time::{Duration, Instant};

use reqwest::header::{CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap};
use reqwest::{StatusCode, Url};

use super::cache::RepoCache;
use super::errors;
use super::http::{Http, Part, Patience, Trouble};
use super::partial::Partial;
use super::progress::FileProgress;
use super::settings::Settings;
use crate::failure::Failure;
use crate::output;

/// Requests in a row that may come to nothing before a file is given up.
const MAX_TRIES: u32 = 6;
/// The largest file that is believed: sums of these cannot overflow.
const MAX_SIZE: u64 = 1 << 53;

/// The transfers of one model's files.
pub struct Transfer {
    http: Http,
    /// The model's id.
    id: String,
    quiet: bool,
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

impl RemoteFile {
    /// Whether the etag is a hash of the content, as the Hub's own are.
    pub fn is_hashed(&self) -> bool {
        [40, 64].contains(&self.etag.len()) && self.etag.bytes().all(|byte| byte.is_ascii_hexdigit())
    }

    /// From the headers of an answer; an error says what they lack.
    fn new(name: &str, url: &Url, headers: &HeaderMap) -> Result<Self, String> {
        let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let etag = header("x-linked-etag").or_else(|| header(ETAG.as_str())).unwrap_or_default();
        let etag = etag.trim_start_matches("W/").trim_matches('"');
        // It becomes a file's name.
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if etag.is_empty() || etag.len() > 200 || !etag.chars().all(is_name) {
            return Err(format!("the answer has no usable etag (`{etag}`)"));
        }
        let size = header("x-linked-size").or_else(|| header(CONTENT_LENGTH.as_str())).unwrap_or_default();
        match size.parse() {
            Ok(size @ 0..=MAX_SIZE) => {
                Ok(Self { name: name.to_string(), size, etag: etag.to_string(), url: url.clone() })
            }
            _ => Err(format!("the answer tells no size (`{size}`)")),
        }
    }
}

impl Transfer {
    pub fn new(settings: &Settings, id: &str, quiet: bool) -> anyhow::Result<Self> {
        Ok(Self { http: Http::new(settings, id)?, id: id.to_string(), quiet })
    }

    /// Lets all transfers end: one of them has failed.
    pub fn stop(&self) {
        self.http.stop();
    }

    /// Asks for size and etag of the file `name` of a commit.
    pub fn describe(&self, commit: &str, name: &str) -> anyhow::Result<RemoteFile> {
        let url = self.http.url(commit, name);
        let headers = self.patiently(name, || self.http.head(&url, name))?;
        RemoteFile::new(name, &url, &headers).map_err(|problem| {
            let failure = Failure::new(format!("{url}: {problem}"));
            failure.with_hint("is HF_ENDPOINT a Hub, and not another kind of server?").into()
        })
    }

    /// Bytes of a file from `start` on: as many as `buffer` has, or fewer at the end of the file.
    pub fn read_range(&self, file: &RemoteFile, start: u64, buffer: &mut [u8]) -> anyhow::Result<usize> {
        let len = (buffer.len() as u64).min(file.size.saturating_sub(start)) as usize;
        if len > 0 {
            self.patiently(&file.name, || self.receive_range(file, start, &mut buffer[..len]))?;
        }
        Ok(len)
    }

    fn receive_range(&self, file: &RemoteFile, start: u64, buffer: &mut [u8]) -> Result<(), Trouble> {
        let last = start + buffer.len() as u64 - 1;
        let mut response = self.http.get(&file.url, &file.name, Part::Between(start, last))?;
        if first_byte(&response) != Some(start) {
            let failure = Failure::new(format!("{}: the server gives no parts of a file, only the whole", file.url));
            return Err(failure.with_hint("fetch the model first: llm8 download").into());
        }
        response.read_exact(buffer).map_err(|error| Trouble::passing(errors::cause(&error)))
    }

    /// Asks again while trouble may pass.
    fn patiently<R>(&self, name: &str, mut ask: impl FnMut() -> Result<R, Trouble>) -> anyhow::Result<R> {
        let mut patience = Patience::new(MAX_TRIES);
        loop {
            let trouble = match ask() {
                Ok(answer) => return Ok(answer),
                Err(trouble) => trouble,
            };
            let say = |why: &str| {
                if !self.quiet {
                    output::say(&format!("{name}: {why}"));
                }
            };
            patience.wait(trouble, say, || self.http.check_interrupt()).map_err(|error| self.given_up(name, error))?;
        }
    }

    /// What is said when a file is given up.
    fn given_up(&self, name: &str, error: anyhow::Error) -> anyhow::Error {
        match error.downcast::<Failure>() {
            Ok(failure) if !failure.has_hint() && !failure.is_interruption() => {
                let hint = "check the connection and try again: what has been fetched is kept";
                Failure::new(format!("{}: {name}: {failure}", self.id)).with_hint(hint).into()
            }
            Ok(failure) => failure.into(),
            Err(error) => error,
        }
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
        let _lock = cache.lock(&file.etag, || {
            if !is_said && asked.elapsed() > Duration::from_secs(1) {
                is_said = true;
                progress.note("another process fetches it: waiting");
            }
            std::thread::sleep(Duration::from_millis(100));
            self.http.check_interrupt()
        })?;
        if has_size(&blob, file.size) {
            progress.found(file.size);
            return Ok(());
        }
        let mut partial = Partial::open(cache.incomplete(&file.etag), file, |bytes| {
            progress.found(bytes);
            self.http.check_interrupt()
        })?;
        let mut patience = Patience::new(MAX_TRIES);
        let (mut was_wrong, mut reached) = (false, partial.len());
        loop {
            let trouble = match self.receive(file, &mut partial, progress) {
                Ok(()) if partial.is_right(file) => return partial.finish(&blob),
                Ok(()) => {
                    // A part that an earlier run has left may have been damaged since.
                    let is_fresh = partial.is_fresh();
                    progress.retreat(partial.len());
                    partial.restart(file)?;
                    if is_fresh && was_wrong {
                        let what = "arrived twice with another content than its hash";
                        let hint = "the way to the Hub changes files, or the file there is damaged: try again later";
                        return Err(Failure::new(format!("{}: {what} {}", file.name, file.etag))
                            .with_hint(hint)
                            .into());
                    }
                    was_wrong |= is_fresh;
                    Trouble::passing("its content is not what its hash says")
                }
                Err(trouble) => trouble,
            };
            // What comes a second time is no progress.
            if partial.len() > reached {
                reached = partial.len();
                patience.has_worked();
            }
            let say = |why: &str| progress.note(&format!("{why}, from {}", output::bytes(partial.len() as usize)));
            patience
                .wait(trouble, say, || self.http.check_interrupt())
                .map_err(|error| self.given_up(&file.name, error))?;
        }
    }

    /// What is left of the file, until it is whole or the connection breaks.
    fn receive(&self, file: &RemoteFile, partial: &mut Partial, progress: &FileProgress) -> Result<(), Trouble> {
        if partial.len() == file.size {
            return Ok(());
        }
        let part = match partial.len() {
            0 => Part::Whole,
            len => Part::From(len, (!file.is_hashed()).then_some(file.etag.as_str())),
        };
        let mut response = self.http.get(&file.url, &file.name, part)?;
        if response.status() == StatusCode::RANGE_NOT_SATISFIABLE {
            // The file ends before the size that it was said to have.
            return Ok(());
        }
        let start = first_byte(&response);
        if start != Some(partial.len()) {
            // The whole file comes, or what was not asked for.
            progress.retreat(partial.len());
            partial.restart(file)?;
            if start != Some(0) {
                return Err(Trouble::passing("another part came than was asked for"));
            }
        }
        let mut buffer = vec![0; 1 << 18];
        while partial.len() < file.size {
            self.http.check_interrupt()?;
            let wanted = buffer.len().min((file.size - partial.len()).try_into().unwrap_or(usize::MAX));
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
}

/// The place in the file of the first byte that an answer holds.
fn first_byte(response: &reqwest::blocking::Response) -> Option<u64> {
    match response.status() {
        StatusCode::PARTIAL_CONTENT => {
            let range = response.headers().get(CONTENT_RANGE)?.to_str().ok()?;
            range.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
        }
        StatusCode::RANGE_NOT_SATISFIABLE => None,
        _ => Some(0),
    }
}

fn has_size(file: &Path, size: u64) -> bool {
    file.metadata().is_ok_and(|metadata| metadata.len() == size)
}
