//! A Hub on loopback: the routes and headers of the real one, a store on a port of its own for large
//! files, and faults where a test wants them.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use serde_json::json;
use sha1::{Digest, Sha1};
use sha2::Sha256;

/// Files of this size on lie in the store.
const LARGE: usize = 40_000;

/// A running server; its threads end with the test.
pub struct HubServer {
    shared: Arc<Shared>,
    /// What HF_ENDPOINT is to be.
    pub endpoint: String,
}

struct Shared {
    state: Mutex<State>,
    store: String,
}

#[derive(Default)]
struct State {
    repos: HashMap<String, Repo>,
    /// Old id to new id.
    moved: HashMap<String, String>,
    requests: Vec<Request>,
    /// What is to go wrong with the next requests for a file's content, or for `api`.
    faults: HashMap<String, VecDeque<Fault>>,
}

/// One model.
#[derive(Default, Clone)]
pub struct Repo {
    /// Branch or tag to commit.
    pub refs: BTreeMap<String, String>,
    /// Commit to files.
    pub commits: BTreeMap<String, BTreeMap<String, Vec<u8>>>,
    /// The tokens that are given the files; anybody where there is none.
    pub tokens: Vec<String>,
    /// Anybody may list the files.
    pub is_gated: bool,
    /// Sizes that are told instead of the true ones.
    pub told_sizes: BTreeMap<String, u64>,
}

/// What goes wrong with one answer.
#[derive(Clone)]
pub enum Fault {
    /// The connection ends after so many bytes.
    Cut(usize),
    /// Nothing more comes after so many bytes, for this long.
    Stall(usize, Duration),
    /// Every byte is another.
    Garbage,
    /// The whole comes, whatever part was asked for.
    WholeInstead,
    /// A part comes, but not the one that was asked for.
    OtherPart,
    /// An answer of this status, with this header.
    Status(u16, &'static str),
}

/// A request that came.
#[derive(Debug, Clone)]
pub struct Request {
    pub is_store: bool,
    pub method: String,
    pub path: String,
    pub range: Option<String>,
    pub authorization: Option<String>,
    /// Bytes of content sent.
    pub sent: usize,
}

impl Repo {
    /// The files of a folder as the commit `main`.
    pub fn of(folder: &Path) -> Self {
        let mut repo = Self::default();
        repo.commit("main", files_of(folder));
        repo
    }

    /// A new commit, which `revision` stands for from now on.
    pub fn commit(&mut self, revision: &str, files: BTreeMap<String, Vec<u8>>) -> String {
        let mut hash = Sha1::new();
        for (name, content) in &files {
            hash.update(name);
            hash.update(content);
        }
        let commit = hex(&hash.finalize());
        self.commits.insert(commit.clone(), files);
        self.refs.insert(revision.to_string(), commit.clone());
        commit
    }
}

pub fn files_of(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let file = |entry: std::io::Result<fs::DirEntry>| {
        let path = entry.unwrap().path();
        (path.file_name().unwrap().to_str().unwrap().to_string(), fs::read(&path).unwrap())
    };
    fs::read_dir(folder).unwrap().map(file).collect()
}

impl HubServer {
    pub fn start() -> Self {
        let (hub, store) = (TcpListener::bind("127.0.0.1:0").unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
        let url = |listener: &TcpListener| format!("http://127.0.0.1:{}", listener.local_addr().unwrap().port());
        let endpoint = url(&hub);
        let shared = Arc::new(Shared { state: Mutex::default(), store: url(&store) });
        for (listener, is_store) in [(hub, false), (store, true)] {
            let shared = shared.clone();
            thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let shared = shared.clone();
                    thread::spawn(move || shared.serve(stream, is_store));
                }
            });
        }
        Self { shared, endpoint }
    }

    pub fn put(&self, id: &str, repo: Repo) {
        self.state().repos.insert(id.to_string(), repo);
    }

    /// From now on `old` redirects to `new`, as after a model's change of name.
    pub fn rename(&self, old: &str, new: &str) {
        self.state().moved.insert(old.to_string(), new.to_string());
    }

    /// What the next requests for the content of `file` (or `api`) meet, one each.
    pub fn fail(&self, file: &str, faults: &[Fault]) {
        self.state().faults.insert(file.to_string(), faults.iter().cloned().collect());
    }

    /// How many requests have come.
    pub fn requests(&self) -> usize {
        self.state().requests.len()
    }

    /// The requests so far; forgets them.
    pub fn take_requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.state().requests)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap()
    }
}

