//! Calls by HTTP on their way over the bus to the instance that holds the agent. Knows neither requests nor connections.
//!
//! A call is one publish. Its answer comes on a channel that only this process subscribes, and is passed to the caller by
//! user and request id. While an agent is away for a moment, its calls wait here: they are published again when it comes.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use futures_util::future::try_join;
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout, timeout_at},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::debug;
use uuid::Uuid;
use wsproxy_proto::{
    agents::{
        answer::{self, Answer, CallAnswer},
        command::{self, ToolCall},
        outcome::{Failure, Outcome},
    },
    names::Id,
};

use crate::{
    audit::{
        Audit,
        row::{AuditRow, Stored},
    },
    bus::publish::{self, Keep},
    core::{
        Core,
        waiting::{Peers, Waiting},
    },
    endpoint::agents::{
        aside::Aside,
        caller::{self, CallEnd, CallUpdate, CallerHandle, CallerId},
        counters::AgentCounters,
        owner::Owners,
        relay::{
            owner_watch::{OwnerWatch, Verdict},
            table::{CallKey, Errand, Joined, Left, Table},
        },
    },
    http::{api::publishing, handshake, rejection::Rejection},
    hub::{inbox::Inbox, sink::Sink},
    telemetry::scrape::{Scrape, Section, Source},
};

mod cancels;
mod owner_watch;
mod table;

/// The calls of this process that are on their way to other instances.
pub struct Relay {
    core: Arc<Core>,
    owners: Arc<Owners>,
    /// Id of the channel on which answers to this process come.
    channel: Id,
    peers: Arc<Peers>,
    table: Table,
    /// Calls whose outcome their owner keeps, until it has them.
    handed: Table,
    records: Records,
    /// Large answers.
    aside: Arc<Aside>,
    /// Whether answers arrive.
    link: watch::Sender<Link>,
}

/// A call for the instance that holds the agent.
pub struct RelayedCall {
    /// User of the agent.
    pub user: Id,
    /// Id of the call.
    pub request: Id,
    /// Name of the tool.
    pub tool: String,
    /// Parameters as JSON.
    pub params: Bytes,
    /// Hash of tool and parameters.
    pub hash: [u8; 16],
    /// Time at which the call came.
    pub begun: SystemTime,
    /// Deadline of the call.
    pub deadline: Instant,
    /// W3C trace context.
    pub traceparent: Option<String>,
    /// The caller wants to hear of progress.
    pub progress: bool,
    /// Name of the caller's API key.
    pub caller: Arc<str>,
    /// The owner keeps the outcome, and no caller waits for an answer.
    pub keep: bool,
}

/// Counters and the audit log, for calls that no instance's agent took.
pub struct Records {
    /// Counters of the family.
    pub counters: Arc<AgentCounters>,
    /// The audit log.
    pub audit: Option<Arc<Audit>>,
}

/// State of the subscription to the channel of answers.
#[derive(Debug, Clone, Copy, Default)]
struct Link {
    /// The bus has confirmed the channel.
    is_confirmed: bool,
    /// The bus is lost.
    is_lost: bool,
}

impl Relay {
    /// Makes the relay of an instance. Answers arrive until `end`, on a task of `background`.
    #[must_use]
    pub fn start(
        core: &Arc<Core>,
        owners: Arc<Owners>,
        records: Records,
        background: &TaskTracker,
        end: &CancellationToken,
    ) -> Arc<Self> {
        let id = Uuid::new_v4().simple().to_string();
        let relay = Arc::new(Self {
            core: Arc::clone(core),
            owners,
            channel: Id::parse(&id).unwrap_or_else(|_| unreachable!("a UUID is an id")),
            peers: Peers::new(core.names.agents_events(), connected),
            table: Table::default(),
            handed: Table::default(),
            records,
            aside: Aside::new(core.tasks.clone()),
            link: watch::Sender::new(Link::default()),
        });
        background.spawn(Arc::clone(&relay).listen(end.clone()));
        relay
    }

