//! The logic of one client with actions that only take notes.

use serde_json::Value;

use super::*;
use crate::bus::{Outcome, Receipt};

const SECOND: u64 = 1_000_000;

/// Takes notes of what the logic wants, at a time that the test sets.
#[derive(Default)]
struct Notes {
    now: Micros,
    /// What the client gets.
    told: Vec<String>,
    resent: Vec<String>,
    published: Vec<(String, String)>,
    ended: Option<(u16, String)>,
    wakes_at: Option<Micros>,
    expires_at: Vec<Option<u64>>,
    verified: Vec<String>,
    backed_up: bool,
    bus: Option<BusError>,
}

struct Nobody;

impl Receipt for Nobody {
    fn published(&self, _outcome: Outcome) {}
}

impl Actions for Notes {
    fn now(&self) -> Micros {
        self.now
    }

    fn reply(&mut self, kind: Kind, payload: &[u8]) {
        self.send(kind, payload);
    }

    fn send(&mut self, kind: Kind, payload: &[u8]) {
        assert_eq!(kind, Kind::Text);
        self.told.push(String::from_utf8(payload.to_vec()).unwrap());
    }

    fn resend(&mut self, kind: Kind, message: &[u8]) {
        assert_eq!(kind, Kind::Text);
        self.resent.push(String::from_utf8(message.to_vec()).unwrap());
    }

    fn is_backed_up(&self) -> bool {
        // As with a connection: what was just sent waits until the turn is over.
        self.backed_up || !self.told.is_empty()
    }

    fn publish(&mut self, publish: Publish) -> Result<(), BusError> {
        if let Some(error) = &self.bus {
            return Err(error.clone());
        }
        let payload = String::from_utf8(publish.payload.to_vec()).unwrap();
        self.published.push((publish.channel.to_string(), payload));
        Ok(())
    }

    fn disconnect(&mut self, why: &'static Disconnect) {
        self.ended = Some((why.code, why.reason.into()));
    }

    fn finish(&mut self, _why: &'static Disconnect, code: u16, reason: &str) {
        self.ended = Some((code, reason.into()));
    }

    fn wake_at(&mut self, at: Micros) {
        self.wakes_at = Some(at);
    }

    fn expire_at(&mut self, at: Option<u64>) {
        self.expires_at.push(at);
    }

    fn verify(&mut self, token: &str) {
        self.verified.push(token.into());
    }

    fn receipt(&self) -> Arc<dyn Receipt> {
        Arc::new(Nobody)
    }
}

/// A client with its connection.
struct Client {
    logic: EventLogic,
    notes: Notes,
}

impl Client {
    fn open() -> Self {
        Self::with(|_| ())
    }

    fn with(change: impl FnOnce(&mut config::Events)) -> Self {
        let mut config = Config::default();
        change(&mut config.events);
        let endpoint = EventEndpoint::new(&config, &Names::new("p"), &"gw".into());
        let user = Id::parse("u-1").unwrap();
        let mut logic = EventLogic::new(
            endpoint.into(),
            user,
            Uuid::nil(),
            Transport::WebSocket,
            Some(77),
            Arc::default(),
        );
        let mut notes = Notes { now: Micros(SECOND), ..Notes::default() };
        logic.on_open(&mut notes);
        Self { logic, notes }
    }

    fn says(&mut self, text: &str) {
        self.logic.on_message(Kind::Text, text.as_bytes(), &mut self.notes);
    }

    fn event(&mut self, tag: u8, number: u64, payload: impl Into<Bytes>) {
        let event = Event { tag, number, payload: payload.into() };
        self.logic.on_event(event, &mut self.notes);
    }

    /// A message is sent which wants an `ack`.
    fn gets(&mut self, id: &str, message: &str) {
        self.event(WANTS_ACK, id.len() as u64, format!("{id}{message}"));
    }

    /// Lets time pass; the logic is woken when it wants to be.
    fn pass(&mut self, seconds: u64) {
        let end = self.notes.now.after(Micros(seconds * SECOND));
        while let Some(at) = self.notes.wakes_at.filter(|at| *at <= end) {
            self.notes.wakes_at = None;
            self.notes.now = at;
            self.event(TIMER, 0, "");
        }
        self.notes.now = end;
    }

    fn told(&mut self) -> Vec<Value> {
        self.notes.told.drain(..).map(|text| serde_json::from_str(&text).unwrap()).collect()
    }

