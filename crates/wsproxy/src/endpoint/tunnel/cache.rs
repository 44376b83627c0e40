//! Answers that are kept for a short time, where an operator has named the pattern of their path. Knows neither lanes nor
//! bodies that flow; the caller brings the time.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use aws_lc_rs::digest;
use bytes::Bytes;
use hashbrown::HashMap;
use http::{HeaderMap, Method, StatusCode, header};
use parking_lot::Mutex;
use wsproxy_conn::clock::Micros;
use wsproxy_proto::{names::Id, tunnel::headers::Headers};

use crate::{
    config::tunnel::rows::{CacheRule, TokenHash},
    endpoint::tunnel::{path, patterns::Pattern},
};

/// The cache of an instance.
///
/// Bound: [`ANSWER_BYTES_MAX`] for each answer and [`BYTES_MAX`] for all, with their heads. The oldest leave. Those that are
/// collected take [`COLLECTING_BYTES_MAX`].
#[derive(Debug, Default)]
pub struct Cache {
    rules: Vec<(Pattern, Micros)>,
    /// Guards the answers; held for a few steps.
    kept: Mutex<Kept>,
    /// Bytes of bodies that are collected while they pass.
    collecting: AtomicUsize,
}

#[derive(Debug, Default)]
struct Kept {
    answers: HashMap<Key, (u64, Arc<Answer>)>,
    /// Keys in the order in which their answers came.
    order: BTreeMap<u64, Key>,
    last: u64,
    bytes: usize,
}

/// Request whose answer may be kept. Two requests with one key get one answer.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Key {
    cluster: Id,
    credential: TokenHash,
    /// Path and query.
    target: Box<str>,
    /// SHA-256 of the headers for the upstream that are not [neutral](is_neutral), since some of them are credentials.
    headers: [u8; 32],
}

/// Answer that is kept.
#[derive(Debug)]
pub struct Answer {
    /// Headers for the client.
    pub headers: HeaderMap,
    /// Body.
    pub body: Bytes,
    at: Micros,
    until: Micros,
    bytes: usize,
}

impl Answer {
    /// Returns the value of `Age`, in seconds.
    #[must_use]
    pub const fn age(&self, now: Micros) -> u64 {
        now.since(self.at).0 / 1_000_000
    }
}

/// Body that is collected while it passes. It is kept when it is complete and small enough.
#[derive(Debug)]
pub struct Collector {
    key: Key,
    headers: HeaderMap,
    ttl: Micros,
    /// `None`: the body is too large.
    body: Option<Collected>,
}

/// Request for which the cache may be asked.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// Cluster.
    pub cluster: &'a Id,
    /// Hash of the client's credential.
    pub credential: TokenHash,
    /// Method.
    pub method: &'a Method,
    /// Path and query.
    pub target: &'a str,
    /// Headers for the upstream.
    pub headers: Headers<'a>,
    /// There is a body, or an upgrade is asked for.
    pub is_more: bool,
}

impl Cache {
    /// Makes an empty cache with these rules. Without a rule nothing is kept.
    #[must_use]
    pub fn new(rules: &[CacheRule]) -> Arc<Self> {
        let rule = |rule: &CacheRule| (Pattern::new(&rule.pattern), rule.ttl.min(TTL_MAX).into());
        Arc::new(Self { rules: rules.iter().map(rule).collect(), ..Self::default() })
    }

    /// Returns the key of a request whose answer may be kept, and for how long.
    #[must_use]
    pub fn key(&self, asked: &Asked<'_>) -> Option<(Key, Duration)> {
        if self.rules.is_empty() || asked.method != Method::GET {
            return None;
        }
        let path = path::without_query(asked.target);
        let (_, ttl) = self.rules.iter().find(|(pattern, _)| pattern.fits(path))?;
        let (_, query) = asked.target.split_once('?').unwrap_or_default();
        let lasts = query.split('&').any(|pair| {
            let name = pair.split('=').next();
            matches!(name, Some("watch" | "follow"))
        });
        let is_for_one = |(name, _): (&[u8], _)| BYPASSING.iter().any(|one| one.as_bytes() == name);
        if lasts || asked.is_more || asked.headers.iter().any(is_for_one) {
            return None;
        }
        let key = Key {
            cluster: asked.cluster.clone(),
            credential: asked.credential,
            target: asked.target.into(),
            headers: selected(asked.headers),
        };
        Some((key, (*ttl).into()))
    }

