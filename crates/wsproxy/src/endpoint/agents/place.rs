//! The place of a user's agent as one connection sees it: taken in the handshake, kept while the connection lives, left
//! at its end. Knows neither messages of agents nor calls.

use std::{collections::VecDeque, net::IpAddr, sync::Arc, time::Duration};

use tokio::{
    sync::Notify,
    time::{Instant, sleep, timeout},
};
use tracing::{debug, warn};
use wsproxy_proto::{
    agents::command::{self, Command},
    disconnect::Disconnect,
};

use crate::{
    endpoint::agents::{
        Agents,
        connections::Registered,
        inbox::{AgentInbox, Inbound},
        leaving::Leaving,
        owner::{Claim, Claimed, Owner},
        turn::{Turn, Verdict},
    },
    http::rejection::Rejection,
    hub::{sink::Sink, subscription::Subscription},
};

/// A connection's hold on the place of its user. Dropping it leaves the place: commands that are still for this
/// connection are answered, until another marker is seen.
pub(super) struct Place {
    /// Entries from other tasks.
    pub(super) inbox: Arc<AgentInbox>,
    /// The connection's part of the commands channel.
    pub(super) turn: Turn,
    /// Entries that came behind the own marker while the handshake ran.
    waiting: VecDeque<Inbound>,
    registered: Option<Registered>,
    subscription: Option<Subscription>,
    /// A claim was sent, so that the place may be this connection's.
    is_claimed: bool,
}

impl Place {
    /// Makes the hold of a handshake, which has no part of the place yet.
    pub(super) fn new(inbox: Arc<AgentInbox>, registered: Registered) -> Self {
        let turn = Turn::new(inbox.connection, Arc::clone(&inbox.agents.counters));
        Self {
            inbox,
            turn,
            waiting: VecDeque::new(),
            registered: Some(registered),
            subscription: None,
            is_claimed: false,
        }
    }

    /// Subscribes to the commands, claims the place, and waits for the own marker. From then on every command behind
    /// the marker reaches this connection.
    ///
    /// # Errors
    /// 403, 409, 429, 503.
    pub(super) async fn take(&mut self, address: Option<IpAddr>) -> Result<(), Rejection> {
        let agents = Arc::clone(self.agents());
        let commands = agents.names.agent_commands(&self.inbox.user).into();
        let sink = Sink::Inbox(Arc::clone(&self.inbox) as _);
        self.subscription = Some(agents.hub.subscribe([(commands, sink)]).await?);
        self.claim(false);
        loop {
            let mut entries = self.inbox.next().await;
            while let Some(entry) = entries.pop_front() {
                if self.enter(entry, address)? {
                    self.waiting = entries;
                    return Ok(());
                }
            }
        }
    }

    /// Returns an error if the connection was told to end since the place was taken.
    ///
    /// # Errors
    /// 403, 409.
    pub(super) fn check(&mut self) -> Result<(), Rejection> {
        self.waiting.extend(self.inbox.take());
        let close = self.waiting.iter().find_map(|entry| match entry {
            Inbound::Close(ending) if self.inbox.is_meant(ending.secret) => {
                Some(refused_for(ending.why))
            }
            _ => None,
        });
        close.map_or(Ok(()), Err)
    }

    /// Takes the entries that wait.
    pub(super) fn take_waiting(&mut self) -> VecDeque<Inbound> {
        std::mem::take(&mut self.waiting)
    }

    /// Claims the place, or keeps it where it is held. The inbox gets the answer.
    pub(super) fn claim(&mut self, announce: bool) {
        self.is_claimed = true;
        let inbox = Arc::clone(&self.inbox);
        let (connection, held) = (inbox.connection, self.turn.generation());
        let claim = Claim { connection, held, announce };
        let tasks = self.agents().tasks.clone();
        tasks.spawn(async move {
            let agents = &inbox.agents;
            let claimed = agents.owners.claim(&inbox.user, claim).await;
            let Ok(Claimed::Held { generation, .. }) = claimed else {
                inbox.claimed(claimed);
                return;
            };
            if !inbox.claimed(claimed) {
                release_late(&inbox, generation);
            }
        });
    }

