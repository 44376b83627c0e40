//! A Cluster under faults and load: clients of histories get the exact sequence or `history_lost` once, nothing twice,
//! and plain messages flow soon after a failover.
//!
//! `CLUSTER_LONG=1` takes 1,000 sessions with 2,000 messages/s, and freezes the master for 12 seconds.

use std::time::{Duration, Instant};

use wsproxy_proto::names::slot;

use super::stage::{Stage, is_long, sessions};
use crate::support::{cluster::MASTERS, eventually, eventually_yes, redis_process::until};

/// Waits until plain messages flow, which they must soon after the replica of `old` was promoted.
async fn flows_after_takeover(stage: &Stage, slot: u16, old: usize) -> usize {
    let new = stage.cluster.taken_over(slot, old).await;
    let decided = Instant::now();
    let gap = stage.plain_flow().await.duration_since(decided);
    println!("plain messages flow {gap:?} after the takeover");
    assert!(gap < FLOW_MAX, "{gap:?}");
    new
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_master_loses_no_message_unsaid() {
    let mut stage = Stage::open().await;
    let slot = stage.cluster.slot_of(0);
    stage.cluster.nodes[0].kill();
    flows_after_takeover(&stage, slot, 0).await;
    stage.plain_messages_arrive().await;
    stage.cluster.nodes[0].start();
    stage.cluster.whole().await;
    stage.judge(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_master_that_thaws_swallows_no_message() {
    let stage = Stage::open().await;
    let slot = stage.cluster.slot_of(0);
    stage.cluster.nodes[0].stop();
    let frozen = Instant::now();
    flows_after_takeover(&stage, slot, 0).await;
    let whole = Duration::from_secs(if is_long() { 12 } else { 4 });
    tokio::time::sleep(whole.saturating_sub(frozen.elapsed())).await;
    stage.cluster.nodes[0].cont();
    stage.plain_messages_arrive().await;
    stage.cluster.whole().await;
    stage.plain_messages_arrive().await;
    stage.judge(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_moves_forth_and_back_is_not_noticed() {
    let stage = Stage::open().await;
    let moved: Vec<_> = stage.sessions_of(0).into_iter().take(5).collect();
    for (from, to) in [(0, 1), (1, 0)] {
        for session in &moved {
            let slot = slot(stage.log(*session).as_bytes());
            assert_eq!(stage.cluster.owner(slot), Some(from));
            let migration = stage.cluster.migration(slot, to);
            // Some keys are there, some are not, and a script may find both.
            migration.move_keys(1);
            tokio::time::sleep(Duration::from_millis(400)).await;
            migration.finish();
        }
    }
    stage.plain_messages_arrive().await;
    stage.judge(0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_comes_and_goes_is_not_noticed() {
    let mut stage = Stage::open().await;
    let moved: Vec<_> =
        (0..MASTERS).flat_map(|m| stage.sessions_of(m).into_iter().take(2)).collect();
    let slots = moved.iter().map(|session| slot(stage.log(*session).as_bytes()));
    let slots: Vec<_> = slots.collect();
    let owners: Vec<_> = slots.iter().map(|slot| stage.cluster.owner(*slot).unwrap()).collect();
    let new = stage.cluster.add().await;
    slots.iter().for_each(|slot| stage.cluster.migrate(*slot, new));
    tokio::time::sleep(Duration::from_millis(700)).await;
    for (slot, owner) in slots.iter().zip(owners) {
        stage.cluster.migrate(*slot, owner);
    }
    stage.cluster.remove(new).await;
    stage.plain_messages_arrive().await;
    stage.judge(0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promoted_replica_that_lagged_is_told_once() {
    let mut stage = Stage::open().await;
    let (slot, replica) = (stage.cluster.slot_of(0), stage.cluster.replica_of(0));
    // The replica loses its master, and cannot come back.
    stage.cluster.nodes[replica].call(&["CONFIG", "SET", "masterauth", "wrong"]);
    stage.cluster.nodes[replica].call(&["CLIENT", "KILL", "TYPE", "master"]);
    tokio::time::sleep(Duration::from_secs(1)).await;
    stage.cluster.nodes[0].kill();
    flows_after_takeover(&stage, slot, 0).await;
    let right = crate::support::cluster::PASSWORDS[1];
    stage.cluster.nodes[replica].call(&["CONFIG", "SET", "masterauth", right]);
    eventually("the loss of the tail is told", || {
        stage.instances.iter().all(|one| {
            one.gateway().metrics.text().lines().any(|line| {
                line.starts_with("wsproxy_history_lost_total{") && !line.ends_with(" 0")
            })
        })
    })
    .await;
    let hit = stage.sessions_of(replica);
    assert!(!hit.is_empty());
    stage.judge_each(|session| usize::from(hit.contains(&session))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_on_command_loses_nothing() {
    let stage = Stage::open().await;
    let new = stage.cluster.fail_over(1).await;
    stage.plain_flow().await;
    stage.plain_messages_arrive().await;
    stage.cluster.whole().await;
    assert_eq!(stage.cluster.replica_of(new), 1);
    stage.judge(0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_of_all_nodes_is_survived() {
    let mut stage = Stage::open().await;
    let mut cluster = stage.cluster;
    stage.cluster = tokio::task::spawn_blocking(move || {
        cluster.restart();
        cluster
    })
    .await
    .unwrap();
    stage.cluster.whole().await;
    stage.plain_flow().await;
    stage.judge(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_part_disturbs_no_session_elsewhere() {
    let mut stage = Stage::open().await;
    let hit = stage.sessions_of(0);
    let names = (0..).map(|number| format!("e-{number}"));
    let is_lost = |name: &String, key: &str| {
        stage.cluster.owner_of(&key.replace(":e:", &format!(":{name}:"))) == 0
    };
    let (log, token) = ("{session:e:down}:log", "session:e:auth");
    let lost = names.clone().find(|name| is_lost(name, log)).unwrap();
    let kept = names.clone().filter(|name| !is_lost(name, log) && !is_lost(name, token));
    let kept: Vec<_> = kept.take(5).collect();
    let pair = stage.cluster.kill_part(0);
    until("the nodes miss it", || stage.cluster.lacks(1, 0) && stage.cluster.lacks(2, 0)).await;
    let one = &stage.instances[0];
    for session in &kept {
        let mut client = one.client(session).await;
        one.keep(session, r#"{"elsewhere":true}"#).await;
        assert_eq!(client.json().await["elsewhere"], true);
        // Plain messages need no slot. A topic of their own, since messages between nodes may come late.
        stage.plain_messages_arrive_on(&format!("session:plain-{session}:down")).await;
        client.close().await;
    }
    let path = format!("/api/v1/sessions/{lost}/messages?history=true");
    let refused = one.api("POST", &path, r#"{"lost":true}"#).await;
    assert!([500, 503, 504].contains(&refused.status), "{refused:?}");
    // The instance takes clients of other parts still.
    for (path, status) in [("/ready", 200), ("/health", 503)] {
        eventually_yes("the part that is away is told", async || {
            let told = one.api("GET", path, "").await;
            told.status == status && told.body.contains("0-5460")
        })
        .await;
    }
    pair.into_iter().for_each(|place| stage.cluster.nodes[place].start());
    stage.cluster.whole().await;
    assert!((1..sessions()).contains(&hit.len()));
    stage.judge_each(|session| usize::from(hit.contains(&session))).await;
}

/// Time within which plain messages flow after a replica was promoted.
const FLOW_MAX: Duration = Duration::from_secs(2);
