//! Before anything is reduced: do all ranks hold the same model? Says which rank and which parameter.

use crate::error::{During, Error, Operation};
use crate::group::ProcessGroup;
use tch::Tensor;

/// A model as one line per tensor, which is what has to agree.
fn describe(names: &[String], tensors: &[Tensor]) -> Vec<String> {
    names.iter().zip(tensors).map(|(name, t)| format!("{name} {:?} {:?}", t.size(), t.kind())).collect()
}

/// An error on *every* rank if any rank's parameters or buffers differ from rank 0's.
///
/// c10d's own check compares shapes with those of rank 0, so rank 0 itself never reports a difference and
/// would go on without its peers; so the verdicts are exchanged.
pub fn same_model(group: &ProcessGroup, names: &[String], tensors: &[Tensor]) -> Result<(), Error> {
    if group.world_size() == 1 {
        return Ok(());
    }
    let mine = describe(names, tensors);
    let first = text_of_rank_0(group, &mine.join("\n"))?;
    let first: Vec<&str> = first.lines().collect();
    let difference = (0..first.len().max(mine.len()))
        .find(|&i| first.get(i).copied() != mine.get(i).map(String::as_str))
        .map_or(-1, |i| i as i64);
    let verdicts = group.gather_number(difference)?;
    let Some(rank) = verdicts.iter().position(|&verdict| verdict >= 0) else { return Ok(()) };
    let line = verdicts[rank] as usize;
    let of_first = first.get(line).copied().unwrap_or("nothing");
    let reason = if rank == group.rank() {
        let here = mine.get(line).map_or("nothing", String::as_str);
        format!("tensor {line} is {here} on rank {rank}, this one, and {of_first} on rank 0")
    } else {
        format!("tensor {line}, {of_first} on rank 0, is another on rank {rank}")
    };
    Err(Error::ModelMismatch { reason })
}

fn text_of_rank_0(group: &ProcessGroup, text: &str) -> Result<String, Error> {
    let during = Operation::VerifyModel;
    let mut len = Tensor::from_slice(&[text.len() as i64]);
    group.inner.broadcast(&mut len, 0).during(during)?;
    let len = len.int64_value(&[0]) as usize;
    let mut bytes = vec![0; len];
    let copied = len.min(text.len());
    bytes[..copied].copy_from_slice(&text.as_bytes()[..copied]);
    let mut tensor = Tensor::from_slice(&bytes);
    group.inner.broadcast(&mut tensor, 0).during(during)?;
    tensor.copy_data(&mut bytes, len);
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
