//! The scripts of rooms in Redis, and what they publish.

use wsproxy_proto::{
    names::{Id, Names, slot},
    rooms::wire::{self, Connection, Form, Frame, Kind},
};

use crate::support::{
    bus::TestBus,
    cluster::Cluster,
    redis_server::{Answer, RedisServer},
};

/// A room on a server, and what a subscriber of its channel sees.
struct Room {
    bus: TestBus,
    seen: usize,
}

impl Room {
    async fn open() -> Self {
        let bus = TestBus::redis();
        bus.subscribe(&[CHANNEL]).await;
        Self { bus, seen: 0 }
    }

    fn server(&self) -> &RedisServer {
        self.bus.server.as_ref().unwrap()
    }

    fn join(&self, client: &str, connection: &str, user: &str, again: &str) -> Answer {
        let words = [client, connection, user, "{}", "2", CHANNEL, &origin(), "3600000", again];
        eval(self.server(), JOIN, &words)
    }

    fn leave(&self, pairs: &[&str], fields: &[&str]) -> Answer {
        let (count, origin) = ((pairs.len() / 2).to_string(), origin());
        let words = [&[CHANNEL, &origin, "60000", &count], pairs, fields].concat();
        eval(self.server(), LEAVE, &words)
    }

    fn state(&self, client: &str, connection: &str, op: &[&str]) -> i64 {
        let words = [&[client, connection, CHANNEL, "message", "3600000"], op].concat();
        eval(self.server(), STATE, &words).integer()
    }

    fn fields(&self, key: &str) -> Vec<String> {
        let Answer::Array(fields) = self.server().call(&["HKEYS", &keys()[index(key)]]) else {
            panic!("{key} is no hash")
        };
        let mut fields: Vec<String> = fields.iter().map(text).collect();
        fields.sort_unstable();
        fields
    }

    fn ttl(&self, key: &str) -> i64 {
        self.server().call(&["PTTL", &keys()[index(key)]]).integer()
    }

    /// Waits for so many further messages of instances.
    async fn published(&mut self, count: usize) -> Vec<String> {
        self.bus.seen.wait_for(self.seen + count).await;
        let payloads = self.bus.seen.payloads(CHANNEL).split_off(self.seen);
        self.seen += count;
        payloads.iter().map(|payload| tell(payload)).collect()
    }
}

fn index(key: &str) -> usize {
    ["members", "meta", "entities", "positions"].iter().position(|name| *name == key).unwrap()
}

/// Writes a message of an instance without versions.
fn tell(payload: &[u8]) -> String {
    let Some(frame) = Frame::parse(payload).unwrap() else {
        return String::from_utf8_lossy(payload).into_owned();
    };
    assert_eq!(frame.from, FROM);
    match frame.kind {
        Kind::Join { client, record, .. } => format!("J {client} {record}"),
        Kind::Entity(snapshot) => format!("E {}", String::from_utf8_lossy(snapshot)),
        Kind::Leave { client, .. } => format!("L {client}"),
        Kind::Replaced { old_connection, client, record } => {
            format!("X {old_connection} {client} {record}")
        }
        kind => panic!("{kind:?}"),
    }
}

fn eval(server: &RedisServer, script: &str, words: &[&str]) -> Answer {
    let keys = keys();
    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
    server.call(&[&["EVAL", script, "4"][..], &keys, words].concat())
}

fn keys() -> [String; 4] {
    let (names, room) = (Names::new(""), Id::parse("lobby").unwrap());
    [
        names.room_members(&room),
        names.room_meta(&room),
        names.room_entities(&room),
        names.room_positions(&room),
    ]
}

fn origin() -> String {
    String::from_utf8(wire::origin(FROM, Form::Envelope).to_vec()).unwrap()
}

fn text(answer: &Answer) -> String {
    let Answer::Text(text) = answer else { panic!("{answer:?}") };
    text.clone()
}

fn refused(why: &str, holder: &str) -> Answer {
    Answer::Array(vec![Answer::Integer(0), Answer::Text(why.into()), Answer::Text(holder.into())])
}

/// Returns version and connection before.
fn joined(answer: &Answer) -> (u64, String) {
    let Answer::Array(parts) = answer else { panic!("{answer:?}") };
    assert_eq!(parts[0], Answer::Integer(1), "{answer:?}");
    (text(&parts[1]).parse().unwrap(), text(&parts[2]))
}

fn gone(clients: &[&str]) -> Answer {
    Answer::Array(clients.iter().map(|client| Answer::Text((*client).into())).collect())
}

