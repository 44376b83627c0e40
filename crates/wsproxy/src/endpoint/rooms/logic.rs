//! The logic of a member: judges its messages, and hands them to its room.

use std::sync::Arc;

use secrecy::SecretString;
use tracing::{debug, info, trace};
use wsproxy_conn::{
    End, Link,
    clock::{self, Micros},
};
use wsproxy_proto::{
    disconnect::Disconnect,
    json::members::Members,
    rooms::{
        check::{self, Body, Checked, Event as PresenceKind, Hello, Refused},
        text, write,
    },
    ws::frame::Kind,
};

use crate::{
    bus::publish::BusError,
    client::event::Event,
    config::rooms::Validate,
    core::{caller::Caller, recent::Who},
    endpoint::rooms::{
        fanout::Form,
        member::{LeaveKind, Membership},
        rates::{Passed, Rates},
        record,
        requests::{MemberAnswer, MemberRequest, MemberRequests},
        room::{NotSaid, Said},
    },
    logic::{Actions, Logic},
    telemetry::log::MESSAGES,
};

/// Logic of one member.
pub(super) struct RoomLogic {
    membership: Arc<Membership>,
    link: Arc<Link>,
    caller: Arc<Caller>,
    expires_at: Option<u64>,
    opened: Micros,
    /// Form of the messages to the member; `None` until its first message, or until it has sent none for a while.
    form: Option<Form>,
    /// The member's ClientHello came.
    has_said_hello: bool,
    rates: Rates,
    /// Time of the timer that the logic asked for.
    wakes_at: Micros,
    messages_in: u32,
    strikes: u32,
    /// A newer token is being checked.
    is_refreshing: bool,
}

type MemberActions<'a> = &'a mut dyn Actions<MemberRequest>;

impl RoomLogic {
    /// Makes the logic of a member. `expires_at` is its token's `exp` in unix seconds.
    pub(super) fn new(
        membership: Arc<Membership>,
        link: Arc<Link>,
        caller: Arc<Caller>,
        expires_at: Option<u64>,
    ) -> Self {
        Self {
            membership,
            link,
            caller,
            expires_at,
            opened: clock::now(),
            form: None,
            has_said_hello: false,
            rates: Rates::default(),
            wakes_at: Micros::NEVER,
            messages_in: 0,
            strikes: 0,
            is_refreshing: false,
        }
    }

    /// Takes an envelope, in binary.
    fn on_envelope(&mut self, envelope: &[u8], form: Form, actions: MemberActions<'_>) {
        let checked = match check::check(envelope, self.membership.client.as_str()) {
            Ok(checked) => checked,
            // Only what is no envelope at all may be of another dialect. A text that is one was translated before.
            Err(Refused::NoEnvelope) => {
                let refused = Refused::NoEnvelope;
                return self.on_opaque((Kind::Binary, envelope), refused, form, actions);
            }
            Err(refused) => {
                self.greet(form, None, actions);
                let message_id = check::message_id(envelope).to_owned();
                return self.refuse(refused, &message_id, actions);
            }
        };
        let hello = match checked.body {
            Body::Hello(hello) => Some(hello),
            _ => None,
        };
        match hello {
            None => self.greet(form, None, actions),
            // A hello on a slow line may come behind the ServerHello. It is answered all the same, for its features.
            Some(_) if !self.has_said_hello => {
                self.form = None;
                self.greet(form, hello, actions);
            }
            Some(_) => {}
        }
        let Membership { rooms, room, .. } = &*self.membership;
        room.count_received(rooms, Some(checked.kind), envelope.len());
        if let Some(hello) = hello {
            if std::mem::replace(&mut self.has_said_hello, true) {
                let refused = Refused::NotAllowed("a second client_hello");
                return self.refuse(refused, checked.message_id, actions);
            }
            return self.on_hello(&hello, actions);
        }
        let now = actions.now();
        let passed = self.rates.take((&checked, envelope), &self.membership.rooms.rates, now);
        self.membership.rooms.counters.coalesced_rate.add(self.rates.take_coalesced());
        match passed {
            Passed::Now => self.say(&checked, envelope, actions),
            Passed::Later => self.plan(actions),
            Passed::Dropped(tell) => {
                self.membership.rooms.counters.rate_limited.add(1);
                if let Some(wait) = tell {
                    let text = "Too many messages.";
                    let wait_ms = u32::try_from(wait.0.div_ceil(1000)).unwrap_or(u32::MAX);
                    self.tell("rate_limited", text, wait_ms, checked.message_id, actions);
                }
            }
            Passed::Flood => actions.disconnect(&Disconnect::RATE),
        }
    }

