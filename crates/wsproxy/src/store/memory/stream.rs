//! Token streams in the embedded store: the same rules and messages as the script on Redis has.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{sync::oneshot, time::Instant};
use wsproxy_proto::{
    history::{Envelope, Position},
    names::{Id, Names},
};

use crate::{
    bus::{HistoryLimits, memory::Request, queue::Back},
    store::{
        StoreError, StreamCommand, StreamOp, StreamState,
        memory::{ENTRY_BYTES, Held, MemoryStore, State, Value, expiry, wrong_kind},
    },
};

/// A token stream of a session.
pub(super) struct TokenStream {
    /// `open`, or the outcome.
    phase: &'static str,
    seq: u64,
    /// Of the last message.
    id: Position,
    text: Vec<u8>,
    meta: Bytes,
    error: Bytes,
    lease_ends: Instant,
}

/// What a command came to.
pub(crate) struct Changed {
    /// The answer.
    pub(crate) answer: (u64, Position),
    /// What the channel is to carry, in envelopes.
    pub(crate) messages: Vec<Vec<u8>>,
}

impl MemoryStore {
    /// The bus's one reader changes the stream, so that ids and deliveries have one order.
    pub(in crate::store) async fn stream(
        &self,
        command: StreamCommand,
    ) -> Result<(u64, Position), StoreError> {
        let bytes = ENTRY_BYTES + command.op.bytes();
        let (caller, answer) = oneshot::channel();
        let request = Request::Stream(Box::new(command), caller);
        self.requests.push(request, bytes).map_err(|(back, _)| match back {
            Back::Full => StoreError::Full,
            Back::Closed => StoreError::Closed,
        })?;
        answer.await.unwrap_or(Err(StoreError::Closed))
    }

    /// Does it, for that reader.
    pub(crate) fn change(&self, command: &StreamCommand) -> Result<Changed, StoreError> {
        let names = &self.names;
        let StreamCommand { session, stream, op, limits } = command;
        let mut state = self.state.lock();
        state.purge();
        let mut change = Change {
            state: &mut state,
            names,
            session,
            limits: *limits,
            log: names.log(&names.session_down(session)),
            messages: Vec::new(),
        };
        let answer = match op {
            StreamOp::Open { meta, lease } => change.open(stream, meta, *lease),
            StreamOp::Append { text, seq, lease } => change.append(stream, text, *seq, *lease),
            StreamOp::Renew { lease } => change.renew(stream, *lease),
            StreamOp::End { outcome, error } => change.end(stream, outcome.label(), error),
            StreamOp::Lost => change.lost(stream),
        }?;
        Ok(Changed { answer, messages: change.messages })
    }

    pub(in crate::store) fn lapsed_streams(
        &self,
        count: usize,
    ) -> Result<Vec<(Id, Id)>, StoreError> {
        let state = self.state.lock();
        let now = Instant::now();
        let lapsed = state.leases.iter().take_while(|(ends, _, _)| *ends <= now).take(count);
        let ids =
            |session: &str, stream: &str| Some((Id::parse(session).ok()?, Id::parse(stream).ok()?));
        Ok(lapsed.filter_map(|(_, session, stream)| ids(session, stream)).collect())
    }
}

impl State {
    /// Those that are held, in the order in which they were opened; the newest if all are too large.
    pub(super) fn streams(
        &self,
        names: &Names,
        session: &Id,
        bytes_max: usize,
    ) -> Result<Vec<StreamState>, StoreError> {
        let ids = match self.held(&names.session_streams(session)) {
            None => return Ok(Vec::new()),
            Some(Value::Index(ids)) => ids,
            Some(_) => return Err(wrong_kind()),
        };
        let mut streams = Vec::new();
        let mut bytes = 0;
        for id in ids.iter().rev() {
            let key = format!("{}{id}", names.stream_prefix(session));
            let Some(Value::Stream(stream)) = self.held(&key) else { continue };
            bytes += stream.text.len();
            if !streams.is_empty() && bytes > bytes_max {
                break;
            }
            streams.push(StreamState {
                stream: (&**id).into(),
                state: stream.phase.into(),
                seq: stream.seq,
                text: Bytes::copy_from_slice(&stream.text),
                meta: stream.meta.clone(),
                error: stream.error.clone(),
            });
        }
        streams.reverse();
        Ok(streams)
    }
}

