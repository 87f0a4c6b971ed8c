//! Messages printed as JSON.

pub(crate) use muster_cli::messages::line;
use prost::Message;

use crate::exit::{Failure, out};

/// Prints a message of type `name` on a line of standard output.
pub(crate) fn print(name: &str, message: &impl Message) -> Result<(), Failure> {
    out!("{}\n", line(name, message)?);
    Ok(())
}
