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
        outlet::Birth,
        probe::{Probes, Returned, Route},
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
    probes: Probes,
    /// When a message was last sent over a connection of its own.
    scouted: Instant,
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
        let now = Instant::now();
        let probes = Probes::new(shared.probe_channel.clone(), now);
        Self {
            probes,
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
            let since = match fault {
                // Others may have published at another server for longer than this link was silent.
                Fault::Probe => self.probes.known_until(),
                _ => None,
            };
            self.interrupted(&fault, since.unwrap_or(link.last_read));
        }
        self.shared.subscriptions.close();
    }

    /// Messages may have been missed since then.
    fn interrupted(&mut self, fault: &Fault, since: Instant) {
        self.outage = Some(self.outage.map_or(since, |earlier| earlier.min(since)));
        self.deliver.lost(&fault.to_string());
    }

    /// Uses a link until it is of no more use; `Ok` at shutdown.
    async fn serve(&mut self, link: &mut Link) -> Result<(), Fault> {
        let shared = self.shared.clone();
        let (every, timeout) = (shared.probe_interval, shared.response_timeout);
        let mut watchdog = Watchdog::new(every, timeout, Instant::now());
        self.probes.renew(Instant::now());
        shared.publishes.outlet.doubt();
        shared.commands.outlet.doubt();
        let mut ticks = interval(Watchdog::period(every, timeout));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.ask_changes(&mut link.output);
            tokio::select! {
                progress = link.drive() => if progress? == Progress::Read {
                    self.round(link, &mut watchdog)?;
                },
                () = shared.subscriptions.changed() => {}
                () = shared.links_changed.notified() => self.prove(|_| true),
                _ = ticks.tick() => self.tick(link, &mut watchdog)?,
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
    fn round(&mut self, link: &mut Link, watchdog: &mut Watchdog) -> Result<(), Fault> {
        let mut unflushed = Unflushed::default();
        let Link { input, output, birth, last_read, .. } = link;
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
                        Returned::Probe(route, birth) => self.shared.outlet(route).prove(birth),
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
        birth: Birth,
    ) -> Result<(), Fault> {
        let (value, _) = Value::parse(frame)?;
        if matches!(value, Value::Push(_)) {
            return Ok(());
        }
        match (self.asked.pop_front(), value) {
            (Some(Asked::Watchdog), value) => {
                watchdog.answered();
                check_role_answer(&value)?;
                let missed = self.probes.fence_was_passed();
                missed.map_or(Ok(()), |missed| self.missed(missed, birth))
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
        if let Resubscription::Until(last) = self.resubscription {
            let open = self.asked.iter().any(|asked| match asked {
                Asked::Subscribe { id, .. } => is_at_most(*id, last),
                _ => false,
            });
            if open {
                return;
            }
            self.resubscription = Resubscription::Done;
            // A server that denies us our own channel most likely denies those of sessions as well.
            self.shared.health.subscribed(self.is_heard());
            self.prove(|_| true);
        }
        self.check_recovery();
    }

    /// Tells that all is well again, once it is: histories must not be read from another server.
    fn check_recovery(&mut self) {
        if self.resubscription != Resubscription::Done {
            return;
        }
        if self.shared.are_links_proven() {
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

    /// Whether the instance's own channel is confirmed.
    fn is_heard(&self) -> bool {
        self.shared.subscriptions.is_confirmed(self.probes.channel())
    }

    /// Sends probes over links that are up, where they are wanted.
    fn prove(&mut self, is_wanted: impl Fn(&Shared) -> bool) {
        let shared = self.shared.clone();
        if self.resubscription != Resubscription::Done || !self.is_heard() || !is_wanted(&shared) {
            return;
        }
        for (route, purpose) in
            [(Route::Publish, Purpose::Publish), (Route::Command, Purpose::Command)]
        {
            if shared.health.is_up(purpose) {
                self.probes.send(route, shared.outlet(route));
            }
        }
    }

    /// A probe did not come back over this connection. Of two links that differ the newer stays, since it
    /// ends where the server's name leads now; every link that is older is made again.
    fn missed(&mut self, (route, birth): (Route, Birth), own: Birth) -> Result<(), Fault> {
        let shared = self.shared.clone();
        let outlet = shared.outlet(route);
        if route != Route::Fresh && outlet.born() != birth {
            return Ok(()); // that connection is gone already
        }
        shared.counters.probe_failures.add(1);
        shared.health.differ();
        let newest = outlet.born().max(own);
        for pipeline in [&shared.publishes, &shared.commands] {
            pipeline.outlet.doubt();
            if pipeline.outlet.born() < newest {
                pipeline.condemn();
            }
        }
        if own < newest {
            return Err(Fault::Probe);
        }
        let since = self.probes.known_until();
        self.interrupted(&Fault::Probe, since.unwrap_or_else(Instant::now));
        Ok(())
    }

    fn tick(&mut self, link: &mut Link, watchdog: &mut Watchdog) -> Result<(), Fault> {
        let now = Instant::now();
        match watchdog.tick(now, link.last_read) {
            Verdict::Fine => self.prove(|shared| !shared.are_links_proven()),
            Verdict::Dead => return Err(Fault::Silent),
            Verdict::Ask => {
                self.probes.fence();
                resp::words(&mut link.output, &[b"ROLE"]);
                self.asked.push_back(Asked::Watchdog);
                self.prove(|_| true);
            }
        }
        if let Some(missed) = self.probes.unheard() {
            self.missed(missed, link.birth)?;
        }
        if now.duration_since(self.scouted) > self.shared.probe_interval * SCOUT_PROBES
            && self.is_heard()
            && self.shared.are_links_proven()
        {
            self.scouted = now;
            self.probes.send(Route::Fresh, &self.shared.scout);
        }
        if now.duration_since(self.refused_retried) > REFUSED_RETRY {
            self.refused_retried = now;
            self.shared.subscriptions.retry_refused();
        }
        // Where nothing can be proven no message tells that all is well again.
        self.check_recovery();
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

/// After so many probes one goes over a connection of its own.
const SCOUT_PROBES: u32 = 10;

/// Denied channels are asked for again this often, since permissions change.
const REFUSED_RETRY: std::time::Duration = std::time::Duration::from_secs(10);
