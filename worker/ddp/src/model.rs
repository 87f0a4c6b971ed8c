//! What of a variable store is trained, what is frozen, and what is a buffer. Reads; never changes.

use std::collections::HashMap;
use tch::{Tensor, nn};

/// The variables of a store, in an order that is the same in every process.
pub struct Model {
    pub parameters: Vec<Tensor>,
    pub parameter_names: Vec<String>,
    /// Trainable by nature, not now: they start equal on every rank, and stay so by themselves.
    pub frozen: Vec<Tensor>,
    pub frozen_names: Vec<String>,
    pub buffers: Vec<Tensor>,
    pub buffer_names: Vec<String>,
}

impl Model {
    pub fn of(vs: &nn::VarStore) -> Self {
        // tch keeps names in a HashMap, and trainable variables, nameless, in order of creation.
        let mut names: HashMap<usize, String> =
            vs.variables().into_iter().map(|(name, tensor)| (address(&tensor), name)).collect();
        let trainable: Vec<(String, Tensor)> = vs
            .trainable_variables()
            .into_iter()
            .enumerate()
            .map(|(i, tensor)| {
                (names.remove(&address(&tensor)).unwrap_or_else(|| format!("parameter {i}")), tensor)
            })
            .collect();
        let (parameters, frozen): (Vec<_>, Vec<_>) =
            trainable.into_iter().partition(|(_, tensor)| tensor.requires_grad());
        let mut buffers: Vec<(String, Tensor)> =
            vs.variables().into_iter().filter(|(_, tensor)| names.contains_key(&address(tensor))).collect();
        buffers.sort_by(|(a, _), (b, _)| a.cmp(b));

        let (parameter_names, parameters) = parameters.into_iter().unzip();
        let (frozen_names, frozen) = frozen.into_iter().unzip();
        let (buffer_names, buffers) = buffers.into_iter().unzip();
        Self { parameters, parameter_names, frozen, frozen_names, buffers, buffer_names }
    }
}

fn address(tensor: &Tensor) -> usize {
    tensor.data_ptr() as usize
}
