//! The task of the subscribing connection: sends subscriptions, delivers messages, and tells loss and recovery.
//!
//! Its only commands are `SUBSCRIBE`, `UNSUBSCRIBE` and `ROLE`. Every answer must fit the oldest open command;
//! otherwise the connection is closed.

use std::{collections::VecDeque, pin::pin, sync::Arc};

use bytes::BytesMut;
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::{
    bus::deliver::{Deliver, Missed},
    redis::{
        address::RedisEndpoint,
        connect::check_role_answer,
        connection::{Progress, RedisConnection},
        fault::{Fault, tell},
        links::Links,
        node::{Nodes, Target},
        outlet::{Birth, Outlet},
        probe::{Probes, Returned, Route},
        resp::{self, Push, RespValue},
        shared::RedisShared,
        subscriptions::{CommandId, Settled},
        supervisor::{Complaints, Supervisor},
        watchdog::{Watchdog, WatchdogStep},
    },
};

/// The reader of the bus.
pub(super) struct RedisReader {
    shared: Arc<RedisShared>,
    deliver: Box<dyn Deliver>,
    /// Commands without an answer, oldest first.
    asked: VecDeque<Asked>,
    last_id: CommandId,
    settled: Vec<Settled>,
    resubscription: Resubscription,
    /// Time since which messages may have been missed; `None` while all is well.
    outage: Option<Instant>,
    probes: Probes,
    /// Connections between the node of a Cluster and the others.
    links: Links,
    /// Time of the latest probe over a connection of its own.
    scouted: Instant,
    refusals: Complaints,
    refused_retried: Instant,
}

enum Asked {
    Subscribe { id: CommandId, channels: Vec<Arc<str>>, confirmed: usize },
    Unsubscribe { channels: Vec<Arc<str>>, confirmed: usize },
    Watchdog,
    Links,
}

/// Progress of a new connection with its subscriptions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Resubscription {
    /// Some wanted channels were not asked for yet.
    Asking,
    /// All wanted channels were asked for; the answer to this command is the last.
    Until(CommandId),
    Done,
}

impl RedisReader {
    /// Creates a reader without a connection.
    pub(super) fn new(shared: Arc<RedisShared>, deliver: Box<dyn Deliver>) -> Self {
        let now = Instant::now();
        Self {
            probes: Probes::new(shared.probe_channel.clone(), now),
            links: Links::default(),
            scouted: now,
            shared,
            deliver,
            asked: VecDeque::new(),
            last_id: 0,
            settled: Vec::new(),
            resubscription: Resubscription::Asking,
            outage: None,
            refusals: Complaints::default(),
            refused_retried: now,
        }
    }

    /// Reads until shutdown.
    pub(super) async fn run(mut self) {
        let shared = self.shared.clone();
        let link = &shared.health.subscribe;
        let mut supervisor = Supervisor::new(shared.clone(), link, Target::Named);
        while let Some((mut connection, server)) = supervisor.connect().await {
            self.shared.subscriptions.connected();
            self.resubscription = Resubscription::Asking;
            let end = self.serve(&mut connection, &server).await;
            while self.deliver.proceed() {}
            self.asked.clear();
            self.shared.subscriptions.disconnected();
            let Err(fault) = end else { break };
            self.shared.health.set_subscribed(false);
            supervisor.lost(&server, &fault);
            let since = match fault {
                // Publishers may have used another server for longer than this connection was silent.
                Fault::Probe | Fault::Moved => self.probes.known_until(),
                _ => None,
            };
            self.interrupted(&fault, since.unwrap_or(connection.last_read), &Missed::All);
        }
        self.shared.subscriptions.close();
    }

    /// Notes that messages may have been missed since `since`.
    fn interrupted(&mut self, fault: &Fault, since: Instant, missed: &Missed) {
        self.outage = Some(self.outage.map_or(since, |earlier| earlier.min(since)));
        self.deliver.lost(&fault.to_string(), missed);
    }

