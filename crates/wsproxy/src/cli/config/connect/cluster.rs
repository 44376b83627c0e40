//! The nodes of a Redis Cluster: those that the seeds name, whether each can be reached, and which slots are served.

use std::{collections::BTreeMap, fmt::Write as _, time::Duration};

use futures_util::future::join_all;

use super::{ANSWER_MAX, Finding, redis, within};
use crate::{
    config::Config,
    redis::{
        address::RedisEndpoint,
        connect::Part,
        trial::{Trial, TrialAnswer, TrialFault},
    },
};

/// Examines the Cluster to which the seeds belong. What was found is there even if a later server hangs.
pub(super) async fn examine(config: &Config, seeds: &[RedisEndpoint], findings: &mut Vec<Finding>) {
    if seeds.len() < SEEDS_GOOD {
        let what = format!("redis.url names {} node(s)", seeds.len());
        let advice = "name three nodes at least: an instance that starts needs one that runs";
        findings.push(Finding::warning(PART, what, advice));
    }
    let asked = join_all(seeds.iter().map(|seed| view_of(config, seed))).await;
    let mut views = Vec::new();
    for (seed, answer) in seeds.iter().zip(asked) {
        match answer {
            Ok(view) => views.push((seed, view)),
            Err(finding) => findings.push(finding),
        }
    }
    let Some((_, first)) = views.first() else {
        let advice = "see the findings above: an instance needs one node that answers";
        findings.push(Finding::error(PART, "no node of redis.url tells of its Cluster", advice));
        return;
    };
    for (seed, view) in &views {
        if !view.nodes.iter().any(|node| first.nodes.iter().any(|known| known.id == node.id)) {
            let what = format!("{} and {seed} belong to different Clusters", views[0].0);
            let advice =
                "name nodes of one Cluster in redis.url, or let the two meet (CLUSTER MEET)";
            findings.push(Finding::error(PART, what, advice));
        }
    }
    let nodes = all_nodes(views.into_iter().map(|(_, view)| view));
    findings.extend(of_slots(&nodes));
    findings.extend(of_replicas(&nodes));
    for found in join_all(nodes.iter().map(|node| of_node(config, node))).await {
        findings.extend(found);
    }
}

/// The nodes that one node knows, itself among them.
#[derive(Debug)]
struct View {
    nodes: Vec<Node>,
}

/// A node as another one knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Node {
    id: String,
    /// The address that it announces; `None` where none is known.
    address: Option<RedisEndpoint>,
    flags: Vec<String>,
    /// Id of its master; `-` for a master.
    master: String,
    epoch: u64,
    slots: Vec<(u16, u16)>,
    /// Slots on their way to or from another node.
    is_moving: bool,
}

/// Asks a seed for its view.
async fn view_of(config: &Config, seed: &RedisEndpoint) -> Result<View, Finding> {
    let unanswered = |TrialFault { why, advice, .. }| Finding::warning(PART, why, advice);
    let mut trial =
        Trial::connect_to(&config.redis, seed, Part::Node, ANSWER_MAX).await.map_err(unanswered)?;
    match trial.ask(&["CLUSTER", "NODES"]).await.map_err(unanswered)? {
        TrialAnswer::Text(text) => Ok(View::read(&text, seed)),
        TrialAnswer::Error(error) if error.starts_with("NOPERM") => {
            let advice = "grant +cluster|nodes and +cluster|links to the user at every node";
            Err(Finding::error(PART, error, advice).of(&seed.to_string()))
        }
        TrialAnswer::Error(error) => {
            let advice = "set cluster-enabled yes there, or write redis:// for one server";
            Err(Finding::error(PART, format!("is not in cluster mode: {error}"), advice)
                .of(&seed.to_string()))
        }
        _ => Err(Finding::error(PART, "an odd answer to CLUSTER NODES", "see what it is")
            .of(&seed.to_string())),
    }
}

