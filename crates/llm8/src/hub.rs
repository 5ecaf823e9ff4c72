//! A model's id on the Hugging Face Hub becomes a folder in the cache that Python's tools share.
//!
//! Ids, revisions and lists of files are asked for with hf-hub; files are brought by [`transfer`], which
//! goes on where a connection broke. Nothing but config, tokenizer and one form of the weights is fetched.

mod cache;
mod errors;
mod progress;
mod remote;
mod settings;
mod transfer;

use std::collections::BTreeSet;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Context;
use hf_hub::HFError;
use int8_models::{ModelFolder, WeightForm, architecture, small_files};

use crate::args::HubArgs;
use crate::failure::Failure;
use crate::output;
use cache::{RepoCache, is_commit};
use progress::Progress;
pub use remote::RemoteFiles;
use settings::Settings;
use transfer::{RemoteFile, Transfer};

const USER_AGENT: &str = concat!("llm8/", env!("CARGO_PKG_VERSION"));
/// Files that come at once.
const WORKERS: usize = 8;
const CONFIG: &str = "config.json";

/// A model's id: `ORGANISATION/MODEL`, or a name alone as the oldest models have.
pub fn is_id(model: &str) -> bool {
    let is_name = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
            && !part.contains("--")
            && !part.contains("..")
    };
    model.split('/').count() <= 2 && model.split('/').all(is_name)
}

/// One model on the Hub, at one revision.
pub struct Hub {
    id: String,
    revision: String,
    settings: Settings,
    cache: RepoCache,
    quiet: bool,
}

/// A model's revision as the Hub describes it.
struct Listing {
    commit: String,
    files: BTreeSet<String>,
}

/// Where a model is.
enum Found {
    /// In this folder, whole.
    Cached(PathBuf),
    /// On the Hub.
    Listed(Listing),
}

impl Hub {
    pub fn new(id: &str, args: &HubArgs, quiet: bool) -> anyhow::Result<Self> {
        let revision = args.revision.clone().unwrap_or_else(|| "main".to_string());
        let is_safe = |part: &str| !part.is_empty() && !part.starts_with('.') && !part.contains(['\\', ':']);
        if !revision.split('/').all(is_safe) || revision.chars().any(|c| c.is_control() || c.is_whitespace()) {
            return Err(Failure::usage(format!("`{revision}` is no branch, tag or commit")).into());
        }
        let settings = Settings::new(args)?;
        let cache = RepoCache::new(&settings.cache_dir, id);
        Ok(Self { id: id.to_string(), revision, settings, cache, quiet })
    }

    /// The folder of the model's files, fetched where they are not in the cache.
    ///
    /// When nothing is missing this takes one small request, and none for a commit's full hash or
    /// offline.
    pub fn fetch(&self) -> anyhow::Result<PathBuf> {
        let listing = match self.find()? {
            Found::Cached(folder) => return Ok(folder),
            Found::Listed(listing) => listing,
        };
        let has = |file: &str| listing.files.contains(file);
        let transfer = Transfer::new(&self.settings, &self.id)?;
        let folder = self.fetch_config(&listing, &transfer)?;
        let Some(weights) = WeightForm::choose(has) else {
            let failure = Failure::new(format!("{} has no {}", self.id, WeightForm::WANTED));
            return Err(failure.with_hint("only safetensors and PyTorch's .bin files are read").into());
        };
        let mut small = small_files(has);
        if let WeightForm::Sharded(index) = weights {
            small.push(index);
        }
        self.fetch_files(&transfer, &listing.commit, &small)?;
        let weights = weights.weight_files(&ModelFolder::open(&folder)?)?;
        self.fetch_files(&transfer, &listing.commit, &weights)?;
        self.cache.set_commit(&self.revision, &listing.commit)?;
        Ok(folder)
    }

    /// Where the model is: the cache decides offline, for a commit that is there, and when the Hub cannot
    /// be reached.
    fn find(&self) -> anyhow::Result<Found> {
        if self.settings.offline {
            return self.cached().map(Found::Cached);
        }
        if let (true, Ok(folder)) = (is_commit(&self.revision), self.cached()) {
            return Ok(Found::Cached(folder));
        }
        match self.list()? {
            Ok(listing) => Ok(Found::Listed(listing)),
            Err(unreachable) => {
                let Ok(folder) = self.cached() else { return Err(unreachable.into()) };
                self.say(&format!("{unreachable}; using the copy in the cache"));
                Ok(Found::Cached(folder))
            }
        }
    }

