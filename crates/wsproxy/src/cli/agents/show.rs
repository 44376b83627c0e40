//! Users and secrets as text and as JSON.

use std::time::SystemTime;

use secrecy::ExposeSecret;
use serde_json::{Value, json};
use wsproxy_proto::names::Id;

use crate::database::agents::{Agent, Issued, SecretInfo};

/// Returns a time as people and programs read it, in UTC.
pub(super) fn time_text(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string()
}

/// Returns a stored secret; without its text where the operator gave that.
pub(super) fn issued_json(user: &Id, issued: &Issued, is_given: bool) -> Value {
    let mut answer = json!({
        "user_id": user.as_str(), "secret_id": issued.id,
        "expires_at": issued.expires_at.map(time_text),
    });
    if !is_given {
        answer["secret"] = issued.secret.expose_secret().into();
    }
    answer
}

/// Returns a user; with its secrets where they are known.
pub(super) fn agent_json(agent: &Agent) -> Value {
    let mut answer = json!({
        "user_id": agent.user_id, "platform": agent.platform, "status": agent.status,
        "created_at": agent.created_at.map(time_text), "last_seen": agent.last_seen.map(time_text),
        "clear": agent.is_clear,
    });
    if let Some(secrets) = &agent.secrets {
        let secrets: Vec<_> = secrets.iter().map(|secret| secret_json(agent, secret)).collect();
        answer["secrets"] = secrets.into();
    }
    answer
}

/// Returns a line of a list.
pub(super) fn agent_line(agent: &Agent) -> String {
    let seen = agent.last_seen.map_or_else(|| "never seen".into(), time_text);
    let clear = if agent.is_clear { "  secret in clear" } else { "" };
    format!("{}  {}  {}  {seen}{clear}\n", agent.user_id, agent.status, agent.platform)
}

/// Returns a user with its secrets, for people.
pub(super) fn agent_text(agent: &Agent) -> String {
    let mut text = agent_line(agent);
    if agent.is_clear {
        text += "Only the value that an application keeps in clear counts.\n";
    }
    for secret in agent.secrets.iter().flatten() {
        let created = secret.created_at.map_or_else(|| "?".into(), time_text);
        text += &format!("secret {}  created {created}  {}\n", secret.id, state(agent, secret));
    }
    text
}

fn secret_json(agent: &Agent, secret: &SecretInfo) -> Value {
    json!({
        "id": secret.id, "created_at": secret.created_at.map(time_text),
        "expires_at": secret.expires_at.map(time_text),
        "revoked_at": secret.revoked_at.map(time_text),
        "valid": state(agent, secret).starts_with("valid"),
    })
}

fn state(agent: &Agent, secret: &SecretInfo) -> String {
    let is_over = secret.expires_at.is_some_and(|end| end <= SystemTime::now());
    match (secret.revoked_at, secret.expires_at) {
        (Some(time), _) => format!("revoked {}", time_text(time)),
        (None, Some(end)) if is_over => format!("expired {}", time_text(end)),
        _ if agent.is_clear => "does not count".into(),
        (None, Some(end)) => format!("valid until {}", time_text(end)),
        (None, None) => "valid".into(),
    }
}
