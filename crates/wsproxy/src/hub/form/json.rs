//! Insertion of a message's id into a JSON object.

use std::fmt::Write;

use serde::Deserialize;
use wsproxy_proto::{history::Position, json};

/// Returns the object with `id` as its first member, `event_id`. `None` if the payload is not an object or has such a
/// member already, since clients must not get two members of one name.
pub(in crate::hub) fn with_event_id(id: Position, payload: &[u8]) -> Option<Vec<u8>> {
    let rest = payload.trim_ascii().strip_prefix(b"{")?;
    let inner = rest.strip_suffix(b"}")?;
    // Text that only looks like an object, such as several objects in a row, must reach the client unchanged.
    json::validate(payload.trim_ascii(), json::DEPTH_MAX).ok()?;
    if may_have_event_id(payload) {
        let EventIdSearch { has_event_id } = serde_json::from_slice(payload).ok()?;
        if has_event_id {
            return None;
        }
    }
    let mut head = String::with_capacity(payload.len() + 64);
    // Writing into a String cannot fail.
    let _ = write!(head, r#"{{"event_id":"{id}""#);
    let mut message = head.into_bytes();
    if !inner.trim_ascii().is_empty() {
        message.push(b',');
    }
    message.extend_from_slice(rest);
    Some(message)
}

/// Returns whether an object may have a member `event_id`, written plainly or with escapes.
fn may_have_event_id(payload: &[u8]) -> bool {
    memchr::memmem::find(payload, b"event_id").is_some()
        || memchr::memmem::find(payload, b"\\u00").is_some()
}

/// Result of the search for members `event_id`, of any value and number.
struct EventIdSearch {
    has_event_id: bool,
}

impl<'de> Deserialize<'de> for EventIdSearch {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(EventIdVisitor)
    }
}

struct EventIdVisitor;

impl<'de> serde::de::Visitor<'de> for EventIdVisitor {
    type Value = EventIdSearch;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: serde::de::MapAccess<'de>>(
        self,
        mut map: A,
    ) -> Result<EventIdSearch, A::Error> {
        let mut has_event_id = false;
        while let Some(name) = map.next_key::<std::borrow::Cow<'de, str>>()? {
            has_event_id |= name == "event_id";
            map.next_value::<serde::de::IgnoredAny>()?;
        }
        Ok(EventIdSearch { has_event_id })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: Position = Position { milliseconds: 17, sequence: 2, tag: 9 };

    #[test]
    fn only_objects_get_an_id() {
        let spliced = |payload: &str| {
            with_event_id(ID, payload.as_bytes()).map(|bytes| String::from_utf8(bytes).unwrap())
        };
        assert_eq!(spliced(r#"{"a":1}"#).unwrap(), r#"{"event_id":"17-2-00000009","a":1}"#);
        assert_eq!(spliced(" {\n } ").unwrap(), "{\"event_id\":\"17-2-00000009\"\n }");
        let inner = r#"{"a":{"event_id":1},"b":"event_id"}"#;
        assert!(spliced(inner).unwrap().starts_with(r#"{"event_id":"17-2-00000009","a""#));
        let own = [r#"{"event_id":1}"#, r#"{"a":1,"event_id":"x"}"#, r#"{"\u0065vent_id":null}"#];
        let alike = ["{hello}", "{a}{b}", "{\"a\":1}\n{\"b\":2}", "{\"a\":1,}", "{\"a\":NaN}"];
        let others = ["", "{", "}", "[1]", "\"{}\"", "1", "text {}"];
        for other in others.into_iter().chain(alike).chain(own) {
            assert_eq!(spliced(other), None, "{other}");
        }
    }
}
