//! The task of a pipeline: sends the requests of many callers in order, and does not wait for replies in between.
//!
//! Publishes have one pipeline and the store's commands another. Queued requests survive the loss of the connection;
//! the callers of sent ones learn that they may or may not have arrived. If the server has forgotten a script, the
//! publish is repeated with the script. If another node of a Cluster has its slot, the publish goes there.

use std::{collections::VecDeque, pin::pin, sync::Arc};

use bytes::BytesMut;
use futures_util::FutureExt;
use hashbrown::HashMap;
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::{
    bus::publish::{Keep, Outcome, Publish, Receipt},
    redis::{
        address::RedisEndpoint,
        answer::{not_done, outcome_of, refusal_of, reply_of},
        connect::{Part, check_role_answer},
        connection::{Progress, RedisConnection},
        fault::{Fault, tell},
        health::Purpose,
        node::Node,
        pipeline::{
            ASKING, Pipeline, PipelineRequest,
            waiting::{IsAsked, Waiting, answer},
        },
        publish::spell_publish,
        resp::{self, RespValue},
        script,
        shared::RedisShared,
        supervisor::Supervisor,
        watchdog::{Watchdog, WatchdogStep},
    },
    store::{command::StoreError, not_done::NotDone},
    telemetry::throttle::Throttle,
};

mod redirects;

/// The one task of a pipeline.
pub(in crate::redis) struct PipelineTask {
    shared: Arc<RedisShared>,
    node: Arc<Node>,
    pipeline: Arc<Pipeline>,
    purpose: Purpose,
    /// Sent requests without a reply, oldest first, each with its bytes.
    waiting: VecDeque<(Waiting, usize)>,
    waiting_bytes: usize,
    batch: Vec<PipelineRequest>,
    /// Publishes that are repeated, since the server had forgotten the script; at most as many as were sent at one
    /// time.
    again: VecDeque<(Box<Publish>, IsAsked)>,
    /// Set if the script is called by its name; otherwise every call has its text.
    is_script_loaded: bool,
    /// Number of scripts that are being loaded.
    scripts_loading: u8,
    /// Set while queued publishes wait to be given to other nodes.
    is_handing_over: bool,
    /// Time until which a node of a Cluster is left alone, since it did not serve a slot.
    paused_until: Option<Instant>,
    /// Slots that the node does not serve for the moment: the times since when, and of the latest refusal.
    waits: HashMap<u16, (Instant, Instant)>,
    ends_at: Option<Instant>,
    complaints: Throttle,
}

impl PipelineTask {
    /// Creates the task of a pipeline.
    pub(in crate::redis) fn new(
        shared: Arc<RedisShared>,
        node: Arc<Node>,
        purpose: Purpose,
    ) -> Self {
        Self {
            shared,
            pipeline: node.pipeline(purpose).clone(),
            node,
            purpose,
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            batch: Vec::new(),
            again: VecDeque::new(),
            is_script_loaded: true,
            scripts_loading: 0,
            is_handing_over: false,
            paused_until: None,
            waits: HashMap::new(),
            ends_at: None,
            complaints: Throttle::default(),
        }
    }

    /// Serves the queue until shutdown, and then the rest of it, if there is a connection.
    pub(in crate::redis) async fn run(mut self) {
        let pipeline = self.pipeline.clone();
        let target = self.node.target.clone();
        let mut supervisor = Supervisor::new(self.shared.clone(), &pipeline.link, target);
        loop {
            let connected = tokio::select! {
                connected = supervisor.connect() => connected,
                () = pipeline.rerouted.notified() => {
                    self.rerouted_while_away();
                    continue;
                }
                () = self.node.removed.cancelled() => None,
            };
            let Some((mut connection, server)) = connected else { break };
            let end = self.serve(&mut connection, &server).await;
            let cause = end.as_ref().map_or_else(String::new, Fault::to_string);
            self.fail_waiting(&cause);
            match end {
                None => break,
                Some(fault) => supervisor.lost(&server, &fault),
            }
            // Clients must not wait for room that does not come.
            pipeline.queue.release();
            self.paused_until = None;
            pipeline.reroute();
        }
        if self.node.removed.is_cancelled() {
            self.rerouted_while_away();
        }
        self.fail_queued();
    }

