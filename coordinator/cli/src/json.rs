//! Messages printed as JSON.

pub(crate) use muster_cli::messages::line;
use prost::Message;

use crate::exit::Failure;
use crate::output::out;

/// Prints a message of type `name` on a line of standard output.
pub(crate) fn print(name: &str, message: &impl Message) -> Result<(), Failure> {
    out!("{}", line(name, message)?);
    Ok(())
}