    /// The only thing that the client was told.
    fn answer(&mut self) -> Value {
        let mut told = self.told();
        assert_eq!(told.len(), 1, "{told:?}");
        told.remove(0)
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
        &self.logic.endpoint.counters
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
    client.event(PUBLISHED, 0, "");
    assert!(client.told().is_empty());
    client.event(PUBLISHED, 1, "");
    assert_eq!(client.answer()["code"], "publish_lost");
    client.notes.bus = Some(BusError::Full);
    client.says("{}");
    assert_eq!(client.answer()["code"], "publish_refused");
    client.event(PUBLISHED, 3, "");
    assert_eq!(client.answer()["code"], "publish_refused");
    let counters = client.counters();
    assert_eq!((counters.unheard.value(), counters.lost.value()), (1, 1));
    assert_eq!(counters.refused.value(), 2);
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
    assert_eq!(client.notes.resent, ["message 2"]);
    client.says(r#"{"type":"ack","ack_id":"e-2"}"#);
    assert_eq!(client.reports(), ["acknowledged e-1 1 -", "acknowledged e-2 2 -"]);
    client.pass(23);
    assert_eq!(client.notes.resent.len(), 1);
    assert!(client.told().is_empty());
    client.pass(1);
    assert_eq!(client.answer()["type"], "ping");
}

#[test]
fn who_acknowledges_nothing_gets_it_three_times_and_then_it_is_reported() {
    let mut client = Client::open();
    client.gets("e", "message");
    client.pass(14);
    assert_eq!(client.notes.resent, ["message", "message"]);
    assert!(client.reports().is_empty());
    client.pass(1);
    assert_eq!(client.reports(), ["unacknowledged e 3 tries"]);
    client.pass(100);
    assert_eq!((client.notes.resent.len(), client.reports().len()), (2, 0));
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
    assert_eq!(client.notes.resent.len(), 10);
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
    assert!(client.notes.resent.is_empty() && client.reports().is_empty());
    client.notes.backed_up = false;
    client.pass(2);
    assert_eq!(client.notes.resent, ["message"]);
}

#[test]
fn a_ping_does_not_keep_what_is_due_with_it_from_being_sent_again() {
    let mut client = Client::open();
    client.pass(25);
    client.gets("e", "message");
    client.pass(5);
    assert_eq!((client.told().len(), client.notes.resent.len()), (1, 1));
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

fn good(user: &str, expires_at: Option<u64>) -> Bytes {
    Verdict::Good { user: user.into(), expires_at }.to_bytes()
}

#[test]
fn a_newer_token_puts_the_end_off() {
    let mut client = Client::open();
    client.says(r#"{"type":"refresh","token":"a.b.c"}"#);
    assert_eq!(client.notes.verified, ["a.b.c"]);
    assert_eq!(client.notes.expires_at.len(), 1);
    client.event(VERIFIED, 0, good("u-1", Some(99)));
    assert_eq!(client.answer(), json!({ "type": "refreshed", "expires_at": 99 }));
    client.says(r#"{"type":"refresh","token":"d.e.f"}"#);
    client.event(VERIFIED, 0, good("u-1", None));
    assert_eq!(client.answer(), json!({ "type": "refreshed", "expires_at": null }));
    assert_eq!(client.notes.expires_at, [Some(82), Some(104), None]);
}

#[test]
fn a_bad_token_changes_nothing() {
    let mut client = Client::open();
    client.says(r#"{"type":"refresh","token":"x"}"#);
    let bad = Verdict::Bad { code: "invalid_token".into(), message: "No.".into() };
    client.event(VERIFIED, 0, bad.to_bytes());
    assert_eq!(client.answer()["code"], "invalid_token");
    assert_eq!((client.notes.expires_at.len(), &client.notes.ended), (1, &None));
    client.says(r#"{"type":"refresh","token":"y"}"#);
    client.event(VERIFIED, 0, "");
    assert_eq!(client.answer()["code"], "internal");
    assert_eq!(client.notes.verified, ["x", "y"]);
}

#[test]
fn one_token_is_looked_at_at_a_time() {
    let mut client = Client::open();
    client.says(r#"{"type":"refresh","token":"x"}"#);
    client.says(r#"{"type":"refresh","token":"y"}"#);
    assert_eq!(client.answer()["code"], "refresh_pending");
    assert_eq!(client.notes.verified, ["x"]);
}

#[test]
fn another_users_token_ends_the_connection() {
    let mut client = Client::open();
    client.says(r#"{"type":"refresh","token":"x"}"#);
    client.event(VERIFIED, 0, good("u-2", Some(99)));
    assert_eq!(client.notes.ended, Some((4401, "token of another user".into())));
    assert!(client.told().is_empty());
}
