//! Rules between keys, and checks of files and URLs; knows values, but not their origins.
//!
//! An instance reads files and URLs with the same functions, so that `config check` refuses what `serve` refuses.

use std::{collections::HashSet, path::Path};

use jsonwebtoken::{Algorithm, AlgorithmFamily};
use secrecy::ExposeSecret;
use wsproxy_proto::rate::EARNING_MICROS_MAX;

use super::{
    ApiConfig, Config, JwtConfig, RedisConfig, TlsConfig,
    agents::AgentsConfig,
    api_key::{ApiKey, KeySecret},
    endpoints::EndpointsConfig,
    peer::{TrustedProxy, is_private},
    rooms::Development,
    traces::TracesConfig,
    tunnel::ClientAuth,
};
use crate::{
    auth::{api_keys, fixed_keys},
    database::url,
    redis::address::RedisAddress,
    tls::{self, pair::TlsPair},
};

/// A broken rule: the key to blame, the other key that it contradicts, and the allowed values or the error.
pub(super) struct BrokenRule {
    pub(super) key: &'static str,
    pub(super) other: Option<&'static str>,
    pub(super) message: String,
}

/// Returns every rule between values that `config` breaks.
pub(super) fn check(config: &Config) -> Vec<BrokenRule> {
    let mut broken = rules(config);
    if config.endpoints.tunnel {
        broken.extend(tunnel_rules(config));
    }
    let url = config.redis.url.as_ref();
    let url = url.map(|url| RedisAddress::parse(url.expose_secret()).map(drop));
    broken.extend(tried("redis.url", url.transpose().map(drop).map_err(str::to_owned)));
    broken.extend(sentinel_rules(config));
    let url = config.database.url.as_ref().filter(|_| config.endpoints.agents);
    let url = url.map(|url| url::parse(url.expose_secret()).map(drop));
    broken.extend(tried("database.url", url.transpose().map(drop).map_err(str::to_owned)));
    broken
}

/// Opens the files that `config` names, and returns every rule that they break.
pub(super) fn check_files(config: &Config) -> Vec<BrokenRule> {
    let Config { redis, jwt, traces, tunnel, .. } = config;
    let mut broken = Vec::new();
    for (key, file) in [
        ("redis.ca_file", &redis.ca_file),
        ("jwt.ca_file", &jwt.ca_file),
        ("traces.ca_file", &traces.ca_file),
        ("tunnel.peer_ca_file", &tunnel.peer_ca_file),
    ] {
        broken.extend(tried(key, file.as_deref().map_or(Ok(()), tls::check_ca_file)));
    }
    let pair = config.tls.files().map(|(certificate, key)| TlsPair::load(certificate, key));
    broken.extend(tried("tls.certificate", pair.transpose().map(drop)));
    broken.extend(tried("api.key", check_api_keys(&config.api)));
    if let Some(path) = jwt.public_key_file.as_deref().filter(|_| verifies_with_public_keys(jwt)) {
        broken.extend(tried("jwt.public_key_file", check_public_key(path, jwt)));
    }
    broken
}

/// Returns every file that `config` names and that cannot be read a second time.
pub(super) fn not_files(config: &Config) -> Vec<BrokenRule> {
    let Config { redis, jwt, tls, api, traces, tunnel, .. } = config;
    let of_keys = api.key.iter().filter_map(|key| match &key.secret {
        KeySecret::File(path) => Some(("api.key", path)),
        KeySecret::Text(_) => None,
    });
    let named = [
        ("redis.ca_file", &redis.ca_file),
        ("jwt.ca_file", &jwt.ca_file),
        ("traces.ca_file", &traces.ca_file),
        ("tunnel.peer_ca_file", &tunnel.peer_ca_file),
        ("jwt.public_key_file", &jwt.public_key_file),
        ("tls.certificate", &tls.certificate),
        ("tls.key", &tls.key),
    ];
    let named = named.into_iter().filter_map(|(key, path)| Some((key, path.as_ref()?)));
    let is_pipe = |path: &Path| path.metadata().is_ok_and(|found| !found.is_file());
    let pipes = named.chain(of_keys).filter(|(_, path)| is_pipe(path));
    let broken = pipes.map(|(key, path)| {
        let message = format!("{} {NO_FILE}", path.display());
        BrokenRule { key, other: None, message }
    });
    broken.collect()
}

