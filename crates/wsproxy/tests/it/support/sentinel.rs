//! Processes of a Redis with Sentinel, started from the files of `deploy/redis/sentinel`.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use tempfile::TempDir;

use super::{
    redis_process::{Server, replaced, until},
    redis_server::{Answer, free_port},
};

/// A master, two replicas and three sentinels; dropping it kills them.
pub struct Deployment {
    /// The servers of data; the first one begins as the master.
    pub servers: Vec<Server>,
    /// The sentinels.
    pub sentinels: Vec<Server>,
    _directory: TempDir,
}

impl Deployment {
    /// Starts all, and waits until the sentinels know each other and the replicas.
    pub fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let ports: Vec<_> = (0..6).map(|_| free_port()).collect();
        let master = ports[0];
        let mut servers: Vec<_> =
            ports[..3].iter().map(|port| data_server(directory.path(), *port, master)).collect();
        let mut sentinels: Vec<_> =
            ports[3..].iter().map(|port| sentinel(directory.path(), *port, master)).collect();
        servers.iter_mut().chain(&mut sentinels).for_each(Server::start);
        let deployment = Self { servers, sentinels, _directory: directory };
        deployment.settled();
        deployment
    }

    /// The URL for the gateway; the sentinels have [`SENTINEL_PASSWORD`].
    pub fn url(&self) -> String {
        let sentinels = self.sentinels.iter().map(|one| format!("127.0.0.1:{}", one.port()));
        let sentinels = sentinels.collect::<Vec<_>>().join(",");
        format!("redis+sentinel://:{REDIS_PASSWORD}@{sentinels}/mymaster/0")
    }

    /// The place of the server that most running sentinels name as the master.
    pub fn master(&self) -> usize {
        let named = self.sentinels.iter().filter_map(names_master);
        let named: Vec<_> = named.collect();
        let place = |port| self.servers.iter().position(|server| server.port() == port).unwrap();
        let most = named.iter().max_by_key(|port| named.iter().filter(|one| one == port).count());
        place(*most.expect("a sentinel runs"))
    }

    /// Waits until a sentinel names another master than this one.
    pub async fn decided(&self, old: usize) -> usize {
        let old = self.servers[old].port();
        let moved = |sentinel: &Server| names_master(sentinel).is_some_and(|port| port != old);
        until("a sentinel names another master", || self.sentinels.iter().any(moved)).await;
        let named = self.sentinels.iter().filter_map(names_master).find(|port| *port != old);
        self.servers.iter().position(|server| Some(server.port()) == named).unwrap()
    }

    /// Waits until a server is a replica whose link is up.
    pub async fn is_replica(&self, server: usize) {
        let server = &self.servers[server];
        until("the server is a replica", || {
            let info = server.try_call(&["INFO", "replication"]);
            matches!(info, Ok(Answer::Text(text)) if text.contains("master_link_status:up"))
        })
        .await;
    }

    fn settled(&self) {
        let deadline = Instant::now() + Duration::from_secs(60);
        let is_settled = |sentinel: &Server| {
            let answer = sentinel.try_call(&["SENTINEL", "MASTER", "mymaster"]);
            let has = |name: &str, value: &str| {
                let Ok(Answer::Array(parts)) = &answer else { return false };
                let pair = [Answer::Text(name.into()), Answer::Text(value.into())];
                parts.chunks_exact(2).any(|found| found == pair)
            };
            has("num-slaves", "2") && has("num-other-sentinels", "2")
        };
        let replicates = |server: &Server| match server.try_call(&["INFO", "replication"]) {
            Ok(Answer::Text(text)) => {
                text.contains("connected_slaves:2") || text.contains("master_link_status:up")
            }
            _ => false,
        };
        while !(self.sentinels.iter().all(is_settled) && self.servers.iter().all(replicates)) {
            assert!(Instant::now() < deadline, "the sentinels do not find each other");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// The port of the master that a sentinel names; `None` where it does not answer.
fn names_master(sentinel: &Server) -> Option<u16> {
    if !sentinel.is_running() {
        return None;
    }
    match sentinel.try_call(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", "mymaster"]).ok()? {
        Answer::Array(parts) => match &parts[..] {
            [_, Answer::Text(port)] => port.parse().ok(),
            _ => None,
        },
        _ => None,
    }
}

/// A sentinel of one master without a password.
pub fn lone_sentinel(master: u16, directory: &Path) -> Server {
    sentinel_on(free_port(), master, directory)
}

/// The same on a port of the caller's.
pub fn sentinel_on(port: u16, master: u16, directory: &Path) -> Server {
    let file = directory.join("sentinel.conf");
    let text =
        format!("port {port}\nbind 127.0.0.1\nsentinel monitor mymaster 127.0.0.1 {master} 1\n");
    fs::write(&file, text).unwrap();
    let mut server = Server::of(directory, port, &[], &file, &["--sentinel"]);
    server.start();
    server
}

/// A sentinel of a master on `localhost`, with TLS and the certificates of that server. Is not waited for.
pub fn tls_sentinel(master: u16, certificates: &Path, directory: &Path) -> Server {
    let (port, file) = (free_port(), directory.join("sentinel.conf"));
    let of = |name: &str| certificates.join(name).display().to_string();
    let text = format!(
        "port 0\ntls-port {port}\nbind 127.0.0.1\ntls-cert-file {}\ntls-key-file {}\ntls-ca-cert-file {}\n\
         tls-auth-clients no\ntls-replication yes\nsentinel resolve-hostnames yes\n\
         sentinel announce-hostnames yes\nsentinel monitor mymaster localhost {master} 1\n",
        of("server.pem"),
        of("server.key"),
        of("ca.pem"),
    );
    fs::write(&file, text).unwrap();
    let mut server = Server::of(directory, port, &[], &file, &["--sentinel"]);
    server.spawn();
    server
}

fn data_server(directory: &Path, port: u16, master: u16) -> Server {
    let folder = directory.join(port.to_string());
    fs::create_dir(&folder).unwrap();
    let dir = format!("dir {}", folder.display());
    let text = replaced(
        DATA_CONF,
        &[
            ("bind * -::*", "bind 127.0.0.1"),
            ("port 6379\n", &format!("port {port}\n")),
            ("dir /var/lib/redis", &dir),
        ],
    );
    fs::write(folder.join("data.conf"), text).unwrap();
    let mut file = folder.join("data.conf");
    if port != master {
        file = folder.join("replica.conf");
        let include = format!("include {}", folder.join("data.conf").display());
        let of = format!("replicaof 127.0.0.1 {master}");
        let changes =
            [("include /etc/redis/data.conf", &*include), ("replicaof 10.0.0.11 6379", &of)];
        fs::write(&file, replaced(REPLICA_CONF, &changes)).unwrap();
    }
    Server::of(&folder, port, &[REDIS_PASSWORD], &file, &[])
}

fn sentinel(directory: &Path, port: u16, master: u16) -> Server {
    let folder = directory.join(port.to_string());
    fs::create_dir(&folder).unwrap();
    let dir = format!("dir {}", folder.display());
    let text = replaced(
        SENTINEL_CONF,
        &[
            ("bind * -::*", "bind 127.0.0.1"),
            ("port 26379", &format!("port {port}")),
            ("dir /var/lib/redis", &dir),
            ("mymaster 10.0.0.11 6379", &format!("mymaster 127.0.0.1 {master}")),
            // Small times for a test.
            ("down-after-milliseconds mymaster 2000", "down-after-milliseconds mymaster 1000"),
            ("failover-timeout mymaster 10000", "failover-timeout mymaster 5000"),
        ],
    );
    let file = folder.join("sentinel.conf");
    fs::write(&file, text).unwrap();
    Server::of(&folder, port, &[SENTINEL_PASSWORD], &file, &["--sentinel"])
}

/// The password of the servers in the files.
pub const REDIS_PASSWORD: &str = "CHANGE-ME-redis";

/// The password of the sentinels in the files.
pub const SENTINEL_PASSWORD: &str = "CHANGE-ME-sentinel";

const DATA_CONF: &str = include_str!("../../../../../deploy/redis/sentinel/data.conf");
const REPLICA_CONF: &str = include_str!("../../../../../deploy/redis/sentinel/replica.conf");
const SENTINEL_CONF: &str = include_str!("../../../../../deploy/redis/sentinel/sentinel.conf");