    /// The folder of the model's config, and the weights' headers: in the cache where all is there, else on
    /// the Hub, where little more than the headers is fetched.
    pub fn headers(&self) -> anyhow::Result<(PathBuf, Option<RemoteFiles>)> {
        let listing = match self.find()? {
            Found::Cached(folder) => return Ok((folder, None)),
            Found::Listed(listing) => listing,
        };
        let transfer = Transfer::new(&self.settings, &self.id)?;
        let folder = self.fetch_config(&listing, &transfer)?;
        let is_whole = self.missing(&listing.commit)?.is_empty();
        let remote = RemoteFiles { id: self.id.clone(), listing, transfer };
        Ok((folder, (!is_whole).then_some(remote)))
    }

    /// Brings the config, and gives its folder; an error when it is of no model that can be run.
    fn fetch_config(&self, listing: &Listing, transfer: &Transfer) -> anyhow::Result<PathBuf> {
        if !listing.files.contains(CONFIG) {
            let failure = Failure::new(format!("{} has no {CONFIG}: it is no model of Transformers", self.id));
            return Err(failure
                .with_hint("supported are BLOOM and OPT models with safetensors or .bin weights")
                .into());
        }
        self.fetch_files(transfer, &listing.commit, &[CONFIG])?;
        let folder = self.cache.snapshot(&listing.commit);
        architecture(&ModelFolder::open(&folder)?).with_context(|| format!("{} cannot be run", self.id))?;
        Ok(folder)
    }

    /// The folder in the cache, if nothing is missing in it.
    fn cached(&self) -> anyhow::Result<PathBuf> {
        let (id, revision) = (&self.id, &self.revision);
        let place = self.settings.cache_dir.display();
        let hint = format!("fetch it once with a connection: llm8 download -m {id}");
        let Some(commit) = self.cache.commit(revision) else {
            let failure = Failure::new(format!("offline, and {id} ({revision}) is not in the cache {place}"));
            return Err(failure.with_hint(hint).into());
        };
        let missing = self.missing(&commit)?;
        if !missing.is_empty() {
            let what = missing.join(", ");
            let failure = Failure::new(format!("offline, and of {id} ({revision}) the cache {place} lacks {what}"));
            return Err(failure.with_hint(hint).into());
        }
        Ok(self.cache.snapshot(&commit))
    }

    /// What a commit's folder lacks for the model to be run.
    fn missing(&self, commit: &str) -> anyhow::Result<Vec<String>> {
        let has = |file: &str| self.cache.has(commit, file);
        let mut missing = Vec::new();
        if !has(CONFIG) {
            missing.push(CONFIG.to_string());
        }
        match WeightForm::choose(has) {
            None => missing.push(WeightForm::WANTED.to_string()),
            Some(weights) => {
                let files = weights.weight_files(&ModelFolder::open(self.cache.snapshot(commit))?)?;
                missing.extend(files.into_iter().filter(|file| !has(file)));
            }
        }
        Ok(missing)
    }

    /// Asks the Hub for the revision's commit and files; the inner error says that it could not be
    /// reached.
    fn list(&self) -> anyhow::Result<Result<Listing, Failure>> {
        let settings = &self.settings;
        let http = reqwest::Client::builder()
            .user_agent(USER_AGENT)
            .connect_timeout(settings.timeout)
            .read_timeout(settings.timeout)
            .build()
            .context("the HTTP client cannot be set up")?;
        let mut client =
            hf_hub::HFClient::builder().endpoint(&settings.endpoint).cache_dir(&settings.cache_dir).client(http);
        if let Some(token) = &settings.token {
            client = client.token(token);
        }
        let client = client.build_sync().with_context(|| format!("HF_ENDPOINT is `{}`", settings.endpoint))?;
        let (owner, name) = hf_hub::split_id(&self.id);
        let info = match client.model(owner, name).info().revision(self.revision.as_str()).send() {
            Ok(info) => info,
            Err(error) => {
                let cause = match &error {
                    HFError::Request { source, .. } => errors::cause(source),
                    error => error.to_string(),
                };
                return match errors::of_info(error, settings, &self.id, &self.revision) {
                    Some(failure) => Err(failure.into()),
                    None => Ok(Err(errors::unreachable(&cause, settings))),
                };
            }
        };
        let files = info.siblings.unwrap_or_default().into_iter().map(|file| file.rfilename).collect();
        match info.sha.filter(|sha| is_commit(sha)) {
            Some(commit) => Ok(Ok(Listing { commit, files })),
            None => Err(Failure::new(format!("{}: the answer names no commit", settings.endpoint)).into()),
        }
    }

