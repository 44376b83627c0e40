//! The logic of a user's agent: what comes from the agent, from the commands channel, and from other tasks of this
//! process. Everything of a connection runs on its task.

use std::{convert::Infallible, sync::Arc, time::Duration};

use tracing::{debug, info};
use wsproxy_conn::{
    End,
    clock::{self, Micros},
};
use wsproxy_proto::{
    agents::{
        command::{self, Command},
        message::{self, AgentMessage, BadMessage, Hello},
        writer::{self, ConnectedDetails},
    },
    disconnect::Disconnect,
    ws::frame::Kind,
};

use crate::{
    client::event::Event,
    core::{caller::Caller, recent::Who},
    endpoint::agents::{
        Agents,
        inbox::{Ending, Inbound},
        logic::calls::InFlight,
        owner::Claimed,
        place::Place,
        turn::Verdict,
    },
    logic::{Actions, Logic, upstream::Strikes},
    registry::agents::AgentMembership,
    store::command::StoreError,
    telemetry::time,
};

mod calls;

/// Logic of one connection of a user's agent.
pub(super) struct AgentLogic {
    place: Place,
    calls: InFlight,
    membership: Option<AgentMembership>,
    caller: Arc<Caller>,
    opened: Micros,
    /// Time of the last claim or refresh.
    refreshed: Micros,
    /// The agent knows more messages than the first version has.
    is_v2: bool,
    /// The connection is about to end: nothing is sent to the agent any more.
    is_ending: bool,
    strikes: Strikes,
    messages_in: u32,
}

impl AgentLogic {
    /// Makes the logic of an agent that holds its place.
    pub(super) fn new(place: Place, caller: Arc<Caller>, is_v2: bool) -> Self {
        let now = clock::now();
        Self {
            place,
            calls: InFlight::default(),
            membership: None,
            caller,
            opened: now,
            refreshed: now,
            is_v2,
            is_ending: false,
            strikes: Strikes::default(),
            messages_in: 0,
        }
    }

    fn agents(&self) -> &Arc<Agents> {
        &self.place.inbox.agents
    }

    /// Sends the first message.
    fn greet(&self, actions: &mut dyn Actions<Infallible>) {
        let (inbox, profile) = (&self.place.inbox, &self.agents().profile);
        let details = self.is_v2.then(|| ConnectedDetails {
            connection: inbox.connection,
            interval: profile.heartbeat_interval.into(),
            timeout: profile.heartbeat_timeout.into(),
        });
        let server = &self.agents().server_id;
        let message = writer::connected(&inbox.user, now_ms(), server, details.as_ref());
        actions.send(Kind::Text, &message);
    }

    /// Takes the entries that other tasks left.
    fn take_entries(&mut self, actions: &mut dyn Actions<Infallible>) {
        for entry in self.place.inbox.take() {
            self.take(entry, actions);
        }
        self.plan(actions);
    }

    fn take(&mut self, entry: Inbound, actions: &mut dyn Actions<Infallible>) {
        match entry {
            Inbound::Message(payload) => self.take_message(&payload, actions),
            Inbound::Lost => self.place.turn.lost(),
            Inbound::Recovered if self.place.turn.is_doubting() => {
                self.ask(actions.now());
            }
            Inbound::Recovered => {}
            Inbound::Claimed(claimed) => self.take_claimed(claimed, actions),
            Inbound::Call(call) if !self.is_ending => self.begin_local(*call, actions),
            // The caller learns from the dropped handle that its call was not sent.
            Inbound::Call(_) => {}
            Inbound::HungUp(request, caller) => self.hang_up(&request, caller, actions),
            Inbound::Cancel(request) => self.cancel(&request, actions),
            Inbound::Close(ending) if self.place.inbox.is_meant(ending.secret) => {
                let Ending { why, reason, .. } = *ending;
                self.end_calls(actions.now());
                self.is_ending = true;
                actions.finish(why, why.code, reason.as_deref().unwrap_or(why.reason));
            }
            Inbound::Close(_) => {}
        }
    }

    /// Takes a message of the commands channel.
    fn take_message(&mut self, payload: &[u8], actions: &mut dyn Actions<Infallible>) {
        let command = command::parse(payload);
        let verdict = match &command {
            Ok(Command::Owner(marker)) => self.place.turn.marker(*marker),
            _ => self.place.turn.command(payload),
        };
        match verdict {
            Verdict::Mine => self.act(command, payload, actions),
            verdict => self.decide(verdict, actions),
        }
    }

