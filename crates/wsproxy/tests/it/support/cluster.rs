//! Processes of a Redis Cluster, started from the file of `deploy/redis/cluster` and joined by commands.

use std::{
    fs,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use tempfile::TempDir;
use wsproxy_proto::names::slot;

use super::{
    redis_process::{Server, replaced, until},
    redis_server::{Answer, free_port},
};

/// Three masters, each with the replica that stands three places behind it; dropping it kills them.
pub struct Cluster {
    /// The nodes. A removed one keeps its place.
    pub nodes: Vec<Server>,
    places: Vec<Place>,
    directory: TempDir,
}

/// Names of a node among the others.
struct Place {
    id: String,
    bus_port: u16,
}

/// A node as a node knows it: a line of `CLUSTER NODES`.
#[derive(Debug)]
struct Known {
    id: String,
    flags: Vec<String>,
    master: String,
    epoch: u64,
    slots: Vec<(u16, u16)>,
}

/// A slot on its way to another master: asked for at both until [`Migration::finish`].
pub struct Migration<'a> {
    cluster: &'a Cluster,
    slot: u16,
    from: usize,
    to: usize,
}

impl Cluster {
    /// Starts the nodes, and waits until they serve all slots.
    pub fn start() -> Self {
        let mut cluster =
            Self { nodes: Vec::new(), places: Vec::new(), directory: tempfile::tempdir().unwrap() };
        for _ in 0..2 * MASTERS {
            cluster.put();
        }
        cluster.nodes.iter_mut().for_each(Server::spawn);
        for number in 0..cluster.nodes.len() {
            cluster.identify(number);
            let epoch = (number + 1).to_string();
            cluster.nodes[number].call(&["CLUSTER", "SET-CONFIG-EPOCH", &epoch]);
            (0..number).for_each(|other| cluster.meet(number, other));
        }
        let bounds = |master: usize| (master * SLOTS / MASTERS).to_string();
        for master in 0..MASTERS {
            let last = ((master + 1) * SLOTS / MASTERS - 1).to_string();
            cluster.nodes[master].call(&["CLUSTER", "ADDSLOTSRANGE", &bounds(master), &last]);
        }
        for master in 0..MASTERS {
            cluster.replicate(master + MASTERS, master);
        }
        cluster.wait();
        cluster
    }

    /// Starts the nodes for several tests.
    pub async fn shared() -> Arc<Self> {
        Arc::new(tokio::task::spawn_blocking(Self::start).await.unwrap())
    }

    /// Removes all keys, and waits until no message is on its way between two nodes: one that comes later would be taken for
    /// one of the next case.
    pub async fn flush(&self) {
        for master in self.masters() {
            self.nodes[master].call(&["FLUSHALL"]);
        }
        until("no message is on its way", || self.messages("sent") == self.messages("received"))
            .await;
    }

    /// Number of messages that the nodes have sent to each other, or received.
    fn messages(&self, way: &str) -> u64 {
        let name = format!("cluster_stats_messages_publish_{way}:");
        let of_node = |node: &Server| {
            let Answer::Text(info) = node.call(&["CLUSTER", "INFO"]) else { return 0 };
            let line = info.lines().find_map(|line| line.strip_prefix(&*name)?.trim().parse().ok());
            line.unwrap_or(0)
        };
        self.nodes.iter().map(of_node).sum::<u64>()
    }

    /// The URL for the gateway, which names the nodes that began.
    pub fn url(&self) -> String {
        self.url_of("wsproxy:CHANGE-ME-wsproxy")
    }

    /// The URL of a user with all rights.
    pub fn admin_url(&self) -> String {
        self.url_of(&ADMIN.join(":"))
    }

    fn url_of(&self, login: &str) -> String {
        let seeds = self.nodes.iter().take(2 * MASTERS);
        let seeds: Vec<_> = seeds.map(|node| format!("127.0.0.1:{}", node.port())).collect();
        format!("redis+cluster://{login}@{}", seeds.join(","))
    }

