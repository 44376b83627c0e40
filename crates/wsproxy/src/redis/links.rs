//! The connections over which the other nodes of a Cluster send messages to the one at which an instance subscribes.
//!
//! Messages between two nodes are lost with their connection, and neither the publisher nor the subscriber is told. The
//! age of each connection shows it (`CLUSTER LINKS`, since Redis 7).

use std::collections::BTreeMap;

use crate::redis::resp::RespValue;

/// The connections as they were last, by node: the times when they were made. `None` before the first answer.
#[derive(Default)]
pub(super) struct Links(Option<BTreeMap<Vec<u8>, i64>>);

impl Links {
    /// Takes an answer to `CLUSTER LINKS`. Returns the ids of the nodes whose connection is another one than before, so that
    /// messages may be lost. An answer that cannot be read, as of a user who may not ask, tells nothing.
    pub(super) fn torn(&mut self, answer: &RespValue<'_>) -> Vec<Vec<u8>> {
        let RespValue::Array(links) = answer else { return Vec::new() };
        let links: BTreeMap<_, _> = links.iter().filter_map(incoming).collect();
        let Some(before) = self.0.replace(links.clone()) else { return Vec::new() };
        let gone = before.iter().filter(|(node, time)| links.get(*node) != Some(time));
        let new = links.iter().filter(|(node, _)| !before.contains_key(*node));
        gone.chain(new).map(|(node, _)| node.clone()).collect()
    }
}

/// Returns node and time of a connection by which messages come.
fn incoming(link: &RespValue<'_>) -> Option<(Vec<u8>, i64)> {
    let RespValue::Array(pairs) = link else { return None };
    let value = |name: &[u8]| {
        let pair = pairs.chunks_exact(2).find(|pair| pair[0].text() == Some(name));
        pair.map(|pair| &pair[1])
    };
    if value(b"direction")?.text() != Some(b"from") {
        return None;
    }
    match value(b"create-time")? {
        RespValue::Integer(time) => Some((value(b"node")?.text()?.to_vec(), *time)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link<'a>(direction: &'a [u8], node: &'a [u8], time: i64) -> RespValue<'a> {
        let text = RespValue::Text;
        RespValue::Array(vec![
            text(b"direction"),
            text(direction),
            text(b"node"),
            text(node),
            text(b"create-time"),
            RespValue::Integer(time),
        ])
    }

    #[test]
    fn a_connection_that_is_made_again_is_noticed_once() {
        let mut links = Links::default();
        let mut torn = |of: &[RespValue<'_>]| links.torn(&RespValue::Array(of.to_vec()));
        let (a, b) = (link(b"from", b"a", 1), link(b"from", b"b", 2));
        assert!(torn(&[a.clone(), b.clone()]).is_empty());
        assert!(torn(&[b.clone(), link(b"to", b"a", 7), a.clone()]).is_empty());
        assert_eq!(torn(&[a.clone(), link(b"from", b"b", 3)]), [b"b"]);
        assert!(torn(&[a.clone(), link(b"from", b"b", 3)]).is_empty());
        assert_eq!(torn(std::slice::from_ref(&a)), [b"b"]);
        assert_eq!(torn(&[a, b]), [b"b"]);
        assert!(links.torn(&RespValue::Error(b"NOPERM")).is_empty());
    }
}
