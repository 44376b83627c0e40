//! Counts the receivers of messages in a Cluster: a node counts its own subscribers only, so that all nodes are asked.

use std::{
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::future::join_all;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::Cluster;
use crate::{
    bus::publish::{Counts, Keep, Outcome, Publish, Receipt},
    queue::Queue,
    redis::{node::Node, resp::Reply, shared::RedisShared},
    store::not_done::NotDone,
    telemetry::throttle::Throttle,
};

/// Messages whose receivers are to be counted.
pub(in crate::redis) struct Receivers {
    queue: Queue<Question>,
    /// Held by each receipt that may still ask.
    open: Arc<()>,
    /// Ends the connections of all nodes: nothing is counted any more.
    pub(in crate::redis) ended: CancellationToken,
}

enum Question {
    /// A message that one node has published.
    Published { channel: Arc<str>, outcome: Outcome, counts: Counts, receipt: Arc<dyn Receipt> },
    /// A message that waits for the number: it is kept if there is none, or those whom it reaches may be gone at once.
    Waiting(Publish),
}

impl Receivers {
    /// Creates a queue of `bytes`.
    pub(in crate::redis) fn new(bytes: usize) -> Self {
        let (open, ended) = (Arc::new(()), CancellationToken::new());
        Self { queue: Queue::new(bytes), open, ended }
    }

    /// Returns the bytes that wait.
    pub(in crate::redis) fn bytes(&self) -> usize {
        self.queue.bytes()
    }

    /// Returns `Pending` while so many wait that producers should pause.
    pub(in crate::redis) fn poll_open(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.queue.poll_open(cx)
    }
}

impl Cluster {
    /// Puts a publish on its way whose sender may depend on the number of receivers.
    pub(in crate::redis) fn publish_counted(
        self: &Arc<Self>,
        mut publish: Publish,
    ) -> Result<(), (crate::queue::Back, Publish)> {
        let counts = publish.receipt.as_ref().map_or(Counts::Nothing, |receipt| receipt.counts());
        if counts == Counts::All || matches!(publish.keep, Keep::IfNoReceiver { .. }) {
            let bytes = publish.queued_bytes();
            let pushed = self.receivers.queue.push(Counting(publish), bytes);
            return pushed.map_err(|(back, Counting(publish))| (back, publish));
        }
        if counts != Counts::Nothing {
            self.count_again(&mut publish, 0);
        }
        self.publish(publish)
    }

    /// Has the receivers of a message counted, if the node that publishes it counts too few. `before` were there already.
    fn count_again(self: &Arc<Self>, publish: &mut Publish, before: u64) {
        let Some(receipt) = publish.receipt.take() else { return };
        let (counts, channel) = (receipt.counts(), publish.channel.clone());
        let cluster = self.clone();
        let open = self.receivers.open.clone();
        let counted = Counted { cluster, channel, counts, before, receipt, _open: open };
        publish.receipt = Some(Arc::new(counted));
    }
}

struct Counting(Publish);

impl From<Counting> for Question {
    fn from(Counting(publish): Counting) -> Self {
        Self::Waiting(publish)
    }
}

/// Receipt that asks all nodes where the count of one does not tell enough.
struct Counted {
    cluster: Arc<Cluster>,
    channel: Arc<str>,
    counts: Counts,
    /// Receivers at all nodes before the message was published.
    before: u64,
    receipt: Arc<dyn Receipt>,
    _open: Arc<()>,
}

impl Receipt for Counted {
    fn published(&self, outcome: Outcome) {
        let (Outcome::Received(count) | Outcome::Stored { receivers: count, duplicate: false, .. }) =
            outcome
        else {
            return self.receipt.published(outcome);
        };
        if count.max(self.before) > 0 && self.counts != Counts::Exact {
            return self.receipt.published(with_count(outcome, Some(self.before), self.counts));
        }
        let (counts, receipt) = (self.counts, self.receipt.clone());
        let bytes = self.channel.len() + QUESTION_BYTES;
        let question =
            Question::Published { channel: self.channel.clone(), outcome, counts, receipt };
        if self.cluster.receivers.queue.push(question, bytes).is_err() {
            self.receipt.published(with_count(outcome, None, counts));
        }
    }
}

/// Counts until shutdown, and what is on its way then. Returns at once where there is no Cluster.
pub(in crate::redis) async fn run(shared: Arc<RedisShared>) {
    let Some(cluster) = shared.nodes.cluster() else { return };
    let queue = &cluster.receivers.queue;
    let (mut questions, mut ends_at) = (Vec::new(), None);
    loop {
        queue.take(BATCH_BYTES, BATCH, &mut questions);
        if questions.is_empty() {
            if let Some(ends_at) = ends_at {
                let is_open = Arc::strong_count(&cluster.receivers.open) > 1;
                if !is_open || Instant::now() >= ends_at {
                    break;
                }
                sleep(LOOK_AGAIN).await;
                continue;
            }
            tokio::select! {
                () = queue.filled() => {}
                () = shared.shutdown.cancelled() => {
                    ends_at = Some(Instant::now() + shared.response_timeout);
                }
            }
            continue;
        }
        let counts = count(cluster, &questions, shared.response_timeout).await;
        for (question, count) in questions.drain(..).zip(counts) {
            answer(cluster, question, count);
        }
    }
    queue.close();
    queue.take(usize::MAX, usize::MAX, &mut questions);
    questions.into_iter().for_each(|question| answer(cluster, question, None));
    cluster.receivers.ended.cancel();
}

fn answer(cluster: &Arc<Cluster>, question: Question, count: Option<u64>) {
    let mut publish = match question {
        Question::Published { outcome, counts, receipt, .. } => {
            return receipt.published(with_count(outcome, count, counts));
        }
        Question::Waiting(publish) => publish,
    };
    let count = count.unwrap_or_default();
    let is_kept = matches!(publish.keep, Keep::IfNoReceiver { .. });
    if is_kept && count > 0 {
        publish.keep = Keep::Nothing;
    }
    // A subscriber that comes while none was counted may get the message twice, and none misses it.
    if !is_kept || count > 0 {
        cluster.count_again(&mut publish, count);
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
        Question::Waiting(publish) => &*publish.channel,
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
    if node.commands.link.is_away() {
        // Its subscribers hear nothing of others either.
        return Some(vec![0; words.len() - NUMSUB]);
    }
    let pairs = match node.commands.command(words).await {
        Ok(Reply::Array(pairs)) => pairs,
        Ok(_) => return None,
        Err(error) => {
            if let Some(left_out) = UNCOUNTED.pass() {
                warn!(%error, left_out, "A node of the Redis Cluster does not tell its subscribers (PUBSUB NUMSUB).");
            }
            return None;
        }
    };
    let counts = pairs.chunks_exact(2).map(|pair| match pair[1] {
        Reply::Integer(count) => Some(count.unsigned_abs()),
        _ => None,
    });
    counts.collect()
}

/// Throttle of log lines about nodes that do not tell.
static UNCOUNTED: Throttle = Throttle::new();

/// Words of the question before the channels.
const NUMSUB: usize = 2;

/// Interval between looks whether a receipt may still ask, at the end.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// Longest wait for a node that does not answer.
const LIMIT: Duration = Duration::from_secs(1);

/// Bytes of messages that are counted at a time.
const BATCH_BYTES: usize = 1024 * 1024;

/// Messages that are counted at a time.
const BATCH: usize = 512;

/// Estimate of a question's cost beside its channel.
const QUESTION_BYTES: usize = 128;