/// Checks that the login at sentinels is whole, and that there are sentinels.
fn sentinel_rules(config: &Config) -> Vec<BrokenRule> {
    let RedisConfig { url, sentinel_username, sentinel_password, .. } = &config.redis;
    let url = url.as_ref().map_or("", |url| url.expose_secret());
    let has_sentinels =
        url.split_once("://").is_some_and(|(scheme, _)| scheme.ends_with("+sentinel"));
    let (has_user, has_password) = (sentinel_username.is_some(), sentinel_password.is_some());
    let needs = "not set, unless redis+sentinel:// or rediss+sentinel:// is the scheme of";
    let mut broken = Vec::new();
    let mut rule = |holds: bool, key, allowed: &str, other| {
        if !holds {
            broken.push(BrokenRule {
                key,
                other: Some(other),
                message: format!("must be {allowed}"),
            });
        }
    };
    rule(!has_user || has_sentinels, "redis.sentinel_username", needs, "redis.url");
    rule(!has_password || has_sentinels, "redis.sentinel_password", needs, "redis.url");
    let allowed = "set only together with";
    rule(!has_user || has_password, "redis.sentinel_username", allowed, "redis.sentinel_password");
    broken
}

fn tried(key: &'static str, result: Result<(), String>) -> Option<BrokenRule> {
    result.err().map(|message| BrokenRule { key, other: None, message })
}

fn verifies_with_public_keys(jwt: &JwtConfig) -> bool {
    jwt.algorithms.iter().any(|algorithm| algorithm.family() != AlgorithmFamily::Hmac)
}

fn check_public_key(path: &Path, jwt: &JwtConfig) -> Result<(), String> {
    fixed_keys::check_public_key(path, &jwt.algorithms).map_err(|problem| {
        format!(
            "must be the file of a PUBLIC KEY in PEM form that fits jwt.algorithms, but {problem}"
        )
    })
}

/// Checks the rules that need the values only.
fn rules(config: &Config) -> Vec<BrokenRule> {
    let Config { server, admin, redis, limits, heartbeat, .. } = config;
    let mut broken = Vec::new();
    let mut rule = |holds: bool, key, allowed, other| {
        if !holds {
            broken.push(BrokenRule { key, other, message: format!("must be {allowed}") });
        }
    };
    let [bind, admin_bind] =
        [server.bind, admin.bind.unwrap_or(server.bind)].map(|bind| bind.to_canonical());
    let same_address = admin_bind == bind || admin_bind.is_unspecified() || bind.is_unspecified();
    let same_port = server.unix.is_none() && server.port != 0 && admin.port == Some(server.port);
    rule(!(same_address && same_port), "admin.port", "different from", Some("server.port"));
    let has_use = admin.bind.is_none() || admin.port.is_some();
    rule(has_use, "admin.bind", "set only together with", Some("admin.port"));

    let TlsConfig { certificate, key, admin: admin_too, .. } = &config.tls;
    let (has_certificate, has_key) = (certificate.is_some(), key.is_some());
    rule(!has_certificate || has_key, "tls.certificate", "set only together with", Some("tls.key"));
    rule(!has_key || has_certificate, "tls.key", "set only together with", Some("tls.certificate"));
    let allowed = "false, unless there is a";
    rule(!admin_too || has_certificate, "tls.admin", allowed, Some("tls.certificate"));
    rule(!admin_too || admin.port.is_some(), "tls.admin", allowed, Some("admin.port"));
    let has_port = server.unix.is_none() || *admin_too;
    let allowed = "empty, unless tls.admin is on: TLS ends at the proxy in front of";
    rule(!has_certificate || has_port, "tls.certificate", allowed, Some("server.unix"));

    let is_of_place =
        |proxy: &TrustedProxy| (*proxy == TrustedProxy::Unix) == server.unix.is_some();
    let has_sender = server.trusted_proxies.iter().any(is_of_place);
    let allowed = "false, unless its senders (\"unix:\" with server.unix, else networks) are in";
    let (key, other) = ("server.proxy_protocol", Some("server.trusted_proxies"));
    rule(!server.proxy_protocol || has_sender, key, allowed, other);

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

    let verifies = config.jwt.has_key();
    let allowed =
        "false, unless there is a jwt.secret_key, a jwt.public_key_file or a jwt.jwks_url";
    rule(!config.endpoints.events || verifies, "endpoints.events", allowed, None);
    let EndpointsConfig { events, rooms, tunnel, .. } = config.endpoints;
    let allowed = "true, unless another endpoint is: nothing would be served";
    rule(config.endpoints.is_any(), "endpoints.sessions", allowed, None);
    let development = config.rooms.development;
    let allowed = "false, unless there is a jwt.secret_key, a jwt.public_key_file or a jwt.jwks_url, or \
                   rooms.development is on";
    let is_open = development != Development::Off;
    rule(!config.endpoints.rooms || verifies || is_open, "endpoints.rooms", allowed, None);
    let is_safe = development != Development::Loopback || bind.is_loopback();
    let allowed = "\"anywhere\" (or false): in development mode every client names itself, so true is for machines \
                   whose own programs are the only clients. \"anywhere\" is for all others, such as containers. true \
                   needs a loopback address in";
    rule(!config.endpoints.rooms || is_safe, "rooms.development", allowed, Some("server.bind"));
    let TracesConfig { queue_max, batch_max, .. } = config.traces;
    rule(batch_max <= queue_max, "traces.batch_max", "at most", Some("traces.queue_max"));
    let AgentsConfig { call_timeout, call_timeout_max, .. } = config.agents;
    let (key, other) = ("agents.call_timeout", Some("agents.call_timeout_max"));
    rule(call_timeout <= call_timeout_max, key, "at most", other);
    let of_tunnel = tunnel && config.tunnel.verifies_jwt();
    check_jwt(&config.jwt, events || (rooms && verifies) || of_tunnel, rule);
    broken
}

