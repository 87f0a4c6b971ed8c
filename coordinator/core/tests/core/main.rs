//! The core from the outside, on a model cluster.

mod access;
mod agents;
mod life;
mod machines;
mod owners;
mod properties;
mod recovery;
mod rendezvous;
mod scale;
mod strangers;
mod world;
