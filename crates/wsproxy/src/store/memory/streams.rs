//! Token streams in the embedded store, with the semantics of the script that Redis runs.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use serde_json::{Value as Json, json};
use tokio::{sync::oneshot, time::Instant};
use wsproxy_proto::{
    history::Position,
    names::{Id, Names},
};

use crate::{
    bus::{History, memory::Work},
    store::{
        StoreError, StreamCommand, StreamOp, StreamOutcome, StreamState,
        memory::{ENTRY_BYTES, Entry, MemoryStore, State, Value, expiry, history::Appended},
    },
};

/// So many streams of a session are remembered, the newest.
const STREAMS_MAX: usize = 16;

/// Longest text of a stream, in bytes.
const TEXT_BYTES_MAX: usize = 4 * 1024 * 1024;

/// A token stream.
pub(super) struct Stream {
    session: Id,
    id: Id,
    state: &'static str,
    seq: u64,
    text: BytesMut,
    meta: Bytes,
    error: Bytes,
    lease_until: Instant,
}

/// What a change leads to: its answer, and a channel and what goes over it.
type Changed = ((u64, Position), Option<(String, Vec<u8>)>);

impl MemoryStore {
    pub(in crate::store) async fn stream(
        &self,
        command: StreamCommand,
    ) -> Result<(u64, Position), StoreError> {
        let (caller, answer) = oneshot::channel();
        let bytes = ENTRY_BYTES + command.op.bytes();
        self.work.push(Work::Stream(command, caller), bytes).map_err(|_| StoreError::Full)?;
        answer.await.unwrap_or(Err(StoreError::Closed))
    }

    pub(in crate::store) fn lapsed_streams(
        &self,
        count: usize,
    ) -> Result<Vec<(Id, Id)>, StoreError> {
        let mut state = self.state.lock();
        let now = state.purge();
        let streams = state.entries.values().filter_map(|entry| match &entry.value {
            Value::Streams(streams) => Some(streams),
            _ => None,
        });
        let lapsed = streams.flatten().filter(|stream| stream.has_lapsed(now));
        Ok(lapsed.take(count).map(|stream| (stream.session.clone(), stream.id.clone())).collect())
    }

    /// Done by the reader of the bus, so that messages and changes have one order.
    pub(crate) fn change_stream(&self, command: &StreamCommand) -> Result<Changed, StoreError> {
        let mut state = self.state.lock();
        let now = state.purge();
        let key: Arc<str> = self.names.session_streams(&command.session).into();
        let (mut streams, expires) = match state.remove(&key) {
            Some((_, Entry { value: Value::Streams(streams), expires, .. })) => (streams, expires),
            _ => (Vec::new(), now),
        };
        let result = change(&mut streams, command, now);
        let expires = if result.is_ok() { expiry(now, command.limits.ttl) } else { expires };
        let bytes = streams.iter().map(|stream| stream.text.len() + ENTRY_BYTES).sum::<usize>();
        if !streams.is_empty() {
            let value = Value::Streams(streams);
            state.insert(key, Entry { value, bytes: bytes + ENTRY_BYTES, expires });
        }
        let (seq, message) = result?;
        let Some(message) = message else { return Ok(((seq, Position::START), None)) };
        let channel = self.names.session_down(&command.session);
        let history = History {
            log: Names::log(&channel).into(),
            clock: None,
            event_id: None,
            dedup: None,
            limits: command.limits,
        };
        match state.append_history(&history, &message.to_string().into())? {
            Appended::New { id, message } => Ok(((seq, id), Some((channel, message)))),
            Appended::Duplicate(id) => Ok(((seq, id), None)),
        }
    }
}

impl State {
    /// A session's streams as they stand.
    pub(super) fn streams(&mut self, key: &str) -> Result<Vec<StreamState>, StoreError> {
        let Some(Value::Streams(streams)) = self.live(key) else { return Ok(Vec::new()) };
        let state = |stream: &Stream| StreamState {
            stream: stream.id.as_str().into(),
            state: stream.state.into(),
            seq: stream.seq,
            text: Bytes::copy_from_slice(&stream.text),
            meta: stream.meta.clone(),
            error: stream.error.clone(),
        };
        Ok(streams.iter().map(state).collect())
    }
}

impl Stream {
    fn has_lapsed(&self, now: Instant) -> bool {
        self.state == OPEN && self.lease_until <= now
    }

    fn end(&mut self, outcome: StreamOutcome, error: &Bytes) -> Json {
        self.state = outcome.label();
        self.error.clone_from(error);
        let mut message = json!({
            "type": "stream_end",
            "stream": self.id.as_str(),
            "outcome": self.state,
            "seq": self.seq,
        });
        if let Some(error) = parse(error) {
            message["error"] = error;
        }
        message
    }
}

/// Changes one of a session's streams. Answers the number of its last append, and what clients are told.
fn change(
    streams: &mut Vec<Stream>,
    command: &StreamCommand,
    now: Instant,
) -> Result<(u64, Option<Json>), StoreError> {
    let refused = |why: String| Err(StoreError::Refused(why));
    let at = streams.iter().position(|stream| stream.id == command.stream);
    if let StreamOp::Open { meta, lease } = &command.op {
        if at.is_some() {
            return refused("EXISTS".into());
        }
        if streams.len() >= STREAMS_MAX {
            streams.remove(0);
        }
        streams.push(Stream {
            session: command.session.clone(),
            id: command.stream.clone(),
            state: OPEN,
            seq: 0,
            text: BytesMut::new(),
            meta: meta.clone(),
            error: Bytes::new(),
            lease_until: now + *lease,
        });
        let mut message = json!({ "type": "stream_open", "stream": command.stream.as_str() });
        if let Some(meta) = parse(meta) {
            message["meta"] = meta;
        }
        return Ok((0, Some(message)));
    }
    let Some(stream) = at.map(|at| &mut streams[at]) else { return refused("NOSTREAM".into()) };
    if stream.state != OPEN {
        return match &command.op {
            StreamOp::End { outcome, .. } if outcome.label() == stream.state => {
                Ok((stream.seq, None))
            }
            _ => refused(format!("ENDED {}", stream.state)),
        };
    }
    match &command.op {
        StreamOp::Append { text, seq, lease } => {
            if seq.is_some_and(|seq| seq != stream.seq + 1) {
                return refused(format!("SEQ {}", stream.seq));
            }
            if stream.text.len() + text.len() > TEXT_BYTES_MAX {
                return refused("TOOLARGE".into());
            }
            stream.seq += 1;
            stream.text.extend_from_slice(text);
            stream.lease_until = now + *lease;
            let text = String::from_utf8_lossy(text);
            let (id, seq) = (stream.id.as_str(), stream.seq);
            let message =
                json!({ "type": "stream_append", "stream": id, "seq": seq, "text": text });
            Ok((stream.seq, Some(message)))
        }
        StreamOp::Renew { lease } => {
            stream.lease_until = now + *lease;
            Ok((stream.seq, None))
        }
        StreamOp::End { outcome, error } => {
            let message = stream.end(*outcome, error);
            Ok((stream.seq, Some(message)))
        }
        StreamOp::Lost if stream.has_lapsed(now) => {
            let error = json!({ "code": "worker_lost", "message": "The worker is gone." });
            let message = stream.end(StreamOutcome::Error, &error.to_string().into());
            Ok((stream.seq, Some(message)))
        }
        StreamOp::Open { .. } | StreamOp::Lost => refused("ALIVE".into()),
    }
}

fn parse(json: &[u8]) -> Option<Json> {
    serde_json::from_slice(json).ok()
}

const OPEN: &str = "open";
