//! Questions to the other instances: each answers with what it knows of a subject. Instances with an admin port answer.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use hashbrown::HashMap;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};
use uuid::Uuid;

use crate::{
    bus::publish::{self, BusError, Keep, Outcome, Publish},
    core::Core,
    endpoint::{
        Families,
        console::reach::{self, Kind, Subject},
    },
    hub::{
        follower::{Followed, FollowerQueue},
        sink::Sink,
    },
};

/// The questions of this instance that wait for answers.
///
/// Invariant: at most [`QUESTIONS_MAX`] wait. A further one is not asked.
pub(super) struct Asker {
    waiting: Mutex<HashMap<Uuid, mpsc::Sender<Value>>>,
}

/// Answers of other instances.
#[derive(Debug, Default)]
pub(super) struct Answers {
    /// The answers.
    pub(super) answers: Vec<Value>,
    /// Number of the other instances that were asked; `None`: Redis did not take the question.
    pub(super) asked: Option<u64>,
}

/// A question to all instances.
#[derive(Debug, Serialize, Deserialize)]
struct Question {
    question: Uuid,
    server_id: String,
    kind: Kind,
    id: String,
}

/// An answer to the instance that asked.
#[derive(Debug, Serialize, Deserialize)]
struct Answer {
    question: Uuid,
    answer: Value,
}

/// Place of a question among those that wait. Dropping it forgets the question.
struct Waiting<'a>(&'a Asker, Uuid);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.lock().remove(&self.1);
    }
}

impl Asker {
    pub(super) fn new() -> Self {
        Self { waiting: Mutex::default() }
    }

    /// Asks all other instances, and waits for their answers at most [`PATIENCE`].
    pub(super) async fn ask(&self, core: &Core, subject: &Subject) -> Answers {
        let (sender, mut received) = mpsc::channel(ANSWERS_MAX);
        let question = Uuid::new_v4();
        {
            let mut waiting = self.waiting.lock();
            if waiting.len() >= QUESTIONS_MAX {
                return Answers::default();
            }
            waiting.insert(question, sender);
        }
        let _waiting = Waiting(self, question);
        let deadline = Instant::now() + PATIENCE;
        let (kind, id) = subject.parts();
        let server_id = core.server_id.to_string();
        let payload = json!(Question { question, server_id, kind, id }).to_string();
        let told = publish(core, core.names.console(), payload.into());
        let Ok(Some(receivers)) = timeout_at(deadline, told).await else {
            return Answers::default();
        };
        // The instance hears its own question too, and answers it with `null`.
        let (mut answers, mut own) = (Vec::new(), 0);
        while (answers.len() + own) < receivers as usize {
            match timeout_at(deadline, received.recv()).await {
                Ok(Some(Value::Null)) => own = 1,
                Ok(Some(answer)) => answers.push(answer),
                Ok(None) | Err(_) => break,
            }
        }
        Answers { answers, asked: Some(receivers.saturating_sub(own as u64)) }
    }

    fn take(&self, question: Uuid, answer: Value) {
        if let Some(sender) = self.waiting.lock().get(&question) {
            // Too many answers are left out.
            let _ = sender.try_send(answer);
        }
    }
}

/// Publishes, and returns the number of receivers; `None` if the bus did not take the message.
async fn publish(core: &Core, channel: String, payload: Bytes) -> Option<u64> {
    let (receipt, outcome) = publish::awaited();
    let (channel, keep) = (channel.into(), Keep::Nothing);
    core.hub.publish(Publish { channel, payload, keep, receipt: Some(receipt) }).ok()?;
    match outcome.await {
        Ok(Outcome::Received(receivers)) => Some(receivers),
        _ => None,
    }
}

/// Answers questions of other instances, and takes answers to this one's, until `end`.
pub(super) async fn run(
    asker: Arc<Asker>,
    core: Arc<Core>,
    families: Arc<Families>,
    end: CancellationToken,
) {
    loop {
        let followed = tokio::select! {
            () = end.cancelled() => return,
            followed = follow(&asker, &core, &families) => followed,
        };
        let pause = match followed {
            Ok(()) => {
                warn!("There are more questions of consoles than this instance can follow.");
                RETRY
            }
            Err(error @ BusError::Refused(_)) => {
                warn!(%error, "Other instances cannot be asked for the console: the user of Redis needs ws:console*.");
                RETRY_REFUSED
            }
            Err(error) => {
                debug!(%error, "Questions of consoles cannot be followed now.");
                RETRY
            }
        };
        tokio::select! {
            () = end.cancelled() => return,
            () = sleep(pause) => {}
        }
    }
}

async fn follow(asker: &Asker, core: &Core, families: &Families) -> Result<(), BusError> {
    let (questions, answers) = (FollowerQueue::new(QUEUE_BYTES), FollowerQueue::new(QUEUE_BYTES));
    let _subscription = core
        .hub
        .subscribe([
            (core.names.console().into(), Sink::Follower(Arc::clone(&questions))),
            (
                core.names.console_answers(&core.server_id).into(),
                Sink::Follower(Arc::clone(&answers)),
            ),
        ])
        .await?;
    loop {
        let (entry, is_question) = tokio::select! {
            entry = questions.next() => (entry, true),
            entry = answers.next() => (entry, false),
        };
        match entry {
            Some(Followed::Message(payload)) if is_question => {
                answer(asker, core, families, &payload)
            }
            Some(Followed::Message(payload)) => match serde_json::from_slice(&payload) {
                Ok(Answer { question, answer }) => asker.take(question, answer),
                Err(error) => debug!(%error, "An answer for the console cannot be read."),
            },
            Some(Followed::Gap(_)) => {}
            None => return Ok(()),
        }
    }
}

fn answer(asker: &Asker, core: &Core, families: &Families, payload: &[u8]) {
    let asked: Question = match serde_json::from_slice(payload) {
        Ok(asked) => asked,
        Err(error) => return debug!(%error, "A question of a console cannot be read."),
    };
    if asked.server_id == *core.server_id {
        return asker.take(asked.question, Value::Null);
    }
    let Ok(subject) = Subject::read(asked.kind, &asked.id) else { return };
    let answer = reach::look(core, families, &subject);
    let payload = json!(Answer { question: asked.question, answer }).to_string().into();
    let channel = core.names.console_answers(&asked.server_id).into();
    let sent = core.hub.publish(Publish { channel, payload, keep: Keep::Nothing, receipt: None });
    if let Err(error) = sent {
        debug!(%error, "An answer to a console cannot be sent.");
    }
}

/// Time for which the answers of other instances are waited for.
const PATIENCE: Duration = Duration::from_millis(1500);

/// Upper bound of the questions that wait.
const QUESTIONS_MAX: usize = 64;

/// Upper bound of the answers to one question that wait to be read.
const ANSWERS_MAX: usize = 256;

/// Upper bound of the bytes of questions, and of answers, that wait.
const QUEUE_BYTES: usize = 4 * 1024 * 1024;

const RETRY: Duration = Duration::from_millis(500);

/// Pause after a refusal: only an operator can change the permissions of Redis.
const RETRY_REFUSED: Duration = Duration::from_secs(600);
