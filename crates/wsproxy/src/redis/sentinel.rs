//! Asks sentinels which server is the master, and follows their announcements of another one.

use std::{convert::Infallible, sync::Arc, time::Duration};

use futures_util::future::join_all;
use tokio::time::{Instant, MissedTickBehavior, interval};
use wsproxy_proto::backoff::Backoff;

use crate::redis::{
    address::{RedisEndpoint, RedisServers},
    connect::{Connector, Part},
    connection::RedisConnection,
    fault::{Fault, tell},
    resp::{self, Push, RespValue},
    shared::RedisShared,
    supervisor::Complaints,
    topology::{NamedMaster, Topology},
};

/// Follows every sentinel until shutdown. Returns at once where there are none.
pub(super) async fn run(shared: Arc<RedisShared>) {
    let RedisServers::Sentinel { sentinels, master } = &shared.connector.address().servers else {
        return;
    };
    let followed = sentinels.iter().enumerate().map(|(number, sentinel)| {
        let follower = Follower { shared: &shared, number, sentinel, name: master };
        follower.run()
    });
    tokio::select! {
        _ = join_all(followed) => {}
        () = shared.shutdown.cancelled() => {}
    }
}

/// The follower of one sentinel.
struct Follower<'a> {
    shared: &'a RedisShared,
    /// Place of the sentinel in the configuration.
    number: usize,
    sentinel: &'a RedisEndpoint,
    /// Name of the master.
    name: &'a str,
}

impl Follower<'_> {
    async fn run(self) -> Infallible {
        let (mut complaints, mut failures) = (Complaints::default(), 0);
        loop {
            let mut has_answered = false;
            let Err(fault) = self.follow(&mut has_answered).await;
            failures = if has_answered { 0 } else { failures + 1 };
            let why = format!("sentinel {}: {fault}", self.sentinel);
            self.shared.topology.silent(self.number, why);
            if complaints.due() {
                let sentinel = self.sentinel;
                tracing::warn!(%sentinel, error = %fault, "A sentinel cannot be asked; it is tried again.");
            }
            tokio::time::sleep(BACKOFF.delay(failures, rand::random())).await;
        }
    }

    /// Asks the sentinel at intervals and at each of its announcements, until the connection fails.
    async fn follow(&self, has_answered: &mut bool) -> Result<Infallible, Fault> {
        let shared = self.shared;
        let client = format!("{}-sentinel", shared.client_name);
        let mut connection =
            shared.connector.connect(self.sentinel, Part::Sentinel, &client).await?;
        let (mut question, mut ticks) = (Question::default(), interval(shared.probe_interval));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        resp::words(&mut connection.output, &[b"SUBSCRIBE", SWITCHED.as_bytes()]);
        question.is_subscribing = true;
        loop {
            tokio::select! {
                progress = connection.drive() => { progress?; }
                _ = ticks.tick() => {
                    if question.asked.is_some_and(|at| at.elapsed() > shared.response_timeout) {
                        return Err(Fault::Silent);
                    }
                    question.ask(self.name, &mut connection);
                }
            }
            while let Some(named) = question.read(self, &mut connection)? {
                *has_answered = true;
                note(&shared.topology, self.number, self.sentinel, named);
            }
        }
    }
}

fn note(topology: &Topology, number: usize, sentinel: &RedisEndpoint, named: NamedMaster) {
    if let Some(master) = topology.answered(number, named) {
        tracing::info!(%master, %sentinel, "The sentinels name a master.");
    }
}

/// A question to a sentinel, which has two parts, and the subscription before it.
#[derive(Default)]
struct Question {
    is_subscribing: bool,
    /// Time of the question without an answer.
    asked: Option<Instant>,
    /// Address in the first part of the answer.
    address: Option<RedisEndpoint>,
    /// An announcement came behind the question, so that its answer may be older.
    again: bool,
}

impl Question {
    /// Asks, unless a question is open.
    fn ask(&mut self, name: &str, connection: &mut RedisConnection) {
        if self.asked.is_some() {
            return;
        }
        self.asked = Some(Instant::now());
        spell(name, connection);
    }

    /// Reads what came, up to the end of an answer.
    fn read(
        &mut self,
        of: &Follower<'_>,
        connection: &mut RedisConnection,
    ) -> Result<Option<NamedMaster>, Fault> {
        while let Some(frame) = connection.input.next()? {
            if let Some(push) = Push::parse(frame)? {
                if push.kind == b"message" && push.payload.starts_with(of.name.as_bytes()) {
                    self.again = true;
                } else if push.kind == b"subscribe" {
                    self.is_subscribing = false;
                }
            } else if std::mem::take(&mut self.is_subscribing) {
                // The user may not subscribe. The questions at intervals remain.
            } else if let Some(address) = self.address.take() {
                let epoch = epoch(&RespValue::parse(frame)?.0);
                self.asked = None;
                if std::mem::take(&mut self.again) {
                    self.ask(of.name, connection);
                }
                return Ok(Some(NamedMaster { endpoint: address, epoch }));
            } else {
                let value = RespValue::parse(frame)?.0;
                let is_tls = of.shared.connector.address().is_tls();
                self.address = Some(address(&value, of.name, is_tls)?);
            }
        }
        if self.again && self.asked.is_none() {
            self.again = false;
            self.ask(of.name, connection);
        }
        Ok(None)
    }
}

