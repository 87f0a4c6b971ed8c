//! The core from the outside, on a model cluster.

mod life;
mod properties;
mod recovery;
mod scale;
mod world;
