//! Rules between keys; knows values, not where they came from.

use super::Config;

/// A broken rule: the key to blame, the other one that it contradicts, and what is allowed.
pub(super) struct Broken {
    pub(super) key: &'static str,
    pub(super) other: Option<&'static str>,
    pub(super) allowed: &'static str,
}

/// Every rule that `config` breaks.
pub(super) fn check(config: &Config) -> Vec<Broken> {
    let Config { server, admin, redis, limits, heartbeat, .. } = config;
    let mut broken = Vec::new();
    let mut rule = |holds: bool, key, allowed, other| {
        if !holds {
            broken.push(Broken { key, other, allowed });
        }
    };
    let admin_bind = admin.bind.unwrap_or(server.bind);
    let same_address =
        admin_bind == server.bind || admin_bind.is_unspecified() || server.bind.is_unspecified();
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

    let readable = redis.ca_file.as_ref().is_none_or(|path| std::fs::read(path).is_ok());
    rule(readable, "redis.ca_file", "a file that can be read", None);
    broken
}
