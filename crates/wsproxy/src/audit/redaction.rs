//! Values as the audit log stores them: without secrets, of bounded size, and such that both databases take them.
//! Knows no rows and no database.

use std::{
    borrow::Cow,
    fmt::{self, Write},
};

use aws_lc_rs::digest;

use crate::{
    audit::{
        redaction::{
            rewrite::{End, rewrite},
            words::SecretNames,
        },
        row::{Stored, plain},
    },
    config::database::AuditForm,
};

mod rewrite;
mod words;

/// Form of stored parameters, or of stored results.
#[derive(Debug)]
pub(super) struct Redaction {
    form: AuditForm,
    secrets: SecretNames,
}

impl Redaction {
    /// Creates the form; `more` are names of secret members beside those that are built in.
    pub(super) fn new(form: AuditForm, more: &[String]) -> Self {
        Self { form, secrets: SecretNames::new(more) }
    }

    /// Returns a raw JSON value as it is stored.
    ///
    /// The text is one JSON value of at most [`VALUE_BYTES_MAX`] bytes, whatever `raw` is.
    pub(super) fn store(&self, raw: &[u8]) -> Stored {
        let secrets = match self.form {
            AuditForm::Nothing => return Stored { size: raw.len(), ..Stored::default() },
            AuditForm::Redacted => Some(&self.secrets),
            AuditForm::Full => None,
        };
        let is_long = raw.len() > VALUE_BYTES_MAX;
        let start = to_text(&raw[..raw.len().min(VALUE_BYTES_MAX)]);
        let new = rewrite(&start, secrets);
        let text = match new.end {
            End::NotJson => "",
            _ => new.text.as_deref().unwrap_or_else(|| &start[..new.read]),
        };
        let (text, is_cut) = match new.end {
            End::Whole if !is_long && text.len() <= VALUE_BYTES_MAX => (text.into(), false),
            End::Whole => (cut(raw, "truncated", text), true),
            End::Start if is_long => (cut(raw, "truncated", text), true),
            // Where its secrets begin and end cannot be told.
            End::Start | End::NotJson if secrets.is_some() => (cut(raw, "not_json", ""), true),
            End::Start | End::NotJson => (cut(raw, "not_json", &start), true),
        };
        Stored { text: Some(text), size: raw.len(), is_cut, _held: None }
    }

    /// Returns an agent's error as it is stored: the text of a JSON string, else the JSON. Where the text is itself a
    /// JSON object or array it loses its secrets, since the gateway makes such texts of errors that are no strings.
    pub(super) fn error(&self, raw: &[u8]) -> Box<str> {
        let decoded = serde_json::from_slice::<Cow<'_, str>>(raw);
        let text = decoded.unwrap_or_else(|_| String::from_utf8_lossy(raw));
        if self.form == AuditForm::Full || !text.trim_start().starts_with(['{', '[']) {
            return plain(&text, VALUE_BYTES_MAX);
        }
        let new = rewrite(&text, Some(&self.secrets));
        let is_json = new.end == End::Whole;
        plain(new.text.as_deref().filter(|_| is_json).unwrap_or(&text), VALUE_BYTES_MAX)
    }

    /// Returns what is stored of a value for which there is no room now.
    pub(super) fn store_nothing_of(&self, raw: &[u8]) -> Stored {
        let text = (self.form != AuditForm::Nothing).then(|| cut(raw, "truncated", ""));
        Stored { text, size: raw.len(), is_cut: true, _held: None }
    }
}

/// SHA-256 of a value, written in hexadecimal digits.
pub(super) struct Sha256Hex(digest::Digest);

impl Sha256Hex {
    /// Computes the hash.
    pub(super) fn of(value: &[u8]) -> Self {
        Self(digest::digest(&digest::SHA256, value))
    }
}

impl fmt::Display for Sha256Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_ref().iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Returns the text of a value's first bytes. The last character may be incomplete there.
fn to_text(bytes: &[u8]) -> Cow<'_, str> {
    match str::from_utf8(bytes) {
        Ok(text) => Cow::Borrowed(text),
        Err(error) if error.error_len().is_none() => {
            String::from_utf8_lossy(&bytes[..error.valid_up_to()])
        }
        Err(_) => String::from_utf8_lossy(bytes),
    }
}

