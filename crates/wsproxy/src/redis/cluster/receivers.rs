//! Counts the receivers of messages in a Cluster: a node counts its own subscribers only, so that all nodes are asked.

use std::{sync::Arc, time::Duration};

use futures_util::future::join_all;
use tokio::time::timeout;

use super::Cluster;
use crate::{
    bus::publish::{Counts, Keep, Outcome, Publish, Receipt},
    queue::Queue,
    redis::{node::Node, resp::Reply, shared::RedisShared},
    store::not_done::NotDone,
};

/// Messages whose receivers are to be counted.
pub(in crate::redis) struct Receivers(Queue<Question>);

enum Question {
    /// A message that one node has published.
    Published { channel: Arc<str>, outcome: Outcome, counts: Counts, receipt: Arc<dyn Receipt> },
    /// A message that is to be kept if there is no receiver.
    Kept(Publish),
}

impl Default for Receivers {
    fn default() -> Self {
        Self(Queue::new(QUEUE_BYTES))
    }
}

impl Cluster {
    /// Puts a publish on its way whose sender may depend on the number of receivers.
    #[expect(clippy::result_large_err, reason = "the message goes back without an allocation")]
    pub(in crate::redis) fn publish_counted(
        self: &Arc<Self>,
        mut publish: Publish,
    ) -> Result<(), (crate::queue::Back, Publish)> {
        if matches!(publish.keep, Keep::IfNoReceiver { .. }) {
            let bytes = publish.queued_bytes();
            return self
                .receivers
                .0
                .push(KeptIfNoReceiver(publish), bytes)
                .map_err(|(back, of)| (back, of.0));
        }
        if let Some(receipt) = publish.receipt.take() {
            publish.receipt = Some(match receipt.counts() {
                Counts::Nothing => receipt,
                counts => Arc::new(Counted {
                    cluster: self.clone(),
                    channel: publish.channel.clone(),
                    counts,
                    receipt,
                }),
            });
        }
        self.publish(publish)
    }
}

struct KeptIfNoReceiver(Publish);

impl From<KeptIfNoReceiver> for Question {
    fn from(KeptIfNoReceiver(publish): KeptIfNoReceiver) -> Self {
        Self::Kept(publish)
    }
}

/// Receipt that asks all nodes where the count of one does not tell enough.
struct Counted {
    cluster: Arc<Cluster>,
    channel: Arc<str>,
    counts: Counts,
    receipt: Arc<dyn Receipt>,
}

impl Receipt for Counted {
    fn published(&self, outcome: Outcome) {
        let (Outcome::Received(count) | Outcome::Stored { receivers: count, duplicate: false, .. }) =
            outcome
        else {
            return self.receipt.published(outcome);
        };
        if count > 0 && self.counts == Counts::Any {
            return self.receipt.published(outcome);
        }
        let (counts, receipt) = (self.counts, self.receipt.clone());
        let bytes = self.channel.len() + QUESTION_BYTES;
        let question =
            Question::Published { channel: self.channel.clone(), outcome, counts, receipt };
        if self.cluster.receivers.0.push(question, bytes).is_err() {
            self.receipt.published(with_count(outcome, None, counts));
        }
    }
}

/// Counts until shutdown. Returns at once where there is no Cluster.
pub(in crate::redis) async fn run(shared: Arc<RedisShared>) {
    let Some(cluster) = shared.nodes.cluster() else { return };
    let queue = &cluster.receivers.0;
    let mut questions = Vec::new();
    loop {
        queue.take(BATCH_BYTES, BATCH, &mut questions);
        if questions.is_empty() {
            tokio::select! {
                () = queue.filled() => continue,
                () = shared.shutdown.cancelled() => break,
            }
        }
        let counts = count(cluster, &questions, shared.response_timeout).await;
        for (question, count) in questions.drain(..).zip(counts) {
            answer(cluster, question, count);
        }
    }
    queue.close();
    queue.take(usize::MAX, usize::MAX, &mut questions);
    questions.into_iter().for_each(|question| match question {
        Question::Published { outcome, counts, receipt, .. } => {
            receipt.published(with_count(outcome, None, counts));
        }
        Question::Kept(publish) => super::lose([publish]),
    });
}

fn answer(cluster: &Arc<Cluster>, question: Question, count: Option<u64>) {
    let mut publish = match question {
        Question::Published { outcome, counts, receipt, .. } => {
            return receipt.published(with_count(outcome, count, counts));
        }
        Question::Kept(publish) => publish,
    };
    // A subscriber that comes in between gets the message twice, and none misses it.
    if count.is_some_and(|count| count > 0) {
        publish.keep = Keep::Nothing;
    }
    if let Err((_, publish)) = cluster.publish(publish)
        && let Some(receipt) = publish.receipt
    {
        receipt.published(Outcome::Refused(NotDone::Busy));
    }
}

/// Returns the outcome with the receivers at all nodes; `None`: not every node has told its own.
fn with_count(outcome: Outcome, count: Option<u64>, counts: Counts) -> Outcome {
    match (outcome, count) {
        (Outcome::Received(own), Some(count)) => Outcome::Received(own.max(count)),
        (Outcome::Stored { receivers, id, duplicate }, Some(count)) => {
            Outcome::Stored { receivers: receivers.max(count), id, duplicate }
        }
        (Outcome::Received(own), None) if own == 0 || counts == Counts::Exact => Outcome::Lost,
        (outcome, None) => outcome,
        (outcome, Some(_)) => outcome,
    }
}

/// Returns the number of receivers of each message at all nodes, replicas included; `None` where no node tells of one and
/// some node does not answer.
async fn count(cluster: &Cluster, questions: &[Question], limit: Duration) -> Vec<Option<u64>> {
    let channels = questions.iter().map(|question| match question {
        Question::Published { channel, .. } => &**channel,
        Question::Kept(publish) => &*publish.channel,
    });
    let mut words: Vec<&[u8]> = vec![b"PUBSUB", b"NUMSUB"];
    words.extend(channels.map(str::as_bytes));
    let nodes = cluster.living();
    let answers = nodes.iter().map(|node| timeout(limit.min(LIMIT), of_node(node, &words)));
    let mut counts = vec![(0_u64, true); questions.len()];
    for answer in join_all(answers).await {
        match answer.ok().flatten() {
            Some(own) if own.len() == counts.len() => {
                counts.iter_mut().zip(own).for_each(|(count, own)| count.0 += own);
            }
            _ => counts.iter_mut().for_each(|count| count.1 = false),
        }
    }
    counts.into_iter().map(|(count, is_whole)| (count > 0 || is_whole).then_some(count)).collect()
}

async fn of_node(node: &Node, words: &[&[u8]]) -> Option<Vec<u64>> {
    let Ok(Reply::Array(pairs)) = node.commands.command(words).await else { return None };
    let counts = pairs.chunks_exact(2).map(|pair| match pair[1] {
        Reply::Integer(count) => Some(count.unsigned_abs()),
        _ => None,
    });
    counts.collect()
}

/// Longest wait for a node that does not answer.
const LIMIT: Duration = Duration::from_secs(1);

/// Upper bound of messages that wait to be counted.
const QUEUE_BYTES: usize = 16 * 1024 * 1024;

/// Bytes of messages that are counted at a time.
const BATCH_BYTES: usize = 1024 * 1024;

/// Messages that are counted at a time.
const BATCH: usize = 512;

/// Estimate of a question's cost beside its channel.
const QUESTION_BYTES: usize = 128;
