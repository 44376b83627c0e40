//! The present state of the tunnel in numbers.

use crate::{
    endpoint::tunnel::Tunnel,
    telemetry::scrape::{Scrape, Section},
};

/// Adds the numbers.
pub(super) fn collect(tunnel: &Tunnel, scrape: &mut Scrape) {
    let lanes = tunnel.lanes.all();
    let handles: Vec<_> = lanes
        .iter()
        .filter_map(|lane| Some((lane.name.cluster.as_str(), lane.handle()?.clone())))
        .collect();
    scrape.section(Section::Families);
    scrape.gauge("tunnel_lanes", "Lanes of cluster agents", handles.len() as i64);
    let help = "Proxied requests and upgraded connections that have a place on a lane";
    scrape.gauge("tunnel_streams", help, tunnel.lanes.streams() as i64);
    let buffered: usize = handles.iter().map(|(_, lane)| lane.numbers().buffered_bytes).sum();
    let help = "Memory of the bytes that wait in streams";
    scrape.gauge("tunnel_buffered_bytes", help, buffered as i64);
    let depths = tunnel.room.depths();
    let named = |cluster: &str| tunnel.counters.is_named(cluster);
    let waiting = depths.iter().filter(|(cluster, _)| named(cluster.as_str()));
    let waiting = waiting.map(|(cluster, n)| ([("cluster", cluster.as_str())], *n as i64));
    scrape.gauges("tunnel_queue_depth", "Requests that wait for a lane", waiting);
    let breakers = tunnel.breakers.open();
    let open = breakers.iter().filter(|(cluster, _)| named(cluster.as_str()));
    let open = open.map(|(cluster, state)| ([("cluster", cluster.as_str())], state.number()));
    let help = "Breakers that are not closed; 1: open, 2: trying";
    scrape.gauges("tunnel_breaker_state", help, open);
    let mut healthy: Vec<(&str, bool)> = Vec::new();
    for (cluster, lane) in handles.iter().filter(|(cluster, _)| named(cluster)) {
        let is_ok = lane.status().health.is_some_and(|health| health.upstream_ok);
        match healthy.iter_mut().find(|(known, _)| known == cluster) {
            Some((_, any)) => *any |= is_ok,
            None => healthy.push((cluster, is_ok)),
        }
    }
    let healthy =
        healthy.iter().map(|(cluster, is_ok)| ([("cluster", *cluster)], i64::from(*is_ok)));
    let help = "Whether an agent of the cluster says that its upstream is healthy";
    scrape.gauges("tunnel_upstream_healthy", help, healthy);
}
