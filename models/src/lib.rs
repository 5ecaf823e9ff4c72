//! BLOOM and OPT causal language models, rebuilt on 8-bit linear layers.
//!
//! The path from a checkpoint to text, one module a step:
//!
//! - [`ModelFolder`]: the files of a model, on disk or inside the program.
//! - [`load()`]: config.json, then every tensor in the chosen [`Precision`]; the model is a [`CausalLm`].
//!   [`load_dummy()`] needs the config alone, and draws weights at random.
//! - [`quantize()`]: a checkpoint becomes an int8 checkpoint on disk, which loads as it lies there.
//! - [`TextCodec`]: text to token ids and back, streamed.
//! - [`Footprint`]: the bytes it would take, from config.json alone; [`published()`] has those of the
//!   published models.
//! - [`generate()`]: the token loop, an iterator over the tokens that follow a prompt.
//!
//! ```no_run
//! use int8_models::{GenerateOptions, LoadOptions, ModelFolder, TextCodec, generate, load};
//! let folder = ModelFolder::open("bloomz-560m")?;
//! let loaded = load(&folder, &LoadOptions::default())?;
//! let text = TextCodec::load(&folder)?;
//! let prompt = text.encode("Translate to English: Je t'aime.")?;
//! let options = GenerateOptions { eos: loaded.eos.clone(), ..Default::default() };
//! for token in generate(loaded.model.as_ref(), &prompt, &options)? {
//!     println!("{}", token?);
//! }
//! # Ok::<(), int8_models::Error>(())
//! ```

mod agreement;
mod attention;
mod bloom;
mod bytes;
mod causal_lm;
mod checkpoint;
mod config;
mod dummy;
mod error;
mod files;
mod folder;
mod footprint;
mod generate;
mod layers;
mod ledger;
mod load;
mod opt;
mod outline;
mod precision;
mod published;
mod quantization_config;
mod quantize;
mod score;
mod source;
mod staging;
mod text;
mod weights;

pub use agreement::Agreement;
pub use attention::KvCache;
pub use candle_core::Device;
pub use causal_lm::CausalLm;
pub use checkpoint::{ReadSeek, TensorHeaders, WeightFiles};
pub use dummy::load_dummy;
pub use error::{Error, Result};
pub use files::{WeightForm, small_files};
pub use folder::ModelFolder;
pub use footprint::{Footprint, WeightBytes};
pub use generate::{FinishReason, GenerateOptions, Generation, generate};
pub use int8_ops::CacheDtype;
pub use ledger::{Ledger, LedgerEntry};
pub use load::{LoadOptions, Loaded, Progress, architecture, load, stored_int8};
pub use outline::{Component, LongestContext};
pub use precision::{Int8Options, Precision};
pub use published::{published, published_names};
pub use quantization_config::StoredInt8;
pub use quantize::{QuantizeOptions, Quantized, quantize};
pub use score::score;
pub use text::{TextCodec, TextStream};
