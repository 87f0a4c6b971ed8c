//! Ranks outlive their daemon: their shim holds them, and the next daemon goes on from where the last one was.

use super::*;
