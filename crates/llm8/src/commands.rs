//! One file a command; `model` is what every command starts with.

pub mod generate;
mod model;
