//! Scripts in Redis: loaded, forgotten, not allowed, and as a worker calls them.

use std::time::Duration;

use wsproxy_proto::history::HistoryLimits;

use wsproxy::bus::publish::{History, Keep, Outcome, Publish};
use wsproxy_proto::history::Position;

use crate::support::{
    bus::{Receipts, TestBus, config, message},
    eventually,
    redis_server::{Answer, RedisServer},
    soon,
};

fn stored(payload: &str) -> Publish {
    let limits =
        HistoryLimits { entries_max: 1000, bytes_max: 1_000_000, ttl: Duration::from_secs(64) };
    let history = History {
        log: "{c}:log".into(),
        clock: None,
        event_id: None,
        dedup: None,
        unique: false,
        limits,
    };
    Publish { keep: Keep::History(Box::new(history)), ..message("c", payload.to_owned()) }
}

fn position(answer: &Answer) -> Position {
    let Answer::Array(parts) = answer else { panic!("{answer:?}") };
    let Answer::Text(id) = &parts[1] else { panic!("{answer:?}") };
    Position::parse(id.as_bytes()).unwrap()
}

/// The one line that a worker needs.
fn eval(server: &RedisServer, payload: &str, event_id: &str) -> Answer {
    let words =
        ["EVAL", PUBLISH, "1", "{c}:log", "c", payload, "1000", "1000000", "64000", event_id];
    server.try_call(&words).unwrap()
}

#[tokio::test]
async fn a_worker_and_the_gateway_write_one_chain() {
    let bus = TestBus::redis();
    let server = bus.server.as_ref().unwrap();
    bus.subscribe(&["c"]).await;
    let first = position(&eval(server, "one", "e-1"));
    let outcome = bus.outcome(stored("two")).await;
    let Outcome::Stored { receivers: 1, id: second, .. } = outcome else { panic!("{outcome:?}") };
    let third = position(&eval(server, "three", ""));
    bus.seen.wait_for(3).await;
    let heads: Vec<Vec<u8>> = bus
        .seen
        .payloads("c")
        .iter()
        .map(|message| message.split(|&byte| byte == b'\n').next().unwrap().to_vec())
        .collect();
    let expected = [
        format!("H2 {first} 0-0 e-1"),
        format!("H2 {second} {first} "),
        format!("H2 {third} {second} "),
    ];
    for (head, expected) in heads.iter().zip(&expected) {
        assert_eq!(head, &[b"\xff", expected.as_bytes()].concat());
    }
}

#[tokio::test]
async fn an_event_id_that_would_break_the_envelope_is_refused() {
    let server = RedisServer::start();
    for bad in ["a b", "a\nb", "a\0", &"x".repeat(129), "0", "2026-11", "0-0", "1-2-0a1b2c3d"] {
        let answer = eval(&server, "x", bad);
        assert!(
            matches!(&answer, Answer::Error(error) if error.starts_with("BADEVENTID")),
            "{answer:?}"
        );
    }
    assert_eq!(server.call(&["EXISTS", "{c}:log"]).integer(), 0);
    position(&eval(&server, "x", &"x".repeat(128)));
}

#[tokio::test]
async fn a_log_lives_for_its_ttl_and_at_most_a_64th_longer() {
    let server = RedisServer::start();
    for _ in 0..20 {
        eval(&server, "x", "");
        let ttl = server.call(&["PTTL", "{c}:log"]).integer();
        assert!((64_000 - 2000..=65_000).contains(&ttl), "{ttl}");
    }
}

#[tokio::test]
async fn a_log_with_entries_of_somebody_else_still_takes_messages() {
    let server = RedisServer::start();
    server.call(&["XADD", "{c}:log", "*", "data", "strange"]);
    let first = position(&eval(&server, "x", ""));
    server.call(&["XADD", "{c}:log", "*", "a", "b", "c", "d"]);
    assert!(first.is_before(position(&eval(&server, "y", ""))));
}

#[tokio::test]
async fn scripts_that_redis_forgot_are_loaded_again() {
    let bus = TestBus::redis();
    assert!(matches!(bus.outcome(stored("one")).await, Outcome::Stored { .. }));
    for _ in 0..3 {
        bus.server.as_ref().unwrap().call(&["SCRIPT", "FLUSH"]);
        // It certainly was not stored, and is sent again.
        assert!(matches!(bus.outcome(stored("two")).await, Outcome::Stored { .. }));
        assert!(matches!(bus.outcome(stored("three")).await, Outcome::Stored { .. }));
    }
    assert_eq!(bus.server.as_ref().unwrap().call(&["XLEN", "{c}:log"]).integer(), 7);
}

