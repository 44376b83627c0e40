//! Token streams in the embedded store, with the rules and messages of the script on Redis.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{sync::oneshot, time::Instant};
use wsproxy_proto::{
    history::{Envelope, Position},
    names::{Id, Names},
};

use wsproxy_proto::history::HistoryLimits;

use crate::{
    embedded::{
        request::EmbeddedRequest,
        store::{ENTRY_BYTES, EmbeddedStore, Held, StoreState, StoredValue, expiry, wrong_kind},
    },
    queue::Back,
    store::{
        command::StoreError,
        token_streams::{
            StreamCommand, StreamError, StreamHead, StreamOp, StreamOutcome, StreamState,
        },
    },
};

/// A token stream of a session.
pub(super) struct TokenStream {
    /// The outcome; `None` while the stream is open.
    outcome: Option<StreamOutcome>,
    seq: u64,
    /// Position of the last message.
    id: Position,
    text: Vec<u8>,
    meta: Bytes,
    error: Bytes,
    lease_ends: Instant,
}

/// Result of a command.
pub(crate) struct Changed {
    /// The stream's head after the command.
    pub(crate) head: StreamHead,
    /// Messages for the session's channel, in envelopes.
    pub(crate) messages: Vec<Vec<u8>>,
}

impl EmbeddedStore {
    /// Sends a command to the reader of the bus, which changes streams, so that ids and deliveries have one order.
    pub(crate) async fn stream(&self, command: StreamCommand) -> Result<StreamHead, StreamError> {
        let bytes = ENTRY_BYTES + command.op.bytes();
        let (caller, answer) = oneshot::channel();
        let request = EmbeddedRequest::Stream(Box::new(command), caller);
        self.requests.push(request, bytes).map_err(|(back, _)| match back {
            Back::Full => StoreError::Full,
            Back::Closed => StoreError::Closed,
        })?;
        answer.await.unwrap_or_else(|_| Err(StoreError::Closed.into()))
    }

    /// Does a command; called by the reader of the bus.
    pub(crate) fn change(&self, command: &StreamCommand) -> Result<Changed, StreamError> {
        let names = &self.names;
        let StreamCommand { session, stream, op, limits } = command;
        let mut state = self.state.lock();
        state.purge();
        let mut change = StreamChange {
            state: &mut state,
            names,
            session,
            limits: *limits,
            log: names.log(&names.session_down(session)),
            messages: Vec::new(),
        };
        let head = match op {
            StreamOp::Open { meta, lease } => change.open(stream, meta, *lease),
            StreamOp::Append { text, seq, lease } => change.append(stream, text, *seq, *lease),
            StreamOp::Renew { lease } => change.renew(stream, *lease),
            StreamOp::End { outcome, error } => change.end(stream, *outcome, error),
            StreamOp::Lost => change.lost(stream),
        }?;
        Ok(Changed { head, messages: change.messages })
    }

    pub(crate) fn lapsed_streams(&self, count: usize) -> Result<Vec<(Id, Id)>, StoreError> {
        let state = self.state.lock();
        let now = Instant::now();
        let lapsed = state.leases.iter().take_while(|(ends, _, _)| *ends <= now).take(count);
        let ids =
            |session: &str, stream: &str| Some((Id::parse(session).ok()?, Id::parse(stream).ok()?));
        Ok(lapsed.filter_map(|(_, session, stream)| ids(session, stream)).collect())
    }
}