    /// Hands a message to the room.
    fn say(&mut self, checked: &Checked<'_>, envelope: &[u8], actions: MemberActions<'_>) {
        if let Body::Custom { name: "refresh", data } = checked.body {
            return self.refresh(String::from_utf8_lossy(data).as_ref(), actions);
        }
        if let Body::Presence { event: PresenceKind::Update, data, .. } = checked.body {
            return self.update_presence(data.unwrap_or_default(), checked.message_id, actions);
        }
        if let Body::Ack(acked) = checked.body {
            return self.membership.room.acked(&self.membership, &acked);
        }
        let now = actions.now();
        let said = Said { member: &self.membership, checked, envelope, now };
        let outcome = self.membership.room.say(said, &mut |publish| actions.publish(publish));
        self.tell_not_said(outcome, checked.message_id, actions);
    }

    /// Takes a message that is no envelope.
    fn on_opaque(
        &mut self,
        (kind, message): (Kind, &[u8]),
        refused: Refused,
        form: Form,
        actions: MemberActions<'_>,
    ) {
        self.greet(form, None, actions);
        if self.membership.rooms.config.validate == Validate::Strict {
            return self.refuse(refused, "", actions);
        }
        let rooms = &self.membership.rooms;
        self.membership.room.count_received(rooms, None, message.len());
        if !self.passes(actions) {
            return;
        }
        let now = actions.now();
        let room = &self.membership.room;
        let publish = &mut |publish| actions.publish(publish);
        let outcome = room.say_opaque(&self.membership, kind, message, now, publish);
        self.tell_not_said(outcome.map_err(NotSaid::from), "", actions);
    }

    /// Counts a message that is no envelope. Returns whether it is within the rates; what is not has no answer.
    fn passes(&mut self, actions: MemberActions<'_>) -> bool {
        let rooms = &self.membership.rooms;
        match self.rates.take_opaque(&rooms.rates, actions.now()) {
            Passed::Now => return true,
            Passed::Flood => actions.disconnect(&Disconnect::RATE),
            Passed::Dropped(_) | Passed::Later => rooms.counters.rate_limited.add(1),
        }
        false
    }

    /// Sends the ServerHello, unless the member has it.
    fn greet(&mut self, form: Form, hello: Option<Hello<'_>>, actions: MemberActions<'_>) {
        if self.form.is_none() {
            self.form = Some(form);
            self.membership.room.greet(&self.membership, form, hello.as_ref(), actions.now());
        }
    }

    fn on_hello(&mut self, hello: &Hello<'_>, actions: MemberActions<'_>) {
        let data = record::named(hello.display_name, hello.presence.unwrap_or_default());
        if hello.presence.is_some() || !data.is_empty() {
            self.update_presence(&data, "", actions);
        }
    }

    fn update_presence(&mut self, data: &[u8], message_id: &str, actions: MemberActions<'_>) {
        let (room, now) = (&self.membership.room, actions.now());
        let publish = &mut |publish| actions.publish(publish);
        let outcome = room.set_presence(&self.membership, data, now, publish);
        self.tell_not_said(outcome, message_id, actions);
    }

    /// Answers a message that the room did not pass on.
    fn tell_not_said(
        &mut self,
        outcome: Result<(), NotSaid>,
        message_id: &str,
        actions: MemberActions<'_>,
    ) {
        let Err(not_said) = outcome else { return };
        if matches!(not_said, NotSaid::Bus(BusError::Closed)) {
            return actions.disconnect(&Disconnect::RESTART);
        }
        let (code, message) = (not_said.code(), not_said.to_string());
        match not_said.is_strike() {
            true => self.strike(code, &message, message_id, actions),
            false => self.tell(code, &message, 0, message_id, actions),
        }
    }

    fn refresh(&mut self, token: &str, actions: MemberActions<'_>) {
        if self.is_refreshing {
            // One check at a time bounds the work that a client can cause.
            return self.tell("refresh_pending", "Another token is being checked.", 0, "", actions);
        }
        self.is_refreshing = true;
        actions.request(MemberRequest::Token(SecretString::from(token)));
    }

