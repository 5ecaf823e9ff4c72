//! Models straight from the Hub: the program against a server on loopback with the Hub's routes.

#[path = "support/fixtures.rs"]
mod fixtures;
#[path = "support/hub_server.rs"]
mod hub_server;
#[path = "support/program.rs"]
mod program;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use fixtures::*;
use hub_server::{Fault, HubServer, Repo, Request, files_of};
use program::*;
use serde_json::Value;

const ID: &str = "debian/tiny";
const WEIGHTS: &str = "model.safetensors";
/// A model with weights in one file, in shards, in PyTorch's format, and in shards of that.
const SINGLE: &str = "random/bloom-residual";
const SHARDED: &str = "random/bloom-12-heads";
const BIN: &str = "random/bloom-bin";
const SHARDED_BIN: &str = "random/opt-sharded-bin";

/// A server, and the home of a user whose cache is empty.
struct Setting {
    server: HubServer,
    home: PathBuf,
}

impl Setting {
    fn new(name: &str) -> Self {
        let home = scratch(name);
        fs::remove_dir_all(&home).unwrap();
        fs::create_dir_all(&home).unwrap();
        Self { server: HubServer::start(), home }
    }

    /// With the fixture as the model [`ID`].
    fn with(name: &str, fixture: &str) -> Self {
        let setting = Self::new(name);
        setting.server.put(ID, Repo::of(&fixtures().join(fixture)));
        setting
    }

