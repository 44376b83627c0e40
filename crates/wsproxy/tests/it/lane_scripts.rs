//! The scripts of lanes in Redis, and what they publish.

use serde_json::{Value, json};

use crate::support::{
    bus::TestBus,
    redis_server::{Answer, RedisServer},
};

/// A cluster on a server, and what a subscriber of the announcements sees.
struct Cluster {
    bus: TestBus,
    seen: usize,
}

impl Cluster {
    async fn open() -> Self {
        let bus = TestBus::redis();
        bus.subscribe(&[CHANNEL]).await;
        Self { bus, seen: 0 }
    }

    fn server(&self) -> &RedisServer {
        self.bus.server.as_ref().unwrap()
    }

    /// Registers a lane of agent `a` at an instance. Returns the first part of the answer and the registration.
    fn register(&self, server: &str, boot: &str, number: u64, held: &str) -> (i64, u64) {
        let value = format!(r#"{{"server_id":"{server}","boot_id":"{boot}","number":{number}"#);
        let told = format!(r#"{{"event":"connected",{}"#, &value[1..]);
        let (number, script) = (number.to_string(), REGISTER);
        let words = ["EVAL", script, "1", KEY, "a", boot, &number, held, &value, &told, "60000"];
        match self.server().call(&[&words[..], &["2", CHANNEL]].concat()) {
            Answer::Array(parts) => match &parts[..] {
                [Answer::Integer(state), Answer::Text(number)] => {
                    (*state, number.parse().unwrap_or_default())
                }
                parts => panic!("{parts:?}"),
            },
            answer => panic!("{answer:?}"),
        }
    }

    fn release(&self, server: &str, boot: &str, number: &str) -> i64 {
        let told = r#"{"event":"lost""#;
        let words = ["EVAL", RELEASE, "1", KEY, "a", server, boot, number, told, CHANNEL];
        self.server().call(&words).integer()
    }

    fn entry(&self) -> Value {
        match self.server().call(&["HGET", KEY, "a"]) {
            Answer::Text(entry) => serde_json::from_str(&entry).unwrap(),
            _ => Value::Null,
        }
    }

    /// Waits for so many further announcements.
    async fn published(&mut self, count: usize) -> Vec<Value> {
        self.bus.seen.wait_for(self.seen + count).await;
        let payloads = self.bus.seen.payloads(CHANNEL).split_off(self.seen);
        self.seen += count;
        payloads.iter().map(|payload| serde_json::from_slice(payload).unwrap()).collect()
    }
}

#[tokio::test]
async fn lanes_of_one_process_follow_their_numbers() {
    let mut cluster = Cluster::open().await;
    let (state, first) = cluster.register("s1", "b", 2, "");
    assert_eq!((state, cluster.register("s2", "b", 1, "")), (1, (2, first)));
    let (state, second) = cluster.register("s2", "b", 3, "");
    assert!(state == 1 && second > first);
    // The older lane is written again: it lost its place.
    assert_eq!(cluster.register("s1", "b", 2, &first.to_string()), (2, second));
    let expected = json!({"server_id":"s2","boot_id":"b","number":3,"registration":second});
    assert_eq!(cluster.entry(), expected);
    let told = cluster.published(2).await;
    assert_eq!(told[1]["registration"], second);
    assert_eq!(told[1]["event"], "connected");
}

#[tokio::test]
async fn lanes_of_two_processes_follow_the_order_of_redis() {
    let cluster = Cluster::open().await;
    let (_, first) = cluster.register("s1", "b", 9, "");
    let (state, second) = cluster.register("s1", "c", 1, "");
    assert!(state == 1 && second > first);
    assert_eq!(cluster.register("s1", "b", 9, &first.to_string()), (0, second));
    // After a loss of Redis the later one takes its place again, with the registration that it has.
    cluster.server().call(&["DEL", KEY]);
    assert_eq!(cluster.register("s1", "b", 9, &first.to_string()), (1, first));
    assert_eq!(cluster.register("s1", "c", 1, &second.to_string()), (1, second));
    assert_eq!(cluster.register("s1", "c", 1, &second.to_string()), (1, second), "again");
    // A clock of Redis that was set back changes no order.
    let ahead = second + 1_000_000_000_000;
    assert_eq!(cluster.register("s1", "d", 1, &ahead.to_string()), (1, ahead));
    assert_eq!(cluster.register("s1", "e", 1, ""), (1, ahead + 1));
}

#[tokio::test]
async fn only_the_lane_itself_leaves() {
    let mut cluster = Cluster::open().await;
    let (_, registration) = cluster.register("s1", "b", 2, "");
    for (server, boot, number) in [("s2", "b", "2"), ("s1", "x", "2"), ("s1", "b", "1")] {
        assert_eq!(cluster.release(server, boot, number), 0);
    }
    assert_eq!(cluster.release("s1", "b", "2"), 1);
    assert_eq!((cluster.release("s1", "b", "2"), cluster.entry()), (0, Value::Null));
    let told = cluster.published(2).await;
    let lost = json!({"event":"lost","boot_id":"b","number":2,"registration":registration});
    assert_eq!(told[1], lost);
    // An instance that has no lane of the agent removes whatever has its name.
    cluster.register("s1", "b", 2, "");
    assert_eq!((cluster.release("s2", "", ""), cluster.release("s1", "", "")), (0, 1));
}

#[tokio::test]
async fn a_cluster_has_a_bounded_number_of_agents() {
    let cluster = Cluster::open().await;
    cluster.server().call(&["HSET", KEY, "x", "{}", "y", "{}"]);
    assert_eq!(cluster.register("s1", "b", 1, ""), (-1, 0));
    cluster.server().call(&["HDEL", KEY, "x"]);
    assert_eq!(cluster.register("s1", "b", 1, "").0, 1);
    assert_eq!(cluster.register("s1", "b", 2, "").0, 1, "it has its place");
}

#[tokio::test]
async fn a_field_of_another_hand_gives_way() {
    let cluster = Cluster::open().await;
    for odd in ["no JSON", "7", "[]", r#"{"number":"x","registration":1}"#] {
        cluster.server().call(&["HSET", KEY, "a", odd]);
        assert_eq!(cluster.release("s1", "", ""), 0, "{odd}");
        assert_eq!(cluster.register("s1", "b", 1, "").0, 1, "{odd}");
        assert_eq!(cluster.entry()["boot_id"], "b");
    }
    assert!(cluster.server().call(&["PTTL", KEY]).integer() > 50_000);
}

const KEY: &str = "tunnel:c1";
const CHANNEL: &str = "tunnels:events";
const REGISTER: &str = include_str!("../../../../spec/scripts/tunnel_register.lua");
const RELEASE: &str = include_str!("../../../../spec/scripts/tunnel_release.lua");