    /// Obeys a command that is this connection's own.
    fn act(
        &mut self,
        command: Result<Command<'_>, command::BadCommand>,
        payload: &[u8],
        actions: &mut dyn Actions<Infallible>,
    ) {
        match command {
            Ok(Command::Call(call)) => self.begin(&call, actions),
            Ok(Command::Cancel { request, reply_to: None }) => self.cancel(&request, actions),
            Ok(Command::Cancel { request, reply_to: Some(channel) }) => {
                self.leave_bus(&request, &channel, actions);
            }
            Ok(Command::Owner(_)) => {}
            Ok(Command::Other) if !self.is_ending => actions.send(Kind::Text, payload),
            Ok(Command::Other) => {}
            Err(bad) => {
                let agents = self.agents();
                if let Some(left_out) = agents.counters.bad_command_lines.pass() {
                    debug!(user_id = %self.place.inbox.user, error = %bad, left_out,
                        "A command for an agent makes no sense.");
                }
                agents.refuse_bad(&self.place.inbox.user, &bad);
            }
        }
    }

    fn take_claimed(
        &mut self,
        claimed: Result<Claimed, StoreError>,
        actions: &mut dyn Actions<Infallible>,
    ) {
        match claimed {
            Ok(claimed) => {
                if let Claimed::Held { .. } = claimed {
                    self.agents().tell_kept(&self.place.inbox.user);
                }
                let verdict = self.place.turn.claimed(&claimed, &self.place.inbox.agents.server_id);
                self.decide(verdict, actions);
            }
            Err(error) => {
                debug!(user_id = %self.place.inbox.user, connection_id = %self.place.inbox.connection,
                    %error, "The place was not refreshed.");
            }
        }
    }

    fn decide(&mut self, verdict: Verdict, actions: &mut dyn Actions<Infallible>) {
        let why = match verdict {
            Verdict::Mine | Verdict::Wait => return,
            Verdict::Full => return self.agents().counters.dropped.add(1),
            Verdict::Settled => return self.run_kept(actions),
            Verdict::Replaced => &Disconnect::REPLACED,
            // No newer connection holds the place, so the agent is to come back.
            Verdict::Released => &Disconnect::RESTART,
        };
        self.end_calls(actions.now());
        self.is_ending = true;
        actions.disconnect(why);
    }

    /// Runs the commands that waited for the decision whose they are.
    fn run_kept(&mut self, actions: &mut dyn Actions<Infallible>) {
        for (is_run, payload) in self.place.turn.take_kept() {
            match command::parse(&payload) {
                Ok(Command::Call(call)) if !is_run => self.refuse_busy(&call),
                command => self.act(command, &payload, actions),
            }
        }
    }

    /// Keeps the place.
    fn refresh(&mut self, now: Micros) {
        self.refreshed = now;
        self.place.keep();
    }

    /// Asks whether the place is still held, with a marker as the answer.
    fn ask(&mut self, now: Micros) {
        self.refreshed = now;
        self.place.claim(true);
    }

    /// Sets the timer: to the next deadline of a call, and to the next refresh.
    fn plan(&mut self, actions: &mut dyn Actions<Infallible>) {
        let after = if self.place.turn.is_doubting() { ASK_AGAIN } else { REFRESH_EVERY };
        let refresh = self.refreshed.after(after);
        actions.wake_at(refresh.min(self.calls.next_deadline()));
    }

    fn on_timer(&mut self, actions: &mut dyn Actions<Infallible>) {
        let now = actions.now();
        self.expire(actions);
        let is_doubting = self.place.turn.is_doubting();
        let after = if is_doubting { ASK_AGAIN } else { REFRESH_EVERY };
        if now >= self.refreshed.after(after) && !self.is_ending {
            if is_doubting { self.ask(now) } else { self.refresh(now) }
        }
    }

    fn on_heartbeat(&mut self, actions: &mut dyn Actions<Infallible>) {
        actions.reply(Kind::Text, &writer::heartbeat_ack(now_ms()));
        let now = actions.now();
        if now.since(self.refreshed) >= REFRESH_AT_MOST_EVERY && !self.place.turn.is_doubting() {
            self.refresh(now);
            // The timer of an agent with heartbeats never comes: forget here the calls that ended long ago.
            self.expire(actions);
        }
    }