/// Looks at one node at the address that it announces, for a bounded time.
async fn of_node(config: &Config, node: &Node) -> Vec<Finding> {
    let name = node.name();
    let mut findings = Vec::new();
    if let Some(flag) = node.flags.iter().find(|flag| flag.starts_with("fail")) {
        let what = format!("{name} is away: other nodes mark it as {flag}");
        let advice = "start it, or remove it with CLUSTER FORGET at every node";
        findings.push(Finding::error(PART, what, advice));
    }
    let Some(address) = &node.address else {
        let advice =
            "let it meet the others again (CLUSTER MEET), or remove it with CLUSTER FORGET";
        findings.push(Finding::error(PART, format!("{name} has no address"), advice));
        return findings;
    };
    let found = within(PART, NODE_MAX, async |found| {
        if let Err(fault) = look_at(config, address, found).await {
            // Nodes that the others reach are away for this machine only.
            let is_hidden = fault.is_unreached && findings.is_empty();
            let advice = if is_hidden { UNREACHABLE } else { fault.advice };
            found.push(Finding::error(PART, fault.why, advice));
        }
    })
    .await;
    findings.extend(found.into_iter().map(|finding| finding.of(&name)));
    findings
}

async fn look_at(
    config: &Config,
    address: &RedisEndpoint,
    findings: &mut Vec<Finding>,
) -> Result<(), TrialFault> {
    let mut trial = Trial::connect_to(&config.redis, address, Part::Node, ANSWER_MAX).await?;
    if let TrialAnswer::Text(text) = trial.ask(&["INFO", "replication"]).await? {
        let info = redis::Info(&text);
        if info.value("role") == "slave" && info.value("master_link_status") != "up" {
            let advice = "see the log of the replica: masterauth and masteruser, network, disk";
            findings.push(Finding::warning(PART, "has lost its master", advice));
        }
    }
    let coverage = ["CONFIG", "GET", "cluster-require-full-coverage"];
    if let TrialAnswer::List(words) = trial.ask(&coverage).await?
        && words.get(1).is_some_and(|value| value == "yes")
    {
        let what =
            "cluster-require-full-coverage is yes: a lost part makes the whole Cluster refuse";
        let advice = "CONFIG SET cluster-require-full-coverage no, and the same in redis.conf";
        findings.push(Finding::warning(PART, what, advice));
    }
    redis::look_at_one(&mut trial, config, findings).await?;
    Ok(())
}

/// The nodes of all views, each as the view with the newest epoch knows it.
fn all_nodes(views: impl Iterator<Item = View>) -> Vec<Node> {
    let mut nodes = BTreeMap::<String, Node>::new();
    for node in views.flat_map(|view| view.nodes) {
        match nodes.get_mut(&node.id) {
            Some(known) if known.epoch >= node.epoch => {
                // A node that one view has lost may be away for all.
                if known.address.is_none() {
                    known.address = node.address;
                }
                known.is_moving |= node.is_moving;
            }
            _ => drop(nodes.insert(node.id.clone(), node)),
        }
    }
    let mut nodes: Vec<_> = nodes.into_values().collect();
    nodes.sort_by_key(|node| (!node.is_master(), node.slots.first().copied(), node.name()));
    nodes
}

/// Judges which slots have a master that runs.
fn of_slots(nodes: &[Node]) -> Vec<Finding> {
    let masters = || nodes.iter().filter(|node| node.is_master() && !node.slots.is_empty());
    let replicas = nodes.iter().filter(|node| !node.is_master()).count();
    let mut slots: Vec<_> =
        masters().filter(|node| !node.has("fail")).flat_map(|node| node.slots.clone()).collect();
    slots.sort_unstable();
    let (mut lacks, mut next) = (Vec::new(), 0);
    for (first, last) in slots.into_iter().chain([(SLOTS, SLOTS)]) {
        if first > next {
            lacks.push((next, first - 1));
        }
        next = next.max(last.saturating_add(1));
    }
    let count: u32 = lacks.iter().map(|(first, last)| u32::from(last - first) + 1).sum();
    let what = format!("{} masters with slots, {replicas} replicas", masters().count());
    let mut findings = vec![match count {
        0 => Finding::ok(PART, format!("{what}: all slots have a master")),
        _ => Finding::error(
            PART,
            format!("{what}: {count} slots have no master that runs: {}", ranges(&lacks)),
            "start the masters of these slots, or give the slots to others: redis-cli --cluster fix",
        ),
    }];
    if masters().count() < MASTERS_GOOD {
        let what = "with fewer than three masters there is no majority for a failover";
        findings.push(Finding::warning(PART, what, "run three masters or more"));
    }
    if nodes.iter().any(|node| node.is_moving) {
        let advice = "see redis-cli --cluster check where nothing is meant to move";
        findings.push(Finding {
            advice: advice.into(),
            ..Finding::ok(PART, "slots are on their way between nodes")
        });
    }
    findings
}

