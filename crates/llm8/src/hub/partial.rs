//! The part of a file that has come, kept beside the cache's blobs and hashed as it comes.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use sha1::{Digest, Sha1};
use sha2::Sha256;

use super::cache::make_parent;
use super::transfer::RemoteFile;
use crate::failure::Failure;

pub struct Partial {
    path: PathBuf,
    file: File,
    len: u64,
    hash: Hash,
    /// Whether all of it came in this run.
    is_fresh: bool,
}

impl Partial {
    /// What an earlier run has left, or nothing; `each` is called with the bytes that are found, as they
    /// are hashed, and may end it.
    pub fn open(path: PathBuf, remote: &RemoteFile, each: impl Fn(u64) -> anyhow::Result<()>) -> anyhow::Result<Self> {
        let unwritable = || format!("{}: cannot be written", path.display());
        make_parent(&path).with_context(unwritable)?;
        let mut options = File::options();
        options.create(true).read(true).write(true).truncate(false);
        let mut file = options.open(&path).with_context(unwritable)?;
        let (mut hash, mut len, mut buffer) = (Hash::of(remote), 0, vec![0; 1 << 20]);
        loop {
            let count = file.read(&mut buffer).with_context(|| format!("{}: cannot be read", path.display()))?;
            if count == 0 {
                break;
            }
            hash.update(&buffer[..count]);
            len += count as u64;
            if len <= remote.size {
                each(count as u64)?;
            }
        }
        let mut partial = Self { path, file, len, hash, is_fresh: len == 0 };
        if len > remote.size {
            partial.restart(remote)?;
        }
        Ok(partial)
    }

    /// Bytes that are here.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether all of it came in this run.
    pub fn is_fresh(&self) -> bool {
        self.is_fresh
    }

    pub fn push(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        self.file.write_all(bytes).map_err(|error| match error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
                let failure = Failure::new(format!("{}: the disk is full", self.path.display()));
                failure.with_hint("make room and try again: what has been fetched is kept").into()
            }
            _ => anyhow::Error::new(error).context(format!("{}: cannot be written", self.path.display())),
        })?;
        self.hash.update(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// Forgets what has come.
    pub fn restart(&mut self, remote: &RemoteFile) -> anyhow::Result<()> {
        let empty = self.file.set_len(0).and_then(|()| self.file.seek(SeekFrom::Start(0)));
        empty.with_context(|| format!("{}: cannot be written", self.path.display()))?;
        self.len = 0;
        self.hash = Hash::of(remote);
        self.is_fresh = true;
        Ok(())
    }

    /// Whether what has come is the whole file, unchanged.
    pub fn is_right(&self, remote: &RemoteFile) -> bool {
        self.len == remote.size && self.hash.clone().is(&remote.etag)
    }

    /// Lets it be the blob.
    pub fn finish(self, blob: &Path) -> anyhow::Result<()> {
        self.file.sync_all().with_context(|| format!("{}: cannot be written", self.path.display()))?;
        fs::rename(&self.path, blob).with_context(|| format!("{}: cannot be written", blob.display()))
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
        match (file.is_hashed(), file.etag.len()) {
            (true, 64) => Self::Sha256(Sha256::new()),
            (true, _) => Self::Git(Sha1::new_with_prefix(format!("blob {}\0", file.size))),
            (false, _) => Self::Unknown,
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hash) => hash.update(bytes),
            Self::Git(hash) => hash.update(bytes),
            Self::Unknown => {}
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
