//! Counters of users' agents.

use wsproxy_conn::clock::Micros;
use wsproxy_proto::agents::outcome::Outcome;

use crate::{
    logic::upstream::UpstreamCounters,
    telemetry::{counter::Counter, throttle::Throttle},
};

/// Counters that the metrics read.
#[derive(Debug, Default)]
pub struct AgentCounters {
    /// Calls by outcome.
    pub calls: CallCounters,
    /// Invalid messages of agents.
    pub upstream: UpstreamCounters,
    /// Responses to calls that had ended.
    pub late: Counter,
    /// Responses to calls that were answered already.
    pub duplicate: Counter,
    /// Responses to calls that this connection was not sent.
    pub unknown: Counter,
    /// Calls that a connection handed on after it had left its place.
    pub handed_on: Counter,
    /// Calls that came again for the same caller while they were in flight.
    pub repeated: Counter,
    /// Connections that replaced one at this instance.
    pub replaced_here: Counter,
    /// Connections that replaced one at another instance.
    pub replaced_elsewhere: Counter,
    /// Connections that were refused, since the user's place changed its holder too often.
    pub flapping: Counter,
    /// Commands that were dropped, since it could not be known which connection they were for.
    pub in_doubt: Counter,
    /// Judged credentials.
    pub auth: AuthCounters,
    /// Commands that could not be read.
    pub bad_commands: Counter,
    /// Messages for agents, and progress, that were dropped.
    pub dropped: Counter,
    /// Throttle of log lines about places that change their holder too often.
    pub flapping_lines: Throttle,
    /// Throttle of log lines about places that could not be released.
    pub unreleased_lines: Throttle,
    /// Throttle of log lines about commands that could not be read.
    pub bad_command_lines: Throttle,
}

/// Judged credentials, by result.
#[derive(Debug, Default)]
pub struct AuthCounters {
    /// The secret was valid.
    pub accepted: Counter,
    /// The user is unknown, or the secret is wrong, expired or revoked.
    pub refused: Counter,
    /// There was no secret, or a malformed one.
    pub malformed: Counter,
    /// The database did not answer.
    pub unavailable: Counter,
    /// The address tried too often for this user.
    pub limited: Counter,
}

/// Ended calls, by outcome.
#[derive(Debug, Default)]
pub struct CallCounters([CallCounter; Outcome::ALL.len()]);

/// Ended calls of one outcome.
#[derive(Debug, Default)]
pub struct CallCounter {
    /// Number of calls.
    pub count: Counter,
    /// Calls that were sent to an agent, by time; not cumulative. The last one is beyond all bounds.
    pub times: [Counter; CALL_BUCKETS.len() + 1],
    /// Sum of these times, in microseconds.
    pub sum_micros: Counter,
}

impl CallCounters {
    /// Counts an ended call; `took` is `None` for a call that was not sent.
    pub fn count(&self, outcome: Outcome, took: Option<Micros>) {
        let counter = &self.0[outcome as usize];
        counter.count.add(1);
        if let Some(took) = took {
            let bucket = CALL_BUCKETS.partition_point(|&bound| bound < took.0);
            counter.times[bucket].add(1);
            counter.sum_micros.add(took.0);
        }
    }

    /// Returns the counters of an outcome.
    #[must_use]
    pub const fn of(&self, outcome: Outcome) -> &CallCounter {
        &self.0[outcome as usize]
    }
}

/// Upper bounds of the times of calls, in microseconds. Tools take longer than messages do.
pub const CALL_BUCKETS: [u64; 14] = [
    1_000,
    2_500,
    5_000,
    10_000,
    25_000,
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    5_000_000,
    15_000_000,
    60_000_000,
    300_000_000,
];
