//! Requests and their replies on one link: many callers, one task, order kept, nothing awaited.
//!
//! Publishes go through one such pipeline and the store's commands through another. What is queued
//! survives the loss of the link; what is on its way is told that it may or may not have arrived. A
//! publish that the server did not do since it had forgotten the script is repeated with the script.

use std::{collections::VecDeque, sync::Arc};

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt;
use tokio::{
    sync::{Notify, oneshot},
    time::{Instant, MissedTickBehavior, interval},
};

use crate::{
    bus::{
        Keep, Outcome, Publish, Receipt,
        not_done::NotDone,
        queue::Queue,
        redis::{
            Shared,
            answer::{outcome_of, refusal_of, reply_of},
            connect::check_role_answer,
            fault::{Fault, tell},
            link::{Link, Progress},
            outlet::Outlet,
            resp::{self, Reply, Value},
            script,
            supervisor::{Purpose, Supervisor},
            watchdog::{Verdict, Watchdog},
        },
    },
    store::StoreError,
    telemetry::throttle::Throttle,
};

/// The callers' end of a pipeline.
pub(super) struct Pipeline {
    /// What waits to be written.
    pub(super) queue: Queue<Request>,
    /// Messages that overtake the queue, and whether the link is known to end where others do.
    pub(super) outlet: Outlet,
    condemned: Notify,
}

/// What callers ask for.
pub(super) enum Request {
    /// A message for a channel.
    Publish(Publish),
    /// A command, spelled out, and who waits for the reply.
    Command(Bytes, oneshot::Sender<Result<Reply, StoreError>>),
}

/// Who is told about the next reply.
enum Waiting {
    Publish(Option<Arc<dyn Receipt>>),
    /// A publish that is repeated where the server has forgotten its script.
    Scripted(Box<Publish>),
    /// A message of our own, which is not counted.
    Urgent(Option<Arc<dyn Receipt>>),
    Command(oneshot::Sender<Result<Reply, StoreError>>),
    Watchdog,
    /// Whether the server takes writes.
    Write,
    /// That the script was loaded.
    Script,
}

impl Pipeline {
    /// With a queue of so many bytes.
    pub(super) fn new(queue_bytes: usize) -> Self {
        Self { queue: Queue::new(queue_bytes), outlet: Outlet::default(), condemned: Notify::new() }
    }

    /// The link, if there is one, is not to be trusted: it is made again.
    pub(super) fn condemn(&self) {
        self.condemned.notify_one();
    }
}

/// The one task of a pipeline.
pub(super) struct Driver {
    shared: Arc<Shared>,
    pipeline: Arc<Pipeline>,
    purpose: Purpose,
    /// What is on its way, oldest first, with what it weighs.
    waiting: VecDeque<(Waiting, usize)>,
    waiting_bytes: usize,
    batch: Vec<Request>,
    /// Publishes that the server did not do since it had forgotten the script. Never more than were on
    /// their way at one time.
    again: VecDeque<Box<Publish>>,
    /// Whether the script is called by its name; where it may not be loaded its text is sent each time.
    is_script_loaded: bool,
    /// Whether the answer to loading it is still to come.
    is_script_loading: bool,
    ends_at: Option<Instant>,
    complaints: Throttle,
}

impl Driver {
    /// Runs nothing yet.
    pub(super) fn new(shared: Arc<Shared>, pipeline: Arc<Pipeline>, purpose: Purpose) -> Self {
        Self {
            shared,
            pipeline,
            purpose,
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            batch: Vec::new(),
            again: VecDeque::new(),
            is_script_loaded: true,
            is_script_loading: false,
            ends_at: None,
            complaints: Throttle::default(),
        }
    }

    /// Serves the queue until shutdown, and then what is left in it, if there is a link.
    pub(super) async fn run(mut self) {
        let mut supervisor = Supervisor::new(self.shared.clone(), self.purpose);
        while let Some(mut link) = supervisor.connect().await {
            let end = self.serve(&mut link).await;
            let cause = end.as_ref().map_or_else(String::new, Fault::to_string);
            self.fail_waiting(&cause);
            match end {
                None => break,
                Some(fault) => supervisor.lost(&fault),
            }
        }
        self.fail_queued();
    }