    /// Whether all nodes that run serve all slots, know each other's roles, and no replica lags behind a lost link.
    pub fn is_whole(&self) -> bool {
        let running = self.nodes.iter().filter(|node| node.is_running());
        let (count, masters) = (running.clone().count(), self.masters().len());
        running.clone().all(|node| {
            let Ok(Answer::Text(info)) = node.try_call(&["CLUSTER", "INFO"]) else { return false };
            let Ok(Answer::Text(role)) = node.try_call(&["INFO", "replication"]) else {
                return false;
            };
            let known = known_by(node);
            let of = |flag: &str| known.iter().filter(|node| node.is(flag)).count();
            info.contains("cluster_state:ok")
                && info.contains(&format!("cluster_slots_ok:{SLOTS}"))
                && known.len() == count
                && of("slave") + masters == count
                && ["handshake", "fail", "fail?", "noaddr"].iter().all(|flag| of(flag) == 0)
                && (role.contains("role:master") || role.contains("master_link_status:up"))
        })
    }

    /// Waits for [`Self::is_whole`].
    pub async fn whole(&self) {
        until("the Cluster is whole", || self.is_whole()).await;
    }

    fn wait(&self) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !self.is_whole() {
            assert!(Instant::now() < deadline, "the nodes do not find each other");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Whether a node has lost another one.
    pub fn lacks(&self, node: usize, other: usize) -> bool {
        let is_it = |known: &Known| known.id == self.places[other].id && known.is("fail");
        known_by(&self.nodes[node]).iter().any(is_it)
    }

    /// The running nodes that say that they are masters.
    pub fn masters(&self) -> Vec<usize> {
        let is_master = |node: &Server| {
            known_by(node).iter().any(|known| known.is("myself") && known.is("master"))
        };
        let places = self.nodes.iter().enumerate();
        places.filter(|(_, node)| is_master(node)).map(|(place, _)| place).collect()
    }

    /// The running master that has a slot, by the newest claim.
    pub fn owner(&self, slot: u16) -> Option<usize> {
        let claim = |node: &Server| {
            let known = known_by(node).into_iter().find(|known| known.is("myself"))?;
            (known.is("master") && known.has(slot)).then_some(known.epoch)
        };
        let claims = self.nodes.iter().enumerate();
        let claims = claims.filter_map(|(place, node)| Some((claim(node)?, place)));
        claims.max().map(|(_, place)| place)
    }

    /// The running master of every slot.
    pub fn owners(&self) -> Vec<Option<usize>> {
        let mut owners = vec![(0, None); SLOTS];
        for (place, node) in self.nodes.iter().enumerate() {
            let known = known_by(node).into_iter().find(|known| known.is("myself"));
            let Some(known) = known.filter(|known| known.is("master")) else { continue };
            for slot in known.slots.iter().flat_map(|(first, last)| *first..=*last) {
                let owner = &mut owners[usize::from(slot)];
                *owner = (*owner).max((known.epoch, Some(place)));
            }
        }
        owners.into_iter().map(|(_, place)| place).collect()
    }

    /// The master of a key.
    pub fn owner_of(&self, key: &str) -> usize {
        self.owner(slot(key.as_bytes())).expect("the slot has a master")
    }

    /// Waits until another node than `old` has a slot.
    pub async fn taken_over(&self, slot: u16, old: usize) -> usize {
        let owner = || self.owner(slot).filter(|owner| *owner != old);
        until("another node has the slot", || owner().is_some()).await;
        owner().unwrap()
    }

    /// The running replica of a master.
    pub fn replica_of(&self, master: usize) -> usize {
        let id = &self.places[master].id;
        let is_replica = |node: &Server| {
            known_by(node).iter().any(|known| known.is("myself") && known.master == *id)
        };
        self.nodes.iter().position(is_replica).expect("the master has a replica")
    }

    /// The lowest slot that a master has.
    pub fn slot_of(&self, master: usize) -> u16 {
        let known = known_by(&self.nodes[master]).into_iter().find(|known| known.is("myself"));
        known.expect("it runs").slots.first().expect("it has slots").0
    }

    /// Kills a master and its replica, and returns their places.
    pub fn kill_part(&mut self, master: usize) -> [usize; 2] {
        let pair = [master, self.replica_of(master)];
        // The replica first: it must not be promoted in between.
        pair.iter().rev().for_each(|place| self.nodes[*place].kill());
        pair
    }

    /// Kills all nodes, and starts them with what they kept.
    pub fn restart(&mut self) {
        self.nodes.iter_mut().for_each(Server::kill);
        self.nodes.iter_mut().for_each(Server::spawn);
        self.nodes.iter().for_each(Server::started);
    }

    /// Promotes the replica of a master on command, and returns its place.
    pub async fn fail_over(&self, master: usize) -> usize {
        let replica = self.replica_of(master);
        self.nodes[replica].call(&["CLUSTER", "FAILOVER"]);
        until("the replica is the master", || self.masters().contains(&replica)).await;
        replica
    }

    /// Starts a further master without slots.
    pub async fn add(&mut self) -> usize {
        let place = self.put();
        self.nodes[place].start();
        self.identify(place);
        let known = self.nodes.iter().position(Server::is_running).unwrap();
        self.meet(place, known);
        self.whole().await;
        place
    }

    /// Removes a node without slots, and ends it.
    pub async fn remove(&mut self, place: usize) {
        let id = self.places[place].id.clone();
        for (other, node) in self.nodes.iter().enumerate() {
            if other != place && node.is_running() {
                node.call(&["CLUSTER", "FORGET", &id]);
            }
        }
        self.nodes[place].kill();
        self.whole().await;
    }

    /// Moves a slot with its keys.
    pub fn migrate(&self, slot: u16, to: usize) {
        let migration = self.migration(slot, to);
        migration.move_keys(usize::MAX);
        migration.finish();
    }

    /// Begins to move a slot: new keys are made at its new master, which clients are told by `ASK`.
    pub fn migration(&self, slot: u16, to: usize) -> Migration<'_> {
        let from = self.owner(slot).expect("the slot has a master");
        let number = slot.to_string();
        let [source, target] = [from, to].map(|place| self.places[place].id.as_str());
        self.nodes[to].call(&["CLUSTER", "SETSLOT", &number, "IMPORTING", source]);
        self.nodes[from].call(&["CLUSTER", "SETSLOT", &number, "MIGRATING", target]);
        Migration { cluster: self, slot, from, to }
    }

