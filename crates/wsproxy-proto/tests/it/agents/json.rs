//! Members and strings of JSON against `serde_json`, which keeps texts as they were written, too.

use std::str;

use proptest::prelude::*;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use wsproxy_proto::json::{
    members::{Member, Members},
    text, validate,
};

use crate::support::cases;

/// Members of an object, with repetitions, as `serde_json` finds them.
struct Oracle<'t>(Vec<(String, &'t str)>);

impl<'de> serde::Deserialize<'de> for Oracle<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct All;
        impl<'de> Visitor<'de> for All {
            type Value = Oracle<'de>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some((name, value)) = map.next_entry::<String, &'de RawValue>()? {
                    members.push((name, value.get()));
                }
                Ok(Oracle(members))
            }
        }
        deserializer.deserialize_map(All)
    }
}

fn ours(json: &[u8]) -> Option<Vec<Member<'_>>> {
    Members::of(json, 127).ok()?.collect::<Result<_, _>>().ok()
}

#[track_caller]
fn same_members(json: &[u8]) {
    let Ok(Oracle(theirs)) = serde_json::from_slice(json) else {
        // The oracle takes no half of a surrogate pair in a name.
        let is_lenient = str::from_utf8(json).is_ok_and(|text| text.contains("\\u"));
        assert!(is_lenient || ours(json).is_none(), "{json:?}");
        return;
    };
    let ours = ours(json).expect("an object of the oracle is one");
    assert_eq!(ours.len(), theirs.len());
    for (ours, (name, value)) in ours.iter().zip(&theirs) {
        assert_eq!((&*ours.name, ours.value), (&**name, value.as_bytes()));
    }
}

/// Objects with white space everywhere, names that repeat, and values of any kind.
fn object() -> impl Strategy<Value = String> {
    let space = prop_oneof![4 => Just(""), 1 => Just(" "), 1 => Just("\n\t"), 1 => Just("\r")];
    let name = prop_oneof!["[a-c]", r#"\\u00[46][1-3]"#, r#"[a"\\äé😀]{0,3}"#.prop_map(quoted)]
        .prop_map(|name| if name.starts_with('"') { name } else { format!("\"{name}\"") });
    let value = prop_oneof![
        any::<String>().prop_map(quoted),
        "-?(0|[1-9][0-9]{0,25})(\\.[0-9]{1,25})?([eE][+-]?[0-9]{1,2})?",
        Just("null".to_owned()),
        Just("[{},[ ],{\"a\":{\"type\":[1,\"}\"]}}]".to_owned()),
        Just(r#""\ud83d\ude00\"\\""#.to_owned()),
        Just("{\"a\" : 1 }".to_owned()),
    ];
    let member = (space.clone(), name, space.clone(), space.clone(), value, space.clone())
        .prop_map(|(a, name, b, c, value, d)| format!("{a}{name}{b}:{c}{value}{d}"));
    (space.clone(), proptest::collection::vec(member, 0..6), space)
        .prop_map(|(a, members, b)| format!("{a}{{{}}}{b}", members.join(",")))
}

fn quoted(text: String) -> String {
    serde_json::to_string(&text).unwrap()
}

proptest! {
    #![proptest_config(cases(1024))]

    #[test]
    fn members_are_those_of_serde(object in object()) {
        same_members(object.as_bytes());
        prop_assert!(ours(object.as_bytes()).is_some());
        for end in 0..object.len() {
            same_members(&object.as_bytes()[..end]);
        }
    }

    #[test]
    fn damaged_members_are_those_of_serde(
        object in object(),
        damage in proptest::collection::vec((any::<usize>(), any::<u8>()), 1..3),
    ) {
        let mut json = object.into_bytes();
        for (at, byte) in damage {
            let at = at % json.len();
            json[at] = byte;
        }
        same_members(&json);
        // Members take what the validation takes, and halves of surrogate pairs besides.
        let is_object = json.trim_ascii_start().starts_with(b"{");
        prop_assert!(!is_object || validate(&json, 127).is_err() || ours(&json).is_some());
    }

    #[test]
    fn strings_are_written_and_read_like_serde_does(string in any::<String>()) {
        let mut json = Vec::new();
        text::write(&string, &mut json);
        prop_assert_eq!(str::from_utf8(&json).unwrap(), quoted(string.clone()));
        prop_assert_eq!(text::decode(&json).unwrap(), string.as_str());
        let escaped: String = string.encode_utf16().map(|unit| format!("\\u{unit:04X}")).collect();
        let escaped = format!("\"{escaped}\"");
        prop_assert_eq!(text::decode(escaped.as_bytes()).unwrap(), string.as_str());
        let list = format!("[ {escaped} ,{}]", str::from_utf8(&json).unwrap());
        prop_assert_eq!(text::strings(list.as_bytes()).unwrap(), vec![string.as_str(); 2]);
    }
}
