//! The keys that an issuer publishes, kept up to date by one task; knows no claims.

use std::{sync::Arc, time::Duration};

use jsonwebtoken::Algorithm;
use serde_json::{Map, Value};
use tokio::{sync::watch, time::Instant};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, info, warn};

use crate::{
    auth::{
        jwks::fetch::{FetchError, Fetcher},
        jwt::{self, JwtError},
        key::JwtKey,
    },
    config,
    telemetry::{
        counter::Counter,
        scrape::{Scrape, Section, Source},
    },
};

mod fetch;

/// An issuer's keys.
///
/// Known keys stay in use while the issuer cannot be reached. The next successful fetch removes keys that the issuer no
/// longer publishes.
pub(super) struct Jwks {
    state: watch::Sender<State>,
    algorithms: Vec<Algorithm>,
    /// Time limit of one fetch, and so of every handshake that waits for one.
    timeout: Duration,
    pub(super) counters: JwksCounters,
}

/// Counters of fetches.
#[derive(Debug, Default)]
pub struct JwksCounters {
    /// Fetches that began.
    pub fetches: Counter,
    /// Fetches that brought no keys.
    pub failures: Counter,
}

impl Source for JwksCounters {
    fn collect(&self, scrape: &mut Scrape) {
        let scrape = scrape.section(Section::Issuers);
        let help = "Fetches of the keys of the issuer of tokens";
        scrape.counter("jwks_fetches", help, self.fetches.value());
        let help = "Of these, fetches without keys: the known ones stay in use";
        scrape.counter("jwks_fetch_failures", help, self.failures.value());
    }
}

/// The key that a token names.
pub(super) struct Lookup<'a> {
    pub(super) token: &'a str,
    pub(super) id: Option<&'a str>,
    pub(super) algorithm: Algorithm,
}

#[derive(Default)]
struct State {
    /// `None` until a fetch succeeded.
    keys: Option<Arc<[JwtKey]>>,
    /// Fetches that have ended.
    fetched: u64,
    phase: Phase,
    /// Set if the newest fetch brought no keys.
    failed: bool,
    /// Time at which the newest fetch for a token began.
    asked: Option<Instant>,
}

#[derive(Default, Clone, Copy, PartialEq, Eq)]
enum Phase {
    #[default]
    Fetching,
    Resting,
    /// A handshake asks for a fetch before the next one is due.
    Wanted,
}

impl Jwks {
    /// Starts fetching on `tasks`, until `end`.
    pub(super) fn start(
        config: &config::JwtConfig,
        url: &str,
        tasks: &TaskTracker,
        end: CancellationToken,
    ) -> Result<Arc<Self>, String> {
        let fetcher = Fetcher::new(url, config.ca_file.as_deref(), config.jwks_timeout, tasks)?;
        if fetcher.is_exposed() {
            warn!(
                "jwt.jwks_url is not https: a third party on the network path can replace the keys and sign tokens."
            );
        }
        let jwks = Arc::new(Self {
            state: watch::Sender::new(State::default()),
            algorithms: config.algorithms.clone(),
            timeout: config.jwks_timeout,
            counters: JwksCounters::default(),
        });
        tasks.spawn(Arc::clone(&jwks).run(fetcher, config.jwks_refresh, end));
        Ok(jwks)
    }

    /// Returns the unchecked claims of a token if a known key signed it.
    pub(super) fn open(&self, wanted: &Lookup<'_>) -> Result<Map<String, Value>, JwtError> {
        let keys = self.state.borrow().keys.clone().ok_or(JwtError::Unavailable)?;
        let named = |key: &JwtKey| wanted.id.is_none_or(|id| key.id.as_deref() == Some(id));
        let fitting = keys.iter().filter(|key| named(key) && key.is_for(wanted.algorithm));
        let mut result = Err(JwtError::UnknownKey);
        for key in fitting.take(KEYS_TRIED_MAX) {
            match key.open(wanted.token).map_err(|error| jwt::cause(&error)) {
                // The token names no key, so another key may still have signed it.
                Err(JwtError::Signature) if wanted.id.is_none() => {}
                Err(JwtError::Signature) => result = Err(JwtError::Signature),
                decided => return decided,
            }
        }
        result
    }

