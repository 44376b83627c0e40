//! The event streams that are open, for those who have to end them.

use std::sync::Arc;

use hashbrown::HashMap;
use parking_lot::Mutex;
use uuid::Uuid;
use wsproxy_conn::Runtime;
use wsproxy_proto::disconnect::Disconnect;

use crate::{http::line::Line, hub::tap::Tap};

/// All event streams of an instance.
#[derive(Debug, Default)]
pub struct OpenStreams(Mutex<HashMap<Uuid, OpenStream, foldhash::fast::RandomState>>);

/// One of them.
#[derive(Debug, Clone)]
pub struct OpenStream {
    id: Uuid,
    tap: Arc<Tap>,
    line: Arc<Line>,
}

/// An entry among [`OpenStreams`]; dropping it takes it out.
#[derive(Debug)]
pub struct Registered {
    streams: Arc<OpenStreams>,
    id: Uuid,
}

impl OpenStreams {
    /// Adds one, for as long as the answer lives.
    #[must_use]
    pub fn add(self: &Arc<Self>, id: Uuid, tap: &Arc<Tap>, line: Arc<Line>) -> Registered {
        self.0.lock().insert(id, OpenStream { id, tap: Arc::clone(tap), line });
        Registered { streams: Arc::clone(self), id }
    }

    /// All of them.
    #[must_use]
    pub fn list(&self) -> Vec<OpenStream> {
        self.0.lock().values().cloned().collect()
    }

    /// Where more waits in the process than may: ends streams as slow consumers, the worst first, as long as
    /// they hold more than any other connection.
    pub fn relieve(&self, runtime: &Runtime) {
        if !runtime.budget.is_exceeded() {
            return;
        }
        let others = runtime.links().iter().map(|link| link.queued_bytes()).max().unwrap_or(0);
        let streams = self.list().into_iter().map(|stream| (stream.tap.waiting_bytes(), stream));
        let mut streams: Vec<_> = streams.filter(|(bytes, _)| *bytes > others).collect();
        streams.sort_unstable_by_key(|(bytes, _)| *bytes);
        while runtime.budget.is_exceeded() {
            let Some((_, worst)) = streams.pop() else { break };
            worst.tap.cut_off(&Disconnect::SLOW);
        }
    }
}

impl OpenStream {
    /// The connection's id.
    #[must_use]
    pub const fn id(&self) -> Uuid {
        self.id
    }

    /// Ends it after all that waits for its client is written.
    pub fn finish(&self, why: &'static Disconnect) {
        self.tap.end(why);
    }

    /// Ends it now.
    pub fn abort(&self) {
        self.line.cut();
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let removed = self.streams.0.lock().remove(&self.id);
        drop(removed);
    }
}