#[tokio::test]
async fn forgotten_scripts_change_neither_number_nor_order() {
    let bus = TestBus::redis();
    bus.subscribe(&["c"]).await;
    let server = bus.server.as_ref().unwrap();
    let (receipt, mut outcomes) = Receipts::channel();
    for n in 0..500 {
        let publish = Publish { receipt: Some(receipt.clone()), ..stored(&format!("{n:03}")) };
        assert!(bus.bus.publish(publish).is_ok());
        if n % 50 == 25 {
            server.call(&["SCRIPT", "FLUSH"]);
            tokio::task::yield_now().await;
        }
    }
    for _ in 0..500 {
        let outcome = soon("an outcome", outcomes.recv()).await.unwrap();
        assert!(matches!(outcome, Outcome::Stored { duplicate: false, .. }), "{outcome:?}");
    }
    bus.seen.wait_for(500).await;
    let order: Vec<_> = bus.seen.payloads("c").iter().map(|m| m.slice(m.len() - 3..)).collect();
    assert!(order.is_sorted());
    assert_eq!(server.call(&["XLEN", "{c}:log"]).integer(), 500);
}

#[tokio::test]
async fn a_new_server_knows_the_script_before_the_first_message() {
    let mut bus = TestBus::redis();
    assert!(matches!(bus.outcome(stored("one")).await, Outcome::Stored { .. }));
    bus.server().kill();
    bus.broken().await;
    eventually("every link is missed", || bus.bus.counters().links_lost.value() == 3).await;
    bus.publish("x", "queued");
    assert!(bus.bus.publish(stored("queued")).is_ok());
    bus.server().restart();
    let outcome = bus.outcome(stored("two")).await;
    let Outcome::Stored { id, .. } = outcome else { panic!("{outcome:?}") };
    assert!(!id.is_beginning());
    assert_eq!(bus.server().call(&["XLEN", "{c}:log"]).integer(), 2);
    assert_eq!(bus.bus.counters().publish_lost.value(), 0);
}

#[tokio::test]
async fn where_scripts_may_not_be_loaded_they_are_sent_each_time() {
    let server = RedisServer::start();
    server.call(&["ACL", "SETUSER", "gateway", "on", ">secret", "~*", "&*", "+@all", "-script"]);
    let url = server.url().replace("redis://", "redis://gateway:secret@");
    let bus = TestBus::on(&config(Some(&url)));
    bus.ready().await;
    for _ in 0..3 {
        server.call(&["SCRIPT", "FLUSH"]);
        assert!(matches!(bus.outcome(stored("x")).await, Outcome::Stored { .. }));
    }
}

#[tokio::test]
async fn an_index_of_another_type_is_seen_before_anything_is_written() {
    let server = RedisServer::start();
    server.call(&["SET", "{c}:ids", "x"]);
    let words = ["EVAL", PUBLISH, "1", "{c}:log", "c", "m", "1000", "1000000", "64000", "e-1"];
    let answer = server.try_call(&words).unwrap();
    assert!(matches!(&answer, Answer::Error(why) if why.contains("WRONGTYPE")), "{answer:?}");
    assert_eq!(server.call(&["EXISTS", "{c}:log", "{c}:head"]), Answer::Integer(0));
}

#[tokio::test]
async fn a_ttl_beyond_redis_clock_still_ends() {
    let server = RedisServer::start();
    for ttl in ["1e30", "99999999999999999999"] {
        let log = format!("{{{ttl}}}:log");
        let words = ["EVAL", PUBLISH, "1", &log, "c", "m", "1000", "1000000", ttl, ""];
        server.call(&words);
        assert!(server.call(&["PTTL", &log]).integer() > 0, "{ttl}");
    }
}

/// A worker that keeps its token stream for a second must not hide one that is kept for an hour.
#[tokio::test]
async fn the_shortest_ttl_does_not_decide_for_all_token_streams() {
    let server = RedisServer::start();
    let stream = |op: &str, name: &str, ttl: &str, rest: &[&str]| {
        let key = |what: &str| format!("{{session:s:down}}:{what}");
        let state = key(&format!("stream:{name}"));
        let (log, text, index) = (key("log"), format!("{state}:text"), key("streams"));
        let mut words = vec!["EVAL", STREAM, "4", &log, &state, &text, &index];
        words.extend([op, "session:s:down", name, "1000", "1000000", ttl, "60000"]);
        words.extend(rest);
        server.call(&words);
    };
    stream("open", "long", "3600000", &["{}"]);
    stream("open", "short", "1000", &["{}"]);
    let index = "{session:s:down}:streams";
    assert!(server.call(&["PTTL", index]).integer() > 3_600_000);
    // An index that was lost is made again by the next sign of life.
    server.call(&["DEL", index]);
    stream("renew", "long", "3600000", &[]);
    let listed = Answer::Array(vec![Answer::Text("long".into())]);
    assert_eq!(server.call(&["ZRANGE", index, "0", "-1"]), listed);
}

const PUBLISH: &str = include_str!("../../../../spec/scripts/publish.lua");
const STREAM: &str = include_str!("../../../../spec/scripts/stream.lua");
