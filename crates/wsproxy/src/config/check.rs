//! Rules between keys, and what files and URLs must hold to be of use; knows values, not where they came from.
//!
//! An instance makes of its configuration what is tried here, with the same functions: so `config check`
//! refuses what `serve` would.

use std::{collections::HashSet, path::Path};

use jsonwebtoken::{Algorithm, AlgorithmFamily};
use secrecy::ExposeSecret;
use wsproxy_proto::rate::EARNING_MICROS_MAX;

use super::{
    Api, Config, Endpoints, Jwt,
    api_key::{ApiKey, KeySecret},
};
use crate::{
    auth::{api_keys, jwt},
    bus, tls,
};

/// A broken rule: the key to blame, the other one that it contradicts, and what is allowed or wrong.
pub(super) struct Broken {
    pub(super) key: &'static str,
    pub(super) other: Option<&'static str>,
    pub(super) message: String,
}

/// Every rule that `config` breaks.
pub(super) fn check(config: &Config) -> Vec<Broken> {
    let mut broken = rules(config);
    let mut tried = |key: &'static str, result: Result<(), String>| {
        broken.extend(result.err().map(|message| Broken { key, other: None, message }));
    };
    let Config { redis, jwt, .. } = config;
    tried("redis.url", bus::check_url(redis));
    for (key, file) in [("redis.ca_file", &redis.ca_file), ("jwt.ca_file", &jwt.ca_file)] {
        tried(key, file.as_deref().map_or(Ok(()), tls::check_ca_file));
    }
    tried("api.key", check_api_keys(&config.api));
    if let Some(path) = jwt.public_key_file.as_deref().filter(|_| verifies_with_public_keys(jwt)) {
        tried("jwt.public_key_file", check_public_key(path, jwt));
    }
    broken
}

fn verifies_with_public_keys(jwt: &Jwt) -> bool {
    jwt.algorithms.iter().any(|algorithm| algorithm.family() != AlgorithmFamily::Hmac)
}

fn check_public_key(path: &Path, jwt: &Jwt) -> Result<(), String> {
    jwt::check_public_key(path, &jwt.algorithms).map_err(|problem| {
        format!(
            "must be the file of a PUBLIC KEY in PEM form that fits jwt.algorithms, but {problem}"
        )
    })
}

/// The rules that can be told from the values alone.
fn rules(config: &Config) -> Vec<Broken> {
    let Config { server, admin, redis, limits, heartbeat, .. } = config;
    let mut broken = Vec::new();
    let mut rule = |holds: bool, key, allowed, other| {
        if !holds {
            broken.push(Broken { key, other, message: format!("must be {allowed}") });
        }
    };
    let [bind, admin_bind] =
        [server.bind, admin.bind.unwrap_or(server.bind)].map(|bind| bind.to_canonical());
    let same_address = admin_bind == bind || admin_bind.is_unspecified() || bind.is_unspecified();
    let same_port = server.port != 0 && admin.port == Some(server.port);
    rule(!(same_address && same_port), "admin.port", "different from", Some("server.port"));
    let has_use = admin.bind.is_none() || admin.port.is_some();
    rule(has_use, "admin.bind", "set only together with", Some("admin.port"));

    let drain = server.drain_delay + server.drain_spread;
    let (key, allowed) = ("server.shutdown_timeout", "longer than server.drain_delay plus");
    rule(drain < server.shutdown_timeout, key, allowed, Some("server.drain_spread"));
    let in_time = heartbeat.interval < heartbeat.timeout;
    rule(in_time, "heartbeat.timeout", "longer than", Some("heartbeat.interval"));

    let message = limits.max_message_bytes;
    let other = Some("limits.max_message_bytes");
    rule(limits.send_buffer_bytes >= message, "limits.send_buffer_bytes", "at least", other);
    rule(redis.publish_queue_bytes >= message, "redis.publish_queue_bytes", "at least", other);
    let (key, other) = ("limits.send_buffers_total_bytes", Some("limits.send_buffer_bytes"));
    rule(limits.send_buffers_total_bytes >= limits.send_buffer_bytes, key, "at least", other);

    let (key, other) = ("limits.bytes_burst", Some("limits.bytes_per_second"));
    let earned_max = limits.bytes_per_second.saturating_mul(BURST_SECONDS_MAX);
    let is_earned = limits.bytes_per_second == 0 || limits.bytes_burst <= earned_max;
    rule(is_earned, key, "at most 1000 times", other);

    let Jwt { secret_key, public_key_file, jwks_url, .. } = &config.jwt;
    let verifies = secret_key.is_some() || public_key_file.is_some() || jwks_url.is_some();
    let allowed =
        "false, unless there is a jwt.secret_key, a jwt.public_key_file or a jwt.jwks_url";
    rule(!config.endpoints.events || verifies, "endpoints.events", allowed, None);
    let Endpoints { sessions, events, echo } = config.endpoints;
    let allowed = "true, unless endpoints.events or endpoints.echo is: nothing would be served";
    rule(sessions || events || echo, "endpoints.sessions", allowed, None);
    check_jwt(&config.jwt, config.endpoints.events, rule);
    broken
}

