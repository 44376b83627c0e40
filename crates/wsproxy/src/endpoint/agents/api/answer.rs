//! The answers to a call by HTTP: status, body, and whether the same request may be sent again.

use std::io::Write;

use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::{HeaderValue, StatusCode, header};
use wsproxy_proto::{
    agents::{
        answer::{Answer, CallAnswer},
        outcome::{Failure, Outcome},
    },
    names::Id,
};

use crate::{
    endpoint::agents::caller::{CallEnd, CallUpdate},
    http::{Body, rejection::Rejection},
};

/// An answer, to be sent alone or as an event of a stream.
pub(super) struct CallResponse {
    status: StatusCode,
    /// JSON.
    pub(super) body: Bytes,
    refusal: Option<Rejection>,
}

/// The request to which an answer belongs.
#[derive(Debug, Clone)]
pub(super) struct Asked {
    pub(super) user: Id,
    pub(super) request: Id,
    /// The caller chose the request id, so that a repetition is known.
    pub(super) has_key: bool,
}

impl Asked {
    /// Makes the answer to the end of a call; `None` if the call never reached an agent.
    pub(super) fn answer(&self, end: Option<CallUpdate>) -> CallResponse {
        match end {
            Some(CallUpdate::Ended(CallEnd { failure: None, body })) => self.response(&body),
            Some(CallUpdate::Ended(CallEnd { failure: Some(failure), .. })) => {
                self.failure(failure)
            }
            Some(CallUpdate::Refused(refusal)) => self.refusal(refusal, None),
            Some(CallUpdate::Progress(_)) | None => self.failure(Failure::AgentOffline),
        }
    }

    /// Makes the answer to a call without a response of the agent.
    pub(super) fn failure(&self, failure: Failure) -> CallResponse {
        self.refusal(self.refused(failure), failure.outcome())
    }

    fn refused(&self, failure: Failure) -> Rejection {
        let make = match failure {
            Failure::Timeout => Rejection::timeout,
            Failure::AgentOffline => Rejection::agent_offline,
            Failure::AgentGone => Rejection::agent_gone,
            Failure::Cancelled => Rejection::cancelled,
            Failure::AgentBusy => Rejection::agent_busy,
            Failure::InstanceBusy => Rejection::instance_busy,
            Failure::Duplicate => Rejection::duplicate,
            Failure::Conflict => Rejection::conflict,
            Failure::BadRequest => Rejection::bad_request,
        };
        let mut refusal = make(failure.message(&self.user).to_string());
        refusal.retryable = match failure {
            // The call was never sent.
            Failure::AgentOffline | Failure::AgentBusy | Failure::InstanceBusy => true,
            // The tool may have run. The id protects from a second run while the agent's connection lasts.
            Failure::AgentGone => self.has_key,
            _ => false,
        };
        refusal.retry_after = refusal.retry_after.filter(|_| refusal.retryable);
        refusal
    }

    /// Makes the answer to a call that was refused, or whose end cannot be known.
    pub(super) fn refusal(&self, mut refusal: Rejection, outcome: Option<Outcome>) -> CallResponse {
        if refusal.code == "outcome_unknown" {
            refusal.retryable = self.has_key;
        }
        let mut body = refusal.body();
        body["request_id"] = self.request.as_str().into();
        if let Some(outcome) = outcome {
            body["outcome"] = outcome.label().into();
        }
        let body = body.to_string().into();
        CallResponse { status: refusal.status, body, refusal: Some(refusal) }
    }

    /// Makes the answer to a call that the agent answered. `published` is the object on the channel of answers.
    pub(super) fn response(&self, published: &[u8]) -> CallResponse {
        let Some(Answer::Ended(answer)) = Answer::parse(published) else {
            return self.refusal(Rejection::internal("The agent's answer cannot be read."), None);
        };
        CallResponse::found(self.body(&answer, None))
    }

    /// Makes the answer to a question for an outcome. It is found, whatever it is.
    pub(super) fn kept(&self, answer: &CallAnswer<'_>, too_large: Option<u64>) -> CallResponse {
        CallResponse::found(match answer.failure {
            None => self.body(answer, too_large),
            Some(failure) => {
                // The same call again gets `duplicate` as long as the outcome is kept.
                let refusal = Rejection { retryable: false, ..self.refused(failure) };
                self.refusal(refusal, failure.outcome()).body
            }
        })
    }

    /// Writes the body of an answer. `too_large` is the size of a result that was not kept.
    fn body(&self, answer: &CallAnswer<'_>, too_large: Option<u64>) -> Bytes {
        let CallAnswer { success, result, error, execution_time, .. } = answer;
        let text = |json: &Option<&[u8]>| -> Vec<u8> { json.unwrap_or(b"null").to_vec() };
        let mut body = Vec::with_capacity(160 + result.map_or(0, <[u8]>::len));
        // Writing into a Vec cannot fail. Ids need no escapes.
        let _ = write!(
            body,
            r#"{{"request_id":"{}","outcome":"response","success":{success},"#,
            self.request
        );
        match too_large {
            Some(size) => drop(write!(body, r#""too_large":true,"size":{size}"#)),
            None => {
                body.extend_from_slice(br#""result":"#);
                body.extend_from_slice(result.unwrap_or(b"null"));
            }
        }
        body.extend_from_slice(br#","error":"#);
        body.extend_from_slice(&text(error));
        body.extend_from_slice(br#","execution_time_ms":"#);
        body.extend_from_slice(&text(execution_time));
        body.push(b'}');
        body.into()
    }
}

impl CallResponse {
    const fn found(body: Bytes) -> Self {
        Self { status: StatusCode::OK, body, refusal: None }
    }
}

impl IntoResponse for CallResponse {
    fn into_response(self) -> Response {
        let mut response = match self.refusal {
            Some(refusal) => {
                let (parts, _) = refusal.response().into_parts();
                Response::from_parts(parts, Body::from(self.body))
            }
            None => Response::new(Body::from(self.body)),
        };
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        response
    }
}