    /// Makes a folder and a file for a node that is not started yet.
    fn put(&mut self) -> usize {
        let (port, bus_port) = (free_port(), free_port());
        self.nodes.push(node(self.directory.path(), port, bus_port));
        self.places.push(Place { id: String::new(), bus_port });
        self.nodes.len() - 1
    }

    fn identify(&mut self, place: usize) {
        self.nodes[place].started();
        let Answer::Text(id) = self.nodes[place].call(&["CLUSTER", "MYID"]) else { panic!() };
        self.places[place].id = id;
    }

    fn meet(&self, one: usize, other: usize) {
        let port = self.nodes[other].port().to_string();
        let bus_port = self.places[other].bus_port.to_string();
        self.nodes[one].call(&["CLUSTER", "MEET", "127.0.0.1", &port, &bus_port]);
    }

    fn replicate(&self, replica: usize, master: usize) {
        let deadline = Instant::now() + Duration::from_secs(20);
        let words = ["CLUSTER", "REPLICATE", &self.places[master].id];
        while let Answer::Error(error) = self.nodes[replica].try_call(&words).unwrap() {
            assert!(Instant::now() < deadline, "{error}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Migration<'_> {
    /// Moves up to so many keys, one by one; returns how many.
    pub fn move_keys(&self, max: usize) -> usize {
        let (slot, count) = (self.slot.to_string(), max.min(1000).to_string());
        let [source, target] = [self.from, self.to].map(|place| &self.cluster.nodes[place]);
        let port = target.port().to_string();
        let mut moved = 0;
        while moved < max {
            let keys = source.call(&["CLUSTER", "GETKEYSINSLOT", &slot, &count]);
            let Answer::Array(keys) = keys else { panic!("{keys:?}") };
            if keys.is_empty() {
                break;
            }
            for key in keys.iter().take(max - moved) {
                let Answer::Text(key) = key else { panic!("{key:?}") };
                let to = ["MIGRATE", "127.0.0.1", &port, key, "0", "5000", "AUTH2"];
                source.call(&[&to[..], ADMIN].concat());
                moved += 1;
            }
        }
        moved
    }

    /// Moves the keys that are left, and gives the slot to its new master.
    pub fn finish(self) {
        self.move_keys(usize::MAX);
        let (slot, id) = (self.slot.to_string(), &self.cluster.places[self.to].id);
        // The new master first: a slot is never without one.
        let rest =
            (0..self.cluster.nodes.len()).filter(|place| ![self.to, self.from].contains(place));
        for place in [self.to, self.from].into_iter().chain(rest) {
            let node = &self.cluster.nodes[place];
            if node.is_running() && self.cluster.masters().contains(&place) {
                node.call(&["CLUSTER", "SETSLOT", &slot, "NODE", id]);
            }
        }
    }
}

impl Known {
    /// Reads a line such as `id 127.0.0.1:7000@17000 myself,master - 0 0 1 connected 0-5460 [93->-id]`.
    fn read(line: &str) -> Self {
        let mut words = line.split(' ');
        let mut next = || words.next().unwrap_or_default().to_owned();
        let (id, _address, flags, master) = (next(), next(), next(), next());
        let (_ping, _pong, epoch, _link) = (next(), next(), next(), next());
        let range = |word: &str| {
            let (first, last) = word.split_once('-').unwrap_or((word, word));
            Some((first.parse().ok()?, last.parse().ok()?))
        };
        let slots = words.filter_map(range).collect();
        let flags = flags.split(',').map(str::to_owned).collect();
        Self { id, flags, master, epoch: epoch.parse().unwrap_or_default(), slots }
    }

    fn is(&self, flag: &str) -> bool {
        self.flags.iter().any(|one| one == flag)
    }

    fn has(&self, slot: u16) -> bool {
        self.slots.iter().any(|(first, last)| (*first..=*last).contains(&slot))
    }
}

/// The nodes that a node knows; none where it does not run.
fn known_by(node: &Server) -> Vec<Known> {
    if !node.is_running() {
        return Vec::new();
    }
    match node.try_call(&["CLUSTER", "NODES"]) {
        Ok(Answer::Text(text)) => text.lines().map(Known::read).collect(),
        _ => Vec::new(),
    }
}

fn node(directory: &Path, port: u16, bus_port: u16) -> Server {
    let folder = directory.join(port.to_string());
    fs::create_dir(&folder).unwrap();
    let text = replaced(
        NODE_CONF,
        &[
            ("bind * -::*", "bind 127.0.0.1"),
            ("\nport 6379\n", &format!("\nport {port}\n")),
            ("cluster-port 16379", &format!("cluster-port {bus_port}")),
            ("dir /var/lib/redis", &format!("dir {}", folder.display())),
        ],
    );
    let file = folder.join("node.conf");
    fs::write(&file, text).unwrap();
    Server::of(&folder, port, ADMIN, &file, &[])
}

/// Number of masters that begin.
pub const MASTERS: usize = 3;

/// The operator's login in the file.
pub const ADMIN: &[&str] = &["admin", "CHANGE-ME-admin"];

/// The passwords in the file.
pub const PASSWORDS: [&str; 3] = ["CHANGE-ME-admin", "CHANGE-ME-replica", "CHANGE-ME-wsproxy"];

const SLOTS: usize = 16_384;

const NODE_CONF: &str = include_str!("../../../../../deploy/redis/cluster/node.conf");