    fn on_hello(&mut self, hello: &Hello<'_>) {
        self.calls.set_abilities(hello.cancel);
        if let Some(membership) = &self.membership {
            membership.describe(hello.platform.as_deref(), hello.version.as_deref());
        }
    }

    fn refuse(&mut self, bad: BadMessage, actions: &mut dyn Actions<Infallible>) {
        debug!(user_id = %self.place.inbox.user, connection_id = %self.place.inbox.connection,
            code = bad.code(), "An agent's message is invalid.");
        let agents = Arc::clone(self.agents());
        let error = (bad.code(), &*bad.to_string());
        self.strikes.refuse(error, agents.config.strikes_max, &agents.counters.upstream, actions);
    }
}

impl Logic for AgentLogic {
    type Request = Infallible;
    type Server = ();

    fn on_open(&mut self, actions: &mut dyn Actions<Infallible>) {
        let inbox = Arc::clone(&self.place.inbox);
        let Caller { address, user_agent, .. } = &*self.caller;
        info!(user_id = %inbox.user, connection_id = %inbox.connection,
            address = address.map(display), user_agent = user_agent.as_deref(),
            "Connection opened.");
        self.greet(actions);
        self.membership = self.agents().tell_connected(
            &inbox.user,
            inbox.connection,
            self.place.turn.generation().unwrap_or_default(),
        );
        self.run_kept(actions);
        for entry in self.place.take_waiting() {
            self.take(entry, actions);
        }
        self.take_entries(actions);
    }

    fn on_message(&mut self, kind: Kind, payload: &[u8], actions: &mut dyn Actions<Infallible>) {
        self.messages_in += 1;
        if kind == Kind::Binary {
            self.end_calls(actions.now());
            self.is_ending = true;
            return actions.disconnect(&Disconnect::UNSUPPORTED);
        }
        match message::parse(payload) {
            Ok(AgentMessage::Heartbeat) => self.on_heartbeat(actions),
            Ok(AgentMessage::Response(response)) => self.on_response(&response, actions),
            Ok(AgentMessage::Hello(hello)) if self.is_v2 => self.on_hello(&hello),
            Ok(AgentMessage::Progress(progress)) if self.is_v2 => {
                self.on_progress(&progress, actions);
            }
            Ok(_) => self.refuse(BadMessage::UnknownType, actions),
            // Calls without a request id go to agents as they are, and may be answered so.
            Err(BadMessage::BadRequestId) => self.agents().counters.unknown.add(1),
            Err(bad) => self.refuse(bad, actions),
        }
        self.plan(actions);
    }

    fn on_event(&mut self, event: Event, actions: &mut dyn Actions<Infallible>) {
        match event {
            Event::Inbox => self.take_entries(actions),
            Event::Timer => {
                self.on_timer(actions);
                self.plan(actions);
            }
            // The family subscribes by its inbox, and has no other requests.
            Event::Unpublished(_)
            | Event::Message { .. }
            | Event::AckWanted { .. }
            | Event::Done(_)
            | Event::ShareFree
            | Event::Writable => {}
        }
    }

    fn who(&self) -> Who<'_> {
        let (user, address) = (Some(self.place.inbox.user.as_str()), self.caller.address);
        Who { user, address, ..Who::default() }
    }

    fn on_end(&mut self, end: End, sent: (u64, u64), actions: &mut dyn Actions<Infallible>) {
        self.end_calls(actions.now());
        let inbox = &self.place.inbox;
        let duration = Duration::from(clock::now().since(self.opened));
        let Caller { address, user_agent, .. } = &*self.caller;
        info!(user_id = %inbox.user, connection_id = %inbox.connection,
            address = address.map(display), user_agent = user_agent.as_deref(),
            reason = end.why.label, code = end.code, duration_ms = duration.as_millis() as u64,
            messages_in = self.messages_in, messages_out = sent.0, "Connection closed.");
    }
}

fn now_ms() -> u64 {
    time::since_epoch().as_millis() as u64
}

/// Interval of refreshes while no heartbeat comes: a third of the time for which a place is kept.
const REFRESH_EVERY: Micros = Micros(40_000_000);

/// Least interval of refreshes that heartbeats cause.
const REFRESH_AT_MOST_EVERY: Micros = Micros(1_000_000);

/// Interval of questions whether the place is still held, after messages may have been missed.
const ASK_AGAIN: Micros = Micros(1_000_000);
