//! The published models by name, as their config.json has them: for what needs a model's shape alone.
//!
//! Sizes are those of the models' own configs on the Hub (BLOOM: Scao et al. 2022, table 3; OPT: Zhang
//! et al. 2022, table 1); the tests hold them against the published numbers of parameters.

use crate::folder::ModelFolder;

/// A name on the Hub, and a folder that holds the config alone.
type Published = (&'static str, &'static [(&'static str, &'static [u8])]);

/// A BLOOM: its name, hidden size, blocks and heads.
macro_rules! bloom {
    ($name:literal, $hidden:literal, $layers:literal, $heads:literal) => {
        (
            concat!("bigscience/", $name),
            &[(
                "config.json",
                concat!(
                    r#"{"model_type": "bloom", "architectures": ["BloomForCausalLM"], "vocab_size": 250880, "#,
                    r#""hidden_size": "#,
                    $hidden,
                    r#", "n_layer": "#,
                    $layers,
                    r#", "n_head": "#,
                    $heads,
                    r#", "layer_norm_epsilon": 1e-05, "apply_residual_connection_post_layernorm": false, "#,
                    r#""seq_length": 2048, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}"#
                )
                .as_bytes(),
            )],
        )
    };
}

/// An OPT: its name, hidden size, width of the embedding, blocks, heads, width of the MLP, and whether
/// norms come first.
macro_rules! opt {
    ($name:literal, $hidden:literal, $layers:literal, $heads:literal, $ffn:literal) => {
        opt!($name, $hidden, $hidden, $layers, $heads, $ffn, true)
    };
    (
        $name:literal, $hidden:literal, $embedding:literal, $layers:literal, $heads:literal, $ffn:literal,
        $norm_before:literal
    ) => {
        (
            concat!("facebook/", $name),
            &[(
                "config.json",
                concat!(
                    r#"{"model_type": "opt", "architectures": ["OPTForCausalLM"], "vocab_size": 50272, "#,
                    r#""hidden_size": "#,
                    $hidden,
                    r#", "word_embed_proj_dim": "#,
                    $embedding,
                    r#", "num_hidden_layers": "#,
                    $layers,
                    r#", "num_attention_heads": "#,
                    $heads,
                    r#", "ffn_dim": "#,
                    $ffn,
                    r#", "do_layer_norm_before": "#,
                    $norm_before,
                    r#", "activation_function": "relu", "max_position_embeddings": 2048, "#,
                    r#""bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}"#
                )
                .as_bytes(),
            )],
        )
    };
}

/// The models, by family and size.
#[rustfmt::skip] // a table
static PUBLISHED: &[Published] = &[
    bloom!("bloom-560m",       1024, 24,  16),
    bloom!("bloom-1b1",        1536, 24,  16),
    bloom!("bloom-1b7",        2048, 24,  16),
    bloom!("bloom-3b",         2560, 30,  32),
    bloom!("bloom-7b1",        4096, 30,  32),
    bloom!("bloom",           14336, 70, 112),
    bloom!("bloomz-560m",      1024, 24,  16),
    bloom!("bloomz-1b1",       1536, 24,  16),
    bloom!("bloomz-1b7",       2048, 24,  16),
    bloom!("bloomz-3b",        2560, 30,  32),
    bloom!("bloomz-7b1",       4096, 30,  32),
    bloom!("bloomz-7b1-mt",    4096, 30,  32),
    bloom!("bloomz-7b1-p3",    4096, 30,  32),
    bloom!("bloomz",          14336, 70, 112),
    bloom!("bloomz-mt",       14336, 70, 112),
    bloom!("bloomz-p3",       14336, 70, 112),
    opt!("opt-125m",            768, 12,  12,  3072),
    opt!("opt-350m",      1024, 512, 24,  16,  4096, false),
    opt!("opt-1.3b",           2048, 24,  32,  8192),
    opt!("opt-2.7b",           2560, 32,  32, 10240),
    opt!("opt-6.7b",           4096, 32,  32, 16384),
    opt!("opt-13b",            5120, 40,  40, 20480),
    opt!("opt-30b",            7168, 48,  56, 28672),
    opt!("opt-66b",            9216, 64,  72, 36864),
    opt!("opt-iml-1.3b",       2048, 24,  32,  8192),
    opt!("opt-iml-max-1.3b",   2048, 24,  32,  8192),
    opt!("opt-iml-30b",        7168, 48,  56, 28672),
    opt!("opt-iml-max-30b",    7168, 48,  56, 28672),
];

/// A folder with the config.json of a published model and nothing else; `None` for another name. The
/// name is that on the Hub, such as `bigscience/bloom-7b1`.
pub fn published(name: &str) -> Option<ModelFolder> {
    let (name, files) = PUBLISHED.iter().find(|(published, _)| *published == name)?;
    Some(ModelFolder::embedded(name, files))
}

/// The names that [`published()`] knows.
pub fn published_names() -> impl Iterator<Item = &'static str> {
    PUBLISHED.iter().map(|(name, _)| *name)
}
