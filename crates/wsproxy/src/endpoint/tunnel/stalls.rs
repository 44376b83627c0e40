//! Watch of the task that reads a lane: bytes wait in its socket, and it reads none. Knows no streams.

use std::{convert::Infallible, time::Duration};

use tokio::time::{MissedTickBehavior, interval};
use tracing::error;
use wsproxy_conn::{lane::LaneHandle, socket::unread::UnreadBytes};

use crate::endpoint::tunnel::{counters::TunnelCounters, lanes::LaneName};

/// Looks at the reader of a lane until the caller drops the future, and counts its stalls.
pub(super) async fn watch(
    counters: &TunnelCounters,
    name: &LaneName,
    handle: &LaneHandle,
    unread: &UnreadBytes,
) -> Infallible {
    let mut looks = interval(LOOK_EVERY);
    // Looks that a pause of the process left out tell nothing of the reader.
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut reader = Reader::default();
    loop {
        looks.tick().await;
        if reader.is_stalled(handle.bytes_received(), unread.count()) {
            counters.reader_stalls.add(1);
            let LaneName { cluster, agent, number, .. } = name;
            error!(%cluster, %agent, number, "A lane is not read, though bytes wait in its socket.");
        }
    }
}

/// Reader of a lane, as it was seen at the last looks.
#[derive(Debug, Default)]
struct Reader {
    received: u64,
    /// Looks in a row that found bytes and no progress.
    stalled: u32,
}

impl Reader {
    /// Returns whether a stall has just become one, at a look that found these numbers of bytes.
    const fn is_stalled(&mut self, received: u64, unread: u64) -> bool {
        let has_progress = received != self.received;
        self.received = received;
        if has_progress || unread == 0 {
            self.stalled = 0;
            return false;
        }
        self.stalled = self.stalled.saturating_add(1);
        self.stalled == LOOKS
    }
}

const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Looks without progress that make a stall: the first one begins it, and five seconds pass.
const LOOKS: u32 = 6;

#[cfg(test)]
mod tests {
    use wsproxy_conn::{
        lane::{self, LaneSettings},
        socket::Socket,
    };
    use wsproxy_proto::{
        names::Id,
        tunnel::memory::{Memory, MemoryLimits},
    };

    use super::*;

    #[test]
    fn a_stall_counts_once_and_ends_with_progress() {
        let mut reader = Reader::default();
        let mut stalls = |received, unread| reader.is_stalled(received, unread);
        assert_eq!((0..20).filter(|_| stalls(0, 0)).count(), 0, "an idle lane");
        assert_eq!((0..20).filter(|n| stalls(*n, 9)).count(), 0, "a busy one");
        assert_eq!((0..5).filter(|_| stalls(19, 9)).count(), 0);
        assert!(stalls(19, 9));
        assert_eq!((0..20).filter(|_| stalls(19, 9)).count(), 0);
        assert!(!stalls(20, 9));
        assert_eq!((0..6).filter(|_| stalls(20, 9)).count(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_lane_that_nothing_reads_is_counted() {
        let (ours, theirs) = tokio::net::UnixStream::pair().unwrap();
        let (socket, id) = (Socket::from(ours), |text| Id::parse(text).unwrap());
        let unread = socket.unread_bytes().unwrap();
        let memory = Memory::new(MemoryLimits::default());
        let lane = lane::gateway(socket, &[], LaneSettings::default(), memory);
        let (_driver, handle) = lane.unwrap();
        let name = LaneName { cluster: id("c1"), agent: id("a"), boot: [0; 16], number: 1 };
        let counters = TunnelCounters::default();
        let look = async |time| {
            let watch = watch(&counters, &name, &handle, &unread);
            let _ = tokio::time::timeout(Duration::from_secs(time), watch).await;
            counters.reader_stalls.value()
        };
        assert_eq!(look(20).await, 0);
        assert_eq!(theirs.try_write(b"bytes").unwrap(), 5);
        assert_eq!(look(4).await, 0);
        assert_eq!(look(20).await, 1);
    }
}
