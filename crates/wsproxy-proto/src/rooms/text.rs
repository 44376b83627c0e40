//! Envelopes as text: the JSON mapping of proto3, to and from protobuf.

use buffa::Message as _;

use super::check::{Kind, Refused};
use super::v1::Envelope;
use crate::json::members::Members;

/// Encodes the envelope of a text frame as protobuf. Members that `rooms.proto` does not know are left out.
///
/// The result is not checked yet.
///
/// # Errors
/// [`Refused::NoEnvelope`] for a text without a known payload, [`Refused::Invalid`] for one with a payload that the
/// mapping refuses.
pub fn to_binary(json: &[u8]) -> Result<Vec<u8>, Refused> {
    match serde_json::from_slice::<Envelope>(json) {
        Ok(Envelope { payload: None, .. }) => Err(Refused::NoEnvelope),
        Ok(envelope) => Ok(envelope.encode_to_vec()),
        Err(_) if has_payload(json) => Err(Refused::Invalid("JSON that is no envelope")),
        Err(_) => Err(Refused::NoEnvelope),
    }
}

/// Writes an envelope as the text of a text frame. `None` if the bytes are no envelope with a known payload. Unknown
/// fields are left out.
#[must_use]
pub fn to_text(envelope: &[u8]) -> Option<String> {
    let envelope = Envelope::decode_from_slice(envelope).ok()?;
    envelope.payload.as_ref()?;
    serde_json::to_string(&envelope).ok()
}

/// Whether the text is an object with a member that is named like a payload, in either spelling.
fn has_payload(json: &[u8]) -> bool {
    let Ok(members) = Members::of(json, crate::json::DEPTH_MAX) else { return false };
    members.map_while(Result::ok).any(|member| is_payload(&member.name))
}

fn is_payload(member: &str) -> bool {
    Kind::ALL.iter().any(|kind| {
        let name = kind.name();
        member == name || (name.contains('_') && is_camel_case_of(member, name))
    })
}

fn is_camel_case_of(member: &str, name: &str) -> bool {
    let mut upper = false;
    let mut camel = name.chars().filter_map(|letter| {
        let next = if upper { letter.to_ascii_uppercase() } else { letter };
        upper = letter == '_';
        (!upper).then_some(next)
    });
    member.chars().all(|letter| camel.next() == Some(letter)) && camel.next().is_none()
}