/// One command at work.
struct Change<'a> {
    state: &'a mut State,
    names: &'a Names,
    session: &'a Id,
    limits: HistoryLimits,
    log: String,
    messages: Vec<Vec<u8>>,
}

type Answer = Result<(u64, Position), StoreError>;

impl Change<'_> {
    fn open(&mut self, id: &Id, meta: &Bytes, lease: Duration) -> Answer {
        let meta = if meta.is_empty() { Bytes::from_static(b"{}") } else { meta.clone() };
        match self.state.held(&self.key(id.as_str())) {
            None => {}
            Some(Value::Stream(held)) if held.is_open() && held.seq == 0 && held.meta == meta => {
                return Ok((0, held.id));
            }
            Some(_) => return refused("EXISTS there is a stream with this id"),
        }
        let Some(text) = object(&meta) else { return refused("BADJSON meta is no JSON object") };
        let position = self.publish("open", id.as_str(), &format!(",\"meta\":{text}"))?;
        let stream = TokenStream {
            phase: OPEN,
            seq: 0,
            id: position,
            text: Vec::new(),
            meta,
            error: Bytes::new(),
            lease_ends: Instant::now(),
        };
        self.put(id.as_str(), stream, Some(lease));
        let index = self.index();
        let mut ids = match self.state.remove(&index) {
            Some((_, Held { value: Value::Index(ids), .. })) => ids,
            _ => Vec::new(),
        };
        ids.push(id.as_str().into());
        while ids.len() > STREAMS_MAX {
            self.forget(&ids.remove(0))?;
        }
        let bytes = index.len() + ids.len() * ENTRY_BYTES;
        let expires = expiry(Instant::now(), self.limits.ttl);
        self.state.insert(index.into(), Held { value: Value::Index(ids), bytes, expires });
        Ok((0, position))
    }

    fn append(&mut self, id: &Id, text: &Bytes, seq: Option<u64>, lease: Duration) -> Answer {
        let limits = self.state.limits;
        let bytes_free = (limits.bytes.saturating_sub(self.state.bytes))
            .min(limits.log_bytes.saturating_sub(self.state.log_bytes));
        let held = self.held(id)?;
        let last = held.seq;
        if last > 0 && seq == Some(last) && held.text.ends_with(text) {
            return Ok((last, held.id));
        }
        held.check_open()?;
        if seq.is_some_and(|seq| seq != last + 1) {
            return refused(&format!("SEQ {last}"));
        }
        if held.text.len() + text.len() > TEXT_BYTES_MAX {
            return refused("TOOLARGE the text would exceed 4 MiB");
        }
        // Once here and once in the log.
        if 2 * text.len() + 2 * ENTRY_BYTES > bytes_free {
            return Err(StoreError::Full);
        }
        let seq = last + 1;
        let json = serde_json::to_string(&String::from_utf8_lossy(text)).unwrap_or_default();
        let position =
            self.publish("append", id.as_str(), &format!(",\"seq\":{seq},\"text\":{json}"))?;
        self.update(id.as_str(), Some(lease), |stream| {
            (stream.seq, stream.id) = (seq, position);
            stream.text.extend_from_slice(text);
        });
        Ok((seq, position))
    }

    fn renew(&mut self, id: &Id, lease: Duration) -> Answer {
        let held = self.held(id)?;
        held.check_open()?;
        let answer = (held.seq, held.id);
        self.update(id.as_str(), Some(lease), |_| {});
        Ok(answer)
    }

    fn end(&mut self, id: &Id, outcome: &'static str, error: &Bytes) -> Answer {
        let held = self.held(id)?;
        if held.phase == outcome && held.error == error {
            return Ok((held.seq, held.id));
        }
        held.check_open()?;
        if !error.is_empty() && object(error).is_none() {
            return refused("BADJSON error is no JSON object");
        }
        self.close(id.as_str(), outcome, error.clone())
    }

    fn lost(&mut self, id: &Id) -> Answer {
        let Ok(held) = self.held(id) else {
            self.state.leases.retain(|(_, session, stream)| {
                (&**session, &**stream) != (self.session.as_str(), id.as_str())
            });
            return no_stream();
        };
        held.check_open()?;
        if held.lease_ends > Instant::now() {
            return refused("ALIVE the lease still runs");
        }
        self.close(id.as_str(), "error", Bytes::from_static(WORKER_LOST))
    }

    fn close(&mut self, id: &str, outcome: &'static str, error: Bytes) -> Answer {
        let seq = match self.state.held(&self.key(id)) {
            Some(Value::Stream(stream)) => stream.seq,
            _ => return no_stream(),
        };
        let mut rest = format!(",\"outcome\":\"{outcome}\",\"seq\":{seq}");
        if let Some(error) = object(&error) {
            rest = format!("{rest},\"error\":{error}");
        }
        let position = self.publish("end", id, &rest)?;
        self.update(id, None, |stream| {
            (stream.phase, stream.error, stream.id) = (outcome, error, position);
        });
        Ok((seq, position))
    }

    /// Makes room for another one; whoever follows it is told its end.
    fn forget(&mut self, id: &str) -> Result<(), StoreError> {
        let key = self.key(id);
        if matches!(self.state.held(&key), Some(Value::Stream(stream)) if stream.is_open()) {
            self.close(id, "error", Bytes::from_static(REPLACED))?;
        }
        self.state.remove(&key);
        Ok(())
    }

    fn publish(&mut self, kind: &str, id: &str, rest: &str) -> Result<Position, StoreError> {
        // An id holds nothing that JSON would have to escape.
        let message = format!("{{\"type\":\"stream_{kind}\",\"stream\":\"{id}\"{rest}}}");
        let payload = Bytes::from(message);
        let (id, prev) = self.state.append(&self.log, None, payload.clone(), self.limits)?;
        self.messages.push(Envelope { id, prev, event_id: None, payload: &payload }.encode());
        Ok(id)
    }

    fn held(&self, id: &Id) -> Result<&TokenStream, StoreError> {
        match self.state.held(&self.key(id.as_str())) {
            Some(Value::Stream(stream)) => Ok(stream),
            None => no_stream(),
            Some(_) => Err(wrong_kind()),
        }
    }

    /// Changes a stream that is held; it lives on, and has a new lease or none.
    fn update(&mut self, id: &str, lease: Option<Duration>, change: impl FnOnce(&mut TokenStream)) {
        if let Some((_, Held { value: Value::Stream(mut stream), .. })) =
            self.state.remove(&self.key(id))
        {
            self.state.leases.remove(&self.lease(id, stream.lease_ends));
            change(&mut stream);
            self.put(id, stream, lease);
            let index = self.index();
            if let Some((key, mut held)) = self.state.remove(&index) {
                held.expires = expiry(Instant::now(), self.limits.ttl);
                self.state.insert(key, held);
            }
        }
    }

    fn put(&mut self, id: &str, mut stream: TokenStream, lease: Option<Duration>) {
        let now = Instant::now();
        if let Some(lease) = lease {
            stream.lease_ends = expiry(now, lease);
            self.state.leases.insert(self.lease(id, stream.lease_ends));
        }
        let key = self.key(id);
        let bytes = key.len() + ENTRY_BYTES + stream.text.len() + stream.meta.len();
        let expires = expiry(now, self.limits.ttl);
        self.state.insert(key.into(), Held { value: Value::Stream(stream), bytes, expires });
    }

    fn lease(&self, id: &str, ends: Instant) -> (Instant, Arc<str>, Arc<str>) {
        (ends, self.session.as_str().into(), id.into())
    }

    fn key(&self, id: &str) -> String {
        format!("{}{id}", self.names.stream_prefix(self.session))
    }

    fn index(&self) -> String {
        self.names.session_streams(self.session)
    }
}

