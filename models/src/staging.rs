//! A folder that appears whole or not at all: it is filled under another name beside its place, and
//! renamed when it is done.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::error::{Error, Result};

/// A folder being filled; dropped before [`Staging::publish`], it is removed.
#[derive(Debug)]
pub(crate) struct Staging {
    folder: TempDir,
    destination: PathBuf,
    parent: PathBuf,
}

impl Staging {
    /// Begins a folder that will be `destination`, where there must be nothing yet, or an empty folder.
    pub(crate) fn new(destination: &Path) -> Result<Self> {
        let problem = |problem: String, hint: &str| Error::Destination {
            path: destination.to_path_buf(),
            problem,
            hint: Some(hint.to_string()),
        };
        match fs::read_dir(destination) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
                return Err(problem("is there already, and is no folder".to_string(), "give another name"));
            }
            Err(error) => return Err(problem(error.to_string(), "give another folder")),
            Ok(mut entries) => {
                if entries.next().is_some() {
                    let hint = "give the name of a new folder, or remove this one first";
                    return Err(problem("is there already, and not empty".to_string(), hint));
                }
            }
        }
        // A link is followed: the folder that it leads to is the one to write.
        let resolved = match destination.symlink_metadata() {
            Ok(_) => destination.canonicalize(),
            Err(_) => Ok(destination.to_path_buf()),
        };
        let Ok(destination) = resolved.as_deref() else {
            return Err(problem("is a link to nothing".to_string(), "give the name of a new folder"));
        };
        let Some(name) = destination.file_name() else {
            return Err(problem("is not the name of a folder".to_string(), "give the name of a new folder"));
        };
        let parent = match destination.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
            _ => PathBuf::from("."),
        };
        if is_mount_point(destination, &parent) {
            let hint = "give the name of a new folder inside it";
            return Err(problem("is a mount point, which cannot be replaced".to_string(), hint));
        }
        let mut prefix = std::ffi::OsString::from(".");
        prefix.push(name);
        let mut builder = tempfile::Builder::new();
        builder.prefix(&prefix).suffix(".partial");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // As for any new folder, less what the process's mask takes away.
            builder.permissions(fs::Permissions::from_mode(0o777));
        }
        let made = builder.tempdir_in(&parent);
        let folder = made.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => {
                problem(format!("cannot be made: no folder {}", parent.display()), "make that folder first")
            }
            // The whole error speaks of the other name.
            kind => problem(format!("cannot be made: {kind}"), "give a folder that may be written to"),
        })?;
        Ok(Self { folder, destination: destination.to_path_buf(), parent })
    }

    /// Where to write meanwhile.
    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// An error unless the disk has room for `bytes`.
    pub(crate) fn check_space(&self, bytes: u64) -> Result<()> {
        // Where the system does not tell, writing will.
        match fs4::available_space(&self.parent) {
            Ok(available) if available < bytes => Err(Error::Destination {
                path: self.destination.clone(),
                problem: format!("needs {bytes} bytes, but its disk has only {available} left"),
                hint: Some("give a folder on another disk, or make room".to_string()),
            }),
            _ => Ok(()),
        }
    }

    /// Writes a small file.
    pub(crate) fn write(&self, name: &str, content: &[u8]) -> Result<()> {
        let write = || {
            let mut file = File::create_new(self.path().join(name))?;
            file.write_all(content)?;
            file.sync_all()
        };
        write().map_err(|error| self.unwritable(error))
    }

    /// The error of a file of the folder that cannot be written.
    pub(crate) fn unwritable(&self, error: io::Error) -> Error {
        Error::Destination {
            path: self.destination.clone(),
            problem: format!("cannot be written: {error}"),
            hint: Some("nothing is left there of what had been written".to_string()),
        }
    }

    /// Gives the folder its name. All its files must be on the disk.
    pub(crate) fn publish(self) -> Result<()> {
        let sync = |folder: &Path| if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) };
        let publish = || {
            sync(self.path())?;
            #[cfg(not(unix))]
            if self.destination.exists() {
                fs::remove_dir(&self.destination)?;
            }
            fs::rename(self.path(), &self.destination)
        };
        publish().map_err(|error| self.unwritable(error))?;
        // The folder is there; a parent that may not be read cannot be synced, and is some time later.
        let _ = sync(&self.parent);
        Ok(())
        // The temporary name no longer exists when it is dropped, which is no error.
    }
}

/// Whether a folder that is there is on another file system than its parent.
#[cfg(unix)]
fn is_mount_point(folder: &Path, parent: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    folder.metadata().is_ok_and(|folder| parent.metadata().is_ok_and(|parent| folder.dev() != parent.dev()))
}

#[cfg(not(unix))]
fn is_mount_point(_folder: &Path, _parent: &Path) -> bool {
    false
}
