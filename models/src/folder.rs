//! The files of a model: a folder on disk, or one built into the program.

use std::borrow::Cow;
use std::fs::File;
use std::io::ErrorKind;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::error::{Error, Result};

/// Where a model's files are.
#[derive(Debug, Clone)]
pub struct ModelFolder {
    path: PathBuf,
    /// Name and content of each file, of a folder built into the program.
    embedded: Option<&'static [(&'static str, &'static [u8])]>,
}

/// The bytes of a file, mapped into memory or built into the program.
#[derive(Debug)]
pub(crate) enum Bytes {
    Mapped(Mmap),
    Embedded(&'static [u8]),
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Embedded(bytes) => bytes,
        }
    }
}

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

    pub(crate) fn has(&self, name: &str) -> bool {
        match self.embedded {
            Some(files) => files.iter().any(|(file, _)| *file == name),
            None => self.file(name).is_file(),
        }
    }

    /// The content of a small file; `None` when there is no such file.
    pub(crate) fn read(&self, name: &str) -> Result<Option<Cow<'static, [u8]>>> {
        if let Some(files) = self.embedded {
            return Ok(files.iter().find(|(file, _)| *file == name).map(|(_, content)| Cow::Borrowed(*content)));
        }
        match std::fs::read(self.file(name)) {
            Ok(content) => Ok(Some(Cow::Owned(content))),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.problem(name, format!("cannot be read: {error}"))),
        }
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
        let unreadable = |error: std::io::Error| self.problem(name, format!("cannot be read: {error}"));
        let file = File::open(self.file(name)).map_err(unreadable)?;
        if file.metadata().map_err(unreadable)?.len() == 0 {
            return Ok(Bytes::Embedded(&[]));
        }
        // SAFETY: the map is only read. Another program that shortened the file meanwhile would end
        // this one by a signal; checkpoints are written once, under another name, and then renamed.
        Ok(Bytes::Mapped(unsafe { Mmap::map(&file) }.map_err(unreadable)?))
    }

    /// An error about a file of the folder.
    pub(crate) fn problem(&self, name: &str, problem: String) -> Error {
        Error::File { file: self.file(name), problem }
    }
}
