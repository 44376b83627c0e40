//! Dials a gateway: the handshake of a lane. Knows no retries.

use std::time::Duration;

use http::{HeaderName, HeaderValue, StatusCode, header};
use uuid::Uuid;
use wsproxy_conn::dial::{DialError, Dialled, Server};
use wsproxy_proto::{tunnel::SUBPROTOCOL, ws::client::ClientRequest};

use crate::config::AgentConfig;

/// Reason why there is no lane.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoLane {
    /// The gateway refused the lane, and may take it after a while.
    #[error("the gateway answered {status}")]
    Refused {
        /// Status of the answer.
        status: StatusCode,
        /// Time before the next try, as the gateway says.
        retry_after: Option<Duration>,
    },
    /// The agent has no token.
    #[error("{0}")]
    Token(#[from] crate::credential::BadToken),
    /// The gateway was not reached, or is none.
    #[error("{0}")]
    Failed(String),
}

impl NoLane {
    /// Returns whether only an operator can change the outcome.
    pub(crate) fn is_refused_for_long(&self) -> bool {
        let long = [StatusCode::UNAUTHORIZED, StatusCode::FORBIDDEN];
        matches!(self, Self::Refused { status, .. } if long.contains(status))
    }

    /// Returns the shortest wait that the gateway asked for.
    pub(crate) const fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Refused { retry_after, .. } => *retry_after,
            Self::Token(_) | Self::Failed(_) => None,
        }
    }
}

/// Opens the WebSocket of a lane. `number` counts the connections of this process.
///
/// # Errors
/// See [`NoLane`].
pub(crate) async fn dial(config: &AgentConfig, boot: Uuid, number: u64) -> Result<Dialled, NoLane> {
    let gateway = &config.gateway;
    let who = format!("{} {} {number}", config.agent_id.as_str(), boot.simple());
    let who = HeaderValue::from_str(&who).map_err(|error| NoLane::Failed(error.to_string()))?;
    let nonce = *Uuid::new_v4().as_bytes();
    let request = ClientRequest::new(gateway.host_header.clone(), gateway.path.clone(), nonce)
        .subprotocol(SUBPROTOCOL)
        .header(header::AUTHORIZATION, gateway.token.read()?)
        .header(AGENT, who);
    let server = Server {
        host: gateway.host.clone(),
        port: gateway.port,
        tls: gateway.tls.clone(),
        timeout: gateway.timeout,
        unacknowledged_max: gateway.timeout,
    };
    let dialled = server.dial(&request).await.map_err(no_lane)?;
    if dialled.subprotocol.as_deref() == Some(SUBPROTOCOL) {
        return Ok(dialled);
    }
    Err(NoLane::Failed("the server speaks WebSocket, and no tunnel".into()))
}

fn no_lane(error: DialError) -> NoLane {
    match error {
        DialError::Refused { status, headers } => {
            let seconds = headers.get(header::RETRY_AFTER).and_then(|value| value.to_str().ok());
            let seconds = seconds.and_then(|text| text.trim().parse().ok());
            let retry_after = seconds.map(|seconds: u32| Duration::from_secs(seconds.into()));
            NoLane::Refused { status, retry_after: retry_after.map(|wait| wait.min(LONGEST)) }
        }
        error => NoLane::Failed(error.to_string()),
    }
}

/// Header that names the agent, its process, and the number of the connection.
const AGENT: HeaderName = HeaderName::from_static("x-wsproxy-agent");

/// Upper bound of a wait that a gateway may ask for.
const LONGEST: Duration = Duration::from_secs(600);
