//! Why a client is disconnected.

/// Why a client is disconnected; the protocol has no reply for it, so that the log alone says it. Each reads on from
/// "refused: ".
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It is no client of a store.
    #[error("it began with query {0} instead of the validation, so it is no client of a TCPStore")]
    NotValidated(u8),
    /// It is no client of a store of torch's.
    #[error("its validation holds {0:#010x} instead of torch's number")]
    WrongMagic(u32),
    /// A query that torch has not, or not yet.
    #[error("query {0} is not known here; its torch may be newer than this store")]
    UnknownQuery(u8),
    /// A client validates once.
    #[error("it validated twice")]
    ValidatedTwice,
    /// See [`crate::Limits::key_bytes_max`].
    #[error("a key of {bytes} bytes is longer than the {max} that a key may have")]
    KeyTooLong {
        /// As announced.
        bytes: u64,
        /// The limit.
        max: usize,
    },
    /// See [`crate::Limits::value_bytes_max`].
    #[error("a value of {bytes} bytes is longer than the {max} that a value may have")]
    ValueTooLong {
        /// As announced, or with what would be appended.
        bytes: u64,
        /// The limit.
        max: usize,
    },
    /// See [`crate::Limits::keys_per_request_max`].
    #[error("a request of {keys} keys has more than the {max} that one may have")]
    TooManyKeys {
        /// As announced.
        keys: u64,
        /// The limit.
        max: usize,
    },
    /// See [`crate::Limits::request_bytes_max`].
    #[error("a request of at least {bytes} bytes is longer than the {max} that one may have")]
    RequestTooLong {
        /// As far as it is known.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// See [`crate::Limits::held_bytes_max`].
    #[error("the store holds {held} of {max} bytes, and {wanted} more do not fit")]
    Full {
        /// What did not fit.
        wanted: usize,
        /// What is held.
        held: usize,
        /// The limit.
        max: usize,
    },
    /// Something is to be added to what is no number.
    #[error("the value of {key} is no whole number of 64 bits, so nothing can be added to it")]
    NotANumber {
        /// As shown to people.
        key: String,
    },
    /// The sum has more than 64 bits.
    #[error("{amount} more would take the counter {key} out of 64 bits")]
    Overflow {
        /// As shown to people.
        key: String,
        /// What was to be added.
        amount: i64,
    },
    /// A connection waits once at a time.
    #[error("it waits already, and began a second wait")]
    SecondWait,
    /// See [`crate::Limits::handshake_max`].
    #[error("it did not validate within {0} s")]
    Silent(u64),
}
