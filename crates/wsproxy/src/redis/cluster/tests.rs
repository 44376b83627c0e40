//! The table of slots without servers: the queues in which publishes wait, and their ways when slots move.

use bytes::Bytes;

use super::*;
use crate::redis::{address::RedisServers, health::Purpose};

fn at(port: u16) -> RedisEndpoint {
    RedisEndpoint::Tcp { host: "10.0.0.1".into(), port, tls: false }
}

fn line(id: &str, port: u16, epoch: u64, slots: std::ops::RangeInclusive<u16>) -> NodeLine {
    NodeLine {
        id: id.into(),
        endpoint: Some(at(port)),
        alias: None,
        is_master: true,
        is_failed: false,
        follows: String::new(),
        epoch,
        slots: vec![slots],
    }
}

fn replica(id: &str, port: u16) -> NodeLine {
    NodeLine { is_master: false, slots: Vec::new(), ..line(id, port, 1, 0..=0) }
}

/// Two masters, each with half of the slots, and a replica of the first.
fn of_two() -> Cluster {
    let cluster = Cluster::new(vec![at(1)], Names::new(""), 1 << 20);
    let new = cluster
        .learn(&[line("a", 1, 1, 0..=8191), line("b", 2, 2, 8192..=16383), replica("c", 3)])
        .unwrap();
    assert_eq!(new.iter().filter(|new| new.publishes).count(), 2);
    assert_eq!(new.iter().filter(|new| new.commands).count(), 3);
    settle(&cluster);
    cluster
}

/// Does what the tasks of the nodes do after a change.
fn settle(cluster: &Cluster) {
    assert!(cluster.hand_over(&cluster.nowhere(), std::iter::empty()).is_empty());
    for node in cluster.nodes() {
        assert!(cluster.hand_over(&node, std::iter::empty()).is_empty());
    }
}

fn publish(channel: &str, payload: &str) -> Publish {
    let payload = Bytes::copy_from_slice(payload.as_bytes());
    Publish { channel: channel.into(), payload, keep: Keep::Nothing, receipt: None }
}

/// Takes the payloads that wait in a node's queue.
fn waiting(cluster: &Cluster, port: u16) -> Vec<String> {
    let node = cluster.node_at(&at(port)).unwrap();
    let mut taken = Vec::new();
    node.pipeline(Purpose::Publish).queue.take(usize::MAX, usize::MAX, &mut taken);
    let publishes = taken.into_iter().filter_map(PipelineRequest::into_publish);
    publishes.map(|publish| String::from_utf8(publish.payload.to_vec()).unwrap()).collect()
}

fn port_of(cluster: &Cluster, slot: u16) -> Option<u16> {
    let node = cluster.owner(slot)?;
    [1, 2, 3, 4]
        .into_iter()
        .find(|port| cluster.node_at(&at(*port)).is_some_and(|other| Arc::ptr_eq(&other, &node)))
}

#[test]
fn publishes_wait_until_a_node_serves_their_slot() {
    let cluster = Cluster::new(vec![at(1)], Names::new(""), 1 << 20);
    assert_eq!(names::slot(LOW.0.as_bytes()), LOW.1);
    cluster.publish(publish("bar", "1")).map_err(drop).unwrap();
    cluster.publish(publish("foo", "2")).map_err(drop).unwrap();
    assert_eq!(cluster.away().as_deref(), Some("slots 0-16383 (no node) are away"));
    cluster.learn(&[line("a", 1, 1, 0..=8191), line("b", 2, 2, 8192..=16383)]);
    settle(&cluster);
    assert_eq!((waiting(&cluster, 1), waiting(&cluster, 2)), (vec!["1".into()], vec!["2".into()]));
}

#[test]
fn a_slot_that_moves_takes_its_publishes_along_in_order() {
    let cluster = of_two();
    let first = cluster.node_at(&at(1)).unwrap();
    cluster.publish(publish("bar", "2")).map_err(drop).unwrap();
    let moved = Redirect::Moved { slot: LOW.1, to: at(2) };
    cluster.redirected(publish("bar", "1"), &moved, &first).map_err(drop).unwrap();
    // Until nothing is on its way, later ones wait where the earlier ones are.
    cluster.publish(publish("bar", "3")).map_err(drop).unwrap();
    assert!(cluster.hand_over(&first, std::iter::once(publish("bar", "1b"))).is_empty());
    cluster.publish(publish("bar", "4")).map_err(drop).unwrap();
    assert_eq!(waiting(&cluster, 2), ["1", "1b", "2", "3", "4"]);
    assert!(waiting(&cluster, 1).is_empty());
    assert_eq!(port_of(&cluster, LOW.1), Some(2));
}

