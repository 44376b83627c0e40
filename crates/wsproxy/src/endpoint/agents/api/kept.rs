//! Outcomes of asynchronous calls, which the store keeps until their callers ask. Knows no agent.

use std::{borrow::Cow, fmt::Write, time::Duration};

use bytes::Bytes;
use serde::Deserialize;
use wsproxy_proto::{
    agents::{
        answer::{self, Answer, CallAnswer},
        message::ToolResponse,
    },
    names::{Id, Names},
};

use crate::store::{Store, command::StoreError};

/// State of an asynchronous call.
#[derive(Debug)]
pub(super) struct Kept {
    /// Hash of tool and parameters.
    pub(super) hash: String,
    /// The stored object.
    pub(super) text: Bytes,
    /// User, and size of a result that was too large.
    pub(super) user: Id,
    pub(super) too_large: Option<u64>,
    /// Time until the call's deadline, negative behind it, in milliseconds; `None`: the call has ended.
    pub(super) left_ms: Option<i64>,
}

/// The members that every stored object has.
#[derive(Debug, Deserialize)]
struct Head<'a> {
    #[serde(borrow)]
    status: Cow<'a, str>,
    #[serde(borrow, rename = "userId")]
    user: Cow<'a, str>,
    #[serde(borrow)]
    hash: Cow<'a, str>,
    size: Option<u64>,
}

/// Notes that a call runs, unless a call with this id is stored already. Returns the state of such a call.
///
/// # Errors
/// The store did not answer.
pub(super) async fn begin(
    (store, names): (&Store, &Names),
    (user, request): (&Id, &Id),
    hash: [u8; 16],
    timeout: Duration,
) -> Result<Option<Kept>, StoreError> {
    let key = names.response_outcome(request);
    let value = running(user, request, hash);
    match store.add(&key, value.as_bytes(), timeout + KEPT_FOR).await? {
        None => Ok(None),
        // Its remaining time has to be asked for.
        Some(_) => load((store, names), request).await,
    }
}

/// Forgets a call that was not sent.
///
/// # Errors
/// The store did not answer.
pub(super) async fn forget(
    (store, names): (&Store, &Names),
    (user, request): (&Id, &Id),
    hash: [u8; 16],
) -> Result<(), StoreError> {
    let value = running(user, request, hash);
    store.take_if_equal(&names.response_outcome(request), value.as_bytes()).await.map(drop)
}

/// Loads the state of a call; `None` if there is none.
///
/// # Errors
/// The store did not answer.
pub(super) async fn load(
    (store, names): (&Store, &Names),
    request: &Id,
) -> Result<Option<Kept>, StoreError> {
    let loaded = store.load_expiring(&names.response_outcome(request)).await?;
    Ok(loaded.and_then(|(text, ttl)| Kept::read(text, ttl)))
}

/// Stores the outcome of a call: `published` is the object for a caller's own channel. Called by the owner of the call,
/// before it tells callers.
///
/// # Errors
/// The store did not answer.
pub async fn store(
    (store, names): (&Store, &Names),
    request: &Id,
    hash: [u8; 16],
    published: &[u8],
) -> Result<(), StoreError> {
    let value = ended(hash, published);
    store.save(&names.response_outcome(request), &value, KEPT_FOR).await
}

impl Kept {
    fn read(text: Bytes, ttl: Duration) -> Option<Self> {
        let Head { status, user, hash, size } = serde_json::from_slice(&text).ok()?;
        let (user, hash) = (Id::parse(&user).ok()?, hash.into_owned());
        let millis = |time: Duration| i64::try_from(time.as_millis()).unwrap_or(i64::MAX);
        let left_ms = (status == RUNNING).then(|| millis(ttl) - millis(KEPT_FOR));
        Some(Self { hash, user, too_large: size, left_ms, text })
    }

    /// Returns whether the call is this one.
    pub(super) fn is(&self, user: &Id, hash: [u8; 16]) -> bool {
        self.user == *user && self.hash == hex(hash)
    }
}

