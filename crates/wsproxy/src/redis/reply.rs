//! Parts of replies, and the error for a reply of another form.

use bytes::Bytes;

use crate::{redis::resp::Reply, store::command::StoreError};

/// Returns the text of a reply; `None` if it is another kind of reply, or not UTF-8.
pub(crate) fn text(reply: &Reply) -> Option<&str> {
    match reply {
        Reply::Text(text) => std::str::from_utf8(text).ok(),
        _ => None,
    }
}

/// Returns the bytes of a text.
pub(super) fn bytes(reply: Reply) -> Option<Bytes> {
    if let Reply::Text(text) = reply { Some(text) } else { None }
}

/// Returns the number of a reply.
///
/// # Errors
/// [`odd_reply`].
pub(crate) fn integer(reply: &Reply) -> Result<i64, StoreError> {
    match reply {
        Reply::Integer(number) => Ok(*number),
        _ => Err(odd_reply()),
    }
}

/// Returns the number of a reply that must not be negative.
pub(super) fn unsigned(reply: &Reply) -> Option<u64> {
    u64::try_from(integer(reply).ok()?).ok()
}

/// Returns the parts of an array.
pub(super) fn array(reply: Reply) -> Option<Vec<Reply>> {
    if let Reply::Array(replies) = reply { Some(replies) } else { None }
}

/// Returns the parts of an array of a known length.
pub(super) fn parts<const N: usize>(reply: Reply) -> Option<[Reply; N]> {
    array(reply)?.try_into().ok()
}

/// Returns the error for a reply of the wrong form.
pub(crate) fn odd_reply() -> StoreError {
    StoreError::Refused("an odd reply".into())
}