    /// Relays a call. `caller` hears progress and exactly one end.
    pub fn call(self: &Arc<Self>, call: RelayedCall, caller: CallerHandle) {
        match self.table.join(&call.key(), call.hash, caller) {
            Joined::First(errand) => {
                self.core.tasks.spawn(Arc::clone(self).drive(call, errand));
            }
            Joined::Another => {}
            Joined::Conflict(caller) => caller.end(failed(&call, Failure::Conflict)),
            Joined::Full(caller) => caller.end(failed(&call, Failure::AgentBusy)),
        }
    }

    /// Sends a call whose outcome the owner keeps. Returns when the owner has it.
    ///
    /// # Errors
    /// The end of a call that was not sent, or whose end cannot be known.
    pub async fn hand_over(self: &Arc<Self>, call: &RelayedCall) -> Result<(), CallUpdate> {
        debug_assert!(call.keep, "an answer would be lost");
        // Its place in the table is there for those who cancel it. Its caller is the request that waits here.
        let (answer, _waiter) = caller::call();
        let Joined::First(errand) = self.handed.join(&call.key(), call.hash, answer) else {
            return Err(CallUpdate::Ended(failed(call, Failure::Duplicate)));
        };
        let sent = tokio::select! {
            () = errand.ended.cancelled() => Err(CallUpdate::Ended(failed(call, Failure::Cancelled))),
            sent = self.send(call, &errand) => sent,
        };
        drop(self.handed.take_own(&errand));
        if let Err(CallUpdate::Ended(CallEnd { failure: Some(failure), .. })) = &sent {
            match failure {
                Failure::AgentOffline => self.records.add(call, None, Outcome::AgentOffline),
                Failure::Cancelled => self.records.add(call, None, Outcome::Cancelled),
                _ => {}
            }
        }
        sent
    }

    /// Notes that this instance takes a call, and refuses it.
    pub fn refuse(&self, call: &RelayedCall) {
        self.records.add(call, None, Outcome::Busy);
    }

    /// Takes one caller away from its call. The call ends when its last caller has left.
    pub fn leave(&self, user: &Id, request: &Id, caller: CallerId) {
        let key = CallKey { user: user.clone(), request: request.clone() };
        if self.table.leave(&key, caller) == Left::Sent {
            let channel = self.core.names.agent_commands(user);
            self.tell(channel, command::cancel(request, Some(&self.channel)));
        }
    }

    /// Keeps the channel of answers subscribed until `end`.
    async fn listen(self: Arc<Self>, end: CancellationToken) {
        let channel: Arc<str> = self.core.names.response(&self.channel).into();
        let answers: Arc<dyn Inbox> = Arc::new(Answers(Arc::clone(&self)));
        loop {
            let sink = Sink::Inbox(Arc::clone(&answers));
            let subscribed = tokio::select! {
                () = end.cancelled() => return,
                subscribed = self.core.hub.subscribe([(Arc::clone(&channel), sink)]) => subscribed,
            };
            match subscribed {
                Ok(_subscription) => {
                    self.link.send_modify(|link| link.is_confirmed = true);
                    return end.cancelled().await;
                }
                Err(error) => {
                    debug!(%error, "The channel of answers to calls cannot be subscribed now.");
                    tokio::select! {
                        () = end.cancelled() => return,
                        () = sleep(RETRY) => {}
                    }
                }
            }
        }
    }