/// Checks the rules of the tunnel.
fn tunnel_rules(config: &Config) -> Vec<BrokenRule> {
    let mut broken = Vec::new();
    let mut rule = |holds: bool, key, allowed, other| {
        if !holds {
            broken.push(BrokenRule { key, other, message: format!("must be {allowed}") });
        }
    };
    let tunnel = &config.tunnel;
    let is_local = config.server.unix.is_some() || config.server.bind.to_canonical().is_loopback();
    let allowed = "\"token\" or \"jwt\", unless only this machine can connect: \"none\" needs a loopback address in";
    let is_open = tunnel.client_auth == ClientAuth::None;
    rule(!is_open || is_local, "tunnel.client_auth", allowed, Some("server.bind"));
    let verifies = config.jwt.has_key();
    let of_clients = tunnel.client_auth == ClientAuth::Jwt;
    let allowed =
        "another one, unless there is a jwt.secret_key, a jwt.public_key_file or a jwt.jwks_url";
    rule(!of_clients || verifies, "tunnel.client_auth", allowed, None);
    let allowed =
        "false, unless there is a jwt.secret_key, a jwt.public_key_file or a jwt.jwks_url";
    rule(!tunnel.agent_jwt || verifies, "tunnel.agent_jwt", allowed, None);
    let (key, other) = ("tunnel.window_max", Some("tunnel.window"));
    rule(tunnel.window <= tunnel.window_max, key, "at least", other);
    let (key, other) = ("tunnel.ping_timeout", Some("tunnel.ping"));
    rule(tunnel.ping < tunnel.ping_timeout, key, "longer than", other);
    if let Some(bind) = tunnel.peer_bind {
        let other = Some("tunnel.peer_bind");
        rule(tunnel.peer_secret.is_some(), "tunnel.peer_secret", "set together with", other);
        let is_named = !bind.ip().is_unspecified() || tunnel.peer_url.is_some();
        let allowed = "set, since other instances cannot use all addresses of";
        rule(is_named, "tunnel.peer_url", allowed, other);
        let has_tls = config.tls.files().is_some();
        let allowed = "false, unless there is a";
        rule(!tunnel.peer_tls || has_tls, "tunnel.peer_tls", allowed, Some("tls.certificate"));
        let is_safe = tunnel.peer_tls || tunnel.peer_allow_insecure || is_private(bind.ip());
        let allowed = "a loopback or private address, unless there is tunnel.peer_tls, or \
                       tunnel.peer_allow_insecure is on";
        rule(is_safe, "tunnel.peer_bind", allowed, None);
    }
    broken
}

/// Checks that every algorithm has a key of its kind, and every public key an algorithm. A secret without an
/// algorithm is allowed: deployments may share it with other services.
fn check_jwt(
    jwt: &JwtConfig,
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
    // Deployments without events may have a secret for other services, of any length.
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

/// Checks that names and secrets are different, and that every file holds a key.
fn check_api_keys(api: &ApiConfig) -> Result<(), String> {
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

/// Returns the shortest secret for these algorithms: as long as the hash (RFC 7518, 3.2). For HS256 half of that is
/// accepted with a warning, since many deployments have shorter secrets.
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

/// Problem of a path that is read again.
pub(super) const NO_FILE: &str = "is no regular file, so it cannot be read again";

/// Longest time for which a burst of bytes can be remembered.
const BURST_SECONDS_MAX: usize = (EARNING_MICROS_MAX / 1_000_000) as usize / 1000 * 1000;