    /// Keeps the place where it is held. The inbox gets an answer only where something has changed.
    pub(super) fn keep(&self) {
        let Some(generation) = self.turn.generation() else { return };
        self.agents().refreshes.want(&self.inbox, generation);
    }

    fn agents(&self) -> &Arc<Agents> {
        &self.inbox.agents
    }

    /// Takes an entry while the handshake runs. Returns whether the place is taken.
    fn enter(&mut self, entry: Inbound, address: Option<IpAddr>) -> Result<bool, Rejection> {
        let verdict = match entry {
            Inbound::Message(payload) => match command::parse(&payload) {
                Ok(Command::Owner(marker)) => self.turn.marker(marker),
                _ => self.turn.command(&payload),
            },
            Inbound::Claimed(Ok(Claimed::Flapping { retry_after, owner })) => {
                return Err(self.flapping(retry_after, &owner, address));
            }
            Inbound::Claimed(Ok(claimed)) => {
                self.count_replaced(&claimed);
                let server = Arc::clone(&self.agents().server_id);
                self.turn.claimed(&claimed, &server)
            }
            Inbound::Claimed(Err(error)) => return Err(error.into()),
            Inbound::Lost => {
                self.turn.lost();
                Verdict::Wait
            }
            Inbound::Recovered => {
                self.claim(true);
                Verdict::Wait
            }
            Inbound::Close(ending) if self.inbox.is_meant(ending.secret) => {
                return Err(refused_for(ending.why));
            }
            Inbound::Close(_) => Verdict::Wait,
            // Callers of this instance do not know the connection before it is complete.
            Inbound::Call(_) | Inbound::HungUp(..) | Inbound::Cancel(_) => Verdict::Wait,
        };
        match verdict {
            Verdict::Settled => Ok(true),
            Verdict::Mine | Verdict::Wait => Ok(false),
            Verdict::Full => {
                self.agents().counters.dropped.add(1);
                Ok(false)
            }
            Verdict::Replaced | Verdict::Released => Err(replaced()),
        }
    }

    fn count_replaced(&self, claimed: &Claimed) {
        let Claimed::Held { replaced: Some(owner), .. } = claimed else { return };
        let agents = self.agents();
        let counters = &agents.counters;
        let is_here = *owner.server == *agents.server_id;
        let counter = if is_here { &counters.replaced_here } else { &counters.replaced_elsewhere };
        counter.add(1);
    }

    fn flapping(&self, retry_after: Duration, owner: &Owner, address: Option<IpAddr>) -> Rejection {
        let agents = self.agents();
        agents.counters.flapping.add(1);
        if let Some(left_out) = agents.counters.flapping_lines.pass() {
            warn!(user_id = %self.inbox.user, address = address.map(display),
                holder = %owner.connection, holder_server_id = &*owner.server, left_out,
                "Agents with one credential replace each other all the time. The present one stays.");
        }
        Rejection::rate_limited("Several agents of this user replace each other all the time.")
            .after(retry_after)
            .because("two agents with one credential replace each other")
    }