/// Judges whether each master has a replica that may follow it.
fn of_replicas(nodes: &[Node]) -> Vec<Finding> {
    let is_alone = |master: &&Node| {
        let replica = |node: &&Node| node.master == master.id && !node.has("fail");
        master.is_master() && !master.slots.is_empty() && !nodes.iter().any(|node| replica(&node))
    };
    let alone = nodes.iter().filter(is_alone).map(|node| {
        let what = "has no replica that runs: without one its slots are lost with it";
        let advice = "start a replica of it: CLUSTER REPLICATE";
        Finding::warning(PART, what, advice).of(&node.name())
    });
    alone.collect()
}

fn ranges(slots: &[(u16, u16)]) -> String {
    let mut text = String::new();
    for (at, (first, last)) in slots.iter().take(RANGES_TOLD_MAX).enumerate() {
        let _ = write!(text, "{}{first}-{last}", if at == 0 { "" } else { ", " });
    }
    if slots.len() > RANGES_TOLD_MAX {
        text += ", …";
    }
    text
}

impl View {
    /// Reads the answer to `CLUSTER NODES`. A node that does not know its own address is at that of the seed.
    fn read(text: &str, seed: &RedisEndpoint) -> Self {
        let nodes = text.lines().filter_map(|line| Node::read(line, seed));
        // A node of which only an address is known is none yet.
        Self { nodes: nodes.filter(|node| !node.has("handshake")).collect() }
    }
}

impl Node {
    /// Reads `id ip:port@bus-port[,name] flags master ping pong epoch link slot…`.
    fn read(line: &str, seed: &RedisEndpoint) -> Option<Self> {
        let words: Vec<_> = line.split_whitespace().collect();
        let [id, address, flags, master, _ping, _pong, epoch, _link, slots @ ..] = &words[..]
        else {
            return None;
        };
        let flags: Vec<_> = flags.split(',').map(str::to_owned).collect();
        let is_myself = flags.iter().any(|flag| flag == "myself");
        let range = |word: &&str| {
            let (first, last) = word.split_once('-').unwrap_or((word, word));
            Some((first.parse().ok()?, last.parse().ok()?))
        };
        Some(Self {
            id: (*id).to_owned(),
            address: endpoint(address, seed, is_myself),
            is_moving: slots.iter().any(|word| word.starts_with('[')),
            slots: slots.iter().filter_map(range).collect(),
            flags,
            master: (*master).to_owned(),
            epoch: epoch.parse().unwrap_or_default(),
        })
    }

    fn has(&self, flag: &str) -> bool {
        self.flags.iter().any(|one| one == flag)
    }

    fn is_master(&self) -> bool {
        self.has("master")
    }

    fn name(&self) -> String {
        let role = if self.is_master() { "master" } else { "replica" };
        match &self.address {
            Some(address) => format!("{role} {address}"),
            None => format!("{role} {}", self.id),
        }
    }
}

/// Reads `ip:port@bus-port[,name]`.
fn endpoint(address: &str, seed: &RedisEndpoint, is_myself: bool) -> Option<RedisEndpoint> {
    let RedisEndpoint::Tcp { host: seed_host, tls, .. } = seed else { return None };
    let (host, port) = address.split('@').next()?.rsplit_once(':')?;
    let port = port.parse().ok().filter(|port| *port != 0)?;
    let host = match host.trim_matches(['[', ']']) {
        "" if is_myself => seed_host,
        "" => return None,
        host => host,
    };
    Some(RedisEndpoint::Tcp { host: host.to_owned(), port, tls: *tls })
}

