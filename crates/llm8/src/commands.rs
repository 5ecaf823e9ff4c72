//! One file a command; `model`, `prompt` and `report` are what several share.

pub mod bench;
pub mod compare;
pub mod download;
pub mod footprint;
pub mod generate;
pub mod quantize;

mod model;
mod prompt;
mod report;