    /// Returns the answer of a key that is still fresh.
    #[must_use]
    pub fn find(&self, key: &Key, now: Micros) -> Option<Arc<Answer>> {
        let mut kept = self.kept.lock();
        let (number, answer) = kept.answers.get(key)?;
        if now < answer.until {
            return Some(Arc::clone(answer));
        }
        let number = *number;
        kept.remove(number);
        None
    }

    /// Begins to collect an answer; `None` where it may not be kept.
    #[must_use]
    pub fn collect(
        self: &Arc<Self>,
        key: Key,
        ttl: Duration,
        status: StatusCode,
        headers: &HeaderMap,
    ) -> Option<Collector> {
        if status != StatusCode::OK || !may_be_kept(headers) {
            return None;
        }
        let body = Collected { cache: Arc::clone(self), bytes: Vec::new() };
        Some(Collector { key, headers: headers.clone(), ttl: ttl.into(), body: Some(body) })
    }

    fn put(&self, key: Key, answer: Answer) {
        let mut kept = self.kept.lock();
        if let Some((number, _)) = kept.answers.get(&key) {
            let number = *number;
            kept.remove(number);
        }
        kept.bytes += answer.bytes;
        kept.last += 1;
        let number = kept.last;
        kept.order.insert(number, key.clone());
        kept.answers.insert(key, (number, Arc::new(answer)));
        while kept.bytes > BYTES_MAX {
            let Some((&oldest, _)) = kept.order.first_key_value() else { break };
            kept.remove(oldest);
        }
    }
}

impl Kept {
    fn remove(&mut self, number: u64) {
        let Some(key) = self.order.remove(&number) else { return };
        if let Some((_, answer)) = self.answers.remove(&key) {
            self.bytes -= answer.bytes;
        }
    }
}

impl Collector {
    /// Takes a piece of the body.
    pub fn push(&mut self, piece: &[u8]) {
        let has_taken = self.body.as_mut().is_some_and(|body| body.take(piece));
        if !has_taken {
            self.body = None;
        }
    }

    /// Keeps the answer, whose body is complete and has no trailers. Returns whether it is kept.
    pub fn finish(self, now: Micros) -> bool {
        let Self { key, headers, ttl, body } = self;
        let Some((cache, body)) = body.map(Collected::into_parts) else { return false };
        let lengths = headers.iter().map(|(name, value)| name.as_str().len() + value.len());
        let bytes = body.len() + lengths.sum::<usize>() + 2 * key.target.len() + ENTRY_BYTES;
        let told = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok());
        let is_whole = told.is_none_or(|told| told.parse() == Ok(body.len()));
        if is_whole {
            cache.put(key, Answer { headers, body, at: now, until: now.after(ttl), bytes });
        }
        is_whole
    }
}

/// The body of an answer on its way to a client.
#[derive(Debug)]
struct Collected {
    cache: Arc<Cache>,
    bytes: Vec<u8>,
}

impl Collected {
    /// Takes a piece. Returns `false` where this body, or all of those on their way, would be too large.
    fn take(&mut self, piece: &[u8]) -> bool {
        let others = self.cache.collecting.fetch_add(piece.len(), Relaxed);
        let is_taken = self.bytes.len() + piece.len() <= ANSWER_BYTES_MAX
            && others + piece.len() <= COLLECTING_BYTES_MAX;
        if is_taken {
            self.bytes.extend_from_slice(piece);
        } else {
            self.cache.collecting.fetch_sub(piece.len(), Relaxed);
        }
        is_taken
    }

    fn into_parts(mut self) -> (Arc<Cache>, Bytes) {
        self.cache.collecting.fetch_sub(self.bytes.len(), Relaxed);
        (Arc::clone(&self.cache), Bytes::from(std::mem::take(&mut self.bytes)))
    }
}

impl Drop for Collected {
    fn drop(&mut self) {
        self.cache.collecting.fetch_sub(self.bytes.len(), Relaxed);
    }
}

