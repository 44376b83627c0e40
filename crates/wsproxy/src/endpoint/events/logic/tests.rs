//! The logic of one client with actions that only take notes.

use secrecy::ExposeSecret;
use serde_json::Value;
use wsproxy_proto::names::Names;

use super::*;
use crate::{
    bus::publish::BusError,
    client::event::Unpublished,
    config::{self, Config},
    endpoint::events::EventCounters,
    logic::notes::Notes,
};

/// A client with its connection.
struct Client {
    logic: EventLogic,
    notes: Notes<CheckToken>,
}

impl Client {
    fn open() -> Self {
        Self::with(|_| ())
    }

    fn with(change: impl FnOnce(&mut config::events::EventsConfig)) -> Self {
        let mut config = Config::default();
        change(&mut config.events);
        let endpoint = Events::new(&config, &Names::new("p"), &"gw".into());
        let user = Id::parse("u-1").unwrap();
        let mut logic = EventLogic::new(
            endpoint.into(),
            user,
            Uuid::nil(),
            Transport::WebSocket,
            Some(77),
            Arc::default(),
        );
        let mut notes = Notes::at(Micros(SECOND));
        logic.on_open(&mut notes);
        Self { logic, notes }
    }

    fn says(&mut self, text: &str) {
        self.logic.on_message(Kind::Text, text.as_bytes(), &mut self.notes);
    }

    fn event(&mut self, event: Event) {
        self.logic.on_event(event, &mut self.notes);
    }

    fn unpublished(&mut self, unpublished: Unpublished) {
        self.event(Event::Unpublished(unpublished));
    }

    /// A message is sent which wants an `ack`.
    fn gets(&mut self, id: &str, message: &str) {
        let (event_id, message) = (id.to_owned().into(), message.to_owned().into());
        self.event(Event::AckWanted { event_id, message });
    }

    /// Lets time pass; the logic is woken when it wants to be.
    fn pass(&mut self, seconds: u64) {
        let end = self.notes.now.after(Micros(seconds * SECOND));
        while let Some(at) = self.notes.wakes_at.filter(|at| *at <= end) {
            self.notes.wakes_at = None;
            self.notes.now = at;
            self.event(Event::Timer);
        }
        self.notes.now = end;
    }

    fn told(&mut self) -> Vec<Value> {
        self.notes.take_told()
    }

    /// The only thing that the client was told.
    fn answer(&mut self) -> Value {
        self.notes.take_answer()
    }

    /// The tokens of which the logic wanted a check.
    fn checked(&self) -> Vec<&str> {
        self.notes.requests.iter().map(|CheckToken(token)| token.expose_secret()).collect()
    }

    fn reports(&mut self) -> Vec<String> {
        let reports = self.notes.published.drain(..).map(|(channel, report)| {
            assert_eq!(channel, "p:ws:acks");
            let report: Value = serde_json::from_str(&report).unwrap();
            assert_eq!((&report["user_id"], &report["server_id"]), (&"u-1".into(), &"gw".into()));
            assert_eq!(report["connection_id"], Uuid::nil().to_string());
            assert!(report["timestamp"].is_string());
            let text = |name: &str| report[name].as_str().unwrap_or("-").to_owned();
            let [event, id, reason] = ["event", "event_id", "reason"].map(text);
            format!("{event} {id} {} {reason}", report["tries"])
        });
        reports.collect()
    }

    fn counters(&self) -> &EventCounters {
        &self.logic.events.counters
    }

    fn ends(&mut self) {
        let end = End { why: &Disconnect::GONE, code: 1006, by_peer: false };
        self.logic.on_end(end, (0, 0), &mut self.notes);
    }
}

