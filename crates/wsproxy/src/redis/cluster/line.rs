//! Reads the answer to `CLUSTER NODES`: one line for each node that the asked one knows. Opens no connection.

use std::ops::RangeInclusive;

use crate::redis::address::RedisEndpoint;

/// A node as another one describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::redis) struct NodeLine {
    /// Id of the node.
    pub(in crate::redis) id: String,
    /// Address for clients; `None` while it is not known.
    pub(in crate::redis) endpoint: Option<RedisEndpoint>,
    /// The same by the other of name and number; redirections may have either.
    pub(in crate::redis) alias: Option<RedisEndpoint>,
    /// Set for a master, also for one without slots.
    pub(in crate::redis) is_master: bool,
    /// Set once most masters count the node as failed.
    pub(in crate::redis) is_failed: bool,
    /// Id of the master that the node follows; empty for a master.
    pub(in crate::redis) follows: String,
    /// Number of the configuration in which the node got its slots: of two nodes with one slot the larger number counts.
    pub(in crate::redis) epoch: u64,
    /// Slots that the node serves.
    pub(in crate::redis) slots: Vec<RangeInclusive<u16>>,
}

/// Reads an answer of the node at `asked`. Nodes that are being introduced are left out.
pub(in crate::redis) fn read(answer: &str, asked: &RedisEndpoint) -> Vec<NodeLine> {
    answer.lines().filter_map(|line| read_one(line, asked)).take(NODES_MAX).collect()
}

fn read_one(line: &str, asked: &RedisEndpoint) -> Option<NodeLine> {
    // <id> <ip:port@cport[,hostname[,…]]> <flags> <master> <ping> <pong> <epoch> <link> <slot>…
    let mut words = line.split(' ');
    let (id, place, flags, follows) = (words.next()?, words.next()?, words.next()?, words.next()?);
    let mut words = words.skip(2);
    let epoch = words.next()?.parse().ok()?;
    let has = |name: &str| flags.split(',').any(|flag| flag == name);
    if has("handshake") {
        return None;
    }
    let (endpoint, alias) = match has("noaddr") {
        true => (None, None),
        false => endpoints(place, asked),
    };
    Some(NodeLine {
        id: id.to_owned(),
        endpoint,
        alias,
        is_master: has("master"),
        is_failed: has("fail"),
        follows: if follows == "-" { String::new() } else { follows.to_owned() },
        epoch,
        slots: words.skip(1).filter_map(slots).collect(),
    })
}

/// Reads `ip:port@cport[,hostname[,…]]`: the address to use, and the other one. With TLS the hostname is used, since
/// certificates name it.
fn endpoints(place: &str, asked: &RedisEndpoint) -> (Option<RedisEndpoint>, Option<RedisEndpoint>) {
    let mut parts = place.split(',');
    let address = parts.next().and_then(|address| address.split('@').next());
    let Some((ip, port)) = address.and_then(|address| address.rsplit_once(':')) else {
        return (None, None);
    };
    let hostname = parts.next().filter(|name| !name.is_empty() && !name.contains('='));
    let by_name = hostname.and_then(|name| named(name, port, asked));
    let by_number = named(ip, port, asked);
    match by_name {
        Some(by_name) if asked.is_tls() => (Some(by_name), by_number),
        by_name => (by_number, by_name),
    }
}

/// Returns the endpoint with a host and a port; without a host it is that of the asked node.
pub(super) fn named(host: &str, port: &str, asked: &RedisEndpoint) -> Option<RedisEndpoint> {
    let port = port.parse().ok().filter(|port| *port != 0)?;
    let RedisEndpoint::Tcp { host: own, tls, .. } = asked else { return None };
    let host = match host {
        "" | "?" => own,
        host => host,
    };
    let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    Some(RedisEndpoint::Tcp { host, port, tls: *tls })
}

/// Reads `<first>[-<last>]`; slots on the move, which have brackets, stand among the others too.
fn slots(word: &str) -> Option<RangeInclusive<u16>> {
    let (first, last) = word.split_once('-').unwrap_or((word, word));
    let (first, last) = (first.parse::<u16>().ok()?, last.parse::<u16>().ok()?);
    (first <= last && usize::from(last) < super::SLOTS).then_some(first..=last)
}

/// Upper bound of nodes, several times that of the largest Cluster.
const NODES_MAX: usize = 4000;

#[cfg(test)]
mod tests {
    use super::*;

    fn at(host: &str, port: u16, tls: bool) -> RedisEndpoint {
        RedisEndpoint::Tcp { host: host.into(), port, tls }
    }

    #[test]
    fn every_kind_of_line_is_read() {
        let answer = "\
07c3 127.0.0.1:30004@31004,host-4 slave e7d1 0 1426238317239 4 connected\n\
67ed 127.0.0.1:30002@31002,,shard-id=69bc master - 0 1426238316232 2 connected 5461-10922 11000\n\
e7d1 :30001@31001,host-1 myself,master - 0 0 1 connected 0-5460 [93->-292f] [77-<-e7d1]\n\
292f 127.0.0.1:30003@31003,host-3 master,fail - 0 1426238318243 3 disconnected 16383\n\
aaaa :0@0 master,noaddr - 0 0 0 disconnected\n\
bbbb 127.0.0.1:30009@31009 handshake - 0 0 0 connected\n\
broken line\n";
        let asked = at("n1", 30001, false);
        let lines = read(answer, &asked);
        let ids: Vec<_> = lines.iter().map(|line| &*line.id).collect();
        assert_eq!(ids, ["07c3", "67ed", "e7d1", "292f", "aaaa"]);
        assert_eq!((lines[0].is_master, &*lines[0].follows, lines[0].epoch), (false, "e7d1", 4));
        assert_eq!(lines[0].endpoint, Some(at("127.0.0.1", 30004, false)));
        assert_eq!(lines[1].slots, [5461..=10922, 11000..=11000]);
        assert_eq!(lines[0].alias, Some(at("host-4", 30004, false)));
        assert_eq!(
            (lines[2].endpoint.clone(), lines[2].slots.clone()),
            (Some(at("n1", 30001, false)), vec![0..=5460])
        );
        assert!(lines[3].is_failed && lines[3].is_master);
        assert_eq!(lines[4].endpoint, None);
        let by_tls = read(answer, &at("n1", 30001, true));
        assert_eq!(by_tls[0].endpoint, Some(at("host-4", 30004, true)));
        assert_eq!(by_tls[1].endpoint, Some(at("127.0.0.1", 30002, true)));
    }
}