const PART: &str = "redis";

const SLOTS: u16 = 16_384;

/// Number of seeds of which two may be away.
const SEEDS_GOOD: usize = 3;

/// Number of masters of which one may fail.
const MASTERS_GOOD: usize = 3;

/// Ranges of slots that are told.
const RANGES_TOLD_MAX: usize = 8;

/// Upper bound of the time for one node; all nodes are looked at at once.
const NODE_MAX: Duration = Duration::from_secs(8);

const UNREACHABLE: &str = "see whether it hangs. If not, only this machine does not reach it: let it announce an address that all clients \
     can reach (cluster-announce-ip, cluster-announce-port), or open the firewall";

#[cfg(test)]
mod tests {
    use super::{super::Level, *};

    fn seed() -> RedisEndpoint {
        RedisEndpoint::Tcp { host: "n1".into(), port: 6379, tls: true }
    }

    fn nodes(text: &str) -> Vec<Node> {
        all_nodes([View::read(text, &seed())].into_iter())
    }

    #[test]
    fn nodes_are_read() {
        let found = nodes(
            "a :6379@16379 myself,master - 0 0 1 connected 0-5460 [93->-b]\n\
             b 10.0.0.2:7000@17000,n2 master - 0 1 2 connected 5461-10922 16383\n\
             c ::1:7001@17001 slave,fail b 0 1 2 disconnected\n\
             d :0@0 master,noaddr - 0 1 0 disconnected\n\
             e 10.0.0.9:1@2 handshake - 0 0 0 connected\n",
        );
        let names: Vec<_> = found.iter().map(Node::name).collect();
        assert_eq!(
            names,
            ["master d", "master n1:6379", "master 10.0.0.2:7000", "replica [::1]:7001"]
        );
        assert_eq!(found[2].slots, [(5461, 10922), (16383, 16383)]);
        assert!(found[1].is_moving && found[3].has("fail") && found[3].master == "b");
        assert!(matches!(found[1].address, Some(RedisEndpoint::Tcp { tls: true, .. })));
    }

    #[test]
    fn slots_without_a_master_are_told() {
        let whole = "a h:1@1 master - 0 0 1 connected 0-5000\nb h:2@2 master - 0 0 2 connected 5001-16383\n";
        let found = of_slots(&nodes(whole));
        assert_eq!(found[0].level, Level::Ok);
        assert!(found[1].what.contains("fewer than three"));
        let found = of_slots(&nodes(&whole.replace("5001-16383", "5002 5004-16382")));
        assert!(
            found[0]
                .what
                .contains("3 slots have no master that runs: 5001-5001, 5003-5003, 16383-16383")
        );
        let found = of_slots(&nodes(&whole.replace("h:2@2 master", "h:2@2 master,fail")));
        assert!(found[0].what.contains("11383 slots have no master that runs: 5001-16383"));
    }

    #[test]
    fn masters_without_a_replica_are_told() {
        let text = "a h:1@1 master - 0 0 1 connected 0-5000\nb h:2@2 slave a 0 0 1 connected\n";
        assert!(of_replicas(&nodes(text)).is_empty());
        let found = of_replicas(&nodes(&text.replace("slave", "slave,fail")));
        assert!(found[0].what.starts_with("master h:1: has no replica"), "{found:?}");
    }

    #[test]
    fn the_newest_view_of_a_node_counts() {
        let old = View::read("a h:1@1 master - 0 0 1 connected 0-9\n", &seed());
        let new = View::read("a h:1@1 master - 0 0 4 connected 0-5\n", &seed());
        let found = all_nodes([old, new].into_iter());
        assert_eq!((found.len(), &found[0].slots[..]), (1, &[(0, 5)][..]));
    }
}