#[test]
fn a_client_is_pinged_every_interval_however_busy_it_is() {
    let mut client = Client::open();
    // The leeway of 5 s is added.
    assert_eq!(client.notes.expires_at, [Some(82)]);
    for _ in 0..4 {
        client.pass(20);
        client.says(r#"{"type":"pong"}"#);
        assert!(client.told().len() <= 1);
    }
    client.pass(10);
    let ping = client.answer();
    assert_eq!(ping["type"], "ping");
    assert!(ping["timestamp"].is_string());
    assert!(client.notes.published.is_empty());
}

#[test]
fn a_ping_is_answered() {
    let mut client = Client::open();
    client.says(r#"{"type":"ping"}"#);
    assert_eq!(client.answer()["type"], "pong");
}

#[test]
fn an_applications_message_goes_up_verbatim() {
    let mut client = Client::open();
    client.says("{ \"type\":\"x\", \"n\":1.0 }");
    let (channel, payload) = client.notes.published.remove(0);
    assert_eq!(channel, "p:ws:up");
    assert!(payload.ends_with("\"message\":{ \"type\":\"x\", \"n\":1.0 }}"), "{payload}");
    client.unpublished(Unpublished::NoReceiver);
    assert!(client.told().is_empty());
    client.unpublished(Unpublished::Lost);
    assert_eq!(client.answer()["code"], "publish_lost");
    client.notes.bus = Some(BusError::Full);
    client.says("{}");
    assert_eq!(client.answer()["code"], "publish_refused");
    client.unpublished(Unpublished::Refused { passing: false });
    assert_eq!(client.answer()["code"], "publish_refused");
    let counters = client.counters();
    assert_eq!((counters.upstream.unheard.value(), counters.upstream.lost.value()), (1, 1));
    assert_eq!(counters.upstream.refused.value(), 2);
    client.notes.bus = Some(BusError::Closed);
    client.says("{}");
    assert_eq!(client.notes.ended.unwrap().0, 1012);
}

#[test]
fn invalid_messages_are_answered_and_the_tenth_is_the_last() {
    let mut client = Client::open();
    for bad in ["[]", "x", "", "5", r#"{"type":"ack"}"#, r#"{"type":"refresh"}"#] {
        client.says(bad);
        assert_eq!(client.answer()["type"], "error", "{bad}");
    }
    client.says(r#"{"type":"resume","last_event_id":"0"}"#);
    assert_eq!(client.answer()["code"], "invalid_message");
    client.says("{");
    client.says("{");
    assert_eq!((client.told().len(), &client.notes.ended), (2, &None));
    client.says("{");
    assert_eq!(client.notes.ended, Some((1008, "too many invalid messages".into())));
    assert!(client.notes.published.is_empty());
    let mut patient = Client::with(|config| config.strikes_max = 0);
    (0..100).for_each(|_| patient.says("{"));
    assert_eq!(patient.notes.ended, None);
}

#[test]
fn an_acknowledged_message_is_not_sent_again() {
    let mut client = Client::open();
    client.gets("e-1", "message 1");
    client.gets("e-2", "message 2");
    client.pass(4);
    client.says(r#"{"type":"ack","event_id":"e-1"}"#);
    client.pass(2);
    assert_eq!(client.notes.verbatim, ["message 2"]);
    client.says(r#"{"type":"ack","ack_id":"e-2"}"#);
    assert_eq!(client.reports(), ["acknowledged e-1 1 -", "acknowledged e-2 2 -"]);
    client.pass(23);
    assert_eq!(client.notes.verbatim.len(), 1);
    assert!(client.told().is_empty());
    client.pass(1);
    assert_eq!(client.answer()["type"], "ping");
}

#[test]
fn who_acknowledges_nothing_gets_it_three_times_and_then_it_is_reported() {
    let mut client = Client::open();
    client.gets("e", "message");
    client.pass(14);
    assert_eq!(client.notes.verbatim, ["message", "message"]);
    assert!(client.reports().is_empty());
    client.pass(1);
    assert_eq!(client.reports(), ["unacknowledged e 3 tries"]);
    client.pass(100);
    assert_eq!((client.notes.verbatim.len(), client.reports().len()), (2, 0));
    // Too late.
    client.says(r#"{"type":"ack","event_id":"e"}"#);
    assert!(client.reports().is_empty());
    assert_eq!(client.counters().acks_unknown.value(), 1);
    assert_eq!(client.counters().unacknowledged[0].value(), 1);
}

#[test]
fn acks_of_nothing_are_counted_and_change_nothing() {
    let mut client = Client::open();
    client.gets("e", "message");
    for id in ["other", "", "e ", "e"] {
        client.says(&format!(r#"{{"type":"ack","event_id":"{id}"}}"#));
    }
    client.says(r#"{"type":"ack","event_id":"e"}"#);
    assert_eq!(client.reports(), ["acknowledged e 1 -"]);
    assert_eq!(client.counters().acks_unknown.value(), 4);
    assert!(client.told().is_empty() && client.notes.ended.is_none());
}

#[test]
fn a_flood_is_bounded_and_what_gives_way_is_reported() {
    let mut client = Client::with(|config| config.ack_queue = 10);
    for n in 0..1000 {
        client.gets(&format!("e-{n}"), "message");
    }
    let reports = client.reports();
    assert_eq!(reports.len(), 990);
    assert_eq!(reports[989], "unacknowledged e-989 1 overflow");
    client.pass(5);
    assert_eq!(client.notes.verbatim.len(), 10);
    let mut client = Client::open();
    for n in 0..30 {
        client.gets(&format!("e-{n}"), &"x".repeat(100_000));
    }
    assert_eq!(client.reports().len(), 20);
}

#[test]
fn a_client_that_does_not_read_gets_nothing_again() {
    let mut client = Client::open();
    client.gets("e", "message");
    client.notes.backed_up = true;
    client.pass(28);
    assert!(client.notes.verbatim.is_empty() && client.reports().is_empty());
    client.notes.backed_up = false;
    client.pass(2);
    assert_eq!(client.notes.verbatim, ["message"]);
}

#[test]
fn a_ping_does_not_keep_what_is_due_with_it_from_being_sent_again() {
    let mut client = Client::open();
    client.pass(25);
    client.gets("e", "message");
    client.pass(5);
    assert_eq!((client.told().len(), client.notes.verbatim.len()), (1, 1));
}

#[test]
fn what_waits_at_the_end_is_reported() {
    let mut client = Client::open();
    client.gets("e", "message");
    client.gets("f", "message");
    client.ends();
    assert_eq!(client.reports(), ["unacknowledged e 1 closed", "unacknowledged f 1 closed"]);
    let mut client = Client::open();
    client.gets("e", "message");
    client.notes.bus = Some(BusError::Full);
    client.ends();
    assert_eq!(client.counters().unreported.value(), 1);
}

fn good(user: &str, expires_at: Option<u64>) -> Event {
    Event::Done(Box::new(TokenVerdict::Good { user: user.into(), expires_at }))
}

#[test]
fn a_newer_token_puts_the_end_off() {
    let mut client = Client::open();
    client.says(r#"{"type":"refresh","token":"a.b.c"}"#);
    assert_eq!(client.checked(), ["a.b.c"]);
    assert_eq!(client.notes.expires_at.len(), 1);
    client.event(good("u-1", Some(99)));
    assert_eq!(client.answer(), json!({ "type": "refreshed", "expires_at": 99 }));
    client.says(r#"{"type":"refresh","token":"d.e.f"}"#);
    client.event(good("u-1", None));
    assert_eq!(client.answer(), json!({ "type": "refreshed", "expires_at": null }));
    assert_eq!(client.notes.expires_at, [Some(82), Some(104), None]);
}

#[test]
fn a_bad_token_changes_nothing() {
    let mut client = Client::open();
    client.says(r#"{"type":"refresh","token":"x"}"#);
    let bad = TokenVerdict::Bad { code: "invalid_token".into(), message: "No.".into() };
    client.event(Event::Done(Box::new(bad)));
    assert_eq!(client.answer()["code"], "invalid_token");
    assert_eq!((client.notes.expires_at.len(), &client.notes.ended), (1, &None));
    client.says(r#"{"type":"refresh","token":"y"}"#);
    client.event(Event::Done(Box::new(())));
    assert_eq!(client.answer()["code"], "internal");
    assert_eq!(client.checked(), ["x", "y"]);
}

#[test]
fn one_token_is_looked_at_at_a_time() {
    let mut client = Client::open();
    client.says(r#"{"type":"refresh","token":"x"}"#);
    client.says(r#"{"type":"refresh","token":"y"}"#);
    assert_eq!(client.answer()["code"], "refresh_pending");
    assert_eq!(client.checked(), ["x"]);
}

#[test]
fn another_users_token_ends_the_connection() {
    let mut client = Client::open();
    client.says(r#"{"type":"refresh","token":"x"}"#);
    client.event(good("u-2", Some(99)));
    assert_eq!(client.notes.ended, Some((4401, "token of another user".into())));
    assert!(client.told().is_empty());
}

const SECOND: u64 = 1_000_000;
