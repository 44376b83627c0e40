//! Commands to the nodes of a Cluster: each goes to the node that serves its key, and follows the key where it moves.

use std::{sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use futures_util::future::join_all;
use tokio::time::{Instant, sleep};
use wsproxy_proto::names;

use super::{Cluster, redirect::Redirect};
use crate::{
    redis::{
        node::{Node, Target},
        pipeline::Replies,
        resp::{self, Reply},
    },
    store::{command::StoreError, not_done::NotDone},
};

impl Cluster {
    /// Sends a command to the node that serves its key. Waits for at most `limit` while no node does.
    pub(in crate::redis) async fn command(
        &self,
        words: &[&[u8]],
        limit: Duration,
    ) -> Result<Reply, StoreError> {
        let mut command = BytesMut::new();
        resp::words(&mut command, words);
        self.send(self.slot_of(words.iter().copied()), command.freeze(), limit).await
    }

    /// Sends commands to the nodes that serve their keys, and waits for all replies.
    pub(in crate::redis) async fn commands<'w>(
        &self,
        commands: impl Iterator<Item = impl Iterator<Item = &'w [u8]> + Clone>,
        limit: Duration,
    ) -> Replies {
        let spelled: Vec<(u16, Bytes)> = commands
            .map(|words| {
                let mut command = BytesMut::new();
                resp::command(&mut command, words.clone().count());
                words.clone().for_each(|word| resp::word(&mut command, word));
                (self.slot_of(words), command.freeze())
            })
            .collect();
        let mut replies: Replies = vec![Err(unserved()); spelled.len()];
        let mut shares: Vec<(Arc<Node>, BytesMut, Vec<usize>)> = Vec::new();
        for (at, (slot, command)) in spelled.iter().enumerate() {
            let Some(node) = self.owner(*slot) else { continue };
            if node.commands.link.is_away() {
                continue;
            }
            let share = shares.iter().position(|share| Arc::ptr_eq(&share.0, &node));
            let share = share.unwrap_or_else(|| {
                shares.push((node, BytesMut::new(), Vec::new()));
                shares.len() - 1
            });
            shares[share].1.extend_from_slice(command);
            shares[share].2.push(at);
        }
        let sent = shares.into_iter().map(async |(node, commands, places)| {
            let replies = node.commands.send_each(commands.freeze(), places.len()).await;
            places.into_iter().zip(replies).collect::<Vec<_>>()
        });
        for (at, reply) in join_all(sent).await.into_iter().flatten() {
            replies[at] = reply;
        }
        // Those that no node has done follow their keys, each by itself.
        let again = replies.iter_mut().zip(&spelled).filter(|(reply, _)| is_redirect(reply));
        join_all(again.map(async |(reply, (slot, command))| {
            *reply = self.send(*slot, command.clone(), limit).await;
        }))
        .await;
        replies
    }

    async fn send(&self, slot: u16, command: Bytes, limit: Duration) -> Result<Reply, StoreError> {
        let deadline = Instant::now() + limit;
        let mut asked = None;
        loop {
            let (node, is_asked) = match asked.take() {
                Some(node) => (Some(node), true),
                None => (self.owner(slot), false),
            };
            if node.as_ref().is_some_and(|node| node.commands.link.is_away()) {
                // The node's keys are away, and others must not wait for them.
                return Err(unserved());
            }
            let reply = match &node {
                None => Err(unserved()),
                Some(node) if is_asked => node.commands.send_asking(command.clone()).await,
                Some(node) => node.commands.send(command.clone()).await,
            };
            let Some(redirect) =
                node.as_deref().map_or(Some(Redirect::Wait), |node| redirect_of(&reply, node))
            else {
                return reply;
            };
            if Instant::now() >= deadline {
                return reply;
            }
            let is_known = match redirect {
                // A node that is asked and does not import the slot is no better than the first.
                _ if is_asked => false,
                Redirect::Moved { slot, to } => self.moved(slot, &to).is_some(),
                Redirect::Ask(to) => {
                    asked = self.node_at(&to);
                    asked.is_some()
                }
                Redirect::Wait => false,
            };
            if !is_known {
                self.doubt();
                sleep(AGAIN).await;
            }
        }
    }

    /// Returns the slot of a command's key. A command without a key goes to any node that is up.
    fn slot_of<'w>(&self, mut words: impl Iterator<Item = &'w [u8]>) -> u16 {
        let is_script = matches!(words.next(), Some(b"EVAL" | b"EVALSHA"));
        match words.nth(if is_script { 2 } else { 0 }) {
            Some(key) => names::slot(key),
            None => self.slot_that_is_up(),
        }
    }
}

/// Returns the place to which a reply sends its command.
fn redirect_of(reply: &Result<Reply, StoreError>, node: &Node) -> Option<Redirect> {
    let Target::Node(asked) = &node.target else { return None };
    match reply {
        Err(StoreError::NotDone { refusal: NotDone::Busy | NotDone::ReadOnly, error })
        | Err(StoreError::Refused(error)) => Redirect::read(error, asked),
        _ => None,
    }
}

fn is_redirect(reply: &Result<Reply, StoreError>) -> bool {
    match reply {
        Err(StoreError::NotDone { refusal, .. }) => {
            matches!(refusal, NotDone::Busy | NotDone::ReadOnly)
        }
        Err(StoreError::Refused(error)) => super::redirect::is_on_the_move(error),
        _ => false,
    }
}

/// Returns the error for a command whose slot no node serves.
pub(in crate::redis) fn unserved() -> StoreError {
    let error = "TRYAGAIN no node serves the slot".to_owned();
    StoreError::NotDone { refusal: NotDone::Busy, error }
}

/// Pause before a command is tried again that no node could do.
const AGAIN: Duration = Duration::from_millis(20);
