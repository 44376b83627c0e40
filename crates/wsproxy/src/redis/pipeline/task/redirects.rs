//! Requests that belong to another node of a Cluster: they go there, or wait until their slot is served again.

use std::time::Duration;

use tokio::time::Instant;

use super::PipelineTask;
use crate::{
    bus::publish::{Outcome, Publish},
    redis::{
        cluster::{self, redirect::Redirect},
        fault::tell,
        health::Purpose,
        node::Target,
        pipeline::{
            PipelineRequest,
            waiting::{IsAsked, answer},
        },
        resp::RespValue,
    },
    store::not_done::NotDone,
};

impl PipelineTask {
    /// Gives queued requests to the nodes that serve their slots now.
    pub(super) fn rerouted_while_away(&mut self) {
        match self.purpose {
            Purpose::Publish => self.hand_over(),
            // Their callers look for the node themselves.
            Purpose::Command | Purpose::Subscribe if self.shared.nodes.cluster().is_some() => {
                self.refuse_commands();
            }
            Purpose::Command | Purpose::Subscribe => {}
        }
    }

    /// Gives queued publishes to the nodes that serve their slots now, in their order.
    pub(super) fn hand_over(&mut self) {
        self.is_handing_over = false;
        let Some(cluster) = self.shared.nodes.cluster() else { return };
        let first = std::mem::take(&mut self.again);
        let homeless =
            cluster.hand_over(&self.node, first.into_iter().map(|(publish, _)| *publish));
        cluster::lose(homeless);
    }

    fn refuse_commands(&mut self) {
        self.pipeline.queue.take(usize::MAX, usize::MAX, &mut self.batch);
        for request in self.batch.drain(..) {
            match request {
                PipelineRequest::Command(_, caller) => drop(caller.send(Err(cluster::unserved()))),
                PipelineRequest::Commands(_, count, caller) => {
                    drop(caller.send(vec![Err(cluster::unserved()); count]));
                }
                PipelineRequest::Publish(_) | PipelineRequest::Asking(_) => {}
            }
        }
    }

    /// Takes a publish that a node of a Cluster did not do. Returns it if that is no matter of its slot.
    pub(super) fn redirected(
        &mut self,
        publish: Box<Publish>,
        is_asked: IsAsked,
        value: &RespValue<'_>,
    ) -> Option<Box<Publish>> {
        let (Some(cluster), Target::Node(at)) = (self.shared.nodes.cluster(), &self.node.target)
        else {
            return Some(publish);
        };
        let redirect = match value {
            RespValue::Error(error) => Redirect::read(&tell(error), at),
            _ => None,
        };
        let Some(redirect) = redirect else {
            if !self.waits.is_empty() {
                self.waits.remove(&cluster.slot_of_publish(&publish));
            }
            return Some(publish);
        };
        let slot = cluster.slot_of_publish(&publish);
        let is_behind =
            self.again.iter().any(|(earlier, _)| cluster.slot_of_publish(earlier) == slot);
        let is_wait = redirect == Redirect::Wait;
        // One that waits stays ahead of later ones. A node that is asked and does not import the slot has no better place.
        let publish = if is_behind || (is_asked && !is_wait) {
            publish
        } else {
            match cluster.redirected(*publish, &redirect, &self.node) {
                Ok(()) => {
                    self.is_handing_over |= matches!(redirect, Redirect::Moved { .. });
                    return None;
                }
                Err(publish) => Box::new(publish),
            }
        };
        let now = Instant::now();
        let wait = self.waits.entry(slot).or_insert((now, now));
        if now.duration_since(wait.1) > WAIT_ENDS {
            wait.0 = now;
        }
        wait.1 = now;
        if now.duration_since(wait.0) > self.shared.response_timeout {
            // Others must not wait behind it for longer.
            self.complain(value);
            self.shared.counters.publish_refused[NotDone::Busy as usize].add(1);
            answer(publish.receipt, Outcome::Refused(NotDone::Busy));
            return None;
        }
        self.paused_until = Some(now + PAUSE);
        self.again.push_back((publish, is_asked && is_wait));
        None
    }
}

/// Time after which the next refusal of a slot begins a wait of its own.
const WAIT_ENDS: Duration = Duration::from_secs(1);

/// Pause before a publish is tried again at a node that did not serve its slot.
const PAUSE: Duration = Duration::from_millis(20);