    /// Uses a connection until it fails; `Ok` at shutdown.
    async fn serve(
        &mut self,
        connection: &mut RedisConnection,
        server: &Arc<RedisEndpoint>,
    ) -> Result<(), Fault> {
        let shared = self.shared.clone();
        let mut left = pin!(shared.topology.left(server));
        self.links = Links::default();
        let (every, timeout) = (shared.probe_interval, shared.response_timeout);
        let mut watchdog = Watchdog::new(every, timeout, Instant::now());
        self.probes.renew(Instant::now());
        for node in shared.nodes.all() {
            node.publishes.outlet.doubt();
            node.commands.outlet.doubt();
        }
        let mut ticks = interval(Watchdog::period(every, timeout));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.ask_changes(&mut connection.output);
            // A message to many gives way to those that came meanwhile, and they to it.
            let is_behind = self.deliver.proceed();
            tokio::select! {
                progress = connection.drive() => if progress? == Progress::Read {
                    self.round(connection, &mut watchdog)?;
                },
                () = shared.subscriptions.changed() => {}
                () = shared.connections_changed.notified() => self.prove(|_| true),
                slots = shared.nodes.failed_over() => {
                    self.missed_some(&Fault::FailedOver, &Missed::Slots(slots));
                }
                _ = ticks.tick() => self.tick(connection, &mut watchdog)?,
                () = &mut left => return Err(Fault::Moved),
                () = tokio::task::yield_now(), if is_behind => {}
                () = shared.shutdown.cancelled() => return Ok(()),
            }
        }
    }

    /// Writes changes of subscriptions, in large commands, no faster than the server reads.
    fn ask_changes(&mut self, output: &mut BytesMut) {
        while output.len() < OUTPUT_BYTES {
            let id = self.last_id.wrapping_add(1);
            let changes = self.shared.subscriptions.take_changes(id, CHANNELS_PER_COMMAND);
            if changes.subscribe.is_empty() && changes.unsubscribe.is_empty() {
                if self.resubscription == Resubscription::Asking {
                    self.resubscription = Resubscription::Until(self.last_id);
                }
                break;
            }
            if !changes.unsubscribe.is_empty() {
                spell(output, b"UNSUBSCRIBE", &changes.unsubscribe);
                let channels = changes.unsubscribe;
                self.asked.push_back(Asked::Unsubscribe { channels, confirmed: 0 });
            }
            if !changes.subscribe.is_empty() {
                self.last_id = id;
                self.subscribe(output, id, changes.subscribe);
            }
        }
        self.check_resubscription();
    }

    fn subscribe(&mut self, output: &mut BytesMut, id: CommandId, channels: Vec<Arc<str>>) {
        spell(output, b"SUBSCRIBE", &channels);
        self.asked.push_back(Asked::Subscribe { id, channels, confirmed: 0 });
    }

    /// Takes all frames that were read, then has outboxes written and wakes callers.
    fn round(
        &mut self,
        connection: &mut RedisConnection,
        watchdog: &mut Watchdog,
    ) -> Result<(), Fault> {
        let mut unflushed = Unflushed::default();
        let RedisConnection { input, output, birth, last_read, .. } = connection;
        let result = loop {
            let (frame, last) = match input.next_and_last() {
                Ok(Some(frame)) => frame,
                Ok(None) => break Ok(()),
                Err(broken) => break Err(broken.into()),
            };
            let taken = match Push::parse(frame) {
                Ok(Some(push)) if push.kind == b"message" => {
                    match self.probes.returned(push.channel, push.payload, *last_read) {
                        Returned::NotOurs => {
                            self.deliver.message(push.channel, push.payload, last);
                            unflushed.messages += 1;
                            unflushed.bytes += push.payload.len();
                        }
                        Returned::Probe(route, birth) => {
                            self.shared.with_outlet(route, |outlet| outlet.prove(birth));
                        }
                        Returned::Foreign => {}
                    }
                    Ok(())
                }
                Ok(Some(push)) => self.confirmation(&push),
                Ok(None) => self.answer(frame, output, watchdog, *birth),
                Err(broken) => Err(broken.into()),
            };
            if let Err(fault) = taken {
                break Err(fault);
            }
            if unflushed.messages >= ROUND_MESSAGES || unflushed.bytes >= ROUND_BYTES {
                self.flush(&mut unflushed);
            }
        };
        self.flush(&mut unflushed);
        for (caller, result) in self.settled.drain(..) {
            // A caller whose deadline has passed has dropped its receiver.
            let _ = caller.send(result);
        }
        self.check_resubscription();
        result
    }

    fn flush(&mut self, unflushed: &mut Unflushed) {
        if unflushed.messages > 0 {
            self.shared.counters.messages_in.add(unflushed.messages);
            self.deliver.flush();
        }
        *unflushed = Unflushed::default();
    }

    /// Takes a push other than a message: it must be the answer to the oldest command.
    fn confirmation(&mut self, push: &Push<'_>) -> Result<(), Fault> {
        let (channels, confirmed, id) = match (push.kind, self.asked.front_mut()) {
            (b"subscribe", Some(Asked::Subscribe { id, channels, confirmed })) => {
                (channels, confirmed, Some(*id))
            }
            (b"unsubscribe", Some(Asked::Unsubscribe { channels, confirmed })) => {
                (channels, confirmed, None)
            }
            (b"subscribe" | b"unsubscribe", _) => {
                return Err(Fault::Broken("a confirmation of nothing"));
            }
            _ => return Ok(()),
        };
        let channel = &channels[*confirmed];
        if channel.as_bytes() != push.channel {
            return Err(Fault::Broken("a confirmation of another channel"));
        }
        if let Some(id) = id {
            self.shared.subscriptions.confirmed(channel, id, &mut self.settled);
            if **channel == *self.shared.probe_channel
                && self.resubscription == Resubscription::Done
            {
                self.shared.health.set_subscribed(true);
            }
        }
        *confirmed += 1;
        if *confirmed == channels.len() {
            self.asked.pop_front();
        }
        Ok(())
    }

    /// Takes a reply: the answer to the oldest command if that is `ROLE`, or an error.
    fn answer(
        &mut self,
        frame: &[u8],
        output: &mut BytesMut,
        watchdog: &mut Watchdog,
        birth: Birth,
    ) -> Result<(), Fault> {
        let (value, _) = RespValue::parse(frame)?;
        if matches!(value, RespValue::Push(_)) {
            return Ok(());
        }
        match (self.asked.pop_front(), value) {
            (Some(Asked::Watchdog), value) => {
                watchdog.answered();
                if self.shared.nodes.cluster().is_none() {
                    check_role_answer(&value)?;
                }
                let missed = self.probes.fence_was_passed();
                missed.map_or(Ok(()), |missed| self.missed(missed, birth))
            }
            (Some(Asked::Links), value) => {
                let torn = self.links.torn(&value);
                if let Some(cluster) = self.shared.nodes.cluster()
                    && !torn.is_empty()
                {
                    cluster.doubt();
                    let slots = cluster.slots_of(&torn);
                    self.missed_some(&Fault::Torn, &Missed::Slots(slots));
                }
                Ok(())
            }
            (Some(Asked::Subscribe { id, channels, confirmed: 0 }), RespValue::Error(error)) => {
                self.denied(id, channels, &tell(error), output);
                Ok(())
            }
            // The channels stay subscribed, which costs only messages without a receiver.
            (Some(Asked::Unsubscribe { confirmed: 0, .. }), RespValue::Error(_)) => Ok(()),
            _ => Err(Fault::Broken("an answer to nothing")),
        }
    }

    /// Asks again for each half of a denied command, since one denied channel denies the whole command.
    fn denied(
        &mut self,
        id: CommandId,
        mut channels: Vec<Arc<str>>,
        why: &str,
        output: &mut BytesMut,
    ) {
        if let [channel] = channels.as_slice() {
            if self.shared.subscriptions.refused(channel, id, why, &mut self.settled) {
                self.shared.counters.subscribe_errors.add(1);
                if **channel == *self.shared.probe_channel {
                    self.shared.health.denied(why);
                }
                if self.refusals.due() {
                    tracing::warn!(%channel, error = why, "Redis refused a subscription.");
                }
            }
            return;
        }
        let resubscribing = match self.resubscription {
            Resubscription::Until(last) => is_at_most(id, last),
            _ => false,
        };
        let half = channels.split_off(channels.len() / 2);
        for mut channels in [channels, half] {
            let new = self.last_id.wrapping_add(1);
            self.shared.subscriptions.ask_again(&mut channels, id, new);
            if !channels.is_empty() {
                self.last_id = new;
                self.subscribe(output, new, channels);
            }
        }
        if resubscribing {
            self.resubscription = Resubscription::Until(self.last_id);
        }
    }

    fn check_resubscription(&mut self) {
        if let Resubscription::Until(last) = self.resubscription {
            let open = self.asked.iter().any(|asked| match asked {
                Asked::Subscribe { id, .. } => is_at_most(*id, last),
                _ => false,
            });
            if open {
                return;
            }
            self.resubscription = Resubscription::Done;
            // A server that denies the instance's own channel most likely denies those of sessions too.
            self.shared.health.set_subscribed(self.is_heard());
            self.prove(|_| true);
        }
        self.check_recovery();
    }

    /// Tells the end of an outage, once all connections are proven: histories must not be read from another server.
    fn check_recovery(&mut self) {
        let is_well = self.outage.is_none() && !self.shared.health.differs();
        if self.resubscription != Resubscription::Done || is_well {
            return;
        }
        if self.shared.are_connections_proven() {
            self.shared.health.agree();
        } else if self.is_heard() && !self.probes.are_denied() {
            return;
        }
        let Some(since) = self.outage.take() else { return };
        let gap = since.elapsed();
        let channels = self.shared.subscriptions.len();
        tracing::info!(?gap, channels, "Every subscription is confirmed again.");
        self.deliver.recovered(gap);
    }

    /// Returns whether the instance's own channel is confirmed.
    fn is_heard(&self) -> bool {
        self.shared.subscriptions.is_confirmed(self.probes.channel())
    }

    /// Sends probes over wanted connections that are up.
    fn prove(&mut self, is_wanted: impl Fn(&RedisShared) -> bool) {
        let shared = self.shared.clone();
        if self.resubscription != Resubscription::Done || !self.is_heard() || !is_wanted(&shared) {
            return;
        }
        let now = Instant::now();
        match &shared.nodes {
            Nodes::One(node) => {
                for (route, pipeline) in
                    [(Route::Publish, &node.publishes), (Route::Command, &node.commands)]
                {
                    if pipeline.link.is_up() {
                        self.probes.send(route, &pipeline.outlet, now);
                    }
                }
            }
            Nodes::Cluster(cluster) => {
                let masters = cluster.masters();
                self.probes.keep_nodes(|number| masters.iter().any(|node| node.number == number));
                for node in masters {
                    if node.publishes.link.is_up() {
                        self.probes.send(Route::Node(node.number), &node.publishes.outlet, now);
                    }
                }
            }
        }
    }

    /// Notes that messages may have been missed, though the connection is well.
    fn missed_some(&mut self, fault: &Fault, missed: &Missed) {
        let since = self.probes.known_until().unwrap_or_else(Instant::now);
        self.interrupted(fault, since, missed);
    }

    /// Handles a missed probe. Of two connections that end at different servers the newer stays, since it ends where
    /// the server's name leads now; all older ones are made again.
    fn missed(&mut self, (route, birth): (Route, Birth), own: Birth) -> Result<(), Fault> {
        let shared = self.shared.clone();
        let born = shared.with_outlet(route, Outlet::born);
        if route != Route::Fresh && born != birth {
            return Ok(()); // That connection is gone already.
        }
        shared.counters.probe_failures.add(1);
        shared.health.differ();
        let node = match &shared.nodes {
            Nodes::One(node) => node,
            Nodes::Cluster(cluster) => {
                let since = Instant::now() - shared.response_timeout;
                // A node hears itself, also when it is cut off from all others.
                let home = Route::Node(cluster.home());
                if !self.probes.are_others_heard([route, home], since) {
                    return Err(Fault::Probe);
                }
                // The others are heard here, so that it is that node which others do not hear.
                if let Route::Node(number) = route
                    && let Some(node) = cluster.node(number)
                {
                    node.publishes.outlet.doubt();
                    node.publishes.condemn();
                    self.missed_some(&Fault::Probe, &Missed::Slots(cluster.slots_at(number)));
                }
                cluster.doubt();
                return Ok(());
            }
        };
        let newest = born.max(own);
        for pipeline in [&node.publishes, &node.commands] {
            pipeline.outlet.doubt();
            if pipeline.outlet.born() < newest {
                pipeline.condemn();
            }
        }
        if own < newest {
            return Err(Fault::Probe);
        }
        self.missed_some(&Fault::Probe, &Missed::All);
        Ok(())
    }

    fn tick(
        &mut self,
        connection: &mut RedisConnection,
        watchdog: &mut Watchdog,
    ) -> Result<(), Fault> {
        let now = Instant::now();
        match watchdog.tick(now, connection.last_read) {
            WatchdogStep::Fine => self.prove(|shared| !shared.are_connections_proven()),
            WatchdogStep::Dead => return Err(Fault::Silent),
            WatchdogStep::Ask => {
                self.probes.fence();
                resp::words(&mut connection.output, &[b"ROLE"]);
                self.asked.push_back(Asked::Watchdog);
                if self.shared.nodes.cluster().is_some() {
                    resp::words(&mut connection.output, &[b"CLUSTER", b"LINKS"]);
                    self.asked.push_back(Asked::Links);
                }
                self.prove(|_| true);
            }
        }
        let limit = self.shared.response_timeout;
        if let Some(missed) = self.probes.no_receiver().or_else(|| self.probes.overdue(limit, now))
        {
            self.missed(missed, connection.birth)?;
        }
        if now.duration_since(self.scouted) > self.shared.probe_interval * SCOUT_PROBES
            && self.is_heard()
            && self.shared.nodes.cluster().is_none()
            && self.shared.are_connections_proven()
        {
            self.scouted = now;
            self.probes.send(Route::Fresh, &self.shared.scout, now);
        }
        if now.duration_since(self.refused_retried) > REFUSED_RETRY {
            self.refused_retried = now;
            self.shared.subscriptions.retry_refused();
        }
        // Without a proof no message reports the end of the outage.
        self.check_recovery();
        Ok(())
    }
}

#[derive(Default)]
struct Unflushed {
    messages: u64,
    bytes: usize,
}

/// Returns whether a command was given before another, or is the same; numbers wrap after some days.
fn is_at_most(id: CommandId, last: CommandId) -> bool {
    last.wrapping_sub(id) < CommandId::MAX / 2
}

fn spell(output: &mut BytesMut, command: &[u8], channels: &[Arc<str>]) {
    resp::command(output, 1 + channels.len());
    resp::word(output, command);
    channels.iter().for_each(|channel| resp::word(output, channel.as_bytes()));
}

/// Channels of one command: the server's other clients wait while it executes one.
const CHANNELS_PER_COMMAND: usize = 512;

/// Upper bound of bytes that wait for the socket.
const OUTPUT_BYTES: usize = 1024 * 1024;

/// Messages after which outboxes are written, even if more were read.
const ROUND_MESSAGES: u64 = 1000;

/// Bytes after which outboxes are written, even if more were read.
const ROUND_BYTES: usize = 1024 * 1024;

/// Probes after which one is sent over a connection of its own.
const SCOUT_PROBES: u32 = 10;

/// Interval at which denied channels are asked for again, since permissions change.
const REFUSED_RETRY: std::time::Duration = std::time::Duration::from_secs(10);
