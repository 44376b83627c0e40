//! The task of the subscribing link: subscriptions out, messages in, loss and recovery told.
//!
//! It carries no commands but `SUBSCRIBE`, `UNSUBSCRIBE` and `ROLE`, and it knows which of them every
//! answer belongs to: an answer that does not fit is the end of the link, never somebody else's answer.

use std::{collections::VecDeque, sync::Arc};

use bytes::BytesMut;
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::bus::{
    Deliver,
    redis::{
        Shared,
        connect::check_role_answer,
        fault::{Fault, tell},
        link::{Link, Progress},
        probe::Probe,
        resp::{self, Push, Value},
        subscriptions::{CommandId, Settled},
        supervisor::{Complaints, Purpose, Supervisor},
        watchdog::{Verdict, Watchdog},
    },
};

/// Reads the bus for the hub.
pub(super) struct Reader {
    shared: Arc<Shared>,
    deliver: Box<dyn Deliver>,
    /// Commands that are not answered, oldest first.
    asked: VecDeque<Asked>,
    last_id: CommandId,
    settled: Vec<Settled>,
    resubscription: Resubscription,
    /// Since when messages may have been missed; `None` while all is well.
    outage: Option<Instant>,
    refusals: Complaints,
    refused_retried: Instant,
}

enum Asked {
    Subscribe { id: CommandId, channels: Vec<Arc<str>>, confirmed: usize },
    Unsubscribe { channels: Vec<Arc<str>>, confirmed: usize },
    Watchdog,
}

/// How far a new connection has caught up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Resubscription {
    /// Not everything that is wanted has been asked for.
    Asking,
    /// It has; the answer to this command is the last.
    Until(CommandId),
    Done,
}

impl Reader {
    /// Reads nothing yet.
    pub(super) fn new(shared: Arc<Shared>, deliver: Box<dyn Deliver>) -> Self {
        Self {
            shared,
            deliver,
            asked: VecDeque::new(),
            last_id: 0,
            settled: Vec::new(),
            resubscription: Resubscription::Asking,
            outage: None,
            refusals: Complaints::default(),
            refused_retried: Instant::now(),
        }
    }

    /// Reads until shutdown.
    pub(super) async fn run(mut self) {
        let mut supervisor = Supervisor::new(self.shared.clone(), Purpose::Subscribe);
        while let Some(mut link) = supervisor.connect().await {
            self.shared.subscriptions.connected();
            self.resubscription = Resubscription::Asking;
            let end = self.serve(&mut link).await;
            self.asked.clear();
            self.shared.subscriptions.disconnected();
            let Err(fault) = end else { break };
            self.shared.health.subscribed(false);
            supervisor.lost(&fault);
            if matches!(fault, Fault::Probe) {
                // Nobody can tell which of the two links is the wrong one.
                self.shared.counters.probe_failures.add(1);
                self.shared.publishes.condemn();
            }
            self.outage.get_or_insert(link.last_read);
            self.deliver.lost(&fault.to_string(), link.last_read.elapsed());
        }
        self.shared.subscriptions.close();
    }