    /// The program with arguments, in an environment of its own.
    fn command(&self, args: &[&str]) -> Command {
        let mut command = llm8(args);
        for (name, _) in std::env::vars_os() {
            let lower = name.to_string_lossy().to_lowercase();
            if lower.starts_with("hf_") || lower.starts_with("hugging") || lower.contains("proxy") {
                command.env_remove(name);
            }
        }
        command.env_remove("TRANSFORMERS_OFFLINE").env_remove("XDG_CACHE_HOME").env("HOME", &self.home);
        command.env("HF_ENDPOINT", &self.server.endpoint).env("HF_HUB_DOWNLOAD_TIMEOUT", "5");
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Downloads [`ID`], and gives the folder that the program names.
    fn download(&self) -> PathBuf {
        self.downloaded(&self.run(&["download", "-q", "-m", ID]))
    }

    fn downloaded(&self, output: &Output) -> PathBuf {
        assert!(output.status.success(), "{}", stderr(output));
        PathBuf::from(stdout(output).trim_end())
    }

    /// The part of the cache for [`ID`].
    fn cache(&self) -> PathBuf {
        self.home.join(".cache/huggingface/hub/models--debian--tiny")
    }

    fn blobs(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.cache().join("blobs")) else { return Vec::new() };
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

/// The ids that a model generates.
fn generated(output: &Output) -> Vec<u32> {
    assert!(output.status.success(), "{}", stderr(output));
    ids(&serde_json::from_slice::<Value>(&output.stdout).unwrap()["ids"])
}

const GENERATE: [&str; 7] = ["generate", "--json", "-q", "-n4", "--ignore-eos", "--prompt-ids", "5,6,7"];

fn generate<'a>(model: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&GENERATE, ["-m", model].as_slice(), more].concat()
}

/// Checks that a folder holds these files of the fixture, byte for byte, and no others.
fn check_folder(folder: &Path, fixture: &str, without: &[&str]) {
    let mut wanted = files_of(&fixtures().join(fixture));
    for name in without {
        wanted.remove(*name).unwrap();
    }
    assert_eq!(files_of(folder), wanted, "{folder:?}");
}

fn contents(requests: &[Request]) -> usize {
    requests.iter().filter(|request| request.method == "GET" && !request.path.starts_with("/api")).count()
}

#[test]
fn a_model_is_fetched_once_and_then_found() {
    let setting = Setting::new("once");
    let mut files = files_of(&fixtures().join(SINGLE));
    for other in ["pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "README.md"] {
        files.insert(other.to_string(), vec![7; 50_000]);
    }
    // With a tokenizer.json the files that it replaces are not needed.
    let tokenizer = fs::read(fixtures().join("tiny-bloom/tokenizer.json")).unwrap();
    files.insert("tokenizer.json".to_string(), tokenizer);
    files.insert("vocab.json".to_string(), b"{}".to_vec());
    let mut repo = Repo::default();
    repo.commit("main", files);
    setting.server.put(ID, repo);
    let local = generated(&setting.run(&generate(fixtures().join(SINGLE).to_str().unwrap(), &[])));
    assert_eq!(generated(&setting.run(&generate(ID, &[]))), local);
    let asked = setting.server.take_requests();
    let asked_for = |name: &str| asked.iter().any(|request| request.path.ends_with(name));
    assert!(asked_for("config.json") && asked_for(WEIGHTS) && asked_for("tokenizer.json"));
    for other in
        ["pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "README.md", "vocab.json", "expected.safetensors"]
    {
        assert!(!asked_for(other), "{other}");
    }
    // Found again: with one small request, with none by the commit's hash, with none offline.
    assert_eq!(generated(&setting.run(&generate(ID, &[]))), local);
    let asked = setting.server.take_requests();
    assert!(asked.len() == 1 && asked[0].path.starts_with("/api/models/"), "{asked:?}");
    let commit = fs::read_to_string(setting.cache().join("refs/main")).unwrap();
    assert_eq!(generated(&setting.run(&generate(ID, &["--revision", &commit]))), local);
    assert_eq!(generated(&setting.run(&generate(ID, &["--offline"]))), local);
    assert_eq!(generated(&setting.command(&generate(ID, &[])).env("HF_HUB_OFFLINE", "1").output().unwrap()), local);
    assert!(setting.server.take_requests().is_empty());
}

#[test]
fn every_form_of_weights_is_fetched_whole() {
    for fixture in [SINGLE, SHARDED, BIN, SHARDED_BIN, "tiny-opt"] {
        let setting = Setting::with("forms", fixture);
        let without: &[&str] = if fixture == "tiny-opt" { &[] } else { &["expected.safetensors"] };
        check_folder(&setting.download(), fixture, without);
        assert!(setting.blobs().iter().all(|blob| !blob.contains("incomplete")), "{fixture}");
        let local = generated(&setting.run(&generate(fixtures().join(fixture).to_str().unwrap(), &[])));
        assert_eq!(generated(&setting.run(&generate(ID, &["--offline"]))), local, "{fixture}");
    }
}

#[test]
fn download_names_the_folder_and_its_files() {
    let setting = Setting::with("report", SHARDED);
    let output = setting.run(&["download", "--json", "-m", ID]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let folder = Path::new(report["folder"].as_str().unwrap());
    assert_eq!(folder, setting.cache().join("snapshots").join(report["commit"].as_str().unwrap()));
    let files = report["files"].as_array().unwrap();
    assert_eq!(files.len(), 4);
    for file in files {
        let content = fs::read(folder.join(file["name"].as_str().unwrap())).unwrap();
        assert_eq!(file["bytes"], content.len());
    }
    let said = stderr(&output);
    assert!(said.contains("fetching debian/tiny (main, commit ") && said.contains("2 files, 132 kB"), "{said}");
}

#[test]
fn footprint_reads_the_headers_of_a_model_on_the_hub() {
    for fixture in [SINGLE, SHARDED, BIN, SHARDED_BIN, "tiny-bloom"] {
        let setting = Setting::with("footprint", fixture);
        let report = |model: &str| -> Value {
            let output = setting.run(&["footprint", "--json", "-q", "-m", model]);
            assert!(output.status.success(), "{}", stderr(&output));
            serde_json::from_slice(&output.stdout).unwrap()
        };
        let (local, remote) = (report(fixtures().join(fixture).to_str().unwrap()), report(ID));
        for key in ["precisions", "parameters", "longest_context"] {
            assert_eq!(remote[key], local[key], "{fixture} {key}");
        }
        for key in ["tensors", "bytes", "bytes_by_dtype"] {
            assert_eq!(remote["disk"][key], local["disk"][key], "{fixture} {key}");
        }
        let asked = setting.server.take_requests();
        // Of every file its beginning, and of a `.bin` its end: a fiftieth of a model that is no toy.
        let files = asked.iter().filter(|request| request.method == "HEAD").count();
        let sent: usize = asked.iter().map(|request| request.sent).sum();
        assert!(sent <= files * 100_000, "{fixture}: {sent} bytes");
        assert!(fixture != "tiny-bloom" || sent < 60_000, "{sent}");
        let blobs = setting.blobs().len();
        assert_eq!(blobs, 1, "the config alone is kept");
        // A model that is in the cache needs none of that.
        setting.download();
        setting.server.take_requests();
        assert_eq!(report(ID)["precisions"], local["precisions"]);
        assert_eq!(contents(&setting.server.take_requests()), 0);
    }
    let setting = Setting::with("footprint", SINGLE);
    setting.server.fail(WEIGHTS, &vec![Fault::Status(500, "retry-after: 0"); 50]);
    let output = setting.run(&["footprint", "-q", "-m", ID]);
    check_failure(&output, 1, &["debian/tiny: model.safetensors: 127.0.0.1 answers 500", "hint: check the connection"]);
}

#[test]
fn a_new_revision_brings_only_what_changed() {
    let setting = Setting::new("revisions");
    let files = files_of(&fixtures().join(SINGLE));
    let mut repo = Repo::default();
    let first = repo.commit("main", files.clone());
    repo.refs.insert("v1".to_string(), first.clone());
    setting.server.put(ID, repo.clone());
    let old = setting.download();
    setting.server.take_requests();
    let mut newer = files.clone();
    newer.insert("generation_config.json".to_string(), b"{\"eos_token_id\": 3}".to_vec());
    let second = repo.commit("main", newer);
    repo.commit("refs/pr/1", files);
    setting.server.put(ID, repo);
    let new = setting.download();
    assert!(old.ends_with(&first) && new.ends_with(&second));
    assert!(new.join("generation_config.json").exists() && !old.join("generation_config.json").exists());
    let asked = setting.server.take_requests();
    assert_eq!(contents(&asked), 1, "{asked:?}");
    // What is there under another name is not fetched again.
    for revision in ["v1", &first, "refs/pr/1"] {
        let output = setting.run(&["download", "-q", "-m", ID, "--revision", revision]);
        assert_eq!(setting.downloaded(&output), old, "{revision}");
    }
    assert_eq!(contents(&setting.server.take_requests()), 0);
    assert_eq!(generated(&setting.run(&generate(ID, &["--offline", "--revision", "v1"]))).len(), 4);
}

#[test]
fn a_model_that_was_renamed_is_found() {
    let setting = Setting::with("renamed", SINGLE);
    setting.server.rename("old/name", ID);
    let output = setting.run(&["download", "-q", "-m", "old/name"]);
    check_folder(&setting.downloaded(&output), SINGLE, &["expected.safetensors"]);
}

#[test]
fn a_connection_that_breaks_is_taken_up_where_it_broke() {
    let setting = Setting::with("breaks", SINGLE);
    let size = fs::metadata(fixtures().join(SINGLE).join(WEIGHTS)).unwrap().len() as usize;
    let breaks = [Fault::Cut(10_000), Fault::Cut(30_000), Fault::Cut(1), Fault::Cut(50_000)];
    setting.server.fail(WEIGHTS, &breaks);
    let output = setting.run(&["download", "-m", ID]);
    check_folder(&setting.downloaded(&output), SINGLE, &["expected.safetensors"]);
    let asked: Vec<_> = setting.server.take_requests().into_iter().filter(|request| request.is_store).collect();
    assert_eq!(asked.iter().map(|request| request.sent).sum::<usize>(), size, "{asked:?}");
    let ranges: Vec<_> = asked.iter().map(|request| request.range.as_deref()).collect();
    assert_eq!(ranges, [None, Some("bytes=10000-"), Some("bytes=40000-"), Some("bytes=40001-"), Some("bytes=90001-")]);
    let said = stderr(&output);
    assert!(
        said.contains("model.safetensors: ")
            && said.contains(": trying again in 0.")
            && said.contains("s, from 10.0 kB"),
        "{said}"
    );
}

#[test]
fn a_connection_that_stalls_is_given_up_and_taken_up() {
    let setting = Setting::with("stalls", SINGLE);
    setting.server.fail(WEIGHTS, &[Fault::Stall(20_000, Duration::from_secs(60))]);
    let start = Instant::now();
    let output = setting.command(&["download", "-m", ID]).env("HF_HUB_DOWNLOAD_TIMEOUT", "1").output().unwrap();
    check_folder(&setting.downloaded(&output), SINGLE, &["expected.safetensors"]);
    assert!(start.elapsed() < Duration::from_secs(50), "it waited for the server");
    assert!(stderr(&output).contains("s, from 20.0 kB"), "{}", stderr(&output));
}

#[test]
fn a_server_that_gives_no_parts_sends_the_whole_again() {
    let setting = Setting::with("no-parts", SINGLE);
    setting.server.fail(WEIGHTS, &[Fault::Cut(30_000), Fault::WholeInstead, Fault::Cut(7)]);
    check_folder(&setting.download(), SINGLE, &["expected.safetensors"]);
    // Another part than the one that was asked for is of no use, and for ever is given up.
    let setting = Setting::with("no-parts", SINGLE);
    setting.server.fail(WEIGHTS, &vec![Fault::OtherPart; 50]);
    let start = Instant::now();
    check(&setting, &[ID], &["another part came than was asked for", "times in a row"]);
    assert!(start.elapsed() < Duration::from_secs(60));
}

#[test]
fn a_file_that_is_shorter_than_it_was_said_to_be() {
    let setting = Setting::new("shorter");
    let mut repo = Repo::of(&fixtures().join(SINGLE));
    let size = repo.commits.values().next().unwrap()[WEIGHTS].len();
    repo.told_sizes.insert(WEIGHTS.to_string(), size as u64 + 5);
    setting.server.put(ID, repo);
    check(&setting, &[ID], &["model.safetensors: arrived twice with another content than its hash"]);
}

#[test]
fn damaged_files_of_the_cache_come_again() {
    let setting = Setting::with("damaged", SINGLE);
    let folder = setting.download();
    for file in [WEIGHTS, "config.json"] {
        let blob = fs::canonicalize(folder.join(file)).unwrap();
        fs::write(&blob, "cut").unwrap();
        assert_eq!(setting.download(), folder);
        check_folder(&folder, SINGLE, &["expected.safetensors"]);
    }
}

#[test]
fn the_hub_is_asked_without_a_token_where_there_is_none() {
    let setting = Setting::with("no-token", SINGLE);
    fs::create_dir_all(setting.home.join(".cache/huggingface")).unwrap();
    fs::write(setting.home.join(".cache/huggingface/token"), "hf_login").unwrap();
    // As in Python, a file that is named and not there is no reason to look elsewhere.
    let mut command = setting.command(&["download", "-q", "-m", ID]);
    setting.downloaded(&command.env("HF_TOKEN_PATH", setting.home.join("nothing")).output().unwrap());
    assert!(setting.server.take_requests().iter().all(|request| request.authorization.is_none()));
}

#[cfg(unix)]
#[test]
fn ctrl_c_need_not_wait_for_a_list_that_does_not_come() {
    let setting = Setting::with("silent-list", SINGLE);
    setting.server.fail("api", &[Fault::Stall(0, Duration::from_secs(60))]);
    let mut command = setting.command(&["download", "-q", "-m", ID]);
    let child = command.stderr(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let start = Instant::now();
    while setting.server.requests() == 0 {
        assert!(start.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(20));
    }
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(130));
}

#[test]
fn a_server_in_trouble_is_asked_again() {
    let setting = Setting::with("trouble", SINGLE);
    setting.server.fail("api", &[Fault::Status(503, ""), Fault::Status(429, "retry-after: 0")]);
    setting.server.fail("config.json", &[Fault::Status(502, ""), Fault::Status(429, "retry-after: 1")]);
    // 403: the address in the store was signed for a while only.
    setting.server.fail(WEIGHTS, &[Fault::Status(403, ""), Fault::Cut(9), Fault::Status(500, "")]);
    check_folder(&setting.download(), SINGLE, &["expected.safetensors"]);
}

/// Waits until so much of the weights has come into the cache.
fn wait_for_incomplete(setting: &Setting, bytes: u64) {
    let start = Instant::now();
    let blobs = setting.cache().join("blobs");
    let is_there = || {
        let Ok(entries) = fs::read_dir(&blobs) else { return false };
        entries.flatten().any(|entry| {
            entry.file_name().to_string_lossy().ends_with(".incomplete")
                && entry.metadata().is_ok_and(|metadata| metadata.len() == bytes)
        })
    };
    while !is_there() {
        assert!(start.elapsed() < Duration::from_secs(60), "nothing came: {:?}", setting.blobs());
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_killed_download_goes_on_with_the_rest() {
    let setting = Setting::with("killed", SINGLE);
    setting.server.fail(WEIGHTS, &[Fault::Stall(100_000, Duration::from_secs(60))]);
    let mut child = setting.command(&["download", "-q", "-m", ID]).stdout(Stdio::null()).spawn().unwrap();
    wait_for_incomplete(&setting, 100_000);
    child.kill().unwrap();
    child.wait().unwrap();
    // Half a file is no file.
    let output = setting.run(&["generate", "-q", "--offline", "--prompt-ids", "5", "-m", ID]);
    check_failure(&output, 1, &["offline, and debian/tiny (main) is not in the cache"]);
    setting.server.take_requests();
    check_folder(&setting.download(), SINGLE, &["expected.safetensors"]);
    let asked = setting.server.take_requests();
    let size = fs::metadata(fixtures().join(SINGLE).join(WEIGHTS)).unwrap().len() as usize;
    let stored: Vec<_> = asked.iter().filter(|request| request.is_store).collect();
    assert!(stored.len() == 1 && stored[0].sent == size - 100_000, "{asked:?}");
    let is_config = |request: &&Request| request.method == "GET" && request.path.ends_with("config.json");
    assert!(!asked.iter().any(|request| is_config(&request)), "what was whole came again");
}

#[cfg(unix)]
#[test]
fn an_interrupted_download_says_that_it_can_go_on() {
    let setting = Setting::with("interrupted", SINGLE);
    setting.server.fail(WEIGHTS, &[Fault::Stall(100_000, Duration::from_secs(60))]);
    let mut command = setting.command(&["download", "-q", "-m", ID]);
    let child =
        command.env("HF_HUB_DOWNLOAD_TIMEOUT", "2").stderr(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    wait_for_incomplete(&setting, 100_000);
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert_eq!(stderr(&output), "interrupted: what has been fetched is kept; the same command goes on from there\n");
    assert_eq!(stdout(&output), "");
}

#[test]
fn a_file_with_another_hash_never_enters_the_cache() {
    let setting = Setting::with("hash", SINGLE);
    setting.server.fail(WEIGHTS, &[Fault::Garbage]);
    setting.server.fail("config.json", &[Fault::Garbage]);
    check_folder(&setting.download(), SINGLE, &["expected.safetensors"]);

    let setting = Setting::with("hash", SINGLE);
    setting.server.fail(WEIGHTS, &[Fault::Cut(5000), Fault::Garbage, Fault::Garbage]);
    let output = setting.run(&["download", "-q", "-m", ID]);
    check_failure(&output, 1, &["model.safetensors: arrived twice with another content than its hash", "hint: "]);
    let weights = fs::read(fixtures().join(SINGLE).join(WEIGHTS)).unwrap();
    for blob in setting.blobs() {
        let len = fs::metadata(setting.cache().join("blobs").join(&blob)).unwrap().len();
        assert!(len == 0 || len < weights.len() as u64, "{blob}");
    }
    // What an earlier run left is doubted too, not only what comes.
    let incomplete = setting.blobs().into_iter().find(|blob| blob.ends_with(".incomplete")).unwrap();
    fs::write(setting.cache().join("blobs").join(incomplete), vec![1; 70_000]).unwrap();
    check_folder(&setting.download(), SINGLE, &["expected.safetensors"]);
}

#[test]
fn two_processes_fetch_a_model_once() {
    let setting = Setting::with("two", SINGLE);
    setting.server.fail(WEIGHTS, &[Fault::Stall(60_000, Duration::from_secs(4))]);
    let first = setting.command(&["download", "-m", ID]).stderr(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    wait_for_incomplete(&setting, 60_000);
    let second =
        setting.command(&["download", "-m", ID]).stderr(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let outputs = [first, second].map(|child| child.wait_with_output().unwrap());
    for output in &outputs {
        check_folder(&setting.downloaded(output), SINGLE, &["expected.safetensors"]);
    }
    let size = fs::metadata(fixtures().join(SINGLE).join(WEIGHTS)).unwrap().len() as usize;
    let asked = setting.server.take_requests();
    assert_eq!(asked.iter().filter(|request| request.is_store).map(|one| one.sent).sum::<usize>(), size);
    assert!(stderr(&outputs[1]).contains("another process fetches it: waiting"), "{}", stderr(&outputs[1]));
}

#[test]
fn a_token_reaches_the_endpoint_and_no_other_host() {
    let setting = Setting::new("token");
    let mut repo = Repo::of(&fixtures().join(SINGLE));
    repo.tokens = ["flag", "variable", "file", "login"].map(|token| format!("hf_{token}")).to_vec();
    setting.server.put(ID, repo);
    let file = setting.home.join("my-token");
    fs::write(&file, "hf_file\n").unwrap();
    fs::create_dir_all(setting.home.join(".cache/huggingface")).unwrap();
    fs::write(setting.home.join(".cache/huggingface/token"), "hf_login").unwrap();
    let file = file.to_str().unwrap();
    let (variable, path) = (("HF_TOKEN", "hf_variable"), ("HF_TOKEN_PATH", file));
    let ways = [
        ("hf_flag", vec!["--token", "hf_flag"], vec![variable]),
        ("hf_variable", vec![], vec![variable, path]),
        ("hf_file", vec![], vec![path]),
        ("hf_login", vec![], vec![]),
    ];
    for (token, flags, variables) in ways {
        let _ = fs::remove_dir_all(setting.cache());
        let args = [["download", "-q", "-m", ID].as_slice(), &flags].concat();
        let mut command = setting.command(&args);
        command.envs(variables);
        check_folder(&setting.downloaded(&command.output().unwrap()), SINGLE, &["expected.safetensors"]);
        let asked = setting.server.take_requests();
        assert!(asked.iter().any(|request| request.is_store));
        for request in asked {
            let wanted = if request.is_store { None } else { Some(format!("Bearer {token}")) };
            assert_eq!(request.authorization, wanted, "{request:?}");
        }
    }
    let _ = fs::remove_dir_all(setting.cache());
    let output = setting.command(&["download", "-q", "-m", ID]).env("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1").output();
    check_failure(&output.unwrap(), 1, &["there is no model debian/tiny at http://127.0.0.1:", "or it is private"]);
}

#[test]
fn the_places_of_the_cache_are_those_of_pythons_tools() {
    let setting = Setting::with("places", SINGLE);
    let place = |name: &str| setting.home.join(name).to_str().unwrap().to_string();
    let run = |args: &[&str], variables: &[(&str, String)]| {
        let args = [["download", "-q", "-m", ID].as_slice(), args].concat();
        let mut command = setting.command(&args);
        command.envs(variables.iter().cloned());
        setting.downloaded(&command.output().unwrap())
    };
    let home = ("HF_HOME", place("home"));
    let cache = ("HF_HUB_CACHE", place("cache"));
    assert!(
        run(&[], &[("XDG_CACHE_HOME", place("xdg"))]).starts_with(place("xdg/huggingface/hub/models--debian--tiny"))
    );
    assert!(run(&[], std::slice::from_ref(&home)).starts_with(place("home/hub/models--debian--tiny")));
    assert!(run(&[], &[home.clone(), cache.clone()]).starts_with(place("cache/models--debian--tiny")));
    let flag = run(&["--cache-dir", &place("flag")], &[home, cache]);
    assert!(flag.starts_with(place("flag/models--debian--tiny")));
    check_folder(&flag, SINGLE, &["expected.safetensors"]);
}

#[test]
fn a_proxy_is_asked_where_there_is_one() {
    let setting = Setting::with("proxy", SINGLE);
    let proxy = setting.server.endpoint.clone();
    // The name can be resolved nowhere: only the proxy knows the way. The store is reached directly.
    let mut command = setting.command(&["download", "-q", "-m", ID]);
    command.env("HF_ENDPOINT", "http://hub.invalid").env("HTTP_PROXY", &proxy).env("NO_PROXY", "127.0.0.1");
    check_folder(&setting.downloaded(&command.output().unwrap()), SINGLE, &["expected.safetensors"]);
    let asked = setting.server.take_requests();
    assert!(
        asked.iter().any(|request| request.path.starts_with("http://hub.invalid/debian/tiny/resolve/")),
        "{asked:?}"
    );
    let mut command = setting.command(&["download", "-q", "-m", "other/model"]);
    command.env("HF_ENDPOINT", "https://hub.invalid").env("HTTPS_PROXY", &proxy);
    check_failure(&command.output().unwrap(), 1, &["https://hub.invalid cannot be reached: ", "HTTPS_PROXY"]);
    let asked = setting.server.take_requests();
    assert!(asked.iter().all(|one| one.method == "CONNECT" && one.path == "hub.invalid:443"), "{asked:?}");
    assert!(!asked.is_empty());
}

/// Checks how a run against the setting fails.
fn check(setting: &Setting, args: &[&str], parts: &[&str]) {
    let args = [["download", "-q", "-m"].as_slice(), args].concat();
    check_failure(&setting.run(&args), 1, parts);
}

#[test]
fn flags_and_endpoints_that_make_no_sense() {
    let setting = Setting::with("no-sense", SINGLE);
    let folder = fixtures().join(SINGLE);
    let args = ["generate", "-q", "--prompt-ids", "5", "--revision", "v1", "-m", folder.to_str().unwrap()];
    check_failure(&setting.run(&args), 2, &["--revision belongs to models on the Hub"]);
    for (endpoint, part) in [
        ("http://user:secret@127.0.0.1:9", "holds a user name or a password"),
        ("http://127.0.0.1:9?x=1", "wanted a URL without `?` and `#`"),
        ("ftp://127.0.0.1:9", "wanted a URL that begins with http"),
    ] {
        let output = setting.command(&["download", "-q", "-m", ID]).env("HF_ENDPOINT", endpoint).output().unwrap();
        check_failure(&output, 1, &[part, "hint: the Hub itself is https://huggingface.co"]);
        assert!(!stderr(&output).contains("secret"));
    }
}

#[test]
fn no_such_model_or_revision() {
    let setting = Setting::with("no-such", SINGLE);
    check(&setting, &["nobody/nothing"], &["there is no model nobody/nothing at http://127", "hint: check the name"]);
    check(&setting, &["nothing"], &["there is no model nothing at http://127", "or it is private", "hf auth login"]);
    check(
        &setting,
        &["nobody/nothing", "--token", "hf_x"],
        &["or the token has no access to it", "hint: check the name"],
    );
    check(&setting, &[ID, "--revision", "v9"], &["debian/tiny has no revision v9", "hint: http://127", "/tree/main"]);
    for bad in ["a/b/c", "../tiny", "debian/", "", "debian/ti ny", "debian/a--b"] {
        check_failure(&setting.run(&["download", "-q", "-m", bad]), 2, &["is no id of a model on the Hub", "hint: "]);
    }
    for bad in ["../../x", "/etc", "", "a b"] {
        check_failure(
            &setting.run(&["download", "-q", "-m", ID, "--revision", bad]),
            2,
            &["is no branch, tag or commit"],
        );
    }
    assert!(!setting.home.join(".cache").exists(), "nothing is made for what is not there");
}

#[test]
fn a_model_that_wants_a_token_or_another_one() {
    let setting = Setting::new("wants-token");
    let mut repo = Repo::of(&fixtures().join(SINGLE));
    repo.tokens = vec!["hf_right".to_string()];
    setting.server.put("private/model", repo.clone());
    repo.is_gated = true;
    setting.server.put("gated/model", repo);
    check(&setting, &["private/model"], &["there is no model private/model", "or it is private", "hf auth login"]);
    check(
        &setting,
        &["gated/model"],
        &["gated/model is gated: it is not given without a token", "ask for access at http"],
    );
    let args = ["gated/model", "--token", "hf_wrong"];
    check(
        &setting,
        &args,
        &["gated/model is gated, and the token has no access to it", "the account that the token belongs to"],
    );
    setting.server.fail("api", &[Fault::Status(401, "x-error-message: Invalid credentials")]);
    check(&setting, &["private/model", "--token", "hf_old"], &["does not accept the token (for private/model)"]);
    setting.server.fail("api", &[Fault::Status(403, "")]);
    check(&setting, &["private/model", "--token", "hf_right"], &["gives no access to private/model"]);
    check_failure(&setting.run(&["download", "-q", "-m", ID, "--token", ""]), 2, &["--token is empty"]);
    check(&setting, &["private/model", "--token", "two words"], &["the token for the Hub holds characters"]);
    let output = setting.run(&["download", "-q", "-m", "gated/model", "--token", "hf_right"]);
    check_folder(&setting.downloaded(&output), SINGLE, &["expected.safetensors"]);
}

#[test]
fn no_network() {
    let setting = Setting::with("no-network", SINGLE);
    let off = |command: &mut Command| command.env("HF_ENDPOINT", "http://127.0.0.1:9").output().unwrap();
    let output = off(&mut setting.command(&["download", "-q", "-m", ID]));
    check_failure(&output, 1, &["http://127.0.0.1:9 cannot be reached: ", "refused", "hint: check the connection"]);
    let output = setting.command(&["download", "-q", "-m", ID]).env("HF_ENDPOINT", "hub").output().unwrap();
    check_failure(&output, 1, &["HF_ENDPOINT is `hub`, wanted a URL that begins with http"]);
    // A copy in the cache does.
    let folder = setting.download();
    let output = off(&mut setting.command(&["download", "-m", ID]));
    assert_eq!(setting.downloaded(&output), folder);
    assert!(stderr(&output).contains("refused") && stderr(&output).contains("; using the copy in the cache"));
    // A server that breaks off for good is given up.
    let setting = Setting::with("no-network", SINGLE);
    setting.server.fail(WEIGHTS, &vec![Fault::Status(500, "retry-after: 0"); 50]);
    check(&setting, &[ID], &["debian/tiny: model.safetensors: 127.0.0.1 answers 500", "6 times in a row", "is kept"]);
    setting.server.fail("api", &vec![Fault::Status(503, ""); 50]);
    check(&setting, &[ID], &["cannot be reached: it answers 503 Service Unavailable, 4 times in a row", "hint: check"]);
    setting.server.fail("api", &vec![Fault::Garbage; 50]);
    check(&setting, &[ID], &["does not answer as the Hub does", "hint: is HF_ENDPOINT right?"]);
}

#[test]
fn offline_and_not_in_the_cache() {
    let setting = Setting::with("offline", SHARDED);
    let args = [ID, "--offline"];
    check(
        &setting,
        &args,
        &["offline, and debian/tiny (main) is not in the cache", "hint: fetch it once", "llm8 download -m"],
    );
    let folder = setting.download();
    fs::remove_file(folder.join("model-00002-of-00002.safetensors")).unwrap();
    fs::remove_file(folder.join("config.json")).unwrap();
    check(&setting, &args, &["of debian/tiny (main) the cache", "lacks config.json, model-00002-of-00002.safetensors"]);
    fs::remove_file(folder.join("model.safetensors.index.json")).unwrap();
    check(&setting, &args, &["lacks config.json, weights (model.safetensors or pytorch_model.bin"]);
}

#[test]
fn what_is_no_model_to_run_is_told_before_its_weights_are_fetched() {
    let setting = Setting::new("not-to-run");
    let mut files = files_of(&fixtures().join(SINGLE));
    let put = |files: &BTreeMap<String, Vec<u8>>| {
        let mut repo = Repo::default();
        repo.commit("main", files.clone());
        setting.server.put(ID, repo);
        setting.server.take_requests();
    };
    let fetched_weights = || setting.server.take_requests().iter().any(|request| request.path.contains(WEIGHTS));
    files.insert("config.json".to_string(), b"{\"model_type\": \"gpt2\"}".to_vec());
    put(&files);
    check(&setting, &[ID], &["debian/tiny cannot be run: ", "architecture `gpt2` is not supported", "hint: supported"]);
    assert!(!fetched_weights());
    files.remove("config.json");
    put(&files);
    check(&setting, &[ID], &["debian/tiny has no config.json", "hint: supported are BLOOM and OPT"]);
    assert!(!fetched_weights());
    let mut files = files_of(&fixtures().join(SINGLE));
    let weights = files.remove(WEIGHTS).unwrap();
    files.insert("tf_model.h5".to_string(), weights);
    put(&files);
    check(&setting, &[ID], &["debian/tiny has no weights (model.safetensors", "hint: only safetensors and PyTorch"]);
}

#[test]
fn a_disk_that_is_too_small_is_told_before_the_weights_are_fetched() {
    let setting = Setting::new("disk");
    let mut repo = Repo::of(&fixtures().join(SINGLE));
    repo.told_sizes.insert(WEIGHTS.to_string(), 5_000_000_000_000_000);
    setting.server.put(ID, repo);
    check(
        &setting,
        &[ID],
        &["debian/tiny needs 5000 TB more on the disk of ", "free", "hint: make room, or name a folder"],
    );
    assert!(!setting.server.take_requests().iter().any(|request| request.is_store));
}

#[cfg(unix)]
#[test]
fn a_cache_that_cannot_be_written() {
    let setting = Setting::with("unwritable", SINGLE);
    let file = setting.home.join("file");
    fs::write(&file, "").unwrap();
    check(
        &setting,
        &[ID, "--cache-dir", file.to_str().unwrap()],
        &["the cache ", "/file/models--debian--tiny cannot be written", "Not a directory", "hint: name another place"],
    );
}

/// Runs a program in Python with the setting's cache and endpoint, and gives what it prints.
fn python(setting: &Setting, program: &str, offline: bool) -> String {
    let python = std::env::var("LLM8_PYTHON").unwrap_or("python3".to_string());
    let mut command = Command::new(python);
    command.args(["-c", program]).env("HOME", &setting.home).env("HF_ENDPOINT", &setting.server.endpoint);
    command.env("HF_HUB_OFFLINE", if offline { "1" } else { "0" }).env("HF_HUB_DISABLE_XET", "1");
    let output = command.env_remove("HF_HOME").env_remove("HF_HUB_CACHE").output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    stdout(&output).trim_end().to_string()
}

#[test]
#[ignore = "needs Python's huggingface_hub: LLM8_PYTHON=python3 cargo test --test hub -- --ignored"]
fn pythons_tools_read_the_cache_and_llm8_reads_theirs() {
    const DOWNLOAD: &str = "import huggingface_hub as hub; print(hub.snapshot_download('debian/tiny', \
        ignore_patterns=['expected*']))";
    let setting = Setting::with("python-reads", "tiny-opt");
    let folder = setting.download();
    setting.server.take_requests();
    assert_eq!(python(&setting, DOWNLOAD, true), folder.to_str().unwrap());
    assert!(setting.server.take_requests().is_empty());
    let scan = "import huggingface_hub as hub; info = hub.scan_cache_dir(); print(info.warnings, \
        [(repo.repo_id, [sorted(r.refs) for r in repo.revisions]) for repo in info.repos])";
    assert_eq!(python(&setting, scan, true), "[] [('debian/tiny', [['main']])]");

    for fixture in ["tiny-opt", SHARDED] {
        let setting = Setting::with("python-writes", fixture);
        let folder = python(&setting, DOWNLOAD, false);
        setting.server.take_requests();
        let output = setting.run(&["download", "-q", "-m", ID, "--offline"]);
        assert_eq!(setting.downloaded(&output), Path::new(&folder));
        let local = generated(&setting.run(&generate(fixtures().join(fixture).to_str().unwrap(), &[])));
        assert_eq!(generated(&setting.run(&generate(ID, &["--offline"]))), local);
        // Online nothing is fetched again either.
        assert_eq!(setting.download(), Path::new(&folder));
        assert_eq!(contents(&setting.server.take_requests()), 0);
    }
}
