//! Cancels of relayed calls: here, at the instance that holds the agent, and at the instances where a call waits for it.
//! Knows no agent's connection.

use std::{fmt, sync::Arc};

use bytes::Bytes;
use wsproxy_proto::{
    agents::{command, outcome::Failure},
    names::Id,
};

use crate::{
    bus::publish::{self, BusError, Keep},
    endpoint::agents::{
        caller::CallUpdate,
        relay::{
            Relay, RelayedCall, end_all, failed_call,
            table::{CallKey, Cancelled},
        },
    },
    http::{api::publishing, handshake, rejection::Rejection},
    hub::{inbox::Inbox, sink::Sink, subscription::Subscription},
};

impl Relay {
    /// Cancels a call that was not sent yet, for all its callers. Returns whether the call was; `None`: no such call is
    /// on its way from here.
    #[must_use]
    pub fn cancel_unsent(&self, user: &Id, request: &Id) -> Option<bool> {
        let key = CallKey { user: user.clone(), request: request.clone() };
        let mut was_unsent = None;
        for cancelled in [&self.table, &self.handed].into_iter().filter_map(|t| t.cancel(&key)) {
            was_unsent = Some(matches!(cancelled, Cancelled::Removed(_)));
            if let Cancelled::Removed(callers) = cancelled {
                end_all(callers, &CallUpdate::Ended(failed_call(&key, Failure::Cancelled)));
            }
        }
        was_unsent
    }

    /// Sends the wish to cancel a call to the instance that holds the agent, and to those where the call waits for it.
    ///
    /// # Errors
    /// 404: no instance holds the agent, and the call waits at none. 503, 504: the wish may not have arrived.
    pub async fn cancel(&self, user: &Id, request: &Id) -> Result<(), Rejection> {
        let names = &self.core.names;
        let channels = [names.agent_commands(user), names.agent_waiting(user, request)];
        let payload = Bytes::from(command::cancel(request, None));
        // Both are on their way before the first answer comes: an agent may connect meanwhile.
        let wishes = channels.map(|channel| {
            publishing::enqueue(&self.core, channel, payload.clone(), Keep::Nothing)
        });
        let mut receivers = 0;
        for wish in wishes {
            let wish = wish?;
            match handshake::deadline(&self.core, async { Ok(wish.await) }).await? {
                Ok(publish::Outcome::Received(count)) => receivers += count,
                Ok(publish::Outcome::Refused(refusal)) => return Err(Rejection::not_done(refusal)),
                Ok(publish::Outcome::Lost) | Err(_) => {
                    let message = "The bus was lost; the wish may have arrived.";
                    return Err(Rejection::bus_unavailable(message));
                }
                Ok(_) => {}
            }
        }
        if receivers > 0 {
            return Ok(());
        }
        Err(Rejection::not_found(format!(
            "No agent of {user} is connected, and the call waits for none."
        )))
    }

    /// Sends the wish to cancel a call to the instances where it waits for its agent, if there are any.
    pub fn cancel_waiting(&self, user: &Id, request: &Id) {
        self.tell(self.core.names.agent_waiting(user, request), command::cancel(request, None));
    }

    /// Subscribes to the wishes of other instances to cancel a call that waits here.
    ///
    /// # Errors
    /// The bus refuses the subscription.
    pub(super) async fn hear_cancels(
        self: &Arc<Self>,
        call: &RelayedCall,
    ) -> Result<Subscription, BusError> {
        let channel = self.core.names.agent_waiting(&call.user, &call.request).into();
        let cancels = Cancels { relay: Arc::clone(self), key: call.key() };
        self.core.hub.subscribe([(channel, Sink::Inbox(Arc::new(cancels)))]).await
    }
}

/// Reader of the channel on which others cancel a call that waits here. Every message there is such a wish.
struct Cancels {
    relay: Arc<Relay>,
    key: CallKey,
}

impl Inbox for Cancels {
    fn message(&self, _payload: &[u8]) {
        let CallKey { user, request } = &self.key;
        if self.relay.cancel_unsent(user, request) == Some(false) {
            // The call is just being sent: its wish follows on the same way.
            let channel = self.relay.core.names.agent_commands(user);
            self.relay.tell(channel, command::cancel(request, None));
        }
    }

    fn lost(&self) {}

    fn recovered(&self) {}
}

impl fmt::Debug for Cancels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Cancels").field(&self.key).finish()
    }
}
