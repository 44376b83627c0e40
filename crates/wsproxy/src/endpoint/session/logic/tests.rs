//! The logic of one client of a session, with actions that only take notes.

use serde_json::{Value, json};
use wsproxy_proto::names::Names;

use super::*;
use crate::{
    bus::publish::BusError,
    config, core,
    endpoint::session::SessionCounters,
    logic::{notes::Notes, upstream::UpstreamCounters},
    telemetry::counter::Counter,
};

/// A client with its connection.
struct Client {
    logic: SessionLogic,
    notes: Notes<Infallible>,
}

impl Client {
    fn open() -> Self {
        Self::with(|_| ())
    }

    fn with(change: impl FnOnce(&mut config::sessions::SessionsConfig)) -> Self {
        let mut config = config::sessions::SessionsConfig::default();
        change(&mut config);
        let sessions = Sessions {
            config,
            names: Names::new("p"),
            server_id: "gw".into(),
            profile: Arc::new(core::profile(&config::Config::default())),
            histories: None,
            log: None,
            counters: SessionCounters::default(),
        };
        let [agent, session] = ["a", "s"].map(|id| Id::parse(id).unwrap());
        let transport = Transport::WebSocket;
        let logic = SessionLogic::new(
            sessions.into(),
            (agent, session),
            Uuid::nil(),
            transport,
            Arc::default(),
            None,
        );
        let mut client = Self { logic, notes: Notes::at(Micros(1)) };
        client.logic.on_open(&mut client.notes);
        client
    }

    fn says(&mut self, text: &str) {
        self.logic.on_message(Kind::Text, text.as_bytes(), &mut self.notes);
    }

    fn event(&mut self, event: Event) {
        self.logic.on_event(event, &mut self.notes);
    }

    fn command(&mut self, command: &str) {
        self.event(Event::Message { tag: COMMANDS, payload: command.to_owned().into() });
    }

    /// The latest message on the bus, which must be JSON on this channel.
    fn published(&mut self, channel: &str) -> Value {
        let (on, payload) = self.notes.published.pop().unwrap();
        assert_eq!(on, channel);
        serde_json::from_str(&payload).unwrap()
    }

    fn counters(&self) -> &SessionCounters {
        &self.logic.sessions.counters
    }
}

#[test]
fn a_session_is_announced_when_it_opens_and_when_it_closes() {
    let mut client = Client::open();
    let channel = client.logic.sessions.names.agent_sessions(&client.logic.agent);
    let opened = client.published(&channel);
    assert_eq!((&opened["event"], &opened["session_id"]), (&json!("opened"), &json!("s")));
    client.says("[1]");
    client.notes.published.clear();
    let end = End { why: &Disconnect::GONE, code: 1006, by_peer: false };
    client.logic.on_end(end, (2, 30), &mut client.notes);
    let closed = client.published(&channel);
    assert_eq!((&closed["event"], &closed["code"]), (&json!("closed"), &json!(1006)));
    let counts = ["messages_in", "bytes_in", "messages_out", "bytes_out"].map(|name| &closed[name]);
    assert_eq!(counts, [&json!(1), &json!(3), &json!(2), &json!(30)]);
}

#[test]
fn an_announcement_that_the_bus_refuses_is_counted() {
    let mut client = Client::open();
    client.notes.bus = Some(BusError::Full);
    let end = End { why: &Disconnect::GONE, code: 1006, by_peer: false };
    client.logic.on_end(end, (0, 0), &mut client.notes);
    assert_eq!(client.counters().unannounced.value(), 1);
}

#[test]
fn json_goes_up_verbatim() {
    let mut client = Client::open();
    client.says("{ \"n\":1.0 }");
    let (channel, payload) = client.notes.published.pop().unwrap();
    assert_eq!((&*channel, &*payload), (&*client.logic.up, "{ \"n\":1.0 }"));
    assert!(client.notes.told.is_empty());
}

#[test]
fn invalid_json_is_a_strike_and_too_many_end_the_connection() {
    let mut client = Client::with(|config| config.strikes_max = 3);
    client.notes.published.clear();
    for bad in ["x", ""] {
        client.says(bad);
        assert_eq!(client.notes.take_answer()["code"], "invalid_json");
    }
    assert_eq!(client.notes.ended, None);
    client.says(&"[".repeat(JSON_DEPTH_MAX + 1));
    assert_eq!(client.notes.ended, Some((1008, "too many invalid messages".into())));
    assert!(client.notes.told.is_empty() && client.notes.published.is_empty());
    assert_eq!(client.counters().upstream.invalid.value(), 3);
}

#[test]
fn a_client_learns_of_messages_that_no_worker_got() {
    let mut client = Client::with(|config| config.no_receiver = NoReceiver::Error);
    let unpublished = [
        (Unpublished::NoReceiver, "no_receiver"),
        (Unpublished::Lost, "publish_lost"),
        (Unpublished::Refused { passing: true }, "publish_refused"),
        (Unpublished::Refused { passing: false }, "publish_refused"),
    ];
    for (unpublished, code) in unpublished {
        client.event(Event::Unpublished(unpublished));
        assert_eq!(client.notes.take_answer()["code"], code);
    }
    let UpstreamCounters { unheard, lost, refused, .. } = &client.counters().upstream;
    assert_eq!([unheard, lost, refused].map(Counter::value), [1, 1, 2]);
    client.notes.bus = Some(BusError::Full);
    client.says("{}");
    assert_eq!(client.notes.take_answer()["code"], "publish_refused");
    client.notes.bus = Some(BusError::Closed);
    client.says("{}");
    assert_eq!(client.notes.ended, Some((1012, "instance restarting".into())));
}

#[test]
fn no_receiver_is_no_error_unless_configured() {
    let mut client = Client::with(|config| config.no_receiver = NoReceiver::Ignore);
    client.event(Event::Unpublished(Unpublished::NoReceiver));
    assert!(client.notes.told.is_empty());
    client.says("{}");
    assert!(matches!(client.notes.keep, Some(Keep::Nothing)));
    let mut client = Client::with(|config| config.no_receiver = NoReceiver::Queue);
    client.says("{}");
    assert!(matches!(client.notes.keep, Some(Keep::IfNoReceiver { .. })));
}

#[test]
fn a_worker_closes_the_session_with_its_own_words() {
    let mut client = Client::open();
    client.command(r#"{"op":"close"}"#);
    let default = (Disconnect::BACKEND.code, Disconnect::BACKEND.reason.into());
    assert_eq!(client.notes.ended.take(), Some(default));
    client.command(r#"{"op":"close","code":4000,"reason":"done"}"#);
    assert_eq!(client.notes.ended, Some((4000, "done".into())));
}

#[test]
fn a_command_for_another_connection_changes_nothing() {
    let mut client = Client::open();
    client.command(&json!({ "op": "close", "connection_id": Uuid::max() }).to_string());
    assert_eq!(client.notes.ended, None);
    client.command(&json!({ "op": "close", "connection_id": Uuid::nil() }).to_string());
    assert!(client.notes.ended.is_some());
    assert_eq!(client.counters().bad_commands.value(), 0);
}

#[test]
fn commands_that_make_no_sense_are_counted() {
    let mut client = Client::open();
    for bad in
        ["", "{}", r#"{"op":"open"}"#, r#"{"op":"close","code":1005}"#, r#"{"op":"close","x":1}"#]
    {
        client.command(bad);
    }
    assert_eq!(client.counters().bad_commands.value(), 5);
    assert_eq!(client.notes.ended, None);
}
