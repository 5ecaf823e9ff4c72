//! The files of a model: a folder on disk, or one built into the program.

use std::borrow::Cow;
use std::fs::File;
use std::io::{BufReader, Cursor, ErrorKind, Read, Seek};
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::bytes::Bytes;
use crate::checkpoint::{ReadSeek, WeightFiles};
use crate::error::{Error, Result};

/// The most that a config, an index or a tokenizer may take; the largest published one has 15 MB.
const MAX_SMALL_FILE: u64 = 1 << 28;

/// Where a model's files are.
#[derive(Debug, Clone)]
pub struct ModelFolder {
    path: PathBuf,
    /// Name and content of each file, of a folder built into the program.
    embedded: Option<&'static [(&'static str, &'static [u8])]>,
}

/// How the small text begins that Git LFS has in place of a large file.
const LFS_START: &[u8] = b"version https://git-lfs.github.com/spec/";

impl ModelFolder {
    /// The folder at `path`; an error when there is none.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let problem = match path.metadata() {
            Ok(metadata) if metadata.is_dir() => return Ok(Self { path, embedded: None }),
            Ok(_) => "not a folder".to_string(),
            Err(error) if error.kind() == ErrorKind::NotFound => "no such folder".to_string(),
            Err(error) => error.to_string(),
        };
        Err(Error::Folder { path, problem })
    }

    /// A folder built into the program: `name` stands for its path in messages, `files` are the name
    /// and content of each file.
    pub fn embedded(name: &str, files: &'static [(&'static str, &'static [u8])]) -> Self {
        Self { path: PathBuf::from(name), embedded: Some(files) }
    }

    /// The path, or the name of a folder built into the program.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The path of a file of the folder, for opening it and for messages.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Whether there is anything of that name; opening it tells what.
    pub(crate) fn has(&self, name: &str) -> bool {
        match self.embedded {
            Some(files) => files.iter().any(|(file, _)| *file == name),
            None => self.file(name).symlink_metadata().is_ok(),
        }
    }

    /// The content of a small file; `None` when there is no such file.
    pub(crate) fn read(&self, name: &str) -> Result<Option<Cow<'static, [u8]>>> {
        if let Some(files) = self.embedded {
            return Ok(files.iter().find(|(file, _)| *file == name).map(|(_, content)| Cow::Borrowed(*content)));
        }
        if !self.has(name) {
            return Ok(None);
        }
        let (mut file, len) = self.open_plain(name)?;
        if len > MAX_SMALL_FILE {
            return Err(self.problem(name, format!("has {len} bytes, wanted {MAX_SMALL_FILE} at most")));
        }
        let mut content = Vec::new();
        file.read_to_end(&mut content).map_err(|error| self.unreadable(name, error))?;
        self.check_lfs_pointer(name, &content)?;
        Ok(Some(Cow::Owned(content)))
    }

    /// Opens a plain file, and tells its length: a pipe would wait for ever, and a device never end.
    fn open_plain(&self, name: &str) -> Result<(File, u64)> {
        let metadata = self.file(name).metadata().map_err(|error| self.unreadable(name, error))?;
        if !metadata.is_file() {
            return Err(self.problem(name, "is not a plain file".to_string()));
        }
        let file = File::open(self.file(name)).map_err(|error| self.unreadable(name, error))?;
        Ok((file, metadata.len()))
    }

    fn unreadable(&self, name: &str, error: std::io::Error) -> Error {
        self.problem(name, format!("cannot be read: {error}"))
    }

    /// A repository cloned without Git LFS has small texts in place of its large files.
    fn check_lfs_pointer(&self, name: &str, content: &[u8]) -> Result<()> {
        if !content.starts_with(LFS_START) {
            return Ok(());
        }
        let problem = "is a Git LFS pointer, not the file itself".to_string();
        Err(self.problem_with_hint(name, problem, "run `git lfs pull` in the model's folder"))
    }

    /// A JSON file; `None` when there is no such file.
    pub(crate) fn read_json(&self, name: &str) -> Result<Option<serde_json::Value>> {
        let Some(content) = self.read(name)? else { return Ok(None) };
        match serde_json::from_slice(&content) {
            Ok(json) => Ok(Some(json)),
            Err(error) => Err(self.problem(name, format!("is not JSON: {error}"))),
        }
    }

    /// The content of a large file, read as it is used.
    pub(crate) fn map(&self, name: &str) -> Result<Bytes> {
        if let Some(content) = self.embedded.and_then(|files| files.iter().find(|(file, _)| *file == name)) {
            return Ok(Bytes::Embedded(content.1));
        }
        let (file, len) = self.open_plain(name)?;
        if len == 0 {
            return Ok(Bytes::Embedded(&[]));
        }
        // SAFETY: the map is only read. Another program that shortened the file meanwhile would end
        // this one by a signal; checkpoints are written once, under another name, and then renamed.
        let bytes = Bytes::Mapped(unsafe { Mmap::map(&file) }.map_err(|error| self.unreadable(name, error))?);
        self.check_lfs_pointer(name, &bytes)?;
        Ok(bytes)
    }

    /// An error about a file of the folder.
    pub(crate) fn problem(&self, name: &str, problem: String) -> Error {
        Error::File { file: self.file(name), problem, hint: None }
    }

    /// An error about a file of the folder, and what to do.
    pub(crate) fn problem_with_hint(&self, name: &str, problem: String, hint: &str) -> Error {
        Error::File { file: self.file(name), problem, hint: Some(hint.to_string()) }
    }
}

impl WeightFiles for ModelFolder {
    fn path(&self, name: &str) -> PathBuf {
        self.file(name)
    }

    /// A Git LFS pointer stands for a file that is not here.
    fn open(&self, name: &str) -> Result<Option<Box<dyn ReadSeek + '_>>> {
        if let Some(files) = self.embedded {
            let file = files.iter().find(|(file, _)| *file == name);
            return Ok(file.map(|(_, content)| Box::new(Cursor::new(*content)) as Box<dyn ReadSeek>));
        }
        if !self.has(name) {
            return Ok(None);
        }
        let (mut file, _) = self.open_plain(name)?;
        let mut start = Vec::new();
        let read = (&mut file).take(LFS_START.len() as u64).read_to_end(&mut start).and_then(|_| file.rewind());
        read.map_err(|error| self.unreadable(name, error))?;
        Ok(if start == LFS_START { None } else { Some(Box::new(BufReader::new(file))) })
    }
}