    /// Brings a call to its end, unless its answer comes first.
    async fn drive(self: Arc<Self>, mut call: RelayedCall, errand: Errand) {
        let (until, mut stored) = (call.deadline + BACKSTOP, None);
        let sent = async {
            match self.send(&call, &errand).await {
                Ok(()) => {
                    sleep(LOOK_EVERY).await;
                    // The agent has the parameters. A call that lasts keeps what the audit log may need of them.
                    stored = self.records.params(&call);
                    call.params = Bytes::new();
                    self.wait_lost(&call).await
                }
                Err(end) => end,
            }
        };
        let end = tokio::select! {
            () = errand.ended.cancelled() => {
                // A call that was sent is its owner's to note.
                if !errand.is_sent() {
                    self.records.add(&call, None, Outcome::Cancelled);
                }
                return;
            }
            end = sent => end,
            () = sleep_until(until) => {
                CallUpdate::Ended(failed(&call, Failure::Timeout))
            }
            () = self.near_end() => CallUpdate::Refused(unknown("The instance is ending.")),
        };
        let callers = self.table.take_own(&errand);
        if let CallUpdate::Ended(CallEnd { failure: Some(failure), .. }) = &end
            && !callers.is_empty()
        {
            match failure {
                Failure::AgentOffline => self.records.add(&call, None, Outcome::AgentOffline),
                Failure::Cancelled => self.records.add(&call, None, Outcome::Cancelled),
                // Its owner can note it no more.
                Failure::AgentGone => self.records.add(&call, stored, Outcome::AgentGone),
                _ => {}
            }
        }
        end_all(callers, &end);
    }

    /// Waits until a call that was sent has lost its owner: the instance was killed, and cannot say so itself.
    async fn wait_lost(&self, call: &RelayedCall) -> CallUpdate {
        let mut watch = OwnerWatch::default();
        loop {
            let pause = match self.owners.look(&call.user).await {
                Ok(Some(look)) => match watch.judge(&look) {
                    Verdict::There => LOOK_EVERY,
                    Verdict::Doubted => LOOK_AGAIN,
                    Verdict::Lost => return CallUpdate::Ended(failed(call, Failure::AgentGone)),
                },
                Ok(None) => return std::future::pending().await,
                Err(_) => LOOK_AGAIN,
            };
            sleep(pause).await;
        }
    }

    /// Sends a call, and waits for an agent that is away for a moment.
    ///
    /// # Errors
    /// The end of a call that was not sent, or whose end cannot be known.
    async fn send(self: &Arc<Self>, call: &RelayedCall, errand: &Errand) -> Result<(), CallUpdate> {
        if self.publish(call, errand).await? {
            return Ok(());
        }
        let offline = || CallUpdate::Ended(failed(call, Failure::AgentOffline));
        let Some(mut waiting) = self.enter(call).await else { return Err(offline()) };
        let wait = self.core.config.agents.offline_wait;
        let until = call.deadline.min(Instant::now() + wait);
        let heard = try_join(waiting.listen(), self.hear_cancels(call));
        let Ok(Ok(((), _cancels))) = timeout_at(until, heard).await else { return Err(offline()) };
        loop {
            // A publish is not cut off: its caller could not be told whether the call was sent.
            if self.publish(call, errand).await? {
                return Ok(());
            }
            if timeout_at(until, waiting.announced()).await.is_err() {
                return Err(offline());
            }
        }
    }

    /// Takes a place in the waiting room; `None` if the agent is not expected, or the room is full.
    async fn enter(&self, call: &RelayedCall) -> Option<Waiting> {
        if self.core.config.agents.offline_wait.is_zero() {
            return None;
        }
        match self.owners.is_awaited(&call.user).await {
            Ok(true) => self.core.waiting_room.enter(&self.peers, &call.user, call.bytes()),
            Ok(false) => None,
            Err(error) => {
                debug!(%error, "Whether an agent comes back cannot be known.");
                None
            }
        }
    }

