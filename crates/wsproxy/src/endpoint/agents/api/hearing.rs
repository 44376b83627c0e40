//! A request that hears of its call, whichever way the call takes to the agent. Knows no status.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use tokio::time::{Instant, timeout_at};
use wsproxy_proto::agents::outcome::Failure;

use crate::{
    endpoint::agents::{
        Agents,
        api::{answer::Asked, relay_of},
        caller::{self, CallUpdate, CallWaiter, LocalCall},
        inbox::AgentInbox,
        relay::{self, Relay, RelayedCall},
    },
    http::rejection::Rejection,
};

/// A call as a request asks for it.
pub(super) struct ToolRequest {
    pub(super) asked: Asked,
    pub(super) tool: String,
    pub(super) params: Bytes,
    pub(super) hash: [u8; 16],
    pub(super) time: Duration,
    pub(super) begun: SystemTime,
    pub(super) deadline: Instant,
    pub(super) traceparent: Option<String>,
    pub(super) progress: bool,
    pub(super) caller: Arc<str>,
}

/// A request that waits for the end of its call. Dropping it before tells the agent's instance that the caller hung up.
pub(super) struct Hearing {
    relay: Arc<Relay>,
    /// The call. Its parameters are empty: they are where the call is now.
    call: ToolRequest,
    waiter: CallWaiter,
    way: Way,
}

/// The way that a call takes.
enum Way {
    /// The agent is connected to this instance.
    Here(Arc<AgentInbox>),
    /// Over the bus.
    Relayed,
    /// None: the call has ended.
    Over,
}

impl ToolRequest {
    /// Returns the call for the bus.
    pub(super) fn relayed(&self) -> RelayedCall {
        RelayedCall {
            user: self.asked.user.clone(),
            request: self.asked.request.clone(),
            tool: self.tool.clone(),
            params: self.params.clone(),
            hash: self.hash,
            begun: self.begun,
            deadline: self.deadline,
            traceparent: self.traceparent.clone(),
            progress: self.progress,
            caller: Arc::clone(&self.caller),
            keep: false,
        }
    }
}

impl Hearing {
    /// Begins a call.
    ///
    /// # Errors
    /// 404: this instance serves no agents.
    pub(super) fn begin(agents: &Agents, mut call: ToolRequest) -> Result<Self, Rejection> {
        let relay = Arc::clone(relay_of(agents)?);
        let (answer, waiter) = caller::call();
        let way = match agents.local(&call.asked.user) {
            Some(inbox) => {
                waiter.keep(call.params.clone());
                inbox.call(LocalCall {
                    request: call.asked.request.clone(),
                    tool: call.tool.clone(),
                    params: call.params.clone(),
                    timeout: call.time,
                    traceparent: call.traceparent.clone(),
                    progress: call.progress,
                    caller: Arc::clone(&call.caller),
                    hash: call.hash,
                    answer,
                });
                Way::Here(inbox)
            }
            None => {
                relay.call(call.relayed(), answer);
                Way::Relayed
            }
        };
        call.params = Bytes::new();
        Ok(Self { relay, call, waiter, way })
    }

    /// Returns the request.
    pub(super) const fn asked(&self) -> &Asked {
        &self.call.asked
    }

    /// Waits for the next progress, or for the end.
    pub(super) async fn next(&mut self) -> Option<CallUpdate> {
        loop {
            let late = self.call.deadline + LATE;
            let update = match timeout_at(late, self.waiter.next()).await {
                Ok(Some(progress @ CallUpdate::Progress(_))) => return Some(progress),
                Ok(None) if matches!(self.way, Way::Here(_)) => {
                    // The connection ended before it took the call.
                    let Some(params) = self.waiter.take_params() else {
                        self.way = Way::Over;
                        return Some(CallUpdate::Refused(relay::unknown("The call was lost.")));
                    };
                    let (answer, waiter) = caller::call();
                    self.relay.call(RelayedCall { params, ..self.call.relayed() }, answer);
                    (self.waiter, self.way) = (waiter, Way::Relayed);
                    continue;
                }
                Ok(end) => end,
                Err(_) => {
                    let failed = relay::failed(&self.call.relayed(), Failure::Timeout);
                    self.hang_up();
                    Some(CallUpdate::Ended(failed))
                }
            };
            self.way = Way::Over;
            return update;
        }
    }

    /// Waits for the end.
    pub(super) async fn end(&mut self) -> Option<CallUpdate> {
        loop {
            match self.next().await {
                Some(CallUpdate::Progress(_)) => {}
                end => return end,
            }
        }
    }

    fn hang_up(&mut self) {
        let (Asked { user, request, .. }, caller) = (&self.call.asked, self.waiter.id());
        match std::mem::replace(&mut self.way, Way::Over) {
            Way::Here(inbox) => inbox.hang_up(request, caller),
            Way::Relayed => self.relay.leave(user, request, caller),
            Way::Over => {}
        }
    }
}

impl Drop for Hearing {
    fn drop(&mut self) {
        self.hang_up();
    }
}

/// Time behind its deadline after which a call counts as timed out, even if neither the agent's connection nor the relay
/// has said so.
const LATE: Duration = Duration::from_secs(3);