    /// Uses a connection until it fails; `None` after shutdown.
    async fn serve(
        &mut self,
        connection: &mut RedisConnection,
        server: &Arc<RedisEndpoint>,
    ) -> Option<Fault> {
        let shared = self.shared.clone();
        let target = self.node.target.clone();
        let mut left = pin!(target.left(&shared, server));
        let pipeline = self.pipeline.clone();
        // Each turn polls what is asked below.
        let is_cluster = shared.nodes.cluster().is_some();
        // Takes back an order to end that was meant for an earlier connection.
        let _ = pipeline.condemned.notified().now_or_never();
        pipeline.outlet.connected(connection.birth);
        shared.connections_changed.notify_one();
        self.scripts_loading = 0;
        if self.purpose == Purpose::Publish {
            self.is_script_loaded = true;
            self.load_scripts(&mut connection.output);
        }
        let (probe, timeout) = (shared.probe_interval, shared.response_timeout);
        let mut watchdog = Watchdog::new(probe, timeout, Instant::now());
        let mut ticks = interval(Watchdog::period(probe, timeout));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            if self.is_handing_over && !self.waits_for_publishes() {
                self.hand_over();
            }
            self.fill(connection);
            let room = self.has_room(connection);
            let paused_until = self.paused_until;
            tokio::select! {
                progress = connection.drive() => match progress {
                    Ok(Progress::Written) => {}
                    Ok(Progress::Read) => match self.replies(connection, &mut watchdog) {
                        Ok(()) => {}
                        Err(fault) => return Some(fault),
                    },
                    Err(fault) => return Some(fault),
                },
                () = pipeline.queue.filled(), if room => {}
                () = pipeline.outlet.nudged() => {}
                () = pipeline.rerouted.notified(), if is_cluster => {
                    self.is_handing_over = self.purpose == Purpose::Publish;
                }
                () = until(paused_until), if is_cluster => self.paused_until = None,
                () = pipeline.condemned.notified() => return Some(Fault::Probe),
                _ = ticks.tick() => match watchdog.tick(Instant::now(), connection.last_read) {
                    WatchdogStep::Fine => {}
                    WatchdogStep::Ask => self.ask(connection),
                    WatchdogStep::Dead => return Some(Fault::Silent),
                },
                () = &mut left => return Some(Fault::Moved),
                () = self.node.removed.cancelled(), if is_cluster => return Some(Fault::Moved),
                () = shared.nodes.requests_end(&shared).cancelled(), if self.ends_at.is_none() => {
                    pipeline.queue.close();
                    self.ends_at = Some(Instant::now() + timeout);
                }
            }
            if self.ends_at.is_some_and(|at| self.is_done(connection) || Instant::now() >= at) {
                return None;
            }
        }
    }

    fn is_done(&self, connection: &RedisConnection) -> bool {
        let own = |(who, _): &_| match who {
            Waiting::Watchdog | Waiting::Write | Waiting::Urgent(_) => true,
            Waiting::Script | Waiting::Asking => true,
            Waiting::Publish(_)
            | Waiting::Scripted(..)
            | Waiting::Command(_)
            | Waiting::Commands(..) => false,
        };
        let only_questions = self.waiting.iter().all(own);
        let is_empty = self.pipeline.queue.is_empty() && self.again.is_empty();
        only_questions && connection.output.is_empty() && is_empty
    }

    /// Returns whether a request may be sent. No request is sent while the script is being loaded, so that repeated
    /// publishes keep their order.
    fn has_room(&self, connection: &RedisConnection) -> bool {
        self.scripts_loading == 0
            && !self.is_handing_over
            && self.paused_until.is_none()
            && connection.output.len() < OUTPUT_BYTES
            && self.waiting.len() < WAITING_MAX
            && self.waiting_bytes < WAITING_BYTES_MAX
    }

    /// Writes queued requests, as many as may be without a reply.
    fn fill(&mut self, connection: &mut RedisConnection) {
        if let Some(publish) = self.pipeline.outlet.take() {
            spell_publish(&publish, self.is_script_loaded, &mut connection.output);
            self.waiting.push_back((Waiting::Urgent(publish.receipt), 0));
        }
        while self.has_room(connection)
            && let Some((publish, is_asked)) = self.again.pop_front()
        {
            let request = match is_asked {
                true => PipelineRequest::Asking(*publish),
                false => PipelineRequest::Publish(*publish),
            };
            self.spell(request, &mut connection.output);
        }
        while self.has_room(connection) {
            let mut batch = std::mem::take(&mut self.batch);
            self.pipeline.queue.take(OUTPUT_BYTES - connection.output.len(), BATCH, &mut batch);
            let took = batch.len();
            for request in batch.drain(..) {
                self.spell(request, &mut connection.output);
            }
            self.batch = batch;
            if took == 0 {
                break;
            }
        }
    }

    fn spell(&mut self, request: PipelineRequest, out: &mut BytesMut) {
        let before = out.len();
        let waiting = match request {
            PipelineRequest::Asking(publish) => {
                out.extend_from_slice(ASKING);
                self.waiting.push_back((Waiting::Asking, 0));
                spell_publish(&publish, self.is_script_loaded, out);
                Waiting::Scripted(Box::new(publish), true)
            }
            PipelineRequest::Publish(publish) => {
                spell_publish(&publish, self.is_script_loaded, out);
                match publish.keep {
                    Keep::Nothing => Waiting::Publish(publish.receipt),
                    Keep::History(_)
                    | Keep::Room(_)
                    | Keep::Positions(_)
                    | Keep::IfNoReceiver { .. } => Waiting::Scripted(Box::new(publish), false),
                }
            }
            // A caller that gave up must not be served: a token would be consumed for no client.
            PipelineRequest::Command(_, caller) if caller.is_closed() => return,
            PipelineRequest::Command(command, caller) => {
                out.extend_from_slice(&command);
                Waiting::Command(caller)
            }
            PipelineRequest::Commands(_, _, caller) if caller.is_closed() => return,
            PipelineRequest::Commands(commands, count, caller) => {
                out.extend_from_slice(&commands);
                Waiting::Commands(Vec::with_capacity(count), count, caller)
            }
        };
        let bytes = out.len() - before;
        self.waiting.push_back((waiting, bytes));
        self.waiting_bytes += bytes;
    }

    /// Loads the scripts. Requests are done in order, so every later call finds them loaded.
    fn load_scripts(&mut self, out: &mut BytesMut) {
        for script in [&script::PUBLISH, &script::ROOM_STATE, &script::ROOM_POSITIONS] {
            self.scripts_loading += 1;
            script.load(out);
            self.waiting.push_back((Waiting::Script, 0));
        }
    }

    fn ask(&mut self, connection: &mut RedisConnection) {
        resp::words(&mut connection.output, &[b"ROLE"]);
        self.waiting.push_back((Waiting::Watchdog, 0));
        if self.purpose == Purpose::Command
            && let Some(key) = self.probe_key()
        {
            // Changes no key, but is refused whenever a write would be.
            resp::words(&mut connection.output, &[b"SETRANGE", key.as_bytes(), b"0", b""]);
            self.waiting.push_back((Waiting::Write, 0));
        }
    }

    /// Returns a key of this server, to find out whether it takes writes; `None` if it has no slots.
    fn probe_key(&self) -> Option<Arc<str>> {
        let channel = &self.shared.probe_channel;
        match self.shared.nodes.cluster() {
            None => Some(channel.clone()),
            Some(cluster) => cluster.key_at(channel, &self.node),
        }
    }

    fn waits_for_publishes(&self) -> bool {
        let is_publish = |(who, _): &_| {
            matches!(who, Waiting::Publish(_) | Waiting::Scripted(..) | Waiting::Asking)
        };
        self.waiting.iter().any(is_publish)
    }

    /// Gives every complete reply to its caller.
    fn replies(
        &mut self,
        connection: &mut RedisConnection,
        watchdog: &mut Watchdog,
    ) -> Result<(), Fault> {
        let RedisConnection { input, output, .. } = connection;
        while let Some(frame) = input.next()? {
            let (value, _) = RespValue::parse(frame)?;
            if matches!(value, RespValue::Push(_)) {
                continue;
            }
            if let Some((Waiting::Commands(replies, count, _), _)) = self.waiting.front_mut() {
                self.node.note_refusal(&value);
                replies.push(reply_of(&value));
                if replies.len() < *count {
                    if self.is_of_a_replica(&value) {
                        return Err(Fault::Role("replica".into()));
                    }
                    continue;
                }
            }
            let Some((waiting, bytes)) = self.waiting.pop_front() else {
                return Err(Fault::Broken("an answer to nothing"));
            };
            self.waiting_bytes -= bytes;
            self.replied(waiting, &value, output, watchdog)?;
            if self.is_of_a_replica(&value) {
                return Err(Fault::Role("replica".into()));
            }
        }
        if self.waiting.is_empty() && self.waiting.capacity() > WAITING_KEPT {
            self.waiting = VecDeque::new();
        }
        Ok(())
    }

    /// Gives one reply to its caller.
    fn replied(
        &mut self,
        waiting: Waiting,
        value: &RespValue<'_>,
        output: &mut BytesMut,
        watchdog: &mut Watchdog,
    ) -> Result<(), Fault> {
        match waiting {
            Waiting::Publish(receipt) => self.published(value, receipt),
            Waiting::Scripted(publish, is_asked) => {
                let Some(publish) = self.redirected(publish, is_asked, value) else {
                    return Ok(());
                };
                // The server has forgotten the script, or the user may not load it. The call was not done;
                // further calls that were sent fail like it, and follow it in order.
                if refusal_of(value) == Some(NotDone::Script) {
                    if self.is_script_loaded && self.scripts_loading == 0 {
                        self.load_scripts(output);
                    }
                    self.again.push_back((publish, is_asked));
                } else if publish.is_message() {
                    self.published(value, publish.receipt);
                } else {
                    self.complain(value);
                    self.node.writes.answered(refusal_of(value));
                    answer(publish.receipt, outcome_of(value));
                }
            }
            Waiting::Urgent(receipt) => {
                self.complain(value);
                answer(receipt, outcome_of(value));
            }
            Waiting::Command(caller) => {
                self.node.note_refusal(value);
                drop(caller.send(reply_of(value)));
            }
            Waiting::Commands(replies, _, caller) => drop(caller.send(replies)),
            Waiting::Watchdog => {
                watchdog.answered();
                if self.node.target.part(&self.shared) == Part::Master {
                    check_role_answer(value)?;
                }
            }
            Waiting::Write if refusal_of(value).is_none() => self.node.writes.answered(None),
            Waiting::Write => self.node.note_refusal(value),
            Waiting::Asking => {}
            Waiting::Script => {
                self.scripts_loading = self.scripts_loading.saturating_sub(1);
                self.is_script_loaded &= !matches!(value, RespValue::Error(_));
            }
        }
        Ok(())
    }

    fn published(&self, value: &RespValue<'_>, receipt: Option<Arc<dyn Receipt>>) {
        self.complain(value);
        let outcome = outcome_of(value);
        let (counters, writes) = (&self.shared.counters, &self.node.writes);
        match outcome {
            Outcome::Received(_) => counters.published.add(1),
            Outcome::Stored { .. } => {
                counters.published.add(1);
                counters.publish_stored.add(1);
                writes.answered(None);
            }
            Outcome::Kept => {
                counters.published.add(1);
                counters.publish_kept.add(1);
                writes.answered(None);
            }
            Outcome::Refused(refusal) => {
                counters.publish_refused[refusal as usize].add(1);
                writes.answered(Some(refusal));
            }
            Outcome::Lost => counters.publish_lost.add(1),
        }
        answer(receipt, outcome);
    }

    /// Returns whether a reply shows that the server is no master any more. The nodes of a Cluster name the right one.
    fn is_of_a_replica(&self, value: &RespValue<'_>) -> bool {
        let RespValue::Error(error) = value else { return false };
        let is_of_a_replica =
            error.starts_with(b"MASTERDOWN") || not_done(error) == Some(NotDone::ReadOnly);
        is_of_a_replica && self.node.target.part(&self.shared) == Part::Master
    }

    fn complain(&self, value: &RespValue<'_>) {
        let RespValue::Error(error) = value else { return };
        if let Some(left_out) = self.complaints.pass() {
            let error = tell(error);
            tracing::warn!(error, left_out, "Redis refused to publish a message.");
        }
    }

    fn fail_waiting(&mut self, cause: &str) {
        self.waiting_bytes = 0;
        let mut lost = 0;
        for (waiting, _) in std::mem::take(&mut self.waiting) {
            match waiting {
                Waiting::Publish(receipt) => {
                    lost += 1;
                    answer(receipt, Outcome::Lost);
                }
                Waiting::Scripted(publish, _) => {
                    lost += u64::from(publish.is_message());
                    answer(publish.receipt, Outcome::Lost);
                }
                Waiting::Urgent(receipt) => answer(receipt, Outcome::Lost),
                Waiting::Command(caller) => {
                    drop(caller.send(Err(StoreError::Lost(cause.into()))));
                }
                Waiting::Commands(mut replies, count, caller) => {
                    replies.resize(count, Err(StoreError::Lost(cause.into())));
                    drop(caller.send(replies));
                }
                Waiting::Watchdog | Waiting::Write | Waiting::Script | Waiting::Asking => {}
            }
        }
        self.shared.counters.publish_lost.add(lost);
        if lost > 0 {
            tracing::warn!(
                lost,
                "Redis was lost before it answered publishes: their messages may be lost."
            );
        }
    }

    /// Fails all queued requests, at the end.
    fn fail_queued(&mut self) {
        self.pipeline.queue.close();
        let mut lost = 0;
        for (publish, _) in std::mem::take(&mut self.again) {
            lost += u64::from(publish.is_message());
            answer(publish.receipt, Outcome::Lost);
        }
        loop {
            self.pipeline.queue.take(usize::MAX, BATCH, &mut self.batch);
            if self.batch.is_empty() {
                break;
            }
            for request in self.batch.drain(..) {
                match request {
                    PipelineRequest::Publish(publish) | PipelineRequest::Asking(publish) => {
                        lost += u64::from(publish.is_message());
                        answer(publish.receipt, Outcome::Lost);
                    }
                    PipelineRequest::Command(_, caller) => {
                        drop(caller.send(Err(StoreError::Closed)))
                    }
                    PipelineRequest::Commands(_, count, caller) => {
                        drop(caller.send(vec![Err(StoreError::Closed); count]));
                    }
                }
            }
        }
        self.shared.counters.publish_lost.add(lost);
        if lost > 0 {
            tracing::warn!(lost, "Messages were still queued at the end.");
        }
    }
}

/// Resolves at a time; never without one.
async fn until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// Upper bound of bytes that wait for the socket. Further requests stay queued, where they survive the loss of a
/// connection.
const OUTPUT_BYTES: usize = 128 * 1024;

/// Upper bound of sent requests without a reply.
const WAITING_MAX: usize = 32 * 1024;

/// Upper bound of the bytes of sent requests without a reply. A single larger request is sent alone.
const WAITING_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Requests for which memory is kept after a burst.
const WAITING_KEPT: usize = 4096;

/// Requests that are taken from the queue at a time.
const BATCH: usize = 1024;