    /// Uses a link until it is of no more use; `None` after shutdown.
    async fn serve(&mut self, link: &mut Link) -> Option<Fault> {
        let shared = self.shared.clone();
        let pipeline = self.pipeline.clone();
        // What was said of an earlier link does not concern this one.
        let _ = pipeline.condemned.notified().now_or_never();
        pipeline.outlet.connected(link.birth);
        shared.links_changed.notify_one();
        self.is_script_loading = false;
        if self.purpose == Purpose::Publish {
            self.is_script_loaded = true;
            self.load_script(&mut link.output);
        }
        let (probe, timeout) = (shared.probe_interval, shared.response_timeout);
        let mut watchdog = Watchdog::new(probe, timeout, Instant::now());
        let mut ticks = interval(Watchdog::period(probe, timeout));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.fill(link);
            let room = self.has_room(link);
            tokio::select! {
                progress = link.drive() => match progress {
                    Ok(Progress::Written) => {}
                    Ok(Progress::Read) => match self.replies(link, &mut watchdog) {
                        Ok(()) => {}
                        Err(fault) => return Some(fault),
                    },
                    Err(fault) => return Some(fault),
                },
                () = pipeline.queue.filled(), if room => {}
                () = pipeline.outlet.nudged() => {}
                () = pipeline.condemned.notified() => return Some(Fault::Probe),
                _ = ticks.tick() => match watchdog.tick(Instant::now(), link.last_read) {
                    Verdict::Fine => {}
                    Verdict::Ask => self.ask(link),
                    Verdict::Dead => return Some(Fault::Silent),
                },
                () = shared.shutdown.cancelled(), if self.ends_at.is_none() => {
                    pipeline.queue.close();
                    self.ends_at = Some(Instant::now() + timeout);
                }
            }
            if self.ends_at.is_some_and(|at| self.is_done(link) || Instant::now() >= at) {
                return None;
            }
        }
    }

    fn is_done(&self, link: &Link) -> bool {
        let own = |(who, _): &_| match who {
            Waiting::Watchdog | Waiting::Write | Waiting::Urgent(_) | Waiting::Script => true,
            Waiting::Publish(_) | Waiting::Scripted(_) | Waiting::Command(_) => false,
        };
        let only_questions = self.waiting.iter().all(own);
        let is_empty = self.pipeline.queue.is_empty() && self.again.is_empty();
        only_questions && link.output.is_empty() && is_empty
    }

    /// Nothing overtakes what is repeated: that is known when the script's loading is answered.
    fn has_room(&self, link: &Link) -> bool {
        !self.is_script_loading
            && link.output.len() < OUTPUT_BYTES
            && self.waiting.len() < WAITING_MAX
            && self.waiting_bytes < WAITING_BYTES_MAX
    }

    /// Spells what is queued, as much as may be on its way.
    fn fill(&mut self, link: &mut Link) {
        if let Some(publish) = self.pipeline.outlet.take() {
            spell_publish(&publish, self.is_script_loaded, &mut link.output);
            self.waiting.push_back((Waiting::Urgent(publish.receipt), 0));
        }
        while self.has_room(link)
            && let Some(publish) = self.again.pop_front()
        {
            self.spell(Request::Publish(*publish), &mut link.output);
        }
        while self.has_room(link) {
            let mut batch = std::mem::take(&mut self.batch);
            self.pipeline.queue.take(OUTPUT_BYTES - link.output.len(), BATCH, &mut batch);
            let took = batch.len();
            for request in batch.drain(..) {
                self.spell(request, &mut link.output);
            }
            self.batch = batch;
            if took == 0 {
                break;
            }
        }
    }

    fn spell(&mut self, request: Request, out: &mut BytesMut) {
        let before = out.len();
        let waiting = match request {
            Request::Publish(publish) => {
                spell_publish(&publish, self.is_script_loaded, out);
                match publish.keep {
                    Keep::History(_) => Waiting::Scripted(Box::new(publish)),
                    Keep::Nothing | Keep::Unheard { .. } => Waiting::Publish(publish.receipt),
                }
            }
            // Whoever gave up must not be served: a token would be consumed for nobody.
            Request::Command(_, caller) if caller.is_closed() => return,
            Request::Command(command, caller) => {
                out.extend_from_slice(&command);
                Waiting::Command(caller)
            }
        };
        let bytes = out.len() - before;
        self.waiting.push_back((waiting, bytes));
        self.waiting_bytes += bytes;
    }

    /// Replies come in order: whoever is behind this finds the script there.
    fn load_script(&mut self, out: &mut BytesMut) {
        self.is_script_loading = true;
        script::PUBLISH.load(out);
        self.waiting.push_back((Waiting::Script, 0));
    }

    fn ask(&mut self, link: &mut Link) {
        resp::words(&mut link.output, &[b"ROLE"]);
        self.waiting.push_back((Waiting::Watchdog, 0));
        if self.purpose == Purpose::Command {
            // Writes nothing and makes no key, but is refused where a write would be.
            let key = self.shared.probe_channel.as_bytes();
            resp::words(&mut link.output, &[b"SETRANGE", key, b"0", b""]);
            self.waiting.push_back((Waiting::Write, 0));
        }
    }

    /// Hands out every reply that is there.
    fn replies(&mut self, link: &mut Link, watchdog: &mut Watchdog) -> Result<(), Fault> {
        let Link { input, output, .. } = link;
        while let Some(frame) = input.next()? {
            let (value, _) = Value::parse(frame)?;
            if matches!(value, Value::Push(_)) {
                continue;
            }
            let Some((waiting, bytes)) = self.waiting.pop_front() else {
                return Err(Fault::Broken("an answer to nothing"));
            };
            self.waiting_bytes -= bytes;
            self.replied(waiting, &value, output, watchdog)?;
            if is_of_a_replica(&value) {
                return Err(Fault::Role("replica".into()));
            }
        }
        if self.waiting.is_empty() && self.waiting.capacity() > WAITING_KEPT {
            self.waiting = VecDeque::new();
        }
        Ok(())
    }

    /// Hands out one reply.
    fn replied(
        &mut self,
        waiting: Waiting,
        value: &Value<'_>,
        output: &mut BytesMut,
        watchdog: &mut Watchdog,
    ) -> Result<(), Fault> {
        match waiting {
            Waiting::Publish(receipt) => self.published(value, receipt),
            Waiting::Scripted(publish) => {
                // Somebody made the server forget the script, or it may not be loaded. The call was not
                // done; further ones that were on their way fail like it and follow it in order.
                if refusal_of(value) == Some(NotDone::Script) {
                    if self.is_script_loaded && !self.is_script_loading {
                        self.load_script(output);
                    }
                    self.again.push_back(publish);
                } else {
                    self.published(value, publish.receipt);
                }
            }
            Waiting::Urgent(receipt) => {
                self.complain(value);
                if let Some(receipt) = receipt {
                    receipt.published(outcome_of(value));
                }
            }
            Waiting::Command(caller) => {
                if let Some(refusal) = refusal_of(value) {
                    self.shared.health.writes.answered(Some(refusal));
                }
                drop(caller.send(reply_of(value)));
            }
            Waiting::Watchdog => {
                watchdog.answered();
                check_role_answer(value)?;
            }
            Waiting::Write => self.shared.health.writes.answered(refusal_of(value)),
            Waiting::Script => {
                self.is_script_loading = false;
                self.is_script_loaded &= !matches!(value, Value::Error(_));
            }
        }
        Ok(())
    }

    fn published(&self, value: &Value<'_>, receipt: Option<Arc<dyn Receipt>>) {
        self.complain(value);
        let outcome = outcome_of(value);
        let (counters, writes) = (&self.shared.counters, &self.shared.health.writes);
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
        if let Some(receipt) = receipt {
            receipt.published(outcome);
        }
    }

    fn complain(&self, value: &Value<'_>) {
        let Value::Error(error) = value else { return };
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
                    if let Some(receipt) = receipt {
                        receipt.published(Outcome::Lost);
                    }
                }
                Waiting::Scripted(publish) => {
                    lost += 1;
                    if let Some(receipt) = publish.receipt {
                        receipt.published(Outcome::Lost);
                    }
                }
                Waiting::Urgent(receipt) => {
                    if let Some(receipt) = receipt {
                        receipt.published(Outcome::Lost);
                    }
                }
                Waiting::Command(caller) => {
                    drop(caller.send(Err(StoreError::Lost(cause.into()))));
                }
                Waiting::Watchdog | Waiting::Write | Waiting::Script => {}
            }
        }
        self.shared.counters.publish_lost.add(lost);
        if lost > 0 {
            tracing::warn!(lost, "Messages were on their way when Redis was lost.");
        }
    }

    /// At the end: nothing more will be sent.
    fn fail_queued(&mut self) {
        self.pipeline.queue.close();
        let again = std::mem::take(&mut self.again);
        let mut lost = again.len() as u64;
        for receipt in again.into_iter().filter_map(|publish| publish.receipt) {
            receipt.published(Outcome::Lost);
        }
        loop {
            self.pipeline.queue.take(usize::MAX, BATCH, &mut self.batch);
            if self.batch.is_empty() {
                break;
            }
            for request in self.batch.drain(..) {
                match request {
                    Request::Publish(publish) => {
                        lost += 1;
                        if let Some(receipt) = publish.receipt {
                            receipt.published(Outcome::Lost);
                        }
                    }
                    Request::Command(_, caller) => drop(caller.send(Err(StoreError::Closed))),
                }
            }
        }
        self.shared.counters.publish_lost.add(lost);
        if lost > 0 {
            tracing::warn!(lost, "Messages were still queued at the end.");
        }
    }
}

