//! The breaker of each cluster: after many failures at its upstream, requests are refused for a while. Knows neither
//! requests nor lanes; the caller brings the time and the chance.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use hashbrown::HashMap;
use parking_lot::Mutex;
use wsproxy_conn::clock::Micros;
use wsproxy_proto::names::Id;

use crate::config::tunnel::TunnelConfig;

/// Numbers of all breakers.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// Time over which outcomes are counted.
    window: Micros,
    /// Share of failures that opens a breaker.
    ratio: f64,
    /// Fewest outcomes that open it.
    outcomes_min: u32,
    /// First time for which it is open.
    open: Micros,
}

/// Outcome of a request, as far as it tells about the upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The upstream answered, with whatever status.
    Answered,
    /// The agent could not connect to the upstream, or waited for a head in vain; or the agent says that the upstream is
    /// not healthy.
    Failed,
    /// Neither: a lost lane, a client that left, an answer that breaks off.
    Unclear,
}

/// State of a breaker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Requests pass.
    Closed,
    /// Requests are refused.
    Open,
    /// One request is on its way to find out; a further one goes each time that it takes as long as the breaker was open.
    Trying,
}

impl State {
    /// Returns the value of the metric.
    #[must_use]
    pub const fn number(self) -> i64 {
        match self {
            Self::Closed => 0,
            Self::Open => 1,
            Self::Trying => 2,
        }
    }

    /// Returns the word for operators.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open => "open",
            Self::Trying => "trying",
        }
    }
}

/// The breakers of an instance.
///
/// Bound: at most [`CLUSTERS_MAX`] clusters have one. Those whose window is empty make room; beyond that, further clusters
/// have none.
#[derive(Debug)]
pub struct Breakers {
    rules: Rules,
    /// Guards the breakers; held for a few steps.
    clusters: Mutex<HashMap<Id, Breaker>>,
    /// Time of the last look for breakers that may go. It visits all, so it is done once a second at most.
    purged_at: AtomicU64,
}

/// Leave of a request to go to the upstream. Dropping it without an outcome counts as [`Outcome::Unclear`].
#[derive(Debug)]
pub struct Pass {
    breakers: Arc<Breakers>,
    cluster: Id,
    /// Number of the try; `None` for ordinary requests.
    trial: Option<u64>,
    is_reported: bool,
}

impl Rules {
    /// Takes the numbers of the configuration.
    #[must_use]
    pub fn new(config: &TunnelConfig) -> Self {
        Self {
            window: config.breaker_window.into(),
            ratio: config.breaker_ratio,
            outcomes_min: config.breaker_min,
            open: config.breaker_open.into(),
        }
    }
}

impl Breakers {
    /// Makes the breakers, all closed.
    #[must_use]
    pub fn new(rules: Rules) -> Arc<Self> {
        Arc::new(Self { rules, clusters: Mutex::default(), purged_at: AtomicU64::new(0) })
    }

    /// Lets a request pass.
    ///
    /// # Errors
    /// Time until the next request may find out whether the upstream answers again.
    pub fn admit(self: &Arc<Self>, cluster: &Id, now: Micros) -> Result<Pass, Duration> {
        let trial = match self.clusters.lock().get_mut(cluster) {
            Some(breaker) => breaker.admit(now)?,
            None => None,
        };
        let cluster = cluster.clone();
        Ok(Pass { breakers: Arc::clone(self), cluster, trial, is_reported: false })
    }

    /// Takes the health of an agent's upstream. One that is well closes the breaker.
    pub fn health(&self, cluster: &Id, is_ok: bool) {
        if is_ok {
            self.clusters.lock().remove(cluster);
        }
    }

    /// Returns the state of a cluster's breaker, and the time until the next try.
    #[must_use]
    pub fn state(&self, cluster: &Id, now: Micros) -> (State, Option<Duration>) {
        let clusters = self.clusters.lock();
        match clusters.get(cluster).map(|breaker| breaker.phase) {
            Some(Phase::Open { until, .. }) => (State::Open, Some(until.since(now).into())),
            Some(Phase::Trying { .. }) => (State::Trying, None),
            Some(Phase::Closed) | None => (State::Closed, None),
        }
    }