    fn on_answer(&mut self, answer: MemberAnswer, actions: MemberActions<'_>) {
        match answer {
            MemberAnswer::Token(expires_at) => {
                self.is_refreshing = false;
                debug!(connection_id = %self.link.id(), "A newer token was accepted.");
                self.expires_at = expires_at;
                self.close_in_time(actions);
                let until = expires_at.map(|at| at.to_string()).unwrap_or_default();
                let told = write::custom("refreshed", until.as_bytes());
                self.send(&told, actions);
            }
            MemberAnswer::OtherToken => {
                info!(connection_id = %self.link.id(), user_id = %self.membership.user,
                    "A token of another user ends the connection.");
                let reason = "token of another user";
                actions.finish(&Disconnect::EXPIRED, Disconnect::EXPIRED.code, reason);
            }
            MemberAnswer::BadToken(code, message) => {
                self.is_refreshing = false;
                self.tell(code, &message, 0, "", actions);
            }
        }
    }

    /// Sets the end of the connection to the token's `exp` plus the leeway, as in the handshake.
    fn close_in_time(&self, actions: MemberActions<'_>) {
        let leeway = self.membership.rooms.leeway;
        actions.expire_at(self.expires_at.map(|end| end.saturating_add(leeway)));
    }

    /// Answers a message that the gateway does not relay.
    fn refuse(&mut self, refused: Refused, message_id: &str, actions: MemberActions<'_>) {
        self.strike(refused.code(), &refused.to_string(), message_id, actions);
    }

    /// Answers a message that no well-meaning client sends. The last strike ends the connection.
    fn strike(
        &mut self,
        code: &'static str,
        message: &str,
        message_id: &str,
        actions: MemberActions<'_>,
    ) {
        debug!(connection_id = %self.link.id(), code, message, "A client's message is refused.");
        self.membership.rooms.counters.invalid.add(1);
        self.strikes += 1;
        if self.strikes >= STRIKES_MAX {
            return actions.disconnect(&Disconnect::STRIKES);
        }
        self.tell(code, message, 0, message_id, actions);
    }

    /// Sends an Error.
    fn tell(
        &self,
        code: &str,
        message: &str,
        retry_after_ms: u32,
        message_id: &str,
        actions: MemberActions<'_>,
    ) {
        let error = write::error(code, message, retry_after_ms, message_id);
        self.send(&error, actions);
    }

    /// Sends an envelope in the member's form.
    fn send(&self, envelope: &[u8], actions: MemberActions<'_>) {
        match self.form.unwrap_or(Form::Binary) {
            Form::Binary => actions.reply(Kind::Binary, envelope),
            Form::Text => {
                if let Some(text) = text::to_text(envelope) {
                    actions.reply(Kind::Text, text.as_bytes());
                }
            }
        }
    }

    fn on_timer(&mut self, actions: MemberActions<'_>) {
        self.wakes_at = Micros::NEVER;
        let now = actions.now();
        if self.form.is_none() && now >= self.opened.after(HELLO_WAIT) {
            self.greet(Form::Binary, None, actions);
        }
        while let Some(position) = self.rates.due(&self.membership.rooms.rates, now) {
            if let Ok(checked) = check::check(&position, self.membership.client.as_str()) {
                self.say(&checked, &position, actions);
            }
        }
        self.membership.room.resend(&self.membership, now);
        self.plan(actions);
    }

    /// Asks for a timer at the next due time, unless an earlier timer is set.
    fn plan(&mut self, actions: MemberActions<'_>) {
        let hello = if self.form.is_none() { self.opened.after(HELLO_WAIT) } else { Micros::NEVER };
        let resend = self.membership.room.next_resend(self.membership.connection.number);
        let next = hello.min(self.rates.next()).min(resend);
        if next < self.wakes_at {
            self.wakes_at = next;
            actions.wake_at(next);
        }
    }
}

impl Logic for RoomLogic {
    type Request = MemberRequest;
    type Server = MemberRequests;

    fn on_open(&mut self, actions: &mut dyn Actions<MemberRequest>) {
        let Caller { address, origin, user_agent } = &*self.caller;
        info!(connection_id = %self.link.id(), room = self.membership.room.id.as_str(),
            user_id = %self.membership.user, client_id = %self.membership.client,
            address = address.map(display), origin = origin.as_deref(),
            user_agent = user_agent.as_deref(), "Connection opened.");
        self.opened = actions.now();
        self.close_in_time(actions);
        self.plan(actions);
    }