impl Connector {
    /// Opens a connection to the master, which the sentinels name, if there are any.
    pub(super) async fn connect_master(&self, name: &str) -> Result<RedisConnection, Fault> {
        let master = match &self.address().servers {
            RedisServers::One(endpoint) => endpoint.clone(),
            RedisServers::Cluster { seeds } => return self.connect_any(seeds, name).await,
            RedisServers::Sentinel { sentinels, master } => {
                let topology = Topology::new(&self.address().servers);
                let asked = sentinels.iter().enumerate().map(async |(number, sentinel)| match self
                    .named_by(sentinel, master, name)
                    .await
                {
                    Ok(named) => drop(topology.answered(number, named)),
                    Err(fault) => topology.silent(number, format!("sentinel {sentinel}: {fault}")),
                });
                join_all(asked).await;
                let trouble = || Fault::NoMaster(topology.trouble().unwrap_or_default());
                RedisEndpoint::clone(&*topology.now().ok_or_else(trouble)?)
            }
        };
        self.connect(&master, Part::Master, name).await
    }

    /// Opens a connection to the first node of a Cluster that answers.
    async fn connect_any(
        &self,
        seeds: &[RedisEndpoint],
        name: &str,
    ) -> Result<RedisConnection, Fault> {
        let mut fault = Fault::Closed;
        for seed in seeds {
            match self.connect(seed, Part::Node, name).await {
                Ok(connection) => return Ok(connection),
                Err(other) => fault = other,
            }
        }
        Err(fault)
    }

    /// Asks one sentinel for the master.
    async fn named_by(
        &self,
        sentinel: &RedisEndpoint,
        master: &str,
        name: &str,
    ) -> Result<NamedMaster, Fault> {
        let mut connection = self.connect(sentinel, Part::Sentinel, name).await?;
        let asked = async {
            spell(master, &mut connection);
            let mut endpoint = None;
            loop {
                if let Some(frame) = connection.input.next()? {
                    let value = RespValue::parse(frame)?.0;
                    match endpoint.take() {
                        None => endpoint = Some(address(&value, master, self.address().is_tls())?),
                        Some(endpoint) => {
                            return Ok(NamedMaster { endpoint, epoch: epoch(&value) });
                        }
                    }
                    continue;
                }
                connection.drive().await?;
            }
        };
        tokio::time::timeout(self.timeout(), asked).await.unwrap_or(Err(Fault::Silent))
    }
}

/// Spells the question for the master and for the number of its failover. The first command alone knows the new master
/// while a failover ends; only the second one tells the number. A sentinel answers both at once.
fn spell(name: &str, connection: &mut RedisConnection) {
    let words: [&[u8]; 3] = [b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", name.as_bytes()];
    resp::words(&mut connection.output, &words);
    resp::words(&mut connection.output, &[b"SENTINEL", b"MASTER", name.as_bytes()]);
}

/// Reads the address of the master.
fn address(answer: &RespValue<'_>, name: &str, tls: bool) -> Result<RedisEndpoint, Fault> {
    match answer {
        RespValue::Array(parts) => {
            let text = |at: usize| std::str::from_utf8(parts.get(at)?.text()?).ok();
            let (host, port) = (text(0), text(1).and_then(|port| port.parse().ok()));
            let (Some(host), Some(port)) = (host, port) else {
                return Err(Fault::Broken("an odd address of the master"));
            };
            Ok(RedisEndpoint::Tcp { host: host.to_owned(), port, tls })
        }
        RespValue::Error(error) => Err(Fault::greeting(error)),
        _ => Err(Fault::UnknownMaster(tell(name.as_bytes()))),
    }
}

/// Reads the number of the failover that made the master one; 0 where the user may not ask for it.
fn epoch(answer: &RespValue<'_>) -> u64 {
    let RespValue::Array(pairs) = answer else { return 0 };
    let mut pairs = pairs.chunks_exact(2);
    let pair = pairs.find(|pair| pair[0].text() == Some(b"config-epoch"));
    let text = pair.and_then(|pair| std::str::from_utf8(pair[1].text()?).ok());
    text.and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// Channel on which a sentinel announces another master.
const SWITCHED: &str = "+switch-master";

const BACKOFF: Backoff =
    Backoff { first: Duration::from_millis(100), max: Duration::from_millis(2000) };
