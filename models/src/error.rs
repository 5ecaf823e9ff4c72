//! What can go wrong between a folder and a token: where, what was found, what was wanted, what to do.

use std::path::{Path, PathBuf};

use int8_ops::device::is_out_of_memory;
use safetensors::Dtype;

/// The result of this crate's functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a model could not be loaded or run; [`Error::hint`] says what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The path given for a model is not a folder.
    #[error("{path}: {problem}")]
    Folder {
        /// The path as it was given.
        path: PathBuf,
        /// What is there instead.
        problem: String,
    },
    /// A file that the model needs is not in its folder.
    #[error("{file}: no such file")]
    MissingFile {
        /// The file that was looked for.
        file: PathBuf,
        /// What would provide it.
        hint: String,
    },
    /// A file could not be read, or does not hold what it should.
    #[error("{file}: {problem}")]
    File {
        /// The file.
        file: PathBuf,
        /// What was found and what was wanted.
        problem: String,
        /// What to do, where there is something.
        hint: Option<String>,
    },
    /// What was to be written could not be.
    #[error("{path}: {problem}")]
    Destination {
        /// The folder as it was given.
        path: PathBuf,
        /// What stands in the way.
        problem: String,
        /// What to do, where there is something.
        hint: Option<String>,
    },
    /// The work was ended at the user's wish.
    #[error("interrupted")]
    Interrupted,
    /// The model is of an architecture that this crate does not have.
    #[error("{file}: architecture `{found}` is not supported")]
    Architecture {
        /// The config file that names it.
        file: PathBuf,
        /// The `model_type`, or what stands in its place.
        found: String,
        /// The `model_type`s that are supported.
        supported: String,
    },
    /// A tensor is missing, or is not what the config calls for.
    #[error("{file}: tensor `{tensor}`: {problem}")]
    Tensor {
        /// The file the tensor is in, or should be in.
        file: PathBuf,
        /// The tensor's full name in the checkpoint.
        tensor: String,
        /// What was found and what was wanted.
        problem: String,
        /// What to do, where there is something.
        hint: Option<String>,
    },
    /// A module to keep out of int8 is not part of the model.
    #[error("no linear layer matches the module name `{name}`")]
    SkipModule {
        /// The name that was given.
        name: String,
        /// Names that would have matched.
        examples: String,
    },
    /// Text could not be turned into token ids, or ids into text.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The prompt cannot be run by the model.
    #[error("the prompt {0}")]
    Prompt(String),
    /// The prompt takes more positions than the model has.
    #[error("the prompt has {tokens} tokens, but the model has only {positions} positions")]
    PromptTooLong {
        /// The prompt's tokens.
        tokens: usize,
        /// The positions of the model.
        positions: usize,
    },
    /// An option of generation is out of its range.
    #[error("{0}")]
    Option(String),
    /// The model's output is unusable.
    #[error("the model's output is {0}")]
    Output(String),
    /// A tensor operation failed.
    #[error("{}", first_line(.0))]
    Candle(#[from] candle_core::Error),
}

/// Why a tensor is missing.
pub(crate) const NOT_FOUND: &str = "not found";
pub(crate) const NO_KNOWN_PREFIX: &str = "not found, with any known prefix";

/// How a checkpoint can contradict its config: said alike whether it is loaded or only looked at.
impl Error {
    pub(crate) fn missing_tensor(file: &Path, tensor: String, problem: &str) -> Self {
        let hint = "the checkpoint is incomplete, or of another model than its config.json";
        let (file, problem, hint) = (file.to_path_buf(), problem.to_string(), Some(hint.to_string()));
        Self::Tensor { file, tensor, problem, hint }
    }

    pub(crate) fn wrong_shape(file: &Path, tensor: &str, found: &[usize], wanted: &[usize]) -> Self {
        let problem = format!("has shape {found:?}, but config.json calls for {wanted:?}");
        Self::Tensor { file: file.to_path_buf(), tensor: tensor.to_string(), problem, hint: None }
    }

    pub(crate) fn wrong_dtype(file: &Path, tensor: &str, found: Dtype, wanted: &str) -> Self {
        let problem = format!("is {found:?}, wanted {wanted}");
        Self::Tensor { file: file.to_path_buf(), tensor: tensor.to_string(), problem, hint: None }
    }

    pub(crate) fn no_memory(file: &Path, tensor: &str, bytes: usize) -> Self {
        let problem = format!("there is no memory for the {bytes} bytes that it takes");
        Self::Tensor { file: file.to_path_buf(), tensor: tensor.to_string(), problem, hint: None }
    }

    pub(crate) fn not_in_shard(shard: &Path, tensor: &str, index: &str) -> Self {
        let problem = format!("not in the file, though {index} says so");
        let hint = Some("the shards and their index do not belong together: fetch them again".to_string());
        Self::Tensor { file: shard.to_path_buf(), tensor: tensor.to_string(), problem, hint }
    }

    pub(crate) fn extra_block(file: &Path, tensor: &str, blocks: usize) -> Self {
        let problem = format!("is of block {blocks}, counted from 0, but config.json calls for {blocks} blocks");
        let hint = Some("the config.json may be of another model, or have been changed".to_string());
        Self::Tensor { file: file.to_path_buf(), tensor: tensor.to_string(), problem, hint }
    }
}

impl Error {
    /// What to do about the error, where there is something to say.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Folder { .. } => Some(
                "give the folder of a model that has been downloaded: config.json, tokenizer and weights".to_string(),
            ),
            Self::MissingFile { hint, .. } => Some(hint.clone()),
            Self::Architecture { supported, .. } => Some(format!("supported architectures: {supported}")),
            Self::Tensor { hint, .. } | Self::File { hint, .. } | Self::Destination { hint, .. } => hint.clone(),
            Self::SkipModule { examples, .. } => Some(format!("modules of this model: {examples}")),
            Self::Output(_) => Some("a weight or the checkpoint may be damaged; try --precision f32".to_string()),
            Self::PromptTooLong { .. } => {
                Some("give a shorter prompt: the model was not made for longer texts".to_string())
            }
            Self::Candle(error) if is_out_of_memory(error) => Some(
                "end other programs on the device, or take a smaller precision, a shorter context or a smaller batch"
                    .to_string(),
            ),
            Self::Tokenizer(_) | Self::Prompt(_) | Self::Option(_) | Self::Candle(_) | Self::Interrupted => None,
        }
    }
}

/// A Candle error's message without the backtrace that may follow it.
pub(crate) fn first_line(error: &candle_core::Error) -> String {
    if is_out_of_memory(error) {
        return "the device has no memory left".to_string();
    }
    error.to_string().lines().next().unwrap_or_default().to_string()
}
