//! The cache that Python's tools share: `models--ORG--NAME` with `blobs` (contents by etag),
//! `snapshots` (a folder of links for each commit) and `refs` (branch or tag to commit).

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::Context;

/// One model's part of the cache.
#[derive(Clone)]
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
            make_parent(&file)?;
            let new = beside(&file);
            fs::write(&new, commit)?;
            fs::rename(&new, &file)
        };
        write().with_context(|| format!("{}: cannot be written", file.display()))
    }

    /// The folder of a commit's files.
    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    /// Whether a commit's file is there, whole.
    pub fn has(&self, commit: &str, file: &str) -> bool {
        self.snapshot(commit).join(file).exists()
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
            make_parent(&pointer)?;
            let new = beside(&pointer);
            point(&self.blob(etag), etag, &new)?;
            fs::rename(&new, &pointer)
        };
        write().with_context(|| format!("{}: cannot be written", pointer.display()))
    }

    /// The lock on a blob, which is held until the file is dropped, or its process ends. Where another
    /// process has it, `wait` is called, then asked again and again whether to go on waiting.
    pub fn lock(&self, etag: &str, mut wait: impl FnMut() -> bool) -> anyhow::Result<Option<File>> {
        let path = self.locks.join(format!("{etag}.lock"));
        let open = || {
            make_parent(&path)?;
            File::options().create(true).append(true).open(&path)
        };
        let file = open().with_context(|| format!("{}: cannot be written", path.display()))?;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Some(file)),
                Err(TryLockError::WouldBlock) if wait() => {}
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(error)) => {
                    return Err(error).with_context(|| format!("{}: cannot be locked", path.display()));
                }
            }
        }
    }
}

/// Whether a revision is a commit's full hash.
pub fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}

pub fn make_parent(file: &Path) -> io::Result<()> {
    file.parent().map_or(Ok(()), fs::create_dir_all)
}

/// A name of this process alone beside `file`, to be renamed to it.
fn beside(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    let new = PathBuf::from(name);
    // What a killed process of the same number may have left.
    let _ = fs::remove_file(&new);
    new
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