    fn on_message(&mut self, kind: Kind, payload: &[u8], actions: &mut dyn Actions<MemberRequest>) {
        self.messages_in += 1;
        trace!(target: MESSAGES, connection_id = %self.link.id(), bytes = payload.len(),
            "A client's message came.");
        if kind == Kind::Binary {
            return self.on_envelope(payload, Form::Binary, actions);
        }
        if let Some(control) = control(payload) {
            self.greet(Form::Text, None, actions);
            return match (self.passes(actions), control) {
                (false, _) => {}
                (true, Control::Beat) => actions.reply(Kind::Text, payload),
                (true, Control::Refresh(token)) => self.refresh(&token, actions),
            };
        }
        match text::to_binary(payload) {
            Ok(envelope) => self.on_envelope(&envelope, Form::Text, actions),
            Err(refused @ Refused::NoEnvelope) => {
                self.on_opaque((kind, payload), refused, Form::Text, actions);
            }
            Err(refused) => {
                self.greet(Form::Text, None, actions);
                self.refuse(refused, "", actions);
            }
        }
    }

    fn on_event(&mut self, event: Event, actions: &mut dyn Actions<MemberRequest>) {
        match event {
            Event::Timer => self.on_timer(actions),
            // A reliable message waits, whose time is to be watched.
            Event::Inbox => self.plan(actions),
            Event::Writable => {
                self.membership.room.catch_up(self.membership.connection.number, actions.now());
            }
            Event::Done(answer) => {
                if let Ok(answer) = answer.downcast() {
                    self.on_answer(*answer, actions);
                }
            }
            Event::Message { .. }
            | Event::ShareFree
            | Event::Unpublished(_)
            | Event::AckWanted { .. } => {}
        }
    }

    fn who(&self) -> Who<'_> {
        let Membership { room, user, client, .. } = &*self.membership;
        Who {
            room: Some(room.id.as_str()),
            user: Some(user.as_str()),
            client: Some(client.as_str()),
            address: self.caller.address,
            ..Who::default()
        }
    }

    fn on_end(&mut self, end: End, sent: (u64, u64), _: &mut dyn Actions<MemberRequest>) {
        let is_replaced = end.why.label == Disconnect::REPLACED.label;
        // A client that says goodbye and one that was sent away do not come back in a moment.
        let is_over = end.why.label == Disconnect::BACKEND.label
            || (end.by_peer && matches!(end.code, 1000 | 1001));
        let is_final = is_replaced || is_over;
        self.membership.set_leave(if is_final { LeaveKind::AtOnce } else { LeaveKind::AfterGrace });
        let duration = std::time::Duration::from(clock::now().since(self.opened));
        let Caller { address, origin, user_agent } = &*self.caller;
        info!(connection_id = %self.link.id(), room = self.membership.room.id.as_str(),
            user_id = %self.membership.user, client_id = %self.membership.client,
            address = address.map(display), origin = origin.as_deref(),
            user_agent = user_agent.as_deref(), reason = end.why.label, code = end.code,
            duration_ms = duration.as_millis() as u64, messages_in = self.messages_in,
            messages_out = sent.0, "Connection closed.");
    }
}

/// A text message that is for the gateway, and no envelope.
enum Control {
    /// `{"type":255,…}`: the keep-alive of existing web clients.
    Beat,
    /// `{"type":"refresh","token":…}`
    Refresh(String),
}

/// Reads a text message that is for the gateway.
fn control(payload: &[u8]) -> Option<Control> {
    let members = Members::of(payload, CONTROL_DEPTH_MAX).ok()?;
    let (mut is_beat, mut is_refresh, mut token) = (false, false, None);
    for member in members {
        let member = member.ok()?;
        match (&*member.name, member.value) {
            ("type", b"255") => is_beat = true,
            ("type", b"\"refresh\"") => is_refresh = true,
            ("token", value) => token = serde_json::from_slice(value).ok(),
            _ => {}
        }
    }
    match (is_beat, is_refresh, token) {
        (true, _, _) => Some(Control::Beat),
        (_, true, Some(token)) => Some(Control::Refresh(token)),
        _ => None,
    }
}

/// Time for which the gateway waits for a member's first message before it sends ServerHello.
const HELLO_WAIT: Micros = Micros(1_000_000);

/// Refused messages after which a connection is closed.
const STRIKES_MAX: u32 = 10;

/// Deepest nesting of a message that is for the gateway.
const CONTROL_DEPTH_MAX: usize = 16;