fn running(user: &Id, request: &Id, hash: [u8; 16]) -> String {
    let hash = hex(hash);
    format!(r#"{{"status":"{RUNNING}","hash":"{hash}","userId":"{user}","requestId":"{request}"}}"#)
}

/// Returns the stored object of an outcome: the published one with a status, and without a result that is too large.
fn ended(hash: [u8; 16], published: &[u8]) -> Vec<u8> {
    let mut head = format!(r#"{{"status":"ended","hash":"{}","#, hex(hash));
    let is_large = published.len() > RESULT_BYTES_MAX;
    let large = is_large.then(|| Answer::parse(published)).flatten();
    let smaller = match large {
        Some(Answer::Ended(CallAnswer {
            user,
            request,
            failure: None,
            success,
            result: Some(result),
            error,
            execution_time,
        })) if result.len() > RESULT_BYTES_MAX => {
            // Writing into a String cannot fail.
            let _ = write!(head, r#""too_large":true,"size":{},"#, result.len());
            let error = error.map(Cow::Borrowed);
            let rest = ToolResponse { request, success, result: None, error, execution_time };
            Some(answer::response(&user, &rest, answer::Form::Caller))
        }
        _ => None,
    };
    let published = smaller.as_deref().unwrap_or(published);
    let mut value = head.into_bytes();
    value.extend_from_slice(published.get(1..).unwrap_or(b"}"));
    value
}

fn hex(hash: [u8; 16]) -> String {
    format!("{:032x}", u128::from_be_bytes(hash))
}

const RUNNING: &str = "running";

/// Time for which an outcome is kept, behind the deadline of a call whose outcome never comes.
pub(super) const KEPT_FOR: Duration = Duration::from_secs(15 * 60);

/// Upper bound of a result that is kept.
const RESULT_BYTES_MAX: usize = 256 * 1024;

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use wsproxy_proto::agents::outcome::Failure;

    use super::*;

    fn id(text: &str) -> Id {
        Id::parse(text).unwrap()
    }

    fn published(result: &[u8]) -> Vec<u8> {
        let response = ToolResponse {
            request: id("q-1"),
            success: true,
            result: Some(result),
            error: Some(Cow::Borrowed(b"null")),
            execution_time: Some(b"12"),
        };
        answer::response(&id("u-1"), &response, answer::Form::Caller)
    }

    fn read(text: Vec<u8>, ttl: Duration) -> Kept {
        Kept::read(text.into(), ttl).unwrap()
    }

    #[test]
    fn a_running_call_knows_its_deadline_from_its_time_to_live() {
        let text = running(&id("u-1"), &id("q-1"), [1; 16]).into_bytes();
        let kept = read(text.clone(), KEPT_FOR + Duration::from_secs(30));
        assert_eq!(kept.left_ms, Some(30_000));
        assert!(kept.is(&id("u-1"), [1; 16]));
        assert!(!kept.is(&id("u-2"), [1; 16]) && !kept.is(&id("u-1"), [2; 16]));
        assert_eq!(read(text, KEPT_FOR - Duration::from_secs(3)).left_ms, Some(-3000));
    }

    #[test]
    fn an_outcome_is_kept_as_it_was_published() {
        let value = ended([7; 16], &published(br#"{"n":1.50}"#));
        let text = String::from_utf8(value.clone()).unwrap();
        assert!(text.contains(r#""result":{"n":1.50}"#), "{text}");
        let kept = read(value, KEPT_FOR);
        assert!(kept.is(&id("u-1"), [7; 16]));
        assert_eq!((kept.left_ms, kept.too_large), (None, None));
        let Some(Answer::Ended(answer)) = Answer::parse(&kept.text) else { panic!("{text}") };
        assert_eq!((answer.failure, answer.execution_time), (None, Some(&b"12"[..])));
        let (user, request) = (id("u-1"), id("q-1"));
        let gone = answer::failure(&user, &request, Failure::AgentGone, answer::Form::Caller);
        let kept = read(ended([7; 16], &gone), KEPT_FOR);
        let Some(Answer::Ended(answer)) = Answer::parse(&kept.text) else { panic!("no answer") };
        assert_eq!(answer.failure, Some(Failure::AgentGone));
    }

    #[test]
    fn a_result_beyond_the_bound_is_left_out_with_its_size() {
        for (size, is_kept) in [(RESULT_BYTES_MAX, true), (RESULT_BYTES_MAX + 1, false)] {
            let result = format!("\"{}\"", "x".repeat(size - 2));
            let value = ended([7; 16], &published(result.as_bytes()));
            let json: Value = serde_json::from_slice(&value).unwrap();
            assert_eq!(json.get("result").is_some(), is_kept, "{size}");
            let size = if is_kept { Value::Null } else { json!(size) };
            assert_eq!(json.get("size").cloned().unwrap_or_default(), size);
            assert_eq!((&json["success"], &json["executionTime"]), (&json!(true), &json!(12)));
        }
    }
}