/// Returns whether the upstream allows an answer to be kept. The operator's word is above `no-cache`, `private` and
/// `max-age`, but not above `no-store`, and a cookie is for one client.
fn may_be_kept(headers: &HeaderMap) -> bool {
    let members = |name| {
        let values = headers.get_all(name).into_iter();
        values
            .flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
            .map(<[u8]>::trim_ascii)
    };
    let mut controls = members(header::CACHE_CONTROL);
    let mut varies = members(header::VARY).filter(|name| !name.is_empty());
    let has_other = ["set-cookie", "trailer", "content-range"];
    !controls.any(|control| control.eq_ignore_ascii_case(b"no-store"))
        && varies.all(|name| name != b"*" && !is_neutral(&name.to_ascii_lowercase()))
        && !has_other.iter().any(|name| headers.contains_key(*name))
}

/// Returns the digest of the headers by which an answer may differ.
fn selected(headers: Headers<'_>) -> [u8; 32] {
    let mut lines: Vec<_> = headers.iter().filter(|(name, _)| !is_neutral(name)).collect();
    // The order of lines with different names means nothing.
    lines.sort_by_key(|(name, _)| *name);
    let mut digest = digest::Context::new(&digest::SHA256);
    for part in lines.iter().flat_map(|(name, value)| [name, value]) {
        digest.update(&(part.len() as u64).to_be_bytes());
        digest.update(part);
    }
    let mut bytes = [0; 32];
    bytes.copy_from_slice(digest.finish().as_ref());
    bytes
}

/// Returns whether a header, in lower case, neither names a client nor its rights, and asks for no other answer. An answer
/// that varies by it is not kept. All others are a part of the key, since any may be a credential of the upstream.
fn is_neutral(name: &[u8]) -> bool {
    NEUTRAL.iter().any(|neutral| match neutral.strip_suffix('*') {
        Some(start) => name.starts_with(start.as_bytes()),
        None => name == neutral.as_bytes(),
    })
}

/// Headers of the way and the traces of a request, and those in which programs tell of themselves. `*` stands for any end.
const NEUTRAL: [&str; 28] = [
    "b3",
    "cache-control",
    "dnt",
    "kubectl-command",
    "kubectl-session",
    "pragma",
    "priority",
    "referer",
    "save-data",
    "sec-ch-ua*",
    "sec-fetch-*",
    "sec-gpc",
    "te",
    "traceparent",
    "tracestate",
    "trailer",
    "uber-trace-id",
    "upgrade-insecure-requests",
    "user-agent",
    "via",
    "x-amzn-trace-id",
    "x-b3-*",
    "x-cloud-trace-context",
    "x-datadog-*",
    "x-forwarded-for",
    "x-forwarded-port",
    "x-forwarded-prefix",
    "x-request-id",
];

/// Headers of a request whose answer is for one client, a part of an answer, or none.
const BYPASSING: [&str; 8] = [
    "authorization",
    "cookie",
    "range",
    "if-match",
    "if-none-match",
    "if-modified-since",
    "if-unmodified-since",
    "if-range",
];

/// Upper bound of one answer's body.
const ANSWER_BYTES_MAX: usize = 1 << 20;

/// Upper bound of all answers.
const BYTES_MAX: usize = 64 << 20;

/// Upper bound of all bodies on their way to clients. Answers beyond it are not kept.
const COLLECTING_BYTES_MAX: usize = 16 << 20;

/// Memory of an entry without its texts, about.
const ENTRY_BYTES: usize = 512;

