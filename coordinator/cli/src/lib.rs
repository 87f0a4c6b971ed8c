//! What of the command `muster` is no command: messages as JSON, and job files. A library, so that tests and the
//! fuzzer reach it.

#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzz;
pub mod messages;
