//! A model's id on the Hugging Face Hub becomes a folder in the cache that Python's tools share.
//!
//! Ids, revisions and lists of files are asked for with hf-hub; files are brought by [`transfer`], which
//! goes on where a connection broke. Nothing but config, tokenizer and one form of the weights is fetched.

mod cache;
mod errors;
mod http;
mod listing;
mod partial;
mod progress;
mod remote;
mod settings;
mod transfer;

use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::Context;
use int8_models::{ModelFolder, WeightForm, architecture, small_files};

use crate::args::HubArgs;
use crate::failure::Failure;
use crate::output;
use cache::{RepoCache, is_commit};
use listing::{Listing, list};
use progress::Progress;
pub use remote::RemoteFiles;
use settings::Settings;
use transfer::{RemoteFile, Transfer};

const USER_AGENT: &str = concat!("llm8/", env!("CARGO_PKG_VERSION"));
/// Files that come at once.
const WORKERS: usize = 8;
/// How often the list of files is asked for.
const MAX_LIST_TRIES: u32 = 4;
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

/// The id that a model's name is, unless it is a path: a folder of that name comes first.
pub fn id_of(model: &Path) -> Option<&str> {
    model.to_str().filter(|name| model.symlink_metadata().is_err() && is_id(name))
}

/// One model on the Hub, at one revision.
pub struct Hub {
    id: String,
    revision: String,
    settings: Settings,
    cache: RepoCache,
    quiet: bool,
}

/// Where a model is.
enum Found {
    /// In this folder, whole.
    Cached(PathBuf),
    /// On the Hub.
    Listed(Listing),
}

