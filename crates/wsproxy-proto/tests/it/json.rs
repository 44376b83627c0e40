//! Our verdict on JSON against that of `serde_json`.

use proptest::prelude::*;
use serde_json::Value;
use wsproxy_proto::json::validate;

use crate::support::cases;

/// Returns whether `serde_json` builds a value of `text`. `None` where it stops at a number that no float can hold,
/// but whose grammar is right.
fn oracle_accepts(text: &[u8]) -> Option<bool> {
    match serde_json::from_slice::<Value>(text) {
        Ok(_) => Some(true),
        Err(error) if error.to_string().starts_with("number out of range") => None,
        Err(_) => Some(false),
    }
}

#[track_caller]
fn same_verdict(text: &[u8]) {
    let ours = validate(text, 127);
    assert!(oracle_accepts(text).is_none_or(|theirs| theirs == ours.is_ok()), "{text:?}");
    assert!(!ours.is_err_and(|error| error.offset > text.len()));
}

/// Values as workers send them.
fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
    ];
    leaf.prop_recursive(5, 40, 6, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            proptest::collection::vec((any::<String>(), inner), 0..6)
                .prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
        ]
    })
}

/// Pieces that are JSON in some orders.
fn soup() -> impl Strategy<Value = Vec<u8>> {
    let piece = proptest::sample::select(vec![
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        "\"",
        "\"a\"",
        "\"a\":",
        "1",
        "0",
        "-",
        ".",
        "e",
        "+",
        "12.5e-3",
        "true",
        "null",
        "fals",
        " ",
        "\n",
        "\\",
        "\\u",
        "d800",
        "\\ud83d\\ude00",
        "\\udc00",
        "\\n",
        "ä",
        "\u{7f}",
        "\t",
        "[[",
        "]]",
        "{}",
        "\u{feff}",
        "0123456789",
    ]);
    proptest::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat().into_bytes())
}

proptest! {
    #![proptest_config(cases(1024))]

    #[test]
    fn what_serde_writes_is_valid(value in value(), pretty in any::<bool>()) {
        let text = if pretty {
            serde_json::to_vec_pretty(&value).unwrap()
        } else {
            serde_json::to_vec(&value).unwrap()
        };
        prop_assert_eq!(validate(&text, 64), Ok(()));
        for end in 0..text.len() {
            same_verdict(&text[..end]);
        }
    }

    #[test]
    fn damaged_values_get_the_same_verdict(
        value in value(),
        damage in proptest::collection::vec((any::<usize>(), any::<u8>()), 1..3),
    ) {
        let mut text = serde_json::to_vec(&value).unwrap();
        for (at, byte) in damage {
            let at = at % text.len();
            text[at] = byte;
        }
        same_verdict(&text);
    }

    #[test]
    fn soup_gets_the_same_verdict(text in soup()) {
        same_verdict(&text);
        same_verdict(&[b"\"", &text[..], b"\""].concat());
    }
}