    /// Uses a link until it is of no more use; `Ok` at shutdown.
    async fn serve(&mut self, link: &mut Link) -> Result<(), Fault> {
        let shared = self.shared.clone();
        let (every, timeout) = (shared.probe_interval, shared.response_timeout);
        let mut watchdog = Watchdog::new(every, timeout, Instant::now());
        let mut probe = Probe::new(shared.probe_channel.clone());
        let mut ticks = interval(Watchdog::period(every, timeout));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.ask_changes(&mut link.output);
            tokio::select! {
                progress = link.drive() => if progress? == Progress::Read {
                    self.round(link, &mut watchdog, &mut probe)?;
                },
                () = shared.subscriptions.changed() => {}
                _ = ticks.tick() => self.tick(link, &mut watchdog, &mut probe)?,
                () = shared.shutdown.cancelled() => return Ok(()),
            }
        }
    }

    /// Tells the server what has changed, in large commands, but not more than it reads.
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

    /// Takes everything that was read, then lets outboxes be written and callers go on.
    fn round(
        &mut self,
        link: &mut Link,
        watchdog: &mut Watchdog,
        probe: &mut Probe,
    ) -> Result<(), Fault> {
        let mut unflushed = Unflushed::default();
        let Link { input, output, .. } = link;
        let result = loop {
            let (frame, last) = match input.next_and_last() {
                Ok(Some(frame)) => frame,
                Ok(None) => break Ok(()),
                Err(broken) => break Err(broken.into()),
            };
            let taken = match Push::parse(frame) {
                Ok(Some(push)) if push.kind == b"message" => {
                    if !probe.returned(push.channel, push.payload) {
                        self.deliver.message(push.channel, push.payload, last);
                        unflushed.messages += 1;
                        unflushed.bytes += push.payload.len();
                    }
                    Ok(())
                }
                Ok(Some(push)) => self.confirmation(&push),
                Ok(None) => self.answer(frame, output, watchdog, probe),
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
            // Nobody is there any more where the caller's deadline has passed.
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

    /// A push other than a message: it must be what the oldest command waits for.
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
                self.shared.health.subscribed(true);
            }
        }
        *confirmed += 1;
        if *confirmed == channels.len() {
            self.asked.pop_front();
        }
        Ok(())
    }

    /// A reply: the answer to the oldest command, which is `ROLE`, or an error.
    fn answer(
        &mut self,
        frame: &[u8],
        output: &mut BytesMut,
        watchdog: &mut Watchdog,
        probe: &mut Probe,
    ) -> Result<(), Fault> {
        let (value, _) = Value::parse(frame)?;
        if matches!(value, Value::Push(_)) {
            return Ok(());
        }
        match (self.asked.pop_front(), value) {
            (Some(Asked::Watchdog), value) => {
                watchdog.answered();
                check_role_answer(&value)?;
                if probe.fence_was_passed() { Err(Fault::Probe) } else { Ok(()) }
            }
            (Some(Asked::Subscribe { id, channels, confirmed: 0 }), Value::Error(error)) => {
                self.denied(id, channels, &tell(error), output);
                Ok(())
            }
            // They stay subscribed, which does no harm but the messages that nobody wants.
            (Some(Asked::Unsubscribe { confirmed: 0, .. }), Value::Error(_)) => Ok(()),
            _ => Err(Fault::Broken("an answer to nothing")),
        }
    }

    /// One denied channel denies the whole command: halves are asked for until it is found.
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
        let Resubscription::Until(last) = self.resubscription else { return };
        let open = self.asked.iter().any(|asked| match asked {
            Asked::Subscribe { id, .. } => is_at_most(*id, last),
            _ => false,
        });
        if open {
            return;
        }
        self.resubscription = Resubscription::Done;
        // A server that denies us our own channel most likely denies those of sessions as well.
        let heard = self.shared.subscriptions.is_confirmed(&self.shared.probe_channel);
        self.shared.health.subscribed(heard);
        if let Some(since) = self.outage.take() {
            let gap = since.elapsed();
            let channels = self.shared.subscriptions.len();
            tracing::info!(?gap, channels, "Every subscription is confirmed again.");
            self.deliver.recovered(gap);
        }
    }

    fn tick(
        &mut self,
        link: &mut Link,
        watchdog: &mut Watchdog,
        probe: &mut Probe,
    ) -> Result<(), Fault> {
        let now = Instant::now();
        match watchdog.tick(now, link.last_read) {
            Verdict::Fine => {}
            Verdict::Dead => return Err(Fault::Silent),
            Verdict::Ask => {
                probe.fence();
                resp::words(&mut link.output, &[b"ROLE"]);
                self.asked.push_back(Asked::Watchdog);
                let heard = self.shared.subscriptions.is_confirmed(probe.channel());
                if heard && self.shared.health.is_up(Purpose::Publish) {
                    probe.send(&self.shared.publishes);
                }
            }
        }
        if probe.is_unheard() {
            return Err(Fault::Probe);
        }
        if now.duration_since(self.refused_retried) > REFUSED_RETRY {
            self.refused_retried = now;
            self.shared.subscriptions.retry_refused();
        }
        Ok(())
    }
}

#[derive(Default)]
struct Unflushed {
    messages: u64,
    bytes: usize,
}

/// Whether a command was given before another, or is that one; numbers wrap after some days.
fn is_at_most(id: CommandId, last: CommandId) -> bool {
    last.wrapping_sub(id) < CommandId::MAX / 2
}

fn spell(output: &mut BytesMut, command: &[u8], channels: &[Arc<str>]) {
    resp::command(output, 1 + channels.len());
    resp::word(output, command);
    channels.iter().for_each(|channel| resp::word(output, channel.as_bytes()));
}

/// So many at a time: a server executes one command without looking at anybody else.
const CHANNELS_PER_COMMAND: usize = 512;

/// More is not spelled ahead of the socket.
const OUTPUT_BYTES: usize = 1024 * 1024;

/// Outboxes are written after so many messages, even if more were read.
const ROUND_MESSAGES: u64 = 1000;

/// The same in bytes.
const ROUND_BYTES: usize = 1024 * 1024;

/// Denied channels are asked for again this often, since permissions change.
const REFUSED_RETRY: std::time::Duration = std::time::Duration::from_secs(10);