#[test]
fn nodes_that_contradict_each_other_are_left_alone_for_a_moment() {
    let cluster = of_two();
    assert!(cluster.moved(LOW.1, &at(2)).is_some());
    assert!(cluster.moved(LOW.1, &at(1)).is_none());
    std::thread::sleep(CONTRADICTION * 2);
    assert!(cluster.moved(LOW.1, &at(1)).is_some());
    assert!(cluster.moved(LOW.1, &at(99)).is_none(), "an unknown node");
}

#[test]
fn the_newest_configuration_counts() {
    let cluster = of_two();
    cluster.learn(&[line("a", 1, 1, 0..=8191), line("b", 2, 7, 0..=16383), replica("c", 3)]);
    assert_eq!(port_of(&cluster, 0), Some(2));
    // A node that was away knows an older one.
    cluster.learn(&[line("a", 1, 1, 0..=8191), line("b", 2, 2, 8192..=16383), replica("c", 3)]);
    assert_eq!(port_of(&cluster, 0), Some(2));
}

#[tokio::test]
async fn a_failover_is_told_and_an_isolated_node_is_not_believed() {
    let cluster = of_two();
    cluster.learn(&[NodeLine { is_failed: true, ..line("a", 1, 9, 0..=16383) }]);
    assert_eq!(port_of(&cluster, 16383), Some(2), "a node alone");
    let failed = NodeLine { is_failed: true, slots: Vec::new(), ..line("a", 1, 1, 0..=0) };
    cluster.learn(&[line("c", 3, 5, 0..=8191), failed, line("b", 2, 2, 8192..=16383)]);
    assert_eq!(port_of(&cluster, 0), Some(3));
    let slots = cluster.failed_over().await;
    assert!(slots.has(0) && slots.has(8191) && !slots.has(8192));
    let a = cluster.slots_of(&[b"b".to_vec()]);
    assert!(a.has(8192) && !a.has(0));
}

#[test]
fn a_node_that_is_gone_leaves_its_slots() {
    let cluster = of_two();
    cluster.forget_others(&["b".to_owned(), "c".to_owned()].into_iter().collect());
    assert!(cluster.node_at(&at(1)).is_none() && cluster.owner(0).is_none());
    assert!(cluster.away().unwrap().starts_with("slots 0-8191 (no node)"));
    assert!(cluster.is_troubled());
}

#[test]
fn a_node_with_another_address_keeps_its_slots() {
    let cluster = of_two();
    cluster.learn(&[line("a", 4, 1, 0..=8191), line("b", 2, 2, 8192..=16383), replica("c", 3)]);
    assert_eq!((port_of(&cluster, 0), cluster.node_at(&at(1)).is_none()), (Some(4), true));
}

#[test]
fn the_home_is_another_node_when_it_is_left() {
    let cluster = of_two();
    let topology = Topology::new(&RedisServers::Cluster { seeds: vec![at(1)] });
    cluster.find_home(&topology, None);
    let home = topology.now().unwrap();
    cluster.find_home(&topology, None);
    assert_eq!(topology.now().as_ref(), Some(&home), "it stays while it is good");
    cluster.find_home(&topology, Some(&home));
    assert_ne!(topology.now().unwrap(), home);
}

#[test]
fn a_key_of_each_master_is_found() {
    let cluster = of_two();
    for node in cluster.masters() {
        let key = cluster.key_at("probe", &node).unwrap();
        assert!(Arc::ptr_eq(&cluster.owner(names::slot(key.as_bytes())).unwrap(), &node));
    }
    let replica = cluster.node_at(&at(3)).unwrap();
    assert_eq!(cluster.key_at("probe", &replica), None);
}

/// Channel whose slot is below 8192, and its slot.
const LOW: (&str, u16) = ("bar", 5061);