impl TokenStream {
    fn is_open(&self) -> bool {
        self.phase == OPEN
    }

    fn check_open(&self) -> Result<(), StoreError> {
        match self.is_open() {
            true => Ok(()),
            false => refused(&format!("ENDED {}", self.phase)),
        }
    }
}

/// The text of a JSON object; `None` where it is something else.
fn object(json: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(json).ok()?;
    serde_json::from_str::<serde::de::IgnoredAny>(text).ok()?;
    text.trim_start().starts_with('{').then_some(text)
}

fn refused<T>(why: &str) -> Result<T, StoreError> {
    Err(StoreError::Refused(why.into()))
}

fn no_stream<T>() -> Result<T, StoreError> {
    refused("NOSTREAM there is no stream with this id")
}

const OPEN: &str = "open";

/// Most streams of a session that are held.
const STREAMS_MAX: usize = 16;

/// Longest text.
const TEXT_BYTES_MAX: usize = 4 * 1024 * 1024;

const WORKER_LOST: &[u8] =
    br#"{"code":"worker_lost","message":"the worker stopped without ending the stream"}"#;

const REPLACED: &[u8] = br#"{"code":"replaced","message":"too many streams in this session"}"#;

#[cfg(test)]
mod tests {
    use super::*;

    fn command(stream: &str, op: StreamOp) -> StreamCommand {
        let ttl = Duration::from_secs(5);
        let limits = HistoryLimits { entries_max: 20, bytes_max: 1024 * 1024, ttl };
        let (session, stream) = (Id::parse("s").unwrap(), Id::parse(stream).unwrap());
        StreamCommand { session, stream, op, limits }
    }

