//! JSON from workers that clients get byte for byte. Knows no schema.
//!
//! Values stay text and are never parsed into numbers, so that large numbers and many digits pass unchanged.

use std::{borrow::Cow, fmt::Write};

use serde::Deserialize;
use serde_json::{Value, value::RawValue};
use wsproxy_proto::json;

use crate::http::rejection::Rejection;

/// Checks that every client can parse `json`.
///
/// # Errors
/// 400: it is not JSON, or nested too deeply.
pub(crate) fn check(json: &[u8]) -> Result<(), Rejection> {
    json::validate(json, DEPTH_MAX)
        .map_err(|error| Rejection::bad_request(format!("The JSON is wrong: {error}.")))
}

/// Parses JSON that has a schema.
///
/// # Errors
/// 400: it does not follow the schema.
pub(crate) fn parse<'a, T: Deserialize<'a>>(json: &'a [u8]) -> Result<T, Rejection> {
    serde_json::from_slice(json).map_err(|error| Rejection::bad_request(error.to_string()))
}

/// Members of a JSON object in their order. Each value is the text that the worker sent.
pub(crate) struct JsonMembers<'a>(Vec<(String, Cow<'a, str>)>);

impl<'a> JsonMembers<'a> {
    /// Parses an object.
    ///
    /// # Errors
    /// 400: `json` is not an object, or nested too deeply.
    pub(crate) fn parse(json: &'a [u8]) -> Result<Self, Rejection> {
        check(json)?;
        parse(json)
    }

    /// Returns the string of a member; `None` if there is no such member.
    ///
    /// # Errors
    /// 400: the value is not a string, or two members have that name.
    pub(crate) fn text(&self, name: &str) -> Result<Option<String>, Rejection> {
        let mut values = self.0.iter().filter(|(known, _)| known == name).map(|(_, value)| value);
        let Some(value) = values.next() else { return Ok(None) };
        if values.next().is_some() {
            return Err(Rejection::bad_request(format!("There are two members {name}.")));
        }
        let text = serde_json::from_str(value);
        text.map(Some).map_err(|_| Rejection::bad_request(format!("{name} must be a string.")))
    }

    /// Returns whether there is a member of that name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.0.iter().any(|(known, _)| known == name)
    }

    /// Sets a member, and removes others of that name.
    pub(crate) fn set(&mut self, name: &str, text: &str) {
        self.0.retain(|(known, _)| known != name);
        self.0.push((name.into(), Value::from(text).to_string().into()));
    }

    /// Returns the object as JSON.
    pub(crate) fn to_json(&self) -> String {
        let mut json = String::from("{");
        for (name, value) in &self.0 {
            if json.len() > 1 {
                json.push(',');
            }
            // Writing into a String cannot fail.
            let _ = write!(json, "{}:{value}", Value::from(name.as_str()));
        }
        json.push('}');
        json
    }
}

impl<'de> Deserialize<'de> for JsonMembers<'de> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(JsonMembersVisitor)
    }
}

struct JsonMembersVisitor;

impl<'de> serde::de::Visitor<'de> for JsonMembersVisitor {
    type Value = JsonMembers<'de>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut members = Vec::new();
        while let Some((name, value)) = map.next_entry::<String, &'de RawValue>()? {
            members.push((name, value.get().into()));
        }
        Ok(JsonMembers(members))
    }
}

/// Upper bound of the nesting of a worker's JSON. Clients' parsers fail between 500 and some thousand levels.
const DEPTH_MAX: usize = 128;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_stay_as_they_were_written() {
        let wei = "115792089237316195423570985008687907853269984665640564039457";
        let text = format!(
            r#"{{"z":{wei},"a":0.12345678901234567890,"e":1E400,"s":"\u00e9\/", "o" : {{ "b":1.0, "a":-0 }}}}"#
        );
        let members = JsonMembers::parse(text.as_bytes()).unwrap();
        let expected = format!(
            r#"{{"z":{wei},"a":0.12345678901234567890,"e":1E400,"s":"\u00e9\/","o":{{ "b":1.0, "a":-0 }}}}"#
        );
        assert_eq!(members.to_json(), expected);
        assert_eq!(JsonMembers::parse(b" { } ").unwrap().to_json(), "{}");
    }

    #[test]
    fn a_member_is_added_in_place_of_its_namesake() {
        let mut members = JsonMembers::parse(br#"{"\u0061":1,"b":"x"}"#).unwrap();
        members.set("a", "\"é\n");
        assert_eq!(members.to_json(), r#"{"b":"x","a":"\"é\n"}"#);
        assert_eq!(members.text("b").unwrap().as_deref(), Some("x"));
        assert_eq!(members.text("c").unwrap(), None);
        assert!(members.has("a") && !members.has("c"));
    }

    #[test]
    fn what_is_no_object_or_no_text_is_refused() {
        for bad in ["", "1", "[]", "{", r#"{"a":1}x"#, r#"{"a":"\ud800"}"#, "{'a':1}"] {
            assert!(JsonMembers::parse(bad.as_bytes()).is_err(), "{bad}");
        }
        let deep = format!(r#"{{"a":{}{}}}"#, "[".repeat(128), "]".repeat(128));
        assert!(JsonMembers::parse(deep.as_bytes()).is_err());
        let members = JsonMembers::parse(br#"{"a":1,"b":"x","b":"y"}"#).unwrap();
        assert!(members.text("a").is_err() && members.text("b").is_err());
    }
}