    /// Brings those of a commit's files that are not there, several at once.
    fn fetch_files(&self, transfer: &Transfer, commit: &str, names: &[impl AsRef<str> + Sync]) -> anyhow::Result<()> {
        let names: Vec<_> = names.iter().map(AsRef::as_ref).filter(|name| !self.cache.has(commit, name)).collect();
        if names.is_empty() {
            return Ok(());
        }
        let files = at_once(&names, |name| transfer.describe(commit, name))?;
        self.check_room(&files)?;
        let size = files.iter().map(|file| file.size).sum();
        let count = match files.as_slice() {
            [file] => file.name.clone(),
            files => format!("{} files", files.len()),
        };
        let (id, revision, size_text) = (&self.id, &self.revision, output::bytes(size as usize));
        self.say(&format!("fetching {id} ({revision}, commit {}): {count}, {size_text}", &commit[..8]));
        let progress = Progress::new(size, self.quiet);
        let fetched = at_once(&files, |file| {
            transfer.fetch(file, &self.cache, &progress.file(&file.name, file.size))?;
            self.cache.link(commit, &file.name, &file.etag)
        });
        progress.finish();
        fetched.map(|_| ())
    }

    /// An error when the disk cannot hold the files.
    fn check_room(&self, files: &[RemoteFile]) -> anyhow::Result<()> {
        let there = |path: PathBuf| path.metadata().map_or(0, |metadata| metadata.len());
        let needed = |file: &RemoteFile| {
            let held = there(self.cache.blob(&file.etag)) + there(self.cache.incomplete(&file.etag));
            file.size.saturating_sub(held)
        };
        let needed: u64 = files.iter().map(needed).sum();
        let Some(free) = free_room(self.cache.folder()) else { return Ok(()) };
        if needed <= free {
            return Ok(());
        }
        let (id, cache) = (&self.id, self.settings.cache_dir.display());
        let (needed, free) = (output::bytes(needed as usize), output::bytes(free as usize));
        let failure = Failure::new(format!("{id} needs {needed} more on the disk of {cache}, which has {free} free"));
        Err(failure.with_hint("make room, or name a folder on another disk with --cache-dir or HF_HUB_CACHE").into())
    }

    fn say(&self, text: &str) {
        if !self.quiet {
            output::say(text);
        }
    }
}

/// The bytes free where `folder` is, or will be made.
fn free_room(folder: &Path) -> Option<u64> {
    fs4::available_space(folder.ancestors().find(|folder| folder.exists())?).ok()
}

/// `work` on every item, several at once; the results in order, or the first error, after which
/// nothing more is begun.
fn at_once<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> anyhow::Result<R> + Sync) -> anyhow::Result<Vec<R>> {
    let next = AtomicUsize::new(0);
    let worker = || -> anyhow::Result<Vec<(usize, R)>> {
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(index) else { return Ok(done) };
            match work(item) {
                Ok(result) => done.push((index, result)),
                Err(error) => {
                    next.store(items.len(), Ordering::Relaxed);
                    return Err(error);
                }
            }
        }
    };
    let done = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..WORKERS.min(items.len())).map(|_| scope.spawn(worker)).collect();
        let results = workers.into_iter().map(|worker| worker.join().unwrap_or_else(|panic| resume_unwind(panic)));
        results.collect::<anyhow::Result<Vec<_>>>()
    })?;
    let mut done: Vec<_> = done.into_iter().flatten().collect();
    done.sort_by_key(|(index, _)| *index);
    Ok(done.into_iter().map(|(_, result)| result).collect())
}