impl StoreState {
    /// Returns the streams of a session in the order of their opening; only the newest if all together are too large.
    pub(super) fn streams(
        &self,
        names: &Names,
        session: &Id,
        bytes_max: usize,
    ) -> Result<Vec<StreamState>, StoreError> {
        let ids = match self.held(&names.session_streams(session)) {
            None => return Ok(Vec::new()),
            Some(StoredValue::Index(ids)) => ids,
            Some(_) => return Err(wrong_kind()),
        };
        let mut streams = Vec::new();
        let mut bytes = 0;
        for id in ids.iter().rev() {
            let key = format!("{}{id}", names.stream_prefix(session));
            let Some(StoredValue::Stream(stream)) = self.held(&key) else { continue };
            bytes += stream.text.len();
            if !streams.is_empty() && bytes > bytes_max {
                break;
            }
            streams.push(StreamState {
                stream: (&**id).into(),
                state: stream.outcome.map_or(OPEN, StreamOutcome::label).into(),
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

/// A command that is being done.
struct StreamChange<'a> {
    state: &'a mut StoreState,
    names: &'a Names,
    session: &'a Id,
    limits: HistoryLimits,
    log: String,
    messages: Vec<Vec<u8>>,
}

impl StreamChange<'_> {
    fn open(&mut self, id: &Id, meta: &Bytes, lease: Duration) -> Result<StreamHead, StreamError> {
        let meta = if meta.is_empty() { Bytes::from_static(b"{}") } else { meta.clone() };
        match self.state.held(&self.key(id.as_str())) {
            None => {}
            Some(StoredValue::Stream(held))
                if held.is_open() && held.seq == 0 && held.meta == meta =>
            {
                return Ok(held.head());
            }
            Some(_) => return Err(StreamError::Exists),
        }
        let Some(text) = object(&meta) else { return Err(StreamError::BadJson) };
        let position = self.publish("open", id.as_str(), &format!(",\"meta\":{text}"))?;
        let stream = TokenStream {
            outcome: None,
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
            Some((_, Held { value: StoredValue::Index(ids), .. })) => ids,
            _ => Vec::new(),
        };
        ids.push(id.as_str().into());
        while ids.len() > STREAMS_MAX {
            self.forget(&ids.remove(0))?;
        }
        let bytes = index.len() + ids.len() * ENTRY_BYTES;
        let expires = expiry(Instant::now(), self.limits.ttl);
        self.state.insert(index.into(), Held { value: StoredValue::Index(ids), bytes, expires });
        Ok(StreamHead { seq: 0, id: position })
    }

    fn append(
        &mut self,
        id: &Id,
        text: &Bytes,
        seq: Option<u64>,
        lease: Duration,
    ) -> Result<StreamHead, StreamError> {
        let limits = self.state.limits;
        let bytes_free = (limits.bytes.saturating_sub(self.state.bytes))
            .min(limits.log_bytes.saturating_sub(self.state.log_bytes));
        let held = self.held(id)?;
        let last = held.seq;
        if last > 0 && seq == Some(last) && held.text.ends_with(text) {
            return Ok(held.head());
        }
        held.check_open()?;
        if seq.is_some_and(|seq| seq != last + 1) {
            return Err(StreamError::WrongSeq { last });
        }
        if held.text.len() + text.len() > TEXT_BYTES_MAX {
            return Err(StreamError::TooLarge);
        }
        // The text is held twice: here and in the log.
        if 2 * text.len() + 2 * ENTRY_BYTES > bytes_free {
            return Err(StoreError::Full.into());
        }
        let seq = last + 1;
        let json = serde_json::to_string(&String::from_utf8_lossy(text)).unwrap_or_default();
        let position =
            self.publish("append", id.as_str(), &format!(",\"seq\":{seq},\"text\":{json}"))?;
        self.update(id.as_str(), Some(lease), |stream| {
            (stream.seq, stream.id) = (seq, position);
            stream.text.extend_from_slice(text);
        });
        Ok(StreamHead { seq, id: position })
    }

    fn renew(&mut self, id: &Id, lease: Duration) -> Result<StreamHead, StreamError> {
        let held = self.held(id)?;
        held.check_open()?;
        let head = held.head();
        self.update(id.as_str(), Some(lease), |_| {});
        Ok(head)
    }

    fn end(
        &mut self,
        id: &Id,
        outcome: StreamOutcome,
        error: &Bytes,
    ) -> Result<StreamHead, StreamError> {
        let held = self.held(id)?;
        if held.outcome == Some(outcome) && held.error == error {
            return Ok(held.head());
        }
        held.check_open()?;
        if !error.is_empty() && object(error).is_none() {
            return Err(StreamError::BadJson);
        }
        self.close(id.as_str(), outcome, error.clone())
    }

    fn lost(&mut self, id: &Id) -> Result<StreamHead, StreamError> {
        let Ok(held) = self.held(id) else {
            self.state.leases.retain(|(_, session, stream)| {
                (&**session, &**stream) != (self.session.as_str(), id.as_str())
            });
            return Err(StreamError::NotFound);
        };
        held.check_open()?;
        if held.lease_ends > Instant::now() {
            return Err(StreamError::LeaseRuns);
        }
        self.close(id.as_str(), StreamOutcome::Error, Bytes::from_static(WORKER_LOST))
    }

    fn close(
        &mut self,
        id: &str,
        outcome: StreamOutcome,
        error: Bytes,
    ) -> Result<StreamHead, StreamError> {
        let seq = match self.state.held(&self.key(id)) {
            Some(StoredValue::Stream(stream)) => stream.seq,
            _ => return Err(StreamError::NotFound),
        };
        let mut rest = format!(",\"outcome\":\"{}\",\"seq\":{seq}", outcome.label());
        if let Some(error) = object(&error) {
            rest = format!("{rest},\"error\":{error}");
        }
        let position = self.publish("end", id, &rest)?;
        self.update(id, None, |stream| {
            (stream.outcome, stream.error, stream.id) = (Some(outcome), error, position);
        });
        Ok(StreamHead { seq, id: position })
    }

    /// Removes a stream to make room for another one, and publishes its end if it is open.
    fn forget(&mut self, id: &str) -> Result<(), StreamError> {
        let key = self.key(id);
        if matches!(self.state.held(&key), Some(StoredValue::Stream(stream)) if stream.is_open()) {
            self.close(id, StreamOutcome::Error, Bytes::from_static(REPLACED))?;
        }
        self.state.remove(&key);
        Ok(())
    }

    fn publish(&mut self, kind: &str, id: &str, rest: &str) -> Result<Position, StoreError> {
        // An id has no character that JSON must escape.
        let message = format!("{{\"type\":\"stream_{kind}\",\"stream\":\"{id}\"{rest}}}");
        let payload = Bytes::from(message);
        let (id, prev) = self.state.append(&self.log, None, payload.clone(), self.limits)?;
        self.messages.push(Envelope { id, prev, event_id: None, payload: &payload }.encode());
        Ok(id)
    }

    fn held(&self, id: &Id) -> Result<&TokenStream, StreamError> {
        match self.state.held(&self.key(id.as_str())) {
            Some(StoredValue::Stream(stream)) => Ok(stream),
            None => Err(StreamError::NotFound),
            Some(_) => Err(wrong_kind().into()),
        }
    }

    /// Changes a stream, renews its time to live, and sets a new lease or none.
    fn update(&mut self, id: &str, lease: Option<Duration>, change: impl FnOnce(&mut TokenStream)) {
        if let Some((_, Held { value: StoredValue::Stream(mut stream), .. })) =
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
        self.state.insert(key.into(), Held { value: StoredValue::Stream(stream), bytes, expires });
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
    const fn head(&self) -> StreamHead {
        StreamHead { seq: self.seq, id: self.id }
    }

    const fn is_open(&self) -> bool {
        self.outcome.is_none()
    }

    fn check_open(&self) -> Result<(), StreamError> {
        self.outcome.map_or(Ok(()), |outcome| Err(StreamError::Ended(outcome)))
    }
}

/// Returns the text of a JSON object; `None` if it is no object.
fn object(json: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(json).ok()?;
    serde_json::from_str::<serde::de::IgnoredAny>(text).ok()?;
    text.trim_start().starts_with('{').then_some(text)
}

const OPEN: &str = "open";

/// Upper bound of the streams of a session.
const STREAMS_MAX: usize = 16;

/// Longest text of a stream.
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
        let store = EmbeddedStore::default();
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
            assert!(matches!(lost, Err(StreamError::NotFound)));
        }
        // The store knows the last append for a while.
        assert_eq!(store.state.lock().entries.len(), 1);
        tokio::time::advance(Duration::from_secs(4100)).await;
        store.state.lock().purge();
        let state = store.state.lock();
        assert_eq!((state.bytes, state.entries.len(), state.leases.len()), (0, 0, 0));
        assert!(state.by_expiry.is_empty());
    }

    #[test]
    fn a_full_store_refuses_text_and_keeps_what_it_has() {
        let store = EmbeddedStore::default();
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
        assert_eq!(refused, StoreError::Full.into());
        let state = store.state.lock();
        let streams = state.streams(&store.names, &Id::parse("s").unwrap(), usize::MAX).unwrap();
        assert_eq!(
            (streams[0].seq, streams[0].text.len()),
            (accepted, accepted as usize * 100_000)
        );
        assert!(state.bytes <= state.limits.bytes);
    }
}
