//! Asks the nodes of a Cluster which of them serve which slots, at intervals and whenever an answer contradicts.

use std::{sync::Arc, time::Duration};

use futures_util::{StreamExt, stream::FuturesUnordered};
use hashbrown::HashSet;
use tokio::time::{sleep, timeout};
use tokio_util::task::TaskTracker;

use super::{Cluster, line, lose};
use crate::redis::{
    address::RedisEndpoint,
    connect::Part,
    fault::{Fault, tell},
    health::Purpose,
    node::{Node, Target},
    pipeline::task::PipelineTask,
    resp::{self, Reply, RespValue},
    shared::RedisShared,
    supervisor::Complaints,
};

/// Follows the Cluster until shutdown, and starts the connections of its nodes. Returns at once if it is none.
pub(in crate::redis) async fn run(shared: Arc<RedisShared>, tasks: TaskTracker) {
    let Some(cluster) = shared.nodes.cluster().cloned() else { return };
    let (mut complaints, mut pause) = (Complaints::default(), PAUSE);
    loop {
        let asked = ask(&shared, &cluster, &tasks);
        let answered = tokio::select! {
            answered = asked => answered,
            () = shared.shutdown.cancelled() => break,
        };
        match answered {
            Ok(()) => cluster.find_home(&shared.topology, None),
            Err(why) => {
                if complaints.due() {
                    tracing::warn!(error = %why, "No node of the Cluster can be asked; it is tried again.");
                }
                shared.topology.unnamed(why);
            }
        }
        // Slots without a node until now may have one.
        lose(cluster.hand_over(&cluster.nowhere(), std::iter::empty()));
        tokio::select! {
            () = sleep(if cluster.is_troubled() { OFTEN } else { RARELY }) => pause = PAUSE,
            () = cluster.doubted.notified() => {
                sleep(pause).await;
                // While the nodes contradict each other, every refused request asks.
                pause = (pause * 2).min(OFTEN);
            }
            () = shared.shutdown.cancelled() => break,
        }
    }
    let nowhere = cluster.nowhere();
    nowhere.publishes.queue.close();
    let mut left = Vec::new();
    nowhere.publishes.queue.take(usize::MAX, usize::MAX, &mut left);
    lose(left.into_iter().filter_map(|request| request.into_publish()));
}

/// Asks all nodes that are known, or the configured ones if none of those answers.
async fn ask(
    shared: &Arc<RedisShared>,
    cluster: &Arc<Cluster>,
    tasks: &TaskTracker,
) -> Result<(), String> {
    let limit = shared.connector.timeout();
    let nodes = cluster.nodes();
    let mut answers: FuturesUnordered<_> = nodes
        .into_iter()
        .filter(|node| node.commands.link.is_up())
        .map(|node| async move {
            let Target::Node(endpoint) = &node.target else { return None };
            let text = timeout(limit, nodes_of(&node)).await.ok()??;
            Some((text, RedisEndpoint::clone(endpoint)))
        })
        .collect();
    let mut named = HashSet::new();
    while let Some(answer) = answers.next().await {
        let Some((text, asked)) = answer else { continue };
        learn(shared, cluster, tasks, &text, &asked, &mut named);
    }
    if named.is_empty() || cluster.is_unserved() {
        ask_seeds(shared, cluster, tasks, &mut named).await?;
    }
    cluster.forget_others(&named);
    Ok(())
}

/// Asks the configured nodes one after the other, until one names nodes that serve slots.
async fn ask_seeds(
    shared: &Arc<RedisShared>,
    cluster: &Arc<Cluster>,
    tasks: &TaskTracker,
    named: &mut HashSet<String>,
) -> Result<(), String> {
    let mut why = String::new();
    let first = rand::random_range(0..cluster.seeds.len().max(1));
    for seed in cluster.seeds.iter().cycle().skip(first).take(cluster.seeds.len()) {
        match ask_seed(shared, seed).await {
            Ok(text) => {
                learn(shared, cluster, tasks, &text, seed, named);
                if !cluster.is_unserved() {
                    return Ok(());
                }
                why = format!("node {seed} names no node that serves slots");
            }
            Err(fault) => why = format!("node {seed}: {fault}"),
        }
    }
    Err(why)
}

fn learn(
    shared: &Arc<RedisShared>,
    cluster: &Arc<Cluster>,
    tasks: &TaskTracker,
    answer: &str,
    asked: &RedisEndpoint,
    named: &mut HashSet<String>,
) {
    let lines = line::read(answer, asked);
    let Some(new) = cluster.learn(&lines) else { return };
    named.extend(lines.into_iter().map(|line| line.id));
    for new in new {
        for (purpose, is_wanted) in
            [(Purpose::Publish, new.publishes), (Purpose::Command, new.commands)]
        {
            if is_wanted {
                tasks.spawn(PipelineTask::new(shared.clone(), new.node.clone(), purpose).run());
            }
        }
    }
}

/// Asks a node over its connection for commands.
async fn nodes_of(node: &Node) -> Option<String> {
    match node.commands.command(&[b"CLUSTER", b"NODES"]).await {
        Ok(Reply::Text(text)) => Some(String::from_utf8_lossy(&text).into_owned()),
        _ => None,
    }
}

/// Asks a configured node over a connection of its own.
async fn ask_seed(shared: &RedisShared, seed: &RedisEndpoint) -> Result<String, Fault> {
    let name = format!("{}-cluster", shared.client_name);
    let mut connection = shared.connector.connect(seed, Part::Node, &name).await?;
    let asked = async {
        resp::words(&mut connection.output, &[b"CLUSTER", b"NODES"]);
        loop {
            if let Some(frame) = connection.input.next()? {
                return match RespValue::parse(frame)?.0 {
                    RespValue::Text(text) => Ok(String::from_utf8_lossy(text).into_owned()),
                    RespValue::Error(error) => Err(Fault::NoCluster(tell(error))),
                    _ => Err(Fault::Broken("an odd answer to CLUSTER NODES")),
                };
            }
            connection.drive().await?;
        }
    };
    timeout(shared.connector.timeout(), asked).await.unwrap_or(Err(Fault::Silent))
}

/// Interval between questions while every slot is served.
const RARELY: Duration = Duration::from_secs(60);

/// Interval between questions while a part is away.
const OFTEN: Duration = Duration::from_millis(500);

/// First pause before a question that an answer of a node caused, since many such answers come together.
const PAUSE: Duration = Duration::from_millis(20);