/// Every algorithm needs a key of its kind, and every public key an algorithm. A secret that no
/// algorithm uses may be there: deployments may share it with other services.
fn check_jwt(
    jwt: &Jwt,
    in_use: bool,
    mut rule: impl FnMut(bool, &'static str, &'static str, Option<&'static str>),
) {
    let (secret, file, url) = (&jwt.secret_key, &jwt.public_key_file, &jwt.jwks_url);
    let is_hmac = |algorithm: &Algorithm| algorithm.family() == AlgorithmFamily::Hmac;
    let shares = jwt.algorithms.iter().any(is_hmac);
    let publishes = jwt.algorithms.iter().any(|algorithm| !is_hmac(algorithm));
    let (key, other) = ("jwt.algorithms", Some("jwt.algorithms"));
    rule(shares || publishes, key, "at least one", None);
    rule(
        file.is_none() || url.is_none(),
        "jwt.public_key_file",
        "empty beside",
        Some("jwt.jwks_url"),
    );

    let length = secret.as_ref().map_or(usize::MAX, |secret| secret.expose_secret().len());
    let (bytes_min, allowed) = secret_bytes_min(&jwt.algorithms);
    // Deployments without events may have one for other services, of whatever length.
    rule(!in_use || length >= bytes_min, "jwt.secret_key", allowed, other);

    let public = file.is_some() || url.is_some();
    let allowed = "those of public keys (RS256, ES256, EdDSA, …), since HS… need";
    rule(!shares || !public || secret.is_some(), key, allowed, Some("jwt.secret_key"));
    let allowed = "HS256, HS384 or HS512, unless there is a jwt.public_key_file or a jwt.jwks_url";
    rule(!publishes || public || secret.is_none(), key, allowed, None);
    if shares && !publishes && secret.is_some() {
        let allowed = "empty, unless its algorithm (RS256, ES256, EdDSA, …) is in";
        rule(file.is_none(), "jwt.public_key_file", allowed, other);
        rule(url.is_none(), "jwt.jwks_url", allowed, other);
    }
}

/// Names and secrets are different, and every file holds a key.
fn check_api_keys(api: &Api) -> Result<(), String> {
    let (mut names, mut secrets) = (HashSet::from([api_keys::NAMELESS]), HashSet::new());
    secrets.extend(api.keys.iter().map(|secret| secret.expose_secret().to_owned()));
    for ApiKey { name, secret, .. } in &api.key {
        let secret = match secret {
            KeySecret::Text(secret) => secret.expose_secret().to_owned(),
            KeySecret::File(path) => secret_of(name, path)?,
        };
        if !names.insert(name) {
            return Err(format!("must have different names; {name} is there twice"));
        }
        if !secrets.insert(secret) {
            return Err(format!("must have different secrets; that of {name} is there twice"));
        }
    }
    Ok(())
}

fn secret_of(name: &str, path: &Path) -> Result<String, String> {
    let secrets = api_keys::read_file(path, false);
    let secrets = secrets.map_err(|problem| format!("the key {name} {problem}"))?;
    Ok(secrets.first().map(|secret| secret.expose_secret().to_owned()).unwrap_or_default())
}

/// How long a secret must be for these algorithms: as long as the hash (RFC 7518, 3.2). For HS256 half of that is
/// accepted with a warning, since many deployments have shorter secrets; less is guessed in no time by whoever
/// has a token.
fn secret_bytes_min(algorithms: &[Algorithm]) -> (usize, &'static str) {
    if algorithms.contains(&Algorithm::HS512) {
        (
            64,
            "at least 64 bytes long, as long as the hash of HS512 (RFC 7518, 3.2), to be used with",
        )
    } else if algorithms.contains(&Algorithm::HS384) {
        (
            48,
            "at least 48 bytes long, as long as the hash of HS384 (RFC 7518, 3.2), to be used with",
        )
    } else if algorithms.contains(&Algorithm::HS256) {
        (16, "at least 16 bytes long, better 32, to be used with")
    } else {
        (0, "")
    }
}

/// Longer than this a burst of bytes cannot be remembered.
const BURST_SECONDS_MAX: usize = (EARNING_MICROS_MAX / 1_000_000) as usize / 1000 * 1000;