#[tokio::test]
async fn members_join_and_leave_once() {
    let mut room = Room::open().await;
    let (first, before) = joined(&room.join("phone", "k1", "alice", ""));
    assert!(first > 1_600_000_000_000_000 && before.is_empty());
    assert_eq!(joined(&room.join("phone", "k2", "alice", "")), (first, "k1".into()));
    assert_eq!(room.join("phone", "k3", "bob", ""), refused("taken", ""));
    assert_eq!(room.leave(&["phone", "k1"], &["*"]), gone(&[]));
    assert_eq!(joined(&room.join("tab", "k4", "bob", "")), (first + 1, String::new()));
    assert_eq!(room.join("third", "k5", "carol", ""), refused("full", ""));
    // A member joins again in a full room, with the same connection only.
    assert_eq!(room.join("phone", "k1", "alice", "again"), refused("replaced", "k2"));
    assert_eq!(joined(&room.join("phone", "k2", "alice", "again")), (first + 1, "k2".into()));
    assert_eq!(
        room.leave(&["phone", "k2", "tab", "k4", "x", "k9"], &["*"]),
        gone(&["phone", "tab"])
    );
    let expected =
        ["J phone k1 alice {}", "X k1 phone k2 alice {}", "J tab k4 bob {}", "L phone", "L tab"];
    assert_eq!(room.published(5).await, expected);
    // The version outlives the members for a while.
    assert!((1..=60_000).contains(&room.ttl("meta")));
    assert_eq!(joined(&room.join("tab", "k6", "bob", "")), (first + 4, String::new()));
    assert!(room.ttl("meta") > 3_500_000);
}

#[tokio::test]
async fn versions_never_repeat_in_another_life() {
    let room = Room::open().await;
    let (first, _) = joined(&room.join("phone", "k1", "alice", ""));
    room.server().call(&["FLUSHALL"]);
    let (again, before) = joined(&room.join("phone", "k1", "alice", "again"));
    assert!(again > first && before.is_empty());
}

#[tokio::test]
async fn state_is_changed_by_the_holder_only() {
    let room = Room::open().await;
    assert_eq!(room.state("phone", "k1", &["spawn", "e", "snapshot"]), -1);
    room.join("phone", "k1", "alice", "");
    assert_eq!(room.state("phone", "k1", &["spawn", "e", "snapshot"]), 1);
    assert_eq!(room.fields("entities"), ["phone e"]);
    assert!((3_500_000..=3_600_000).contains(&room.ttl("entities")));
    room.join("phone", "k2", "alice", "");
    assert_eq!(room.state("phone", "k1", &["despawn", "e"]), -1);
    assert_eq!(room.state("phone", "k1", &["presence", "{\"name\":\"Eve\"}"]), -1);
    assert_eq!(room.fields("entities"), ["phone e"]);
    room.server().call(&["HSET", &keys()[3], "phone e", "p", "phone f", "p"]);
    assert_eq!(room.state("phone", "k2", &["despawn", "e"]), 1);
    assert_eq!(
        (room.fields("entities").len(), room.fields("positions")),
        (0, vec!["phone f".into()])
    );
    assert_eq!(room.state("phone", "k2", &["presence", "{\"name\":\"A b\"}"]), 1);
    let record = room.server().call(&["HGET", &keys()[0], "phone"]);
    assert_eq!(text(&record), "k2 alice {\"name\":\"A b\"}");
}

#[tokio::test]
async fn positions_are_written_for_the_holder_only() {
    let room = Room::open().await;
    room.join("phone", "k1", "alice", "");
    let write = |positions: &[&str]| {
        eval(room.server(), POSITIONS, &[&["3600000"], positions].concat()).integer()
    };
    let three = ["phone", "k1", "e", "1", "phone", "k0", "f", "1", "tab", "k2", "g", "1"];
    assert_eq!(write(&three), 1);
    assert_eq!(
        (room.fields("positions"), room.fields("entities")),
        (vec!["phone e".into()], vec![])
    );
    assert!((3_500_000..=3_600_000).contains(&room.ttl("positions")));
    room.leave(&["phone", "k1"], &["phone e"]);
    assert_eq!(write(&three), 0);
    assert_eq!(write(&[]), 0);
    assert_eq!(room.fields("positions").len(), 0);
}