    /// Leaves the place. The returned future is to be run to its end.
    fn leave(&mut self) -> Option<impl Future<Output = ()> + Send + use<>> {
        let (registered, subscription) = (self.registered.take()?, self.subscription.take());
        let (inbox, agents) = (Arc::clone(&self.inbox), Arc::clone(self.agents()));
        let over = Arc::new(Notify::new());
        let none = Turn::new(inbox.connection, Arc::clone(&agents.counters));
        let turn = std::mem::replace(&mut self.turn, none);
        let (was_over, generation) = (turn.is_over(), turn.generation());
        let was_replaced = was_over && !turn.is_vacant();
        let waiting = std::mem::take(&mut self.waiting);
        let user = inbox.user.clone();
        let mut leaving = Leaving::new(Arc::clone(&agents), user, turn, Arc::clone(&over));
        for entry in waiting {
            if let Inbound::Message(payload) = entry {
                leaving.message(payload);
            }
        }
        inbox.leave(Box::new(leaving));
        if !self.is_claimed || was_replaced {
            inbox.end();
            return None;
        }
        Some(async move {
            let _registered = registered;
            if !was_over {
                let was_holder = release(&agents, &inbox).await;
                inbox.released(was_holder);
                if was_holder {
                    agents.tell_disconnected(&inbox.user, generation.unwrap_or_default());
                }
                // Without a marker in time the bus was lost, and with it the subscription. A connection that never held
                // the place has no commands of its own.
                if was_holder || generation.is_some() {
                    let _ = timeout(MARKER_WAIT, over.notified()).await;
                }
            }
            if let Some(subscription) = subscription {
                let stopping = agents.hub.stop(&subscription, agents.fence(inbox.connection));
                let _ = timeout(MARKER_WAIT, stopping).await;
                let unowned = inbox.end();
                drop(subscription);
                for (_, payload) in unowned {
                    agents.hand_on(&inbox.user, &payload).await;
                }
            }
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let tasks = self.agents().tasks.clone();
        if let Some(leaving) = self.leave() {
            tasks.spawn(leaving);
        }
    }
}

/// Releases a place whose connection had ended when the answer to its claim came: the claim may have come behind the
/// release, and a place without a connection would look held until it expires.
pub(super) fn release_late(inbox: &Arc<AgentInbox>, generation: u64) {
    let inbox = Arc::clone(inbox);
    inbox.agents.tasks.clone().spawn(async move {
        let agents = &inbox.agents;
        if release(agents, &inbox).await {
            inbox.released(true);
            agents.tell_disconnected(&inbox.user, generation);
        }
    });
}

/// Releases the place, and tries again while the store is away. Returns whether the connection held it.
async fn release(agents: &Agents, inbox: &AgentInbox) -> bool {
    let (since, mut is_doubted) = (Instant::now(), false);
    loop {
        let permit = agents.releases.acquire().await;
        match agents.owners.release(&inbox.user, inbox.connection).await {
            // The answer of an attempt that took effect may be lost. Then the place is free, and no other connection tells that.
            Ok(false) if is_doubted => {
                return agents.owners.is_free(&inbox.user).await.unwrap_or_default();
            }
            Ok(was_holder) => return was_holder,
            Err(error) if since.elapsed() > release_for(agents) => {
                if let Some(left_out) = agents.counters.unreleased_lines.pass() {
                    warn!(user_id = %inbox.user, connection_id = %inbox.connection, %error, left_out,
                        "A place could not be released. It expires by itself.");
                }
                return false;
            }
            Err(error) => {
                debug!(user_id = %inbox.user, connection_id = %inbox.connection, %error,
                    "A place is not released yet.");
            }
        }
        drop(permit);
        is_doubted = true;
        sleep(RELEASE_RETRY).await;
    }
}

/// Returns the time for which a release is tried again. An instance that ends does not wait for a store that is away:
/// another one releases the places when the lease has run out.
fn release_for(agents: &Agents) -> Duration {
    if agents.is_closing() { RELEASE_FOR_AT_END } else { RELEASE_FOR }
}

/// Refuses a handshake that a command has ended.
fn refused_for(why: &Disconnect) -> Rejection {
    if *why == Disconnect::REVOKED { invalid() } else { replaced().because(why.label) }
}

/// Refuses credentials: always with the same words.
pub(super) fn invalid() -> Rejection {
    Rejection::invalid_credentials("The user is unknown, or the secret is not valid.")
}

fn replaced() -> Rejection {
    Rejection::replaced("A newer connection of this user took the place of this one.")
}

/// Time to wait for the marker behind the last command.
const MARKER_WAIT: Duration = Duration::from_secs(1);

/// Time for which the release is tried again.
const RELEASE_FOR: Duration = Duration::from_secs(30);

/// The same while the instance ends. A store whose replica takes over may be back by then.
const RELEASE_FOR_AT_END: Duration = Duration::from_secs(2);

const RELEASE_RETRY: Duration = Duration::from_millis(500);