    /// Returns the states of the breakers that are not closed.
    #[must_use]
    pub fn open(&self) -> Vec<(Id, State)> {
        let clusters = self.clusters.lock();
        let open = clusters.iter().filter_map(|(cluster, breaker)| match breaker.phase {
            Phase::Closed => None,
            Phase::Open { .. } => Some((cluster.clone(), State::Open)),
            Phase::Trying { .. } => Some((cluster.clone(), State::Trying)),
        });
        open.collect()
    }

    /// Counts an outcome. `chance` is a random number from 0 to 1.
    fn count(
        &self,
        cluster: &Id,
        trial: Option<u64>,
        outcome: Outcome,
        (now, chance): (Micros, f64),
    ) {
        let mut clusters = self.clusters.lock();
        if !clusters.contains_key(cluster) {
            if outcome == Outcome::Unclear {
                return;
            }
            let since = now.0.saturating_sub(self.purged_at.load(Relaxed));
            if clusters.len() >= CLUSTERS_MAX && since >= PURGE_EVERY {
                self.purged_at.store(now.0, Relaxed);
                clusters.retain(|_, breaker| !breaker.is_idle(&self.rules, now));
            }
            if clusters.len() >= CLUSTERS_MAX {
                return;
            }
        }
        let breaker = clusters.entry_ref(cluster).or_default();
        breaker.count(&self.rules, trial, outcome, (now, chance));
    }
}

impl Pass {
    /// Reports the outcome. `chance` is a random number from 0 to 1, which spreads the tries of many instances.
    pub fn report(mut self, outcome: Outcome, now: Micros, chance: f64) {
        self.is_reported = true;
        self.breakers.count(&self.cluster, self.trial, outcome, (now, chance));
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        if !self.is_reported && self.trial.is_some() {
            let now = wsproxy_conn::clock::now();
            self.breakers.count(&self.cluster, self.trial, Outcome::Unclear, (now, 0.5));
        }
    }
}

/// Breaker of one cluster.
#[derive(Debug, Default)]
struct Breaker {
    phase: Phase,
    /// Outcomes in parts of the window.
    parts: [Part; PARTS],
    /// Number of the last try.
    trials: u64,
}

#[derive(Debug, Clone, Copy, Default)]
enum Phase {
    #[default]
    Closed,
    Open {
        until: Micros,
        /// Time for which it is open, without its jitter.
        span: Micros,
    },
    Trying {
        trial: u64,
        span: Micros,
        /// Time at which another request may try: this one has taken as long as the breaker was open.
        until: Micros,
    },
}

#[derive(Debug, Clone, Copy, Default)]
struct Part {
    /// Number of the part since the clock's start.
    number: u64,
    answered: u32,
    failed: u32,
}

impl Breaker {
    /// Lets a request pass, perhaps as the one try, whose number is returned.
    fn admit(&mut self, now: Micros) -> Result<Option<u64>, Duration> {
        match self.phase {
            Phase::Closed => Ok(None),
            Phase::Open { until, .. } if now < until => Err(until.since(now).into()),
            Phase::Trying { until, .. } if now < until => {
                Err(Duration::from(until.since(now)).min(WHILE_TRYING))
            }
            Phase::Open { span, .. } | Phase::Trying { span, .. } => {
                self.trials += 1;
                let (trial, until) = (self.trials, now.after(span));
                self.phase = Phase::Trying { trial, span, until };
                Ok(Some(trial))
            }
        }
    }

