//! Tensors as parts of a checkpoint, and back. Reads and writes no file.

use crate::checkpoint::{Checkpoint, Part};
use crate::error::Error;
use tch::{Kind, Tensor, nn};

/// Begins the names of a model's parts.
const MODEL: &str = "model/";

/// A tensor's bytes as they are in memory, with its kind and shape.
pub fn tensor_part(name: &str, tensor: &Tensor) -> Part {
    let dense = tensor.detach().to_device(tch::Device::Cpu).contiguous();
    let mut data = vec![0; dense.numel() * dense.kind().elt_size_in_bytes()];
    dense.copy_data_u8(&mut data, dense.numel());
    Part { name: name.to_owned(), kind: kind_name(dense.kind()), shape: dense.size(), data }
}

/// Overwrites a tensor with the part of this name, which must be of its kind and shape.
pub fn restore_tensor(tensor: &mut Tensor, checkpoint: &Checkpoint, name: &str) -> Result<(), Error> {
    let misfit = |reason| Error::CheckpointMismatch { path: checkpoint.path.clone(), reason };
    let part = checkpoint.part(name).ok_or_else(|| misfit(format!("it holds no {name}")))?;
    let (kind, shape) = (kind_name(tensor.kind()), tensor.size());
    if (&part.kind, &part.shape) != (&kind, &shape) {
        return Err(misfit(format!("its {name} is {} {:?}, not {kind} {shape:?}", part.kind, part.shape)));
    }
    if part.data.len() != tensor.numel() * tensor.kind().elt_size_in_bytes() {
        return Err(misfit(format!(
            "its {name} has {} bytes, too few or too many for its shape",
            part.data.len()
        )));
    }
    let saved = Tensor::from_data_size(&part.data, &shape, tensor.kind());
    tch::no_grad(|| tensor.copy_(&saved));
    Ok(())
}

/// Every variable of a model, buffers included, in order of names.
pub fn model_parts(vs: &nn::VarStore) -> Vec<Part> {
    variables(vs).iter().map(|(name, tensor)| tensor_part(&format!("{MODEL}{name}"), tensor)).collect()
}

/// Overwrites every variable of a model. To be called before [`crate::Ddp::new`], which copies rank 0's to every rank.
pub fn restore_model(vs: &nn::VarStore, checkpoint: &Checkpoint) -> Result<(), Error> {
    for (name, mut tensor) in variables(vs) {
        restore_tensor(&mut tensor, checkpoint, &format!("{MODEL}{name}"))?;
    }
    Ok(())
}

fn variables(vs: &nn::VarStore) -> Vec<(String, Tensor)> {
    // tch keeps them in a HashMap.
    let mut variables: Vec<_> = vs.variables().into_iter().collect();
    variables.sort_by(|(a, _), (b, _)| a.cmp(b));
    variables
}

fn kind_name(kind: Kind) -> String {
    format!("{kind:?}").to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn a_model_comes_back_as_it_was_and_another_is_refused() {
        let model = |wide: i64| {
            let vs = nn::VarStore::new(Device::Cpu);
            let _linear = nn::linear(vs.root() / "linear", 3, wide, nn::LinearConfig::default());
            let _norm = nn::batch_norm2d(vs.root() / "norm", 2, nn::BatchNormConfig::default());
            vs
        };
        let saved = model(2);
        let checkpoint = Checkpoint {
            path: "step-1".into(),
            step: 1,
            world_size: 1,
            generation: 0,
            parts: model_parts(&saved),
        };
        let restored = model(2);
        restore_model(&restored, &checkpoint).unwrap();
        assert_eq!(model_parts(&restored), checkpoint.parts);
        assert!(restored.trainable_variables().iter().all(Tensor::requires_grad));
        let misfit = restore_model(&model(4), &checkpoint).unwrap_err().to_string();
        assert!(misfit.contains("its model/linear.bias is float [2], not float [4]"), "{misfit}");
    }
}