/// What is made of files that are in the cache.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Held {
    /// They were whole when they came.
    Trusted,
    /// They may have been damaged since: sizes are compared with the Hub's.
    Compared,
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

    /// The folder of the model's files, fetched where they are not in the cache; `check` is given the folder
    /// once it holds the config, and may refuse what is to come.
    ///
    /// When nothing is missing this takes one small request, and none for a commit's full hash or
    /// offline.
    pub fn fetch(&self, check: impl FnOnce(&ModelFolder) -> anyhow::Result<()>) -> anyhow::Result<PathBuf> {
        match self.find()? {
            Found::Cached(folder) => Ok(folder),
            Found::Listed(listing) => self.fetch_listed(&listing, Held::Trusted, check),
        }
    }

    /// As [`fetch`](Self::fetch), but files in the cache are compared with the Hub's: damaged ones come again.
    pub fn fetch_and_compare(&self) -> anyhow::Result<PathBuf> {
        match self.find()? {
            Found::Cached(folder) => Ok(folder),
            Found::Listed(listing) => self.fetch_listed(&listing, Held::Compared, |_| Ok(())),
        }
    }

    fn fetch_listed(
        &self,
        listing: &Listing,
        held: Held,
        check: impl FnOnce(&ModelFolder) -> anyhow::Result<()>,
    ) -> anyhow::Result<PathBuf> {
        let has = |file: &str| listing.files.contains(file);
        let transfer = Transfer::new(&self.settings, &self.id, self.quiet)?;
        let folder = self.fetch_config(listing, &transfer, held)?;
        let Some(weights) = WeightForm::choose(has) else {
            let failure = Failure::new(format!("{} has no {}", self.id, WeightForm::WANTED));
            return Err(failure.with_hint("only safetensors and PyTorch's .bin files are read").into());
        };
        check(&folder)?;
        let mut small = small_files(has);
        if let WeightForm::Sharded(index) = weights {
            small.push(index);
        }
        self.fetch_files(&transfer, &listing.commit, &small, held)?;
        self.fetch_files(&transfer, &listing.commit, &weights.weight_files(&folder)?, held)?;
        let noted = self.cache.set_commit(&self.revision, &listing.commit);
        // A cache that cannot be written is of use all the same when nothing had to come.
        if let Err(error) = noted {
            self.say(&format!("{error:#}"));
        }
        Ok(folder.path().to_path_buf())
    }

    /// Where the model is: the cache decides offline, for a commit that is there, and when the Hub cannot
    /// be reached.
    fn find(&self) -> anyhow::Result<Found> {
        if self.settings.offline {
            return self.cached().map(Found::Cached);
        }
        let cached = self.cached();
        // Python's tools may have fetched no more than the weights.
        let has_tokenizer =
            |folder: &PathBuf| folder.join("tokenizer.json").exists() || folder.join("vocab.json").exists();
        if is_commit(&self.revision) && cached.as_ref().is_ok_and(has_tokenizer) {
            return cached.map(Found::Cached);
        }
        let max_tries = if cached.is_ok() { 1 } else { MAX_LIST_TRIES };
        match list(&self.id, &self.revision, &self.settings, max_tries, |why| self.say(why))? {
            Ok(listing) => Ok(Found::Listed(listing)),
            Err(unreachable) => {
                let Ok(folder) = cached else { return Err(unreachable.into()) };
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
        let transfer = Transfer::new(&self.settings, &self.id, self.quiet)?;
        let folder = self.fetch_config(&listing, &transfer, Held::Trusted)?.path().to_path_buf();
        if self.missing(&listing.commit)?.is_empty() {
            return Ok((folder, None));
        }
        Ok((folder, Some(RemoteFiles::new(&self.id, &listing, transfer)?)))
    }

    /// Brings the config, and gives its folder; an error when it is of no model that can be run.
    fn fetch_config(&self, listing: &Listing, transfer: &Transfer, held: Held) -> anyhow::Result<ModelFolder> {
        if !listing.files.contains(CONFIG) {
            let failure = Failure::new(format!("{} has no {CONFIG}: it is no model of Transformers", self.id));
            let hint = "supported are BLOOM and OPT models with safetensors or .bin weights";
            return Err(failure.with_hint(hint).into());
        }
        self.fetch_files(transfer, &listing.commit, &[CONFIG], held)?;
        let folder = ModelFolder::open(self.cache.snapshot(&listing.commit))?;
        architecture(&folder).with_context(|| format!("{} cannot be run", self.id))?;
        Ok(folder)
    }

    /// The folder in the cache, if nothing is missing in it.
    fn cached(&self) -> anyhow::Result<PathBuf> {
        let (id, revision) = (&self.id, &self.revision);
        let place = self.settings.cache_dir.display();
        let flag = if revision == "main" { String::new() } else { format!(" --revision {revision}") };
        let hint = format!("fetch it once with a connection: llm8 download -m {id}{flag}");
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

    /// Brings those of a commit's files that are not there, several at once.
    fn fetch_files(
        &self,
        transfer: &Transfer,
        commit: &str,
        names: &[impl AsRef<str> + Sync],
        held: Held,
    ) -> anyhow::Result<()> {
        let names = names.iter().map(AsRef::as_ref);
        let names: Vec<_> = names.filter(|name| held == Held::Compared || !self.cache.has(commit, name)).collect();
        let mut files = at_once(&names, |name| transfer.describe(commit, name), || transfer.stop())?;
        files.retain(|file| !self.cache.has_whole(commit, &file.name, file.size));
        if files.is_empty() {
            return Ok(());
        }
        self.check_room(&files)?;
        let size = files.iter().map(|file| file.size).sum();
        let what = match files.as_slice() {
            [file] => file.name.clone(),
            files => format!("{} files", files.len()),
        };
        let revision = if is_commit(&self.revision) { String::new() } else { format!("{}, ", self.revision) };
        let (id, short, size_text) = (&self.id, &commit[..8], output::bytes(size as usize));
        self.say(&format!("fetching {id} ({revision}commit {short}): {what}, {size_text}"));
        let progress = Progress::new(size, self.quiet);
        let fetch = |file: &RemoteFile| {
            transfer.fetch(file, &self.cache, &progress.file(&file.name, file.size))?;
            self.cache.link(commit, &file.name, &file.etag)
        };
        let fetched = at_once(&files, fetch, || transfer.stop());
        progress.finish();
        fetched.map(drop)
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

/// `work` on every item, several at once; the results in order, or the first error, after which nothing
/// more is begun and `stop` is called for what has begun.
fn at_once<T: Sync, R: Send>(
    items: &[T],
    work: impl Fn(&T) -> anyhow::Result<R> + Sync,
    stop: impl Fn() + Sync,
) -> anyhow::Result<Vec<R>> {
    let next = AtomicUsize::new(0);
    let first_error = Mutex::new(None);
    let worker = || {
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(index) else { return done };
            match work(item) {
                Ok(result) => done.push((index, result)),
                Err(error) => {
                    first_error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                    next.store(items.len(), Ordering::Relaxed);
                    stop();
                }
            }
        }
    };
    let done = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..WORKERS.min(items.len())).map(|_| scope.spawn(worker)).collect();
        let done = workers.into_iter().map(|worker| worker.join().unwrap_or_else(|panic| resume_unwind(panic)));
        done.collect::<Vec<_>>()
    });
    if let Some(error) = first_error.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(error);
    }
    let mut done: Vec<_> = done.into_iter().flatten().collect();
    done.sort_by_key(|(index, _)| *index);
    Ok(done.into_iter().map(|(_, result)| result).collect())
}