    fn open() -> StreamOp {
        StreamOp::Open { meta: Bytes::new(), lease: Duration::from_secs(1) }
    }

    fn append(text: Vec<u8>) -> StreamOp {
        StreamOp::Append { text: text.into(), seq: None, lease: Duration::from_secs(1) }
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_stays_of_streams_that_have_expired() {
        let store = MemoryStore::default();
        for n in 0..20 {
            let stream = format!("stream-{n}");
            store.change(&command(&stream, open())).unwrap();
            store.change(&command(&stream, append(vec![b'x'; 1000]))).unwrap();
        }
        tokio::time::advance(Duration::from_secs(6)).await;
        let lapsed = store.lapsed_streams(100).unwrap();
        assert_eq!(lapsed.len(), 16);
        for (_, stream) in lapsed {
            let lost = store.change(&command(stream.as_str(), StreamOp::Lost));
            assert!(matches!(lost, Err(StoreError::Refused(why)) if why.starts_with("NOSTREAM")));
        }
        // What came last is known for a while.
        assert_eq!(store.state.lock().entries.len(), 1);
        tokio::time::advance(Duration::from_secs(4100)).await;
        store.state.lock().purge();
        let state = store.state.lock();
        assert_eq!((state.bytes, state.entries.len(), state.leases.len()), (0, 0, 0));
        assert!(state.by_expiry.is_empty());
    }

    #[test]
    fn a_full_store_refuses_text_and_keeps_what_it_has() {
        let store = MemoryStore::default();
        store.change(&command("a", open())).unwrap();
        let minute = Duration::from_secs(60);
        for n in 0..62 {
            store.save(&format!("key-{n}"), &vec![0; 1024 * 1024], minute).unwrap();
        }
        let mut accepted = 0;
        let refused = loop {
            match store.change(&command("a", append(vec![b'x'; 100_000]))) {
                Ok(_) => accepted += 1,
                Err(error) => break error,
            }
        };
        assert_eq!(refused, StoreError::Full);
        let state = store.state.lock();
        let streams = state.streams(&store.names, &Id::parse("s").unwrap(), usize::MAX).unwrap();
        assert_eq!(
            (streams[0].seq, streams[0].text.len()),
            (accepted, accepted as usize * 100_000)
        );
        assert!(state.bytes <= state.limits.bytes);
    }
}
