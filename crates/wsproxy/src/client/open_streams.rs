//! The open event streams of an instance, for the drain and for the budget of waiting bytes.

use std::sync::Arc;

use hashbrown::HashMap;
use parking_lot::Mutex;
use uuid::Uuid;
use wsproxy_conn::Runtime;
use wsproxy_proto::disconnect::Disconnect;

use crate::client::event_stream_outbox::EventStreamOutbox;

/// All event streams of an instance.
#[derive(Debug, Default)]
pub struct OpenStreams(Mutex<HashMap<Uuid, Arc<EventStreamOutbox>, foldhash::fast::RandomState>>);

/// Guard of a stream among [`OpenStreams`]. Dropping it removes the stream.
#[derive(Debug)]
pub struct Registered {
    streams: Arc<OpenStreams>,
    id: Uuid,
}

impl OpenStreams {
    /// Adds a stream until the returned guard is dropped.
    #[must_use]
    pub fn add(self: &Arc<Self>, outbox: &Arc<EventStreamOutbox>) -> Registered {
        let id = outbox.id();
        self.0.lock().insert(id, Arc::clone(outbox));
        Registered { streams: Arc::clone(self), id }
    }

    /// Returns all streams.
    #[must_use]
    pub fn list(&self) -> Vec<Arc<EventStreamOutbox>> {
        self.0.lock().values().cloned().collect()
    }

    /// Ends streams as slow consumers while the process's budget of waiting bytes is exceeded. The stream with the most
    /// bytes ends first, and only while it holds more than any WebSocket.
    pub fn relieve(&self, runtime: &Runtime) {
        if !runtime.budget.is_exceeded() {
            return;
        }
        let others = runtime.links().iter().map(|link| link.queued_bytes()).max().unwrap_or(0);
        let streams = self.list().into_iter().map(|stream| (stream.waiting_bytes(), stream));
        let mut streams: Vec<_> = streams.filter(|(bytes, _)| *bytes > others).collect();
        streams.sort_unstable_by_key(|(bytes, _)| *bytes);
        while runtime.budget.is_exceeded() {
            let Some((_, worst)) = streams.pop() else { break };
            worst.disconnect(&Disconnect::SLOW);
        }
    }

    /// Cuts off streams while the process's budget is still exceeded, those with the most bytes first that their sockets do
    /// not take: these bytes go only with their connection.
    pub fn cut_off(&self, runtime: &Runtime) {
        if !runtime.budget.is_exceeded() {
            return;
        }
        let streams = self.list().into_iter().map(|stream| (stream.stalled_bytes(), stream));
        let mut streams: Vec<_> = streams.filter(|(bytes, _)| *bytes > 0).collect();
        streams.sort_unstable_by_key(|(bytes, _)| *bytes);
        while runtime.budget.is_exceeded() {
            let Some((_, worst)) = streams.pop() else { break };
            worst.disconnect(&Disconnect::SLOW);
            // The stream's task frees them in a moment. Until then they must not end other streams.
            worst.set_stalled(0);
            worst.abort();
        }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let removed = self.streams.0.lock().remove(&self.id);
        // Free the stream outside the lock: it may be the last owner of many waiting bytes.
        drop(removed);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use wsproxy_conn::clock::Micros;

    use super::*;

    #[test]
    fn the_stream_with_the_most_stalled_bytes_is_cut_off() {
        let (runtime, streams) =
            (Runtime::new(1 << 20, Micros(0)), Arc::new(OpenStreams::default()));
        let open = |stalled| {
            let outbox = EventStreamOutbox::new(Uuid::now_v7(), 1000, Arc::clone(&runtime), None);
            outbox.set_stalled(stalled);
            (streams.add(&outbox), outbox)
        };
        let [worst, other, healthy] = [700_000, 500_000, 0].map(open);
        let is_cut = |(_, outbox): &(Registered, Arc<EventStreamOutbox>)| {
            outbox.wait_aborted().now_or_never().is_some()
        };
        streams.cut_off(&runtime);
        assert_eq!([&worst, &other, &healthy].map(is_cut), [true, false, false]);
        assert!(worst.1.is_closed() && !other.1.is_closed());
        assert_eq!(runtime.budget.used(), 500_000, "these bytes end no other stream");
        streams.cut_off(&runtime);
        assert_eq!([&worst, &other, &healthy].map(is_cut), [false; 3]);
        // All of them, where no stream alone is enough.
        for (_, outbox) in [&worst, &other, &healthy] {
            outbox.set_stalled(1 << 20);
        }
        streams.cut_off(&runtime);
        assert_eq!([&worst, &other, &healthy].map(is_cut).iter().filter(|is| **is).count(), 2);
    }
}