/// Returns the object that stands for a value: its length and its hash, and its start as far as there is room.
fn cut(raw: &[u8], why: &str, start: &str) -> Box<str> {
    let mut text = String::with_capacity((start.len() + 160).min(VALUE_BYTES_MAX));
    let hash = Sha256Hex::of(raw);
    let _ = write!(text, r#"{{"{why}":true,"bytes":{},"sha256":"{hash}""#, raw.len());
    if !start.is_empty() {
        text.push_str(r#","start":""#);
        escape(start, VALUE_BYTES_MAX - 2, &mut text);
        text.push('"');
    }
    text.push('}');
    text.into()
}

/// Appends the inside of a JSON string, until `out` has `bytes_max` bytes.
pub(super) fn escape(text: &str, bytes_max: usize, out: &mut String) {
    for character in text.chars() {
        let from = out.len();
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\0' => out.push(char::REPLACEMENT_CHARACTER),
            '\u{1}'..='\u{1f}' => {
                let _ = write!(out, "\\u{:04x}", u32::from(character));
            }
            _ => out.push(character),
        }
        if out.len() > bytes_max {
            out.truncate(from);
            return;
        }
    }
}

/// Upper bound of a stored value.
pub(super) const VALUE_BYTES_MAX: usize = 64 * 1024;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Map, Value, json};
    use wsproxy_proto::json::validate;

    use super::*;

    fn redacted() -> Redaction {
        Redaction::new(AuditForm::Redacted, &["pin_code".into()])
    }

    fn full() -> Redaction {
        Redaction::new(AuditForm::Full, &[])
    }

    fn text(redaction: &Redaction, raw: impl AsRef<[u8]>) -> String {
        let stored = redaction.store(raw.as_ref());
        assert_eq!(stored.size, raw.as_ref().len());
        let text = String::from(stored.text.unwrap());
        assert!(text.len() <= VALUE_BYTES_MAX);
        // The parser of PostgreSQL refuses the same, and an escaped NUL beside it.
        validate(text.as_bytes(), 500).unwrap();
        assert!(!has_escaped_nul(&text), "{text}");
        text
    }

    fn has_escaped_nul(text: &str) -> bool {
        text.replace("\\\\", "").contains("\\u0000")
    }

    #[test]
    fn secrets_are_replaced_at_any_depth() {
        for (raw, stored) in [
            (r#"{"password":"x"}"#, r#"{"password":"[redacted]"}"#),
            (
                r#"{ "a" : 1 , "db_pwd" : "x\"}" , "b":2}"#,
                r#"{ "a" : 1 , "db_pwd" : "[redacted]" , "b":2}"#,
            ),
            (r#"[{"x":[{"apiKey":{"a":["}",1]}},2]}]"#, r#"[{"x":[{"apiKey":"[redacted]"},2]}]"#),
            (
                r#"{"secret":null,"token":-1.5e3,"cookie":true}"#,
                r#"{"secret":"[redacted]","token":"[redacted]","cookie":"[redacted]"}"#,
            ),
            (
                r#"{"secret":[],"a":{},"token":{}}"#,
                r#"{"secret":"[redacted]","a":{},"token":"[redacted]"}"#,
            ),
            (
                r#"{"pa\u0073sword":"x","pinCode":1}"#,
                r#"{"pa\u0073sword":"[redacted]","pinCode":"[redacted]"}"#,
            ),
            (
                r#"{"max_tokens":5,"next_page_token":"x"}"#,
                r#"{"max_tokens":5,"next_page_token":"x"}"#,
            ),
            (r#""password""#, r#""password""#),
            (r#"["password","x"]"#, r#"["password","x"]"#),
        ] {
            assert_eq!(text(&redacted(), raw), stored, "{raw}");
            assert_eq!(text(&full(), raw), raw);
        }
    }

    #[test]
    fn numbers_escapes_and_order_stay_as_written() {
        let raw = r#" { "z":1.10,"a":-0,"é":"\u00e9\/\ud83d\ude00","b":[1E+2,12345678901234567890.0,[ ]] }	"#;
        assert_eq!(text(&redacted(), raw), raw);
        assert!(!redacted().store(raw.as_bytes()).is_cut);
    }

    #[test]
    fn values_that_databases_refuse_are_replaced() {
        let long = "1".repeat(NUMBER_TOO_LONG);
        for (raw, stored) in [
            (r#"["a\u0000b"]"#, r#"["a\ufffdb"]"#),
            (r#"{"a\u0000":1}"#, r#"{"a\ufffd":1}"#),
            (r#"["\\u0000"]"#, r#"["\\u0000"]"#),
            (
                r#"["\ud800","\udc00","\ud800x","\ud800\ud800\udc00"]"#,
                r#"["\ufffd","\ufffd","\ufffdx","\ufffd\ud800\udc00"]"#,
            ),
            ("[1e400000,-2E-99999,1e0005,1e999]", r#"["1e400000","-2E-99999",1e0005,1e999]"#),
            (&format!("[{long}]"), &format!("[\"{long}\"]")),
        ] {
            assert_eq!(text(&redacted(), raw), stored, "{raw}");
            assert_eq!(text(&full(), raw), stored);
        }
        assert_eq!(text(&full(), b"[\"a\xffb\"]"), "[\"a\u{fffd}b\"]");
    }

    const NUMBER_TOO_LONG: usize = 1001;

    #[test]
    fn nesting_is_bounded() {
        let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        assert_eq!(text(&full(), nested(128)), nested(128));
        let deep = text(&full(), nested(5000));
        assert_eq!(deep, format!("{}\"[too deep]\"{}", "[".repeat(128), "]".repeat(128)));
    }

    #[test]
    fn long_values_are_cut_with_length_and_hash() {
        let raw = json!({ "token": "S3CRET", "content": "x\"\n".repeat(50_000) }).to_string();
        let stored: Value = serde_json::from_str(&text(&redacted(), &raw)).unwrap();
        assert_eq!(stored["truncated"], true);
        assert_eq!(stored["bytes"], raw.len());
        assert_eq!(stored["sha256"], Sha256Hex::of(raw.as_bytes()).to_string());
        let start = stored["start"].as_str().unwrap();
        assert!(
            start.len() > 20_000 && start.starts_with(r#"{"content":"x\"\nx"#),
            "{}",
            &start[..40]
        );
        let wide = format!("[\"{}\"]", "é".repeat(VALUE_BYTES_MAX));
        assert!(text(&redacted(), wide).contains('é'));
        // A value that only grows beyond the bound is cut as well.
        let many = format!("[{}{{}}]", r#"{"pwd":1},"#.repeat(6000));
        assert!(many.len() < VALUE_BYTES_MAX);
        assert!(redacted().store(many.as_bytes()).is_cut);
        assert!(text(&redacted(), many).starts_with(r#"{"truncated":true"#));
    }

    #[test]
    fn text_that_is_no_json_is_stored_only_in_full() {
        for raw in [
            r#"{"password":"S3CRET""#,
            r#"{"password"}"#,
            "{'password':'S3CRET'}",
            "é",
            "",
            "[1,]",
            "1 2",
            "\"\u{1}\"",
            "{\"a\":\\u}",
        ] {
            let stored = text(&redacted(), raw);
            assert!(
                stored.starts_with(r#"{"not_json":true"#) && !stored.contains("start"),
                "{stored}"
            );
            let stored: Value = serde_json::from_str(&text(&full(), raw)).unwrap();
            assert_eq!(stored["start"].as_str().unwrap_or_default(), raw);
        }
    }

    #[test]
    fn nothing_is_stored_where_so_configured() {
        let none = Redaction::new(AuditForm::Nothing, &[]);
        let stored = none.store(b"{\"a\":1}");
        assert_eq!((stored.text, stored.size, stored.is_cut), (None, 7, false));
        assert_eq!(none.store_nothing_of(b"{}").text, None);
        assert!(
            redacted().store_nothing_of(b"{\"token\":1}").text.unwrap().contains("\"bytes\":11")
        );
    }

    #[test]
    fn errors_are_text_without_secrets_and_nul() {
        let error = |raw: &str| String::from(redacted().error(raw.as_bytes()));
        assert_eq!(error(r#""no \"such\" file\u0000""#), "no \"such\" file\u{fffd}");
        assert_eq!(error(r#"{"code":1,"secret":"x"}"#), r#"{"code":1,"secret":"[redacted]"}"#);
        assert_eq!(
            error(r#""{\"code\":1,\"secret\":\"x\"}""#),
            r#"{"code":1,"secret":"[redacted]"}"#
        );
        assert_eq!(error(r#""{ is no JSON""#), "{ is no JSON");
        assert_eq!(error(r#""\ud800""#), r#""\ud800""#);
        let long = error(&json!("é".repeat(VALUE_BYTES_MAX)).to_string());
        assert!(
            long.len() <= VALUE_BYTES_MAX
                && long.ends_with(']')
                && long.contains("131072 bytes, sha256 ")
        );
    }

    /// JSON values whose members are secret or not, with a mark in every secret value.
    fn values() -> impl Strategy<Value = Value> {
        let names = prop::sample::select(vec![
            "a",
            "max_tokens",
            "password",
            "X-API-Key",
            "idToken",
            "pinCode",
            "\u{0}",
        ]);
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            ".{0,12}".prop_map(Value::from),
        ];
        let tree = leaf.prop_recursive(6, 64, 8, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..8).prop_map(Value::from),
                prop::collection::vec((names.clone(), inner), 0..8).prop_map(|members| members
                    .into_iter()
                    .map(|(k, v)| (k.to_owned(), v))
                    .collect::<Map<_, _>>()
                    .into()),
            ]
        });
        tree.prop_map(|value| marked(value, false))
    }

    fn marked(value: Value, is_secret: bool) -> Value {
        match value {
            Value::Array(all) => all.into_iter().map(|value| marked(value, is_secret)).collect(),
            Value::Object(all) => {
                let member = |(k, v): (String, Value)| {
                    let inner = is_secret || !PLAIN_NAMES.contains(&&*k);
                    (k, marked(v, inner))
                };
                all.into_iter().map(member).collect()
            }
            Value::String(text) if is_secret => format!("{text}{MARK}").into(),
            value => value,
        }
    }

    /// The same by a tree.
    fn expected(value: &Value) -> Value {
        match value {
            Value::Array(all) => all.iter().map(expected).collect(),
            Value::Object(all) => {
                let member = |(k, v): (&String, &Value)| {
                    let value =
                        if PLAIN_NAMES.contains(&&**k) { expected(v) } else { "[redacted]".into() };
                    (k.replace('\0', "\u{fffd}"), value)
                };
                all.iter().map(member).collect()
            }
            Value::String(text) => text.replace('\0', "\u{fffd}").into(),
            value => value.clone(),
        }
    }

    const PLAIN_NAMES: [&str; 3] = ["a", "max_tokens", "\u{0}"];
    const MARK: &str = "S3CRET";

    proptest! {
        #[test]
        fn the_pass_does_what_a_tree_would_do(value in values(), is_pretty: bool) {
            let raw = if is_pretty { format!("{value:#}") } else { value.to_string() };
            let stored = text(&redacted(), &raw);
            // Read back, since the parser rounds some numbers.
            let value = serde_json::from_str(&raw).unwrap();
            prop_assert_eq!(serde_json::from_str::<Value>(&stored).unwrap(), expected(&value));
            prop_assert!(!stored.contains(MARK));
        }

        #[test]
        fn a_part_of_a_value_tells_no_secret(value in values(), part in 0.0..1.0, pad in 0..2_usize) {
            let pad = " ".repeat(pad * (VALUE_BYTES_MAX - 100));
            let raw = format!("{pad}{value}{value}");
            let end = (raw.len() as f64 * part) as usize;
            let stored = text(&redacted(), &raw.as_bytes()[..end]);
            prop_assert!(!stored.contains(MARK));
        }

        #[test]
        fn any_bytes_become_json_that_databases_take(
            raw in prop_oneof![
                prop::collection::vec(any::<u8>(), 0..200),
                r#"[\[\]{}:,"\\ud80etrfalsn01.\-+ \x00\x1fé]{0,200}"#.prop_map(String::into_bytes),
            ],
            repeat in prop_oneof![Just(1), Just(700)],
        ) {
            let raw = raw.repeat(repeat);
            text(&redacted(), &raw);
            text(&full(), &raw);
        }
    }
}
