//! The demonstration model: a small trained BLOOM at int8, inside the program.

use int8_models::ModelFolder;

/// What stands for its path in messages.
pub const NAME: &str = "(demonstration model)";

macro_rules! files {
    ($($name:literal),+ $(,)?) => {
        &[$(($name, include_bytes!(concat!("../demo/", $name)).as_slice())),+]
    };
}

/// The files, as they stand in the folder `demo` of this crate.
static FILES: &[(&str, &[u8])] = files![
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
];

pub fn folder() -> ModelFolder {
    ModelFolder::embedded(NAME, FILES)
}