#[tokio::test]
async fn member_joins_again_together_with_its_entities() {
    let mut room = Room::open().await;
    let again = |room: &Room, connection: &str| {
        let origin = origin();
        let words = ["phone", connection, "alice", "{}", "2", CHANNEL, &origin, "3600000", "again"];
        let entities = ["e", "one", "f", "two"];
        eval(room.server(), JOIN, &[&words[..], &entities].concat())
    };
    room.join("phone", "k1", "alice", "");
    room.state("phone", "k1", &["spawn", "e", "newer"]);
    // The member is there: only what Redis lacks is written.
    joined(&again(&room, "k1"));
    assert_eq!(again(&room, "k0"), refused("replaced", "k1"));
    let entity = |room: &Room, field: &str| text(&room.server().call(&["HGET", &keys()[2], field]));
    assert_eq!(
        (entity(&room, "phone e"), entity(&room, "phone f")),
        ("newer".into(), "two".into())
    );
    room.server().call(&["FLUSHALL"]);
    joined(&again(&room, "k1"));
    assert_eq!(entity(&room, "phone e"), "one");
    assert!((3_500_000..=3_600_000).contains(&room.ttl("entities")));
    let seen = room.published(6).await;
    let record = "k1 alice {}";
    let expected = [
        format!("J phone {record}"),
        "message".into(),
        "E two".into(),
        format!("J phone {record}"),
        "E one".into(),
        "E two".into(),
    ];
    assert_eq!(seen, expected);
}

#[tokio::test]
async fn entities_and_positions_leave_with_their_member() {
    for fields in [&["*"][..], &["phone e", "phone f", "tab e"]] {
        let room = Room::open().await;
        room.join("phone", "k1", "alice", "");
        room.join("tab", "k2", "bob", "");
        for key in &keys()[2..] {
            room.server().call(&["HSET", key, "phone e", "1", "phone f", "1", "tab e", "1"]);
        }
        // The connection does not hold the place any more: nothing goes.
        room.leave(&["phone", "k0"], fields);
        assert_eq!(room.fields("entities").len(), 3);
        room.leave(&["phone", "k1"], fields);
        assert_eq!(room.fields("entities"), ["tab e"]);
        assert_eq!(room.fields("positions"), ["tab e"]);
        room.leave(&["tab", "k2"], &[]);
        assert_eq!((room.fields("entities").len(), room.fields("positions").len()), (0, 0));
    }
}

#[tokio::test]
async fn fields_left_behind_are_removed_without_an_event() {
    let mut room = Room::open().await;
    room.join("tab", "k2", "bob", "");
    let mut words = vec!["HSET".to_owned(), keys()[3].clone()];
    for number in 0..2500 {
        words.extend([format!("phone {number}"), "p".into()]);
    }
    words.extend(["tab e".into(), "p".into()]);
    room.server().call(&words.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(room.leave(&["phone", "", "tab", ""], &["*"]), gone(&[]));
    assert_eq!(room.fields("positions"), ["tab e"]);
    assert_eq!(room.published(1).await, ["J tab k2 bob {}"]);
}

#[test]
fn scripts_of_rooms_run_in_a_cluster() {
    let cluster = Cluster::start();
    for key in keys() {
        assert_eq!(slot(key.as_bytes()), slot(CHANNEL.as_bytes()));
    }
    let server = &cluster.nodes[cluster.owner_of(CHANNEL)];
    let keys = keys();
    let run = |script: &str, words: &[&str]| {
        let keys: Vec<_> = keys.iter().map(String::as_str).collect();
        server.call(&[&["EVAL", script, "4"][..], &keys, words].concat())
    };
    let origin = origin();
    joined(&run(JOIN, &["phone", "k1", "alice", "{}", "0", CHANNEL, &origin, "60000", ""]));
    let spawn = ["phone", "k1", CHANNEL, "message", "60000", "spawn", "e", "snapshot"];
    assert_eq!(run(STATE, &spawn).integer(), 0);
    let positions = ["60000", "phone", "k1", "e", "position"];
    assert_eq!(run(POSITIONS, &positions).integer(), 1);
    let leave = [CHANNEL, &origin, "60000", "1", "phone", "k1", "*"];
    assert_eq!(run(LEAVE, &leave), gone(&["phone"]));
}

/// Connection in the heads. All of its bytes are ASCII, since words of this test are text.
const FROM: Connection = Connection { server: 0x0102_0304_0506_0708, number: 9 };
const CHANNEL: &str = "room:lobby";
const JOIN: &str = include_str!("../../../../spec/scripts/room_join.lua");
const POSITIONS: &str = include_str!("../../../../spec/scripts/room_positions.lua");
const LEAVE: &str = include_str!("../../../../spec/scripts/room_leave.lua");
const STATE: &str = include_str!("../../../../spec/scripts/room_state.lua");
