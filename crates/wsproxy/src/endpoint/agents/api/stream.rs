//! The event stream of a call: progress, then one result. Knows no agent.

use std::convert::Infallible;

use axum::response::Response;
use bytes::Bytes;
use futures_util::stream;
use tokio::time::timeout;

use crate::{
    endpoint::agents::{api::hearing::Hearing, caller::CallUpdate},
    http::follow::{self, KEEP_ALIVE},
    hub::form::sse,
};

/// Answers with the events of a call, of which the first one is known.
pub(super) fn response(hearing: Hearing, first: Bytes) -> Response {
    let start = Some((hearing, Some(first)));
    follow::response(stream::unfold(start, |state| async {
        let (mut hearing, first) = state?;
        if let Some(first) = first {
            return Some((Ok::<_, Infallible>(first), Some((hearing, None))));
        }
        let event = match timeout(KEEP_ALIVE, hearing.next()).await {
            Ok(Some(CallUpdate::Progress(data))) => progress(&data),
            Err(_) => COMMENT,
            Ok(end) => {
                let answer = hearing.asked().answer(end);
                return Some((Ok(event("result", &answer.body)), None));
            }
        };
        Some((Ok(event), Some((hearing, None))))
    }))
}

/// Makes the event of progress.
pub(super) fn progress(data: &[u8]) -> Bytes {
    event("progress", data)
}

fn event(name: &str, data: &[u8]) -> Bytes {
    let text = String::from_utf8_lossy(data);
    let mut event = String::with_capacity(text.len() + 32);
    event.push_str("event: ");
    event.push_str(name);
    event.push('\n');
    sse::push_data(&mut event, &text);
    event.into()
}

/// Comment that keeps proxies from closing the stream.
pub(super) const COMMENT: Bytes = sse::COMMENT;