/// Spells a publish.
pub(super) fn spell_publish(publish: &Publish, is_script_loaded: bool, out: &mut BytesMut) {
    match &publish.keep {
        Keep::Nothing => {
            out.extend_from_slice(b"*3\r\n$7\r\nPUBLISH\r\n");
            resp::word(out, publish.channel.as_bytes());
            resp::word(out, &publish.payload);
        }
        Keep::History(history) => {
            let Publish { channel, payload, .. } = publish;
            script::spell_publish(channel, payload, history, is_script_loaded, out);
        }
        Keep::Unheard { log, entries_max, bytes_max, ttl } => {
            resp::command(out, 9);
            resp::word(out, b"EVAL");
            resp::word(out, PUBLISH_OR_KEEP.as_bytes());
            resp::number(out, 1);
            resp::word(out, log.as_bytes());
            resp::word(out, publish.channel.as_bytes());
            resp::word(out, &publish.payload);
            resp::number(out, (*entries_max).max(1));
            resp::number(out, crate::bus::redis::milliseconds(*ttl));
            resp::number(out, *bytes_max);
        }
    }
}

fn is_of_a_replica(value: &Value<'_>) -> bool {
    let Value::Error(error) = value else { return false };
    error.starts_with(b"MASTERDOWN") || NotDone::of(error) == Some(NotDone::ReadOnly)
}

