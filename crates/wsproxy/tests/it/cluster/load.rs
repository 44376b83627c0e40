//! Load on the histories of sessions: rising numbers, a few of which are on their way at a time, and what became of each.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use serde_json::Value;
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite::Message;
use tokio_util::sync::CancellationToken;
use wsproxy::{
    bus::publish::{History, Keep, Outcome, Publish, Receipt},
    core::Core,
};
use wsproxy_proto::history::HistoryLimits;

use crate::support::{client::Client, gateway::id};

/// The numbers of one session by what the bus said of them.
#[derive(Default)]
pub struct Sent {
    /// Each is in the history.
    pub stored: Vec<u64>,
    /// None was published.
    pub refused: Vec<u64>,
    /// Each may have been published.
    pub lost: Vec<u64>,
}

/// The messages that a client got.
#[derive(Default)]
pub struct Seen {
    pub numbers: Vec<u64>,
    pub notices: Vec<Value>,
}

/// Tells the outcome of a number.
struct Numbered(u64, mpsc::UnboundedSender<(u64, Outcome)>);

impl Receipt for Numbered {
    fn published(&self, outcome: Outcome) {
        let _ = self.1.send((self.0, outcome));
    }
}

/// Publishes rising numbers until `end`, one in each `pause` and at most [`WINDOW`] on their way.
pub async fn publish(
    core: Arc<Core>,
    session: String,
    pause: Duration,
    end: CancellationToken,
) -> Sent {
    let (sender, mut outcomes) = mpsc::unbounded_channel();
    let (mut sent, mut open) = (Sent::default(), 0);
    for number in 0.. {
        while open >= WINDOW || (end.is_cancelled() && open > 0) {
            open -= 1;
            sent.note(outcomes.recv().await.unwrap());
        }
        if end.is_cancelled() {
            break;
        }
        let receipt = Arc::new(Numbered(number, sender.clone()));
        match core.hub.publish(message(&core, &session, number, Some(receipt))) {
            Ok(_) => open += 1,
            Err(_) => sent.refused.push(number),
        }
        tokio::time::sleep(pause).await;
        while let Ok(outcome) = outcomes.try_recv() {
            open -= 1;
            sent.note(outcome);
        }
    }
    sent
}

/// Publishes a session's last number until it is in the history.
pub async fn publish_last(core: &Arc<Core>, session: &str) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    loop {
        let (sender, mut outcomes) = mpsc::unbounded_channel();
        let receipt = Arc::new(Numbered(LAST, sender));
        let is_taken = core.hub.publish(message(core, session, LAST, Some(receipt))).is_ok();
        if is_taken && matches!(outcomes.recv().await, Some((_, Outcome::Stored { .. }))) {
            return;
        }
        assert!(tokio::time::Instant::now() < deadline, "the last message is not taken");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn message(core: &Core, session: &str, number: u64, receipt: Option<Arc<dyn Receipt>>) -> Publish {
    let channel = core.names.session_down(&id(session));
    let history = History {
        log: core.names.log(&channel).into(),
        clock: None,
        event_id: None,
        dedup: None,
        unique: false,
        limits: LIMITS,
    };
    let payload = format!(r#"{{"n":{number}}}"#).into();
    Publish { channel: channel.into(), payload, keep: Keep::History(Box::new(history)), receipt }
}

/// Reads a client's messages up to the last one.
pub async fn watch(mut client: Client) -> Seen {
    let mut seen = Seen::default();
    loop {
        let next = tokio::time::timeout(Duration::from_secs(120), client.next());
        let text = match next.await.expect("messages go on") {
            Message::Text(text) => text,
            Message::Close(frame) => panic!("closed: {frame:?}"),
            _ => continue,
        };
        let message: Value = serde_json::from_str(&text).unwrap();
        match message["n"].as_u64() {
            Some(LAST) => return seen,
            Some(number) => seen.numbers.push(number),
            None => seen.notices.push(message),
        }
    }
}

impl Sent {
    fn note(&mut self, (number, outcome): (u64, Outcome)) {
        match outcome {
            Outcome::Stored { .. } => self.stored.push(number),
            Outcome::Refused(_) => self.refused.push(number),
            Outcome::Lost => self.lost.push(number),
            Outcome::Received(_) | Outcome::Kept => panic!("{number} is not in the history"),
        }
    }
}

/// Says what is wrong with the messages of a client, if anything is.
pub fn objection(sent: &Sent, seen: &Seen, told_max: usize) -> Option<String> {
    let told = seen.notices.len();
    if told > told_max {
        return Some(format!("is told {told} times: {:?}", seen.notices));
    }
    let mut count = BTreeMap::<u64, usize>::new();
    seen.numbers.iter().for_each(|number| *count.entry(*number).or_default() += 1);
    let twice: Vec<_> = count.iter().filter(|(_, count)| **count > 1).collect();
    if !twice.is_empty() {
        return Some(format!("gets twice: {twice:?}"));
    }
    if let Some(pair) = seen.numbers.windows(2).find(|pair| pair[0] > pair[1]) {
        return Some(format!("gets {} before {}", pair[0], pair[1]));
    }
    let undone: Vec<_> = sent.refused.iter().filter(|number| count.contains_key(number)).collect();
    if !undone.is_empty() {
        return Some(format!("gets what was refused: {undone:?}"));
    }
    let missing: Vec<_> = sent.stored.iter().filter(|number| !count.contains_key(number)).collect();
    (told == 0 && !missing.is_empty()).then(|| format!("misses {missing:?} and is not told"))
}

/// Number of a session's last message.
const LAST: u64 = 1_000_000_000;

/// Messages of one session that are on their way at a time.
const WINDOW: usize = 4;

const LIMITS: HistoryLimits =
    HistoryLimits { entries_max: 1000, bytes_max: 1 << 20, ttl: Duration::from_secs(600) };
