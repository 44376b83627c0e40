//! Every vector of `spec/rooms`. The binary ones were written by another implementation of protobuf.

use buffa::Message as _;
use serde_json::{Value, json};
use wsproxy_proto::rooms::check::{self, Checked, Refused};
use wsproxy_proto::rooms::stamp;
use wsproxy_proto::rooms::text::{to_binary, to_text};
use wsproxy_proto::rooms::v1::Envelope;

#[test]
fn valid_messages_are_read_stamped_and_translated() {
    let file = read(include_str!("../../../../../spec/rooms/messages.json"));
    let client = file["client"].as_str().unwrap();
    for case in file["cases"].as_array().unwrap() {
        let binary = bytes(&case["binary"]);
        let checked = check::read(&binary).unwrap_or_else(|refused| panic!("{case}: {refused}"));
        assert_eq!(found(&checked), expected(case), "{case}");
        let allowed = if case["from_clients"] == true { Ok(checked) } else { Err("not_allowed") };
        let found = check::check(&binary, client).map_err(|refused| refused.code());
        assert_eq!(found, allowed, "{case}");

        let mut stamped = Vec::new();
        stamp::stamp(&binary, checked.stamp, client, case["seq"].as_u64(), &mut stamped);
        assert_eq!(hex(&stamped), case["stamped"], "{case}");
        assert_eq!(text_of(&stamped), case["stamped_text"], "{case}");
        if case["text"].is_object() {
            assert_eq!(text_of(&binary), case["text"], "{case}");
            let text = case["text"].to_string();
            assert_eq!(
                to_binary(text.as_bytes()).map(|binary| hex(&binary)),
                Ok(hex(&binary)),
                "{case}"
            );
        }
    }
}

#[test]
fn lenient_texts_are_read() {
    let file = read(include_str!("../../../../../spec/rooms/texts.json"));
    for case in file["cases"].as_array().unwrap() {
        let binary = to_binary(case["text"].as_str().unwrap().as_bytes()).unwrap();
        assert_eq!(hex(&binary), case["binary"], "{case}");
        assert!(check::read(&binary).is_ok(), "{case}");
    }
}

#[test]
fn bad_messages_are_refused_with_their_code() {
    let file = read(include_str!("../../../../../spec/rooms/refused.json"));
    let client = file["client"].as_str().unwrap();
    for case in file["cases"].as_array().unwrap() {
        let refused = match case["text"].as_str() {
            Some(text) => to_binary(text.as_bytes())
                .and_then(|binary| check::check(&binary, client).map(|_| ())),
            None => check::check(&bytes(&case["binary"]), client).map(|_| ()),
        };
        let refused = refused.expect_err(&case.to_string());
        let found = json!([refused.code(), refused != Refused::NoEnvelope]);
        assert_eq!(found, json!([case["code"], case["envelope"]]), "{case}: {refused}");
    }
}

/// Every limit that holds at 128 bytes or 64 components is in the refused vectors with one more.
#[test]
fn limits_themselves_are_allowed() {
    let id = "e".repeat(128);
    let components: serde_json::Map<_, _> =
        (0..64).map(|index| (format!("{index:0>128}"), json!(""))).collect();
    let spawn = json!({ "messageId": id, "to": id,
        "entitySpawn": { "entityId": id, "templateId": id, "ownerId": id, "components": components } });
    let binary = to_binary(spawn.to_string().as_bytes()).unwrap();
    assert!(check::check(&binary, &id).is_ok());
}

#[test]
fn message_id_of_a_refused_message_is_found() {
    let two = br#"{"messageId":"m-1","entityDespawn":{}}"#;
    let binary = to_binary(two).unwrap();
    assert_eq!(check::read(&binary), Err(Refused::Invalid("no entity_id")));
    assert_eq!(check::message_id(&binary), "m-1");
    assert_eq!(check::message_id(b"\x0a\x03m-1\xff"), "m-1");
    assert_eq!(check::message_id(b"\x0a\x03m-"), "");
}

#[test]
fn deep_unknown_members_are_skipped() {
    let deep = format!("{{\"ack\":{{}},\"x\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
    assert_eq!(to_binary(deep.as_bytes()), to_binary(br#"{"ack":{}}"#));
}

/// `codegen/ --check`, which the whole check runs, compares the code itself.
#[test]
fn generated_code_is_of_this_proto_file() {
    let proto = include_bytes!("../../../../../spec/rooms/v1/rooms.proto");
    let line = format!("// SHA-1 of rooms.proto: {}\n", sha1_smol::Sha1::from(proto).digest());
    let code = include_str!("../../../src/rooms/v1.rs");
    assert!(
        code.ends_with(&line),
        "run cargo run --manifest-path crates/wsproxy-proto/codegen/Cargo.toml"
    );
}

fn found(checked: &Checked<'_>) -> Value {
    json!([
        checked.kind.name(),
        checked.reliable,
        checked.to.unwrap_or_default(),
        checked.message_id
    ])
}

fn expected(case: &Value) -> Value {
    let text = |name: &str| case[name].as_str().unwrap_or_default();
    json!([case["kind"], case["reliable"] == true, text("to"), text("message_id")])
}

fn text_of(binary: &[u8]) -> Value {
    // Each text is also read back.
    let text = to_text(binary).unwrap();
    let back = to_binary(text.as_bytes()).unwrap();
    assert_eq!(Envelope::decode_from_slice(&back), Envelope::decode_from_slice(binary));
    read(&text)
}

fn read(json: &str) -> Value {
    serde_json::from_str(json).unwrap()
}

/// Bytes of all valid messages, for other tests.
pub(super) fn binaries() -> Vec<Vec<u8>> {
    let file = read(include_str!("../../../../../spec/rooms/messages.json"));
    file["cases"].as_array().unwrap().iter().map(|case| bytes(&case["binary"])).collect()
}

fn bytes(hex: &Value) -> Vec<u8> {
    let digits = hex.as_str().unwrap().as_bytes().chunks(2);
    digits.map(|two| u8::from_str_radix(str::from_utf8(two).unwrap(), 16).unwrap()).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