/// An answer before it is sent.
struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    content: Vec<u8>,
    /// The file that the content is of.
    file: String,
}

impl Answer {
    fn status(status: u16, headers: &[(&'static str, &str)]) -> Self {
        let headers = headers.iter().map(|(name, value)| (*name, value.to_string())).collect();
        Self { status, headers, content: Vec::new(), file: String::new() }
    }
}

impl Shared {
    /// Answers one request: a connection serves no more.
    fn serve(&self, mut stream: TcpStream, is_store: bool) {
        let Some(request) = read_request(&mut stream, is_store) else { return };
        // A proxy is asked for a whole URL.
        let path = match request.path.split_once("://") {
            Some((_, rest)) => rest[rest.find('/').unwrap_or(rest.len())..].to_string(),
            None => request.path.clone(),
        };
        let mut answer = self.answer(&request, &path);
        let mut state = self.state.lock().unwrap();
        let content_of = if answer.file.is_empty() && path.starts_with("/api/") { "api" } else { &answer.file };
        let is_get = request.method == "GET";
        let fault = if is_get { state.faults.get_mut(content_of).and_then(VecDeque::pop_front) } else { None };
        let index = state.requests.len();
        let is_head = request.method == "HEAD";
        let asked = request.clone();
        state.requests.push(request);
        drop(state);
        let mut end = answer.content.len();
        let mut stall = Duration::ZERO;
        match fault {
            Some(Fault::Status(status, header)) => {
                let (name, value) = header.split_once(": ").unwrap_or(("x-none", ""));
                answer = Answer::status(status, &[(name, value)]);
                end = 0;
            }
            Some(Fault::WholeInstead) => {
                answer = self.answer(&Request { range: None, ..asked.clone() }, &path);
                end = answer.content.len();
            }
            Some(Fault::OtherPart) => {
                answer = self.answer(&Request { range: Some("bytes=3-100".to_string()), ..asked.clone() }, &path);
                end = answer.content.len();
            }
            Some(Fault::Garbage) => answer.content.iter_mut().for_each(|byte| *byte ^= 0x55),
            Some(Fault::Cut(bytes)) => end = bytes.min(end),
            Some(Fault::Stall(bytes, time)) => (end, stall) = (bytes.min(end), time),
            None => {}
        }
        let mut head = format!("HTTP/1.1 {} Answer\r\nConnection: close\r\n", answer.status);
        for (name, value) in &answer.headers {
            head += &format!("{name}: {value}\r\n");
        }
        if !answer.headers.iter().any(|(name, _)| *name == "content-length") {
            head += &format!("content-length: {}\r\n", answer.content.len());
        }
        let content = if is_head { &[] } else { &answer.content[..end] };
        // Counted as they go, so that a test can wait for them.
        self.state.lock().unwrap().requests[index].sent = content.len();
        let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(b"\r\n"));
        let _ = stream.write_all(content).and_then(|()| stream.flush());
        thread::sleep(stall);
    }

    fn answer(&self, request: &Request, path: &str) -> Answer {
        let state = self.state.lock().unwrap();
        if request.is_store {
            let sha256 = path.trim_start_matches("/blobs/").split('?').next().unwrap();
            let mut files = state.repos.values().flat_map(|repo| repo.commits.values()).flatten();
            return match files.find(|(_, content)| hex(&Sha256::digest(content)) == sha256) {
                Some((name, content)) => part(name, content, request.range.as_deref()),
                None => Answer::status(404, &[]),
            };
        }
        let token = request.authorization.as_deref().and_then(|value| value.strip_prefix("Bearer "));
        let api = path.strip_prefix("/api/models/");
        let is_api = api.is_some();
        let parts = api.map_or_else(|| path[1..].split_once("/resolve/"), |rest| rest.split_once("/revision/"));
        let (id, rest) = parts.unwrap_or_default();
        if let Some(new) = state.moved.get(id) {
            return Answer::status(307, &[("location", &path.replace(id, new))]);
        }
        let Some(repo) = state.repos.get(id) else {
            // The Hub does not tell a stranger whether a model is private or not there.
            let status = if token.is_some() { 404 } else { 401 };
            return Answer::status(status, &[("x-error-code", "RepoNotFound")]);
        };
        let is_allowed =
            repo.tokens.is_empty() || token.is_some_and(|token| repo.tokens.iter().any(|one| one == token));
        let is_listed = is_api && repo.is_gated;
        if !is_allowed && !is_listed {
            let (code, status) = if repo.is_gated {
                ("GatedRepo", if token.is_some() { 403 } else { 401 })
            } else {
                ("RepoNotFound", if token.is_some() { 404 } else { 401 })
            };
            return Answer::status(status, &[("x-error-code", code)]);
        }
        let (revision, file) = if is_api { (rest, "") } else { rest.split_once('/').unwrap_or((rest, "")) };
        let revision = revision.replace("%2F", "/");
        let commit = repo.refs.get(&revision).unwrap_or(&revision);
        let Some(files) = repo.commits.get(commit) else {
            return Answer::status(404, &[("x-error-code", "RevisionNotFound")]);
        };
        if is_api {
            let siblings: Vec<_> = files.keys().map(|name| json!({"rfilename": name})).collect();
            let info = json!({"_id": "0", "id": id, "sha": commit, "private": false, "siblings": siblings});
            let mut answer = Answer::status(200, &[("content-type", "application/json")]);
            answer.content = info.to_string().into_bytes();
            return answer;
        }
        let Some(content) = files.get(file) else {
            return Answer::status(404, &[("x-error-code", "EntryNotFound"), ("x-repo-commit", commit)]);
        };
        let size = repo.told_sizes.get(file).copied().unwrap_or(content.len() as u64).to_string();
        if content.len() >= LARGE {
            let sha256 = hex(&Sha256::digest(content));
            let location = format!("{}/blobs/{sha256}?signature=once", self.store);
            let etag = format!("\"{sha256}\"");
            let linked = [("x-linked-etag", etag.as_str()), ("x-linked-size", &size), ("location", &location)];
            return Answer::status(302, &[[("x-repo-commit", commit.as_str())].as_slice(), &linked].concat());
        }
        let mut answer = part(file, content, request.range.as_deref());
        let git = Sha1::new_with_prefix(format!("blob {}\0", content.len())).chain_update(content).finalize();
        answer.headers.push(("x-repo-commit", commit.clone()));
        answer.headers.push(("etag", format!("W/\"{}\"", hex(&git))));
        answer
    }
}

/// A file's content, or the part of it that was asked for.
fn part(name: &str, content: &[u8], range: Option<&str>) -> Answer {
    let mut answer = Answer::status(200, &[]);
    answer.file = name.to_string();
    answer.content = content.to_vec();
    if let Some(range) = range {
        let (start, end) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
        let start: usize = start.parse().unwrap();
        let end = end.parse().map_or(content.len(), |last: usize| last + 1).min(content.len());
        if start >= end {
            return Answer::status(416, &[]);
        }
        answer.status = 206;
        answer.headers.push(("content-range", format!("bytes {start}-{}/{}", end - 1, content.len())));
        answer.content = content[start..end].to_vec();
    }
    answer
}

fn read_request(stream: &mut TcpStream, is_store: bool) -> Option<Request> {
    let (mut bytes, mut buffer) = (Vec::new(), [0; 4096]);
    while !bytes.windows(4).any(|end| end == b"\r\n\r\n") {
        match stream.read(&mut buffer) {
            Ok(count) if count > 0 => bytes.extend(&buffer[..count]),
            _ => return None,
        }
    }
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut request = httparse::Request::new(&mut headers);
    request.parse(&bytes).ok()?;
    let header = |name: &str| {
        let header = request.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name))?;
        Some(String::from_utf8(header.value.to_vec()).unwrap())
    };
    Some(Request {
        is_store,
        method: request.method?.to_string(),
        path: request.path?.to_string(),
        range: header("range"),
        authorization: header("authorization"),
        sent: 0,
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