    /// Publishes a call. Returns whether an instance received it.
    ///
    /// # Errors
    /// The call was not published, or that cannot be known.
    async fn publish(&self, call: &RelayedCall, errand: &Errand) -> Result<bool, CallUpdate> {
        let refused = CallUpdate::Refused;
        let table = if call.keep { &self.handed } else { &self.table };
        if !call.keep {
            self.answers_arrive().await.map_err(refused)?;
        }
        let channel = self.core.names.agent_commands(&call.user);
        let time = self.core.config.server.handshake_timeout;
        let room = timeout(time, self.core.bus.publishable()).await;
        room.map_err(|_| refused(Rejection::bus_unavailable("The bus is overloaded.")))?;
        if !table.set_sent(errand, true) {
            // Cancelled at this moment.
            return Err(CallUpdate::Ended(failed(call, Failure::Cancelled)));
        }
        let payload = call.encode(&self.channel).into();
        let outcome = publishing::enqueue(&self.core, channel, payload, Keep::Nothing);
        let outcome = match outcome {
            Ok(outcome) => timeout(time, outcome).await,
            Err(rejection) => {
                table.set_sent(errand, false);
                return Err(refused(rejection));
            }
        };
        match outcome {
            Ok(Ok(publish::Outcome::Received(0))) => {
                if !table.set_sent(errand, false) {
                    return Err(CallUpdate::Ended(failed(call, Failure::Cancelled)));
                }
                Ok(false)
            }
            Ok(Ok(publish::Outcome::Refused(refusal))) => {
                Err(refused(Rejection::not_done(refusal)))
            }
            Ok(Ok(publish::Outcome::Lost) | Err(_)) | Err(_) => Err(refused(lost())),
            Ok(Ok(_)) => Ok(true),
        }
    }

    /// Waits until answers arrive. Without them the caller of a call that was sent would not hear its end.
    async fn answers_arrive(&self) -> Result<(), Rejection> {
        let mut link = self.link.subscribe();
        let arrive = async {
            // The sender lives as long as this relay.
            let _ = link.wait_for(|link| link.is_confirmed && !link.is_lost).await;
            Ok(())
        };
        handshake::deadline(&self.core, arrive).await
    }

    /// Waits until the instance has so little time left that calls can no longer be waited for.
    async fn near_end(&self) {
        self.core.followers_end.cancelled().await;
        sleep(self.core.config.server.shutdown_timeout / 2).await;
    }

    /// Publishes a command without asking whether it arrived.
    fn tell(&self, channel: String, payload: Vec<u8>) {
        let sent = publishing::enqueue(&self.core, channel, payload.into(), Keep::Nothing);
        if let Err(error) = sent {
            debug!(%error, "A command for an agent was not sent.");
        }
    }
}

impl Source for Relay {
    fn collect(&self, scrape: &mut Scrape) {
        let help = "Calls by HTTP that wait for an agent to come back";
        let waiting = self.peers.waiting() as i64;
        scrape.section(Section::Families).gauge("agent_calls_waiting", help, waiting);
    }
}

impl Records {
    /// Returns what the audit log may need of the parameters; bytes of all calls together are bounded.
    fn params(&self, call: &RelayedCall) -> Option<Stored> {
        self.audit.as_ref().map(|audit| audit.params(&call.params))
    }

    /// Notes a call that ended without its agent's instance. `stored`: its parameters, where the call no longer has them.
    fn add(&self, call: &RelayedCall, stored: Option<Stored>, outcome: Outcome) {
        self.counters.calls.count(outcome, None);
        if let Some(audit) = &self.audit {
            audit.record(AuditRow {
                user: &call.user,
                request: &call.request,
                tool: &call.tool,
                params: stored.unwrap_or_else(|| audit.params(&call.params)),
                result: None,
                error: None,
                success: None,
                outcome,
                execution_time: None,
                begun: call.begun,
                took: call.begun.elapsed().unwrap_or_default(),
                caller: Some(&call.caller),
                traceparent: call.traceparent.as_deref(),
            });
        }
    }
}

impl Relay {
    /// Takes a message of the channel of answers.
    fn answered(&self, body: Bytes) {
        match Answer::parse(&body) {
            Some(Answer::Ended(CallAnswer { user, request, failure, .. })) => {
                let callers = self.table.take(&CallKey { user, request });
                end_all(callers, &CallUpdate::Ended(CallEnd { failure, body: body.clone() }));
            }
            Some(Answer::Progress { user, progress }) => {
                let data = Bytes::from(answer::progress_data(&progress));
                self.table.progress(&CallKey { user, request: progress.request }, &data);
            }
            None => debug!("A message on the channel of answers is none."),
        }
    }
}