/// Longest time for which an answer is kept.
const TTL_MAX: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use wsproxy_proto::tunnel::headers::HeaderBlock;

    use super::*;

    const NOW: Micros = Micros(1_000_000_000);

    fn cache() -> Arc<Cache> {
        let rule = |pattern: &str, seconds| CacheRule {
            pattern: pattern.into(),
            ttl: Duration::from_secs(seconds),
        };
        Cache::new(&[rule("/api/v1/pods", 2), rule("/slow/{}", 600)])
    }

    fn map(lines: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(*name, HeaderValue::from_static(value));
        }
        headers
    }

    /// Changes to a request that may be kept.
    fn key_of(
        cache: &Cache,
        target: &str,
        lines: &[(&str, &str)],
        change: impl FnOnce(&mut Asked<'_>),
    ) -> Option<(Key, Duration)> {
        let (cluster, mut block) = (Id::parse("c1").unwrap(), HeaderBlock::new());
        for (name, value) in lines {
            block.push(name.as_bytes(), value.as_bytes()).unwrap();
        }
        let mut asked = Asked {
            cluster: &cluster,
            credential: TokenHash([1; 32]),
            method: &Method::GET,
            target,
            headers: block.headers(),
            is_more: false,
        };
        change(&mut asked);
        cache.key(&asked)
    }

    fn key(cache: &Cache, target: &str) -> Key {
        key_of(cache, target, &[], |_| {}).unwrap().0
    }

    fn keep(cache: &Arc<Cache>, key: &Key, body: &[u8], headers: &HeaderMap, now: Micros) -> bool {
        let ttl = Duration::from_secs(2);
        let collector = cache.collect(key.clone(), ttl, StatusCode::OK, headers);
        collector.is_some_and(|mut collector| {
            body.chunks(1000).for_each(|piece| collector.push(piece));
            collector.finish(now)
        })
    }

    #[test]
    fn only_plain_reading_of_named_paths_has_a_key() {
        let cache = cache();
        let has = |target: &str| key_of(&cache, target, &[], |_| {}).is_some();
        assert!(has("/api/v1/pods") && has("/api/v1/pods?limit=5&x=watch") && has("/slow/a"));
        for target in [
            "/api/v1/pods?watch=true",
            "/api/v1/pods?a=b&watch=1",
            "/api/v1/pods?follow",
            "/api/v1/pods/",
            "/api/v1/pods/a",
            "/slow/",
            "/",
        ] {
            assert!(!has(target), "{target}");
        }
        let target = "/api/v1/pods";
        for name in ["range", "if-none-match", "if-range", "authorization", "cookie"] {
            let line = (name, "a");
            assert!(key_of(&cache, target, &[line], |_| {}).is_none(), "{line:?}");
        }
        assert!(key_of(&cache, target, &[], |asked| asked.method = &Method::HEAD).is_none());
        assert!(key_of(&cache, target, &[], |asked| asked.is_more = true).is_none());
        assert!(key_of(&Cache::default(), target, &[], |_| {}).is_none());
        assert_eq!(key_of(&cache, "/slow/a", &[], |_| {}).unwrap().1, TTL_MAX);
    }

    #[test]
    fn requests_that_may_differ_have_different_keys() {
        let cache = cache();
        let target = "/api/v1/pods";
        let lines = |lines: &[(&str, &str)]| key_of(&cache, target, lines, |_| {}).unwrap().0;
        let keys = [
            key(&cache, target),
            key(&cache, "/api/v1/pods?a"),
            lines(&[("accept", "a")]),
            lines(&[("accept", "a"), ("accept", "b")]),
            lines(&[("accept-encoding", "a")]),
            lines(&[("host", "a")]),
            lines(&[("x-forwarded-host", "a")]),
            lines(&[("x-forwarded-proto", "a")]),
            lines(&[("x-api-key", "a")]),
            lines(&[("x-api-key", "b")]),
            lines(&[("x-api-key", "a"), ("x-user", "b")]),
            lines(&[("x-api-keya", "")]),
            Key { cluster: Id::parse("c2").unwrap(), ..key(&cache, target) },
            key_of(&cache, target, &[], |asked| asked.credential = TokenHash([2; 32])).unwrap().0,
        ];
        for (at, one) in keys.iter().enumerate() {
            assert!(keys[at + 1..].iter().all(|other| one != other), "{one:?}");
        }
        for name in NEUTRAL {
            let neutral = name.replace('*', "a");
            assert_eq!(lines(&[(&neutral, "a")]), keys[0], "{neutral}");
            // Names that end or begin alike are a part of the key.
            let longer = (!name.ends_with('*')).then(|| format!("{name}-id"));
            for other in longer.into_iter().chain([format!("x-{neutral}")]) {
                assert_ne!(lines(&[(&other, "a")]), keys[0], "{other}");
            }
        }
        for credential in [
            "x-auth-token",
            "x-forwarded-user",
            "x-forwarded-groups",
            "x-amzn-oidc-data",
            "x-goog-iap-jwt-assertion",
            "x-csrf-token",
            "origin",
            "accept-language",
        ] {
            assert_ne!(lines(&[(credential, "a")]), keys[0], "{credential}");
        }
        let order = [("accept", "a"), ("x-api-key", "b")];
        assert_eq!(lines(&order), lines(&[order[1], order[0]]));
    }

    #[test]
    fn an_answer_is_kept_for_its_time() {
        let (cache, headers) = (cache(), map(&[("cache-control", "no-cache, private, max-age=0")]));
        let key = key(&cache, "/api/v1/pods");
        assert!(cache.find(&key, NOW).is_none());
        assert!(keep(&cache, &key, b"body", &headers, NOW));
        let later = NOW.after(Micros(1_999_999));
        let found = cache.find(&key, later).unwrap();
        assert_eq!(
            (&found.body[..], found.age(later), &found.headers),
            (&b"body"[..], 1, &headers)
        );
        assert!(cache.find(&key, NOW.after(Micros(2_000_000))).is_none());
        let left = |kept: &Kept| (kept.bytes, kept.order.len());
        assert_eq!(left(&cache.kept.lock()), (0, 0));
        // A newer answer takes the place of an older one.
        assert!(
            keep(&cache, &key, b"one", &headers, NOW) && keep(&cache, &key, b"two", &headers, NOW)
        );
        assert_eq!(cache.find(&key, NOW).unwrap().body, "two");
        assert_eq!(cache.kept.lock().order.len(), 1);
    }

    #[test]
    fn answers_that_are_for_one_client_are_not_kept() {
        let cache = cache();
        let key = key(&cache, "/api/v1/pods");
        for line in [
            ("cache-control", "no-store"),
            ("cache-control", "private, No-Store"),
            ("vary", "*"),
            ("vary", "accept, *"),
            ("vary", "accept, User-Agent"),
            ("vary", "x-forwarded-for"),
            ("set-cookie", "a=b"),
            ("trailer", "x-sum"),
            ("content-length", "5"),
        ] {
            assert!(!keep(&cache, &key, b"body", &map(&[line]), NOW), "{line:?}");
        }
        let good = map(&[("vary", "Accept-Encoding, accept, X-Api-Key"), ("content-length", "4")]);
        assert!(keep(&cache, &key, b"body", &good, NOW));
        for status in [204, 206, 304, 404, 500] {
            let status = StatusCode::from_u16(status).unwrap();
            assert!(cache.collect(key.clone(), TTL_MAX, status, &good).is_none());
        }
    }

    #[test]
    fn answers_on_their_way_are_bounded_together() {
        let (cache, headers, half) = (cache(), HeaderMap::new(), [0; ANSWER_BYTES_MAX / 2]);
        let mut collectors: Vec<_> = (0..40)
            .map(|n| {
                let key = key(&cache, &format!("/slow/{n}"));
                let collector = cache.collect(key, TTL_MAX, StatusCode::OK, &headers);
                let mut collector = collector.unwrap();
                collector.push(&half);
                collector
            })
            .collect();
        assert_eq!(cache.collecting.load(Relaxed), COLLECTING_BYTES_MAX);
        // Those behind the bound go on without being kept, also where others have ended meanwhile.
        let (last, first) = (collectors.pop().unwrap(), collectors.swap_remove(0));
        assert!(first.finish(NOW) && !last.finish(NOW));
        drop(collectors);
        assert_eq!(cache.collecting.load(Relaxed), 0);
    }

    #[test]
    fn the_cache_is_bounded_and_the_oldest_leave() {
        let (cache, headers) = (cache(), HeaderMap::new());
        let large = key(&cache, "/slow/large");
        assert!(!keep(&cache, &large, &vec![0; ANSWER_BYTES_MAX + 1], &headers, NOW));
        let body = vec![0; ANSWER_BYTES_MAX];
        for n in 0..70 {
            assert!(keep(&cache, &key(&cache, &format!("/slow/{n}")), &body, &headers, NOW));
        }
        assert!(cache.kept.lock().bytes <= BYTES_MAX);
        let found = |n: usize| cache.find(&key(&cache, &format!("/slow/{n}")), NOW).is_some();
        assert!(!found(0) && !found(6) && found(7) && found(69));
        assert_eq!(cache.kept.lock().answers.len(), 63);
    }
}