    fn count(
        &mut self,
        rules: &Rules,
        trial: Option<u64>,
        outcome: Outcome,
        (now, chance): (Micros, f64),
    ) {
        match self.phase {
            Phase::Closed => {
                let part = self.part(rules, now);
                match outcome {
                    Outcome::Answered => part.answered = part.answered.saturating_add(1),
                    Outcome::Failed => part.failed = part.failed.saturating_add(1),
                    Outcome::Unclear => return,
                }
                if self.has_failed(rules, now) {
                    self.open(rules.open, now, chance);
                }
            }
            // Requests that passed before the breaker opened change nothing. The answer of a slow try is as good as another.
            Phase::Open { .. } | Phase::Trying { .. }
                if trial.is_some() && outcome == Outcome::Answered =>
            {
                *self = Self { trials: self.trials, ..Self::default() };
            }
            Phase::Trying { trial: current, span, .. } if trial == Some(current) => {
                if outcome == Outcome::Failed {
                    let longer = Micros(span.0.saturating_mul(2)).min(OPEN_MAX);
                    self.open(longer.max(span), now, chance);
                } else {
                    // The next request tries.
                    self.phase = Phase::Open { until: now, span };
                }
            }
            Phase::Open { .. } | Phase::Trying { .. } => {}
        }
    }

    /// Opens the breaker for three quarters to five quarters of `span`.
    fn open(&mut self, span: Micros, now: Micros, chance: f64) {
        let jittered = span.0 as f64 * (0.75 + chance.clamp(0.0, 1.0) / 2.0);
        self.phase = Phase::Open { until: now.after(Micros(jittered as u64)), span };
        self.parts = Default::default();
    }

    fn part(&mut self, rules: &Rules, now: Micros) -> &mut Part {
        let number = part_number(rules, now);
        let part = &mut self.parts[(number % PARTS as u64) as usize];
        if part.number != number {
            *part = Part { number, ..Part::default() };
        }
        part
    }

    /// Returns the outcomes in the window: answered and failed.
    fn outcomes(&self, rules: &Rules, now: Micros) -> (u64, u64) {
        let newest = part_number(rules, now);
        let parts = self.parts.iter().filter(|part| part.number + PARTS as u64 > newest);
        parts.fold((0, 0), |(answered, failed), part| {
            (answered + u64::from(part.answered), failed + u64::from(part.failed))
        })
    }

    fn has_failed(&self, rules: &Rules, now: Micros) -> bool {
        let (answered, failed) = self.outcomes(rules, now);
        let all = answered + failed;
        all >= rules.outcomes_min.into() && failed > 0 && failed as f64 >= rules.ratio * all as f64
    }

    /// Returns whether nothing is lost with the breaker.
    fn is_idle(&self, rules: &Rules, now: Micros) -> bool {
        matches!(self.phase, Phase::Closed) && self.outcomes(rules, now) == (0, 0)
    }
}

/// Returns the number of the part of the window that `now` is in. Parts begin at 1, since 0 stands for none.
fn part_number(rules: &Rules, now: Micros) -> u64 {
    let span = (rules.window.0 / PARTS as u64).max(1);
    now.0 / span + PARTS as u64
}

/// Parts of a window. The oldest one leaves the window as a whole.
const PARTS: usize = 10;

/// Longest time for which a breaker is open, unless the configuration names a longer one.
const OPEN_MAX: Micros = Micros(60_000_000);

/// `Retry-After` while a request is on its way to find out.
const WHILE_TRYING: Duration = Duration::from_secs(1);

/// Microseconds between two looks for breakers that may go.
const PURGE_EVERY: u64 = 1_000_000;