/// Answers how many received it, or -1 where it was kept instead. Every entry says in `sum` how many bytes of data
/// were kept until then, so that the oldest can go where they are too many.
const PUBLISH_OR_KEEP: &str = "\
local call,log,data=redis.call,KEYS[1],ARGV[2] \
local n=call('PUBLISH',ARGV[1],data) \
if n>0 then return n end \
local function sum_of(entry) return tonumber(entry[2][4] or 0) or 0 end \
local last=call('XREVRANGE',log,'+','-','COUNT',1)[1] \
local sum=#data+(last and sum_of(last) or 0) \
local id=call('XADD',log,'MAXLEN','~',ARGV[3],'*','data',data,'sum',string.format('%.0f',sum)) \
call('PEXPIRE',log,ARGV[4]) \
while true do \
local first=call('XRANGE',log,'-','+','COUNT',1)[1] \
if not first or first[1]==id or sum-sum_of(first)+#(first[2][2] or '')<=tonumber(ARGV[5]) then return -1 end \
call('XDEL',log,first[1]) \
end";

/// So much is spelled ahead of the socket; the rest stays queued, where the loss of a link spares it.
const OUTPUT_BYTES: usize = 128 * 1024;

/// Most requests on their way.
const WAITING_MAX: usize = 32 * 1024;

/// Most bytes on their way, except for one request that alone is larger.
const WAITING_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Room for so many stays after a burst.
const WAITING_KEPT: usize = 4096;

/// So many requests are taken at a time.
const BATCH: usize = 1024;