impl RelayedCall {
    fn key(&self) -> CallKey {
        CallKey { user: self.user.clone(), request: self.request.clone() }
    }

    /// Returns the bytes that the call holds while it waits.
    fn bytes(&self) -> usize {
        self.tool.len() + self.params.len() + CALL_OVERHEAD_BYTES
    }

    /// Writes the command with the time that is left.
    fn encode(&self, channel: &Id) -> Vec<u8> {
        let left = self.deadline.saturating_duration_since(Instant::now()).as_millis();
        let call = ToolCall {
            request: self.request.clone(),
            tool: self.tool.as_str().into(),
            params: &self.params,
            timeout_ms: Some(u64::try_from(left).unwrap_or(u64::MAX).max(1)),
            traceparent: self.traceparent.as_deref().map(Into::into),
            progress: self.progress && !self.keep,
            reply_to: (!self.keep).then(|| channel.clone()),
            keep: self.keep,
            again: false,
            body_hash: self.hash,
            caller: Some((&*self.caller).into()),
        };
        call.encode()
    }
}

/// Reader of the channel of answers.
struct Answers(Arc<Relay>);

impl Inbox for Answers {
    fn message(&self, payload: &[u8]) {
        let (relay, payload) = (Arc::clone(&self.0), Bytes::copy_from_slice(payload));
        self.0.aside.run(payload.len(), move || relay.answered(payload));
    }

    fn lost(&self) {
        self.0.link.send_modify(|link| link.is_lost = true);
        // Their answers may be lost already.
        end_all(self.0.table.take_sent(), &CallUpdate::Refused(lost()));
    }

    fn recovered(&self) {
        self.0.link.send_modify(|link| link.is_lost = false);
    }
}

impl fmt::Debug for Answers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Answers").field(&self.0.channel).finish()
    }
}

fn end_all(callers: Vec<CallerHandle>, end: &CallUpdate) {
    for caller in callers {
        match end {
            CallUpdate::Ended(end) => caller.end(end.clone()),
            CallUpdate::Refused(refusal) => caller.refuse(refusal.clone()),
            CallUpdate::Progress(_) => {}
        }
    }
}

/// Returns the end of a call without a response of the agent.
pub(super) fn failed(call: &RelayedCall, failure: Failure) -> CallEnd {
    failed_call(&call.key(), failure)
}

fn failed_call(key: &CallKey, failure: Failure) -> CallEnd {
    let body = answer::failure(&key.user, &key.request, failure, answer::Form::Caller).into();
    CallEnd { failure: Some(failure), body }
}

fn lost() -> Rejection {
    unknown("The bus was lost; the tool may have run.")
}

/// Returns the refusal of a call whose end cannot be known.
pub(super) fn unknown(message: &str) -> Rejection {
    Rejection { retryable: false, ..Rejection::outcome_unknown(message) }
}

/// Reads the user of an announced agent that has connected.
fn connected(announcement: &[u8]) -> Option<Id> {
    #[derive(serde::Deserialize)]
    struct Announcement<'a> {
        #[serde(borrow)]
        event: std::borrow::Cow<'a, str>,
        #[serde(borrow, rename = "userId")]
        user: std::borrow::Cow<'a, str>,
    }
    let Announcement { event, user } = serde_json::from_slice(announcement).ok()?;
    Id::parse(&user).ok().filter(|_| event == "connected")
}

/// Time behind a call's deadline after which the relay no longer waits for the owner's outcome.
const BACKSTOP: Duration = Duration::from_secs(2);

/// Interval at which the relay looks for the owner of a call that lasts.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Pause before the relay believes that the owner is lost.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// Estimate of a waiting call's cost beside its bytes.
const CALL_OVERHEAD_BYTES: usize = 512;

/// Pause before the channel of answers is subscribed again.
const RETRY: Duration = Duration::from_millis(500);