/// Upper bound of the clusters with a breaker.
const CLUSTERS_MAX: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000;

    fn breakers() -> Arc<Breakers> {
        Breakers::new(Rules::new(&TunnelConfig::default()))
    }

    fn cluster() -> Id {
        Id::parse("c1").unwrap()
    }

    fn at(seconds: u64) -> Micros {
        Micros(1000 * SECOND + seconds * SECOND)
    }

    fn count(breakers: &Arc<Breakers>, outcomes: &[(Outcome, usize)], now: Micros) {
        for (outcome, times) in outcomes {
            for _ in 0..*times {
                let pass = breakers.admit(&cluster(), now);
                pass.unwrap().report(*outcome, now, 0.5);
            }
        }
    }

    fn opened(now: Micros) -> Arc<Breakers> {
        let breakers = breakers();
        count(&breakers, &[(Outcome::Failed, 20)], now);
        assert_eq!(breakers.state(&cluster(), now).0, State::Open);
        breakers
    }

    #[test]
    fn half_of_twenty_outcomes_open_a_breaker() {
        use Outcome::{Answered, Failed, Unclear};
        for (outcomes, expected) in [
            (&[(Failed, 19)][..], State::Closed),
            (&[(Failed, 20)], State::Open),
            (&[(Failed, 9), (Answered, 11)], State::Closed),
            (&[(Failed, 10), (Answered, 9)], State::Closed),
            (&[(Failed, 10), (Answered, 10)], State::Open),
            (&[(Answered, 10), (Failed, 9)], State::Closed),
            (&[(Answered, 10), (Failed, 10)], State::Open),
            (&[(Answered, 100), (Failed, 20)], State::Closed),
            (&[(Failed, 19), (Unclear, 100)], State::Closed),
            (&[(Answered, 1000)], State::Closed),
        ] {
            let breakers = breakers();
            count(&breakers, outcomes, at(0));
            assert_eq!(breakers.state(&cluster(), at(0)).0, expected, "{outcomes:?}");
        }
    }

    #[test]
    fn outcomes_leave_the_window() {
        let breakers = breakers();
        count(&breakers, &[(Outcome::Failed, 19)], at(0));
        count(&breakers, &[(Outcome::Failed, 1)], at(11));
        assert_eq!(breakers.state(&cluster(), at(11)).0, State::Closed);
        count(&breakers, &[(Outcome::Failed, 18)], at(12));
        assert_eq!(breakers.state(&cluster(), at(12)).0, State::Closed);
        count(&breakers, &[(Outcome::Failed, 1)], at(13));
        assert_eq!(breakers.state(&cluster(), at(13)).0, State::Open);
    }

    #[test]
    fn one_request_tries_and_its_answer_closes_the_breaker() {
        let breakers = opened(at(0));
        assert_eq!(breakers.admit(&cluster(), at(0)).unwrap_err(), Duration::from_secs(5));
        assert_eq!(breakers.admit(&cluster(), at(4)).unwrap_err(), Duration::from_secs(1));
        let trial = breakers.admit(&cluster(), at(5)).unwrap();
        assert_eq!(breakers.state(&cluster(), at(5)).0, State::Trying);
        assert_eq!(breakers.admit(&cluster(), at(5)).unwrap_err(), Duration::from_secs(1));
        assert_eq!(breakers.open(), [(cluster(), State::Trying)]);
        trial.report(Outcome::Answered, at(6), 0.5);
        assert_eq!(breakers.state(&cluster(), at(6)).0, State::Closed);
        // The failures before are forgotten.
        count(&breakers, &[(Outcome::Failed, 19)], at(6));
        assert_eq!(breakers.state(&cluster(), at(6)).0, State::Closed);
    }

    #[test]
    fn a_breaker_is_open_for_longer_and_longer() {
        let breakers = opened(at(0));
        let mut now = at(0);
        for seconds in [5, 10, 20, 40, 60, 60] {
            let wait = breakers.admit(&cluster(), now).unwrap_err();
            assert_eq!(wait, Duration::from_secs(seconds));
            now = now.after(wait.into());
            breakers.admit(&cluster(), now).unwrap().report(Outcome::Failed, now, 0.5);
        }
        breakers.health(&cluster(), false);
        assert_eq!(breakers.state(&cluster(), now).0, State::Open);
        breakers.health(&cluster(), true);
        assert_eq!(breakers.state(&cluster(), now).0, State::Closed);
        // From the beginning again.
        count(&breakers, &[(Outcome::Failed, 20)], now);
        assert_eq!(breakers.admit(&cluster(), now).unwrap_err(), Duration::from_secs(5));
    }

    #[test]
    fn the_time_of_a_try_is_jittered() {
        for (chance, millis) in [(0.0, 3750), (1.0, 6250), (7.0, 6250)] {
            let breakers = breakers();
            for _ in 0..20 {
                let pass = breakers.admit(&cluster(), at(0)).unwrap();
                pass.report(Outcome::Failed, at(0), chance);
            }
            let wait = breakers.admit(&cluster(), at(0)).unwrap_err();
            assert_eq!(wait, Duration::from_millis(millis));
        }
    }

    #[test]
    fn a_try_without_an_outcome_leaves_the_try_to_the_next_request() {
        // The clock of the drop is the process's.
        let opened_at = wsproxy_conn::clock::now();
        let tried_at = opened_at.after(Micros(5_000_000));
        let breakers = opened(opened_at);
        breakers.admit(&cluster(), tried_at).unwrap().report(Outcome::Unclear, tried_at, 0.5);
        for _ in 0..2 {
            let trial = breakers.admit(&cluster(), tried_at).unwrap();
            // One at a time.
            assert!(breakers.admit(&cluster(), tried_at).is_err());
            drop(trial);
            assert_eq!(breakers.state(&cluster(), tried_at).0, State::Open);
        }
    }

    #[test]
    fn a_try_without_an_answer_does_not_hold_up_the_next() {
        let breakers = opened(at(0));
        let slow = breakers.admit(&cluster(), at(5)).unwrap();
        assert_eq!(breakers.admit(&cluster(), at(9)).unwrap_err(), Duration::from_secs(1));
        // It has taken the five seconds for which the breaker was open.
        let second = breakers.admit(&cluster(), at(10)).unwrap();
        assert!(breakers.admit(&cluster(), at(10)).is_err());
        // Its failure is an old one, and its answer counts.
        second.report(Outcome::Failed, at(11), 0.5);
        assert_eq!(breakers.admit(&cluster(), at(11)).unwrap_err(), Duration::from_secs(10));
        slow.report(Outcome::Answered, at(12), 0.5);
        assert_eq!(breakers.state(&cluster(), at(12)).0, State::Closed);
        let breakers = opened(at(0));
        let slow = breakers.admit(&cluster(), at(5)).unwrap();
        let _second = breakers.admit(&cluster(), at(10)).unwrap();
        slow.report(Outcome::Failed, at(11), 0.5);
        assert_eq!(breakers.state(&cluster(), at(11)).0, State::Trying);
    }

    #[test]
    fn requests_from_before_do_not_close_an_open_breaker() {
        let breakers = breakers();
        let early: Vec<_> = (0..9).map(|_| breakers.admit(&cluster(), at(0)).unwrap()).collect();
        count(&breakers, &[(Outcome::Failed, 20)], at(0));
        let trial = breakers.admit(&cluster(), at(5)).unwrap();
        for pass in early {
            pass.report(Outcome::Answered, at(5), 0.5);
        }
        assert_eq!(breakers.state(&cluster(), at(5)).0, State::Trying);
        trial.report(Outcome::Failed, at(5), 0.5);
        assert_eq!(breakers.state(&cluster(), at(5)).0, State::Open);
    }

    #[test]
    fn clusters_have_breakers_of_their_own_and_few_at_once() {
        let breakers = opened(at(0));
        let other = Id::parse("c2").unwrap();
        assert!(breakers.admit(&other, at(0)).is_ok());
        for n in 0..2 * CLUSTERS_MAX {
            let id = Id::parse(&format!("x{n}")).unwrap();
            breakers.admit(&id, at(0)).unwrap().report(Outcome::Failed, at(0), 0.5);
        }
        assert_eq!(breakers.clusters.lock().len(), CLUSTERS_MAX);
        // Those whose failures have left the window make room.
        breakers.admit(&other, at(30)).unwrap().report(Outcome::Failed, at(30), 0.5);
        assert_eq!(breakers.clusters.lock().len(), 2);
    }
}
