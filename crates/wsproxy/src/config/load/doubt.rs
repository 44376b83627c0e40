//! Values that are allowed but probably not meant: empty secrets, numbers in another unit, slips of short names, a limit
//! that clients behind a proxy share, secrets without encryption.

use crate::config::{
    Config,
    environment::{Environment, PREFIX},
    keys::{self, Alias, Key},
    rooms::ROOM_ATTEMPTS,
};

/// Returns a sentence for each doubtful variable. `is_settled` returns whether a source sets a key, or the key's short
/// name is not read.
pub(super) fn doubtful(
    environment: &Environment,
    is_settled: impl Fn(&Key) -> bool,
) -> Vec<String> {
    let mut doubts = Vec::new();
    for key in keys::all() {
        if let Some(alias) = key.alias {
            doubts.extend(few_milliseconds(alias, environment));
        }
        // Without a secret the gateway runs, and refuses every client.
        if !key.secret || is_settled(key) {
            continue;
        }
        let short = key.alias.map(|alias| alias.name.to_owned());
        for name in [Some(key.env()), short].into_iter().flatten() {
            for name in [format!("{name}_FILE"), name] {
                if environment.is_empty(&name) {
                    doubts.push(format!("{name} is empty, so it does not set {}.", key.path()));
                }
                doubts.extend(slip(&name, environment));
            }
        }
    }
    doubts
}

/// Returns a sentence if clients of rooms would share one address and its attempts behind a proxy. An operator who sets
/// the list of proxies, even to an empty one, has thought of it.
pub(super) fn shared_address(config: &Config, is_settled: impl Fn(&Key) -> bool) -> Option<String> {
    let attempts = config.rate_limit.max_requests_or(ROOM_ATTEMPTS);
    let is_local = config.server.bind.to_canonical().is_loopback();
    let is_set = keys::all().filter(|key| key.path() == PROXIES).any(is_settled);
    let is_limited = config.endpoints.rooms && attempts > 0 && !is_local;
    (is_limited && !is_set && config.server.trusted_proxies.is_empty()).then(|| {
        format!(
            "{PROXIES} is not set: behind a proxy or load balancer, all clients would share one address and its \
             {attempts} attempts to open a room in {:?}. Name the proxy, or set {PROXIES} = [] if there is none.",
            config.rate_limit.window,
        )
    })
}

/// Returns a sentence if users' agents would send their secrets over a network without encryption.
pub(super) fn open_secrets(config: &Config) -> Option<String> {
    let server = &config.server;
    let is_local = server.unix.is_some() || server.bind.to_canonical().is_loopback();
    let is_covered = config.tls.files().is_some() || !server.trusted_proxies.is_empty();
    (config.endpoints.agents && !is_local && !is_covered).then(|| {
        format!(
            "server.bind = {} is no loopback address, and the port speaks no TLS: the secrets of users' agents cross the \
             network unencrypted. Set tls.certificate and tls.key, or {PROXIES} where a proxy in front speaks TLS.",
            server.bind
        )
    })
}

/// Finds small numbers: a deployment that thinks in seconds writes 30 and means 30000.
fn few_milliseconds(alias: Alias, environment: &Environment) -> Option<String> {
    let text = environment.value(alias.name)?.ok().filter(|_| !alias.unit.is_empty())?;
    let number = text.trim().parse::<u64>().ok().filter(|number| *number < FEW_MILLISECONDS)?;
    Some(format!(
        "{} = {number} is {number} milliseconds; write {number}s for seconds.",
        alias.name
    ))
}

/// Returns a variable that is one slip away from `name`, which is not set.
fn slip(name: &str, environment: &Environment) -> Option<String> {
    // Slips after the prefix are problems already.
    let others = environment.names().filter(|given| !given.starts_with(PREFIX));
    let is_slip = |given: &&str| {
        *given != name && strsim::osa_distance(&given.to_ascii_uppercase(), name) <= 1
    };
    let given = others.into_iter().find(is_slip)?;
    Some(format!("{given} is not read by wsproxy; did you mean {name}?"))
}

/// Key of the proxies whose word is taken for a client's address.
const PROXIES: &str = "server.trusted_proxies";

/// Numbers of milliseconds below this were probably meant as seconds.
const FEW_MILLISECONDS: u64 = 1000;
