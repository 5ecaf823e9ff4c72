//! The cache that Python's tools share: `models--ORG--NAME` with `blobs` (contents by etag),
//! `snapshots` (a folder of links for each commit) and `refs` (branch or tag to commit).

use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::failure::Failure;

/// One model's part of the cache.
pub struct RepoCache {
    folder: PathBuf,
    locks: PathBuf,
}

impl RepoCache {
    /// The part of `cache_dir` for the model `id`; nothing is made before it is needed.
    pub fn new(cache_dir: &Path, id: &str) -> Self {
        let name = format!("models--{}", id.replace('/', "--"));
        Self { folder: cache_dir.join(&name), locks: cache_dir.join(".locks").join(name) }
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The commit that `revision` stood for when it was last fetched, or is itself.
    pub fn commit(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_string());
        }
        let commit = fs::read_to_string(self.folder.join("refs").join(revision)).ok()?;
        Some(commit.trim().to_string()).filter(|commit| is_commit(commit))
    }

    /// Notes that `revision` stands for `commit`.
    pub fn set_commit(&self, revision: &str, commit: &str) -> anyhow::Result<()> {
        if is_commit(revision) || self.commit(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        let file = self.folder.join("refs").join(revision);
        let write = || {
            let mut new = NamedTempFile::new_in(make_parent(&file)?)?;
            new.write_all(commit.as_bytes())?;
            new.persist(&file).map(drop).map_err(|error| error.error)
        };
        write().map_err(|error| self.unwritable(&error).into())
    }

    /// The folder of a commit's files.
    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    /// Whether a commit's file is there, whole.
    pub fn has(&self, commit: &str, file: &str) -> bool {
        self.snapshot(commit).join(file).exists()
    }

    /// Whether a commit's file is there, with this size.
    pub fn has_whole(&self, commit: &str, file: &str, size: u64) -> bool {
        let metadata = self.snapshot(commit).join(file).metadata();
        metadata.is_ok_and(|metadata| metadata.is_file() && metadata.len() == size)
    }

    pub fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }

    /// Where a blob is gathered until it is whole.
    pub fn incomplete(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(format!("{etag}.incomplete"))
    }

    /// Lets the commit's `file` be the blob.
    pub fn link(&self, commit: &str, file: &str, etag: &str) -> anyhow::Result<()> {
        let pointer = self.snapshot(commit).join(file);
        let write = || {
            let new = tempfile::Builder::new()
                .prefix(".link")
                .make_in(make_parent(&pointer)?, |new| point(&self.blob(etag), etag, new))?;
            new.persist(&pointer).map(drop).map_err(|error| error.error)
        };
        write().map_err(|error| self.unwritable(&error).into())
    }

    /// The lock on a blob, held until the file is dropped or its process ends. While another process has
    /// it, `wait` is called before each new try; its error ends the waiting.
    pub fn lock(&self, etag: &str, mut wait: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<File> {
        let path = self.locks.join(format!("{etag}.lock"));
        let open = || {
            make_parent(&path)?;
            // Windows locks no file that is open for appending alone.
            File::options().create(true).read(true).append(true).open(&path)
        };
        let file = open().map_err(|error| self.unwritable(&error))?;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) => wait()?,
                Err(TryLockError::Error(error)) => {
                    let failure = Failure::new(format!("{}: cannot be locked: {error}", path.display()));
                    return Err(failure
                        .with_hint("keep the cache on a local disk: --cache-dir or HF_HUB_CACHE")
                        .into());
                }
            }
        }
    }

    fn unwritable(&self, error: &io::Error) -> Failure {
        let failure = Failure::new(format!("the cache {} cannot be written: {error}", self.folder.display()));
        failure.with_hint("name another place with --cache-dir or HF_HUB_CACHE")
    }
}

/// Whether a revision is a commit's full hash.
pub fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// The folder of a file, made where there is none.
pub fn make_parent(file: &Path) -> io::Result<&Path> {
    let folder = file.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map(|()| folder)
}

/// A relative link, so that the cache can be moved; every snapshot is two folders below the model's,
/// and no file that is fetched lies deeper.
#[cfg(unix)]
fn point(_blob: &Path, etag: &str, pointer: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(Path::new("../../blobs").join(etag), pointer)
}

/// Links need a privilege on Windows, where Python's tools copy too.
#[cfg(not(unix))]
fn point(blob: &Path, _etag: &str, pointer: &Path) -> io::Result<()> {
    fs::hard_link(blob, pointer).or_else(|_| fs::copy(blob, pointer).map(|_| ()))
}