    /// Waits for a running fetch, or for one that begins at once unless a token caused one a moment ago.
    ///
    /// # Errors
    /// The verdict on a token with an unknown key, if there is no fetch to wait for.
    pub(super) async fn ask_again(&self) -> Result<(), JwtError> {
        let mut changes = self.state.subscribe();
        let mut before = Ok(0);
        self.state.send_if_modified(|state| {
            let often = state.asked.is_some_and(|asked| asked.elapsed() < ASK_EVERY);
            before = Ok(state.fetched);
            let asks = state.phase == Phase::Resting;
            if asks && often {
                before = Err(state.verdict());
                return false;
            }
            if asks {
                (state.phase, state.asked) = (Phase::Wanted, Some(Instant::now()));
            }
            asks
        });
        let before = before?;
        let fetched = changes.wait_for(|state| state.fetched != before);
        match tokio::time::timeout(self.timeout, fetched).await {
            Ok(Ok(state)) if !state.failed => Ok(()),
            _ => Err(JwtError::Unavailable),
        }
    }

    async fn run(self: Arc<Self>, fetcher: Fetcher, refresh: Duration, end: CancellationToken) {
        let mut changes = self.state.subscribe();
        let mut failures = 0_u32;
        loop {
            self.counters.fetches.add(1);
            let fetched = tokio::select! {
                () = end.cancelled() => return,
                fetched = fetcher.fetch() => fetched,
            };
            let keys = fetched.and_then(|body| self.read(&body));
            match &keys {
                Ok(_) => failures = 0,
                Err(error) => {
                    failures += 1;
                    self.counters.failures.add(1);
                    warn!(%error, failures, "The issuer's keys could not be fetched.");
                }
            }
            self.state.send_modify(|state| {
                state.phase = Phase::Resting;
                state.fetched += 1;
                state.failed = keys.is_err();
                if let Ok(keys) = keys {
                    state.keys = Some(keys.into());
                }
            });
            tokio::select! {
                () = end.cancelled() => return,
                () = tokio::time::sleep(pause(failures, refresh)) => {}
                _ = changes.wait_for(|state| state.phase == Phase::Wanted) => {}
            }
            self.state.send_modify(|state| state.phase = Phase::Fetching);
        }
    }

    /// Returns the usable keys of a document.
    fn read(&self, body: &[u8]) -> Result<Vec<JwtKey>, FetchError> {
        #[derive(serde::Deserialize)]
        struct Set {
            keys: Vec<Value>,
        }
        let set: Set = serde_json::from_slice(body).map_err(|error| FetchError::Malformed {
            line: error.line(),
            column: error.column(),
        })?;
        let mut keys = Vec::new();
        for jwk in &set.keys {
            match JwtKey::jwk(jwk, &self.algorithms) {
                Ok(key) => keys.push(key),
                Err(problem) => debug!("A published key is left out, since it {problem}."),
            }
        }
        let (known, published) = (self.state.borrow().keys.clone(), set.keys.len());
        if keys.is_empty() && known.is_none() {
            return Err(FetchError::NoKey { published });
        }
        if keys.is_empty() {
            // An issuer withdraws stolen keys with an empty set: then no token may be accepted.
            warn!(published, "The issuer publishes no usable key any more: no token is accepted.");
        } else if known
            .is_none_or(|known| !known.iter().map(|k| &k.id).eq(keys.iter().map(|k| &k.id)))
        {
            info!(keys = keys.len(), published, "The issuer's keys have changed.");
        }
        Ok(keys)
    }
}

impl State {
    fn verdict(&self) -> JwtError {
        if self.failed || self.keys.is_none() {
            JwtError::Unavailable
        } else {
            JwtError::UnknownKey
        }
    }
}

/// Returns the pause after a fetch, with jitter, so that instances do not ask together.
fn pause(failures: u32, refresh: Duration) -> Duration {
    let pause = match failures {
        0 => refresh,
        n => RETRY_FIRST.saturating_mul(1 << (n - 1).min(16)).min(RETRY_LAST).min(refresh),
    };
    pause.mul_f64(rand::random_range(0.9..1.1))
}

/// Shortest time between two fetches for tokens with unknown keys.
const ASK_EVERY: Duration = Duration::from_secs(10);

/// Upper bound of keys that are tried for a token that names none.
const KEYS_TRIED_MAX: usize = 8;

const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_LAST: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_minute_but_not_beyond_the_refresh() {
        let about = |pause: Duration, seconds: f64| {
            let ratio = pause.as_secs_f64() / seconds;
            assert!((0.9..1.1).contains(&ratio), "{pause:?} is not about {seconds} s");
        };
        let refresh = Duration::from_secs(600);
        for (failures, seconds) in [(0, 600.0), (1, 1.0), (4, 8.0), (7, 60.0), (u32::MAX, 60.0)] {
            about(pause(failures, refresh), seconds);
        }
        about(pause(9, Duration::from_secs(10)), 10.0);
    }
}
