//! Endings and refusals in the words of operators: what happened, and what to do.

use crate::auth::{jwt::JwtError, session::WrongToken};

/// Words about an ending or a refusal.
pub(super) struct Words {
    /// Sentence about what happened.
    pub(super) what: &'static str,
    /// Sentence about what to do.
    pub(super) advice: &'static str,
}

/// Returns the words for a label of the table of endings. A client that closed first did so by itself.
pub(super) fn of_end(label: &str, by_client: bool) -> Words {
    let (what, advice) = match (label, by_client) {
        (_, true) => ("The client closed the connection.", NOTHING),
        ("normal", _) => ("The connection was closed as agreed.", NOTHING),
        ("gone", _) => (
            "The connection broke off: the network failed, or the client went away without a word.",
            "One client: nothing is to be done. Many at once: look at the network, or for a proxy that restarted or has a timeout.",
        ),
        ("heartbeat_timeout", _) => (
            "The client was silent for too long, and was taken for dead.",
            "Does the client answer pings? If so, its device slept or its network was gone: nothing is to be done.",
        ),
        ("idle_timeout", _) => (
            "No message went either way for heartbeat.idle_timeout.",
            "Raise heartbeat.idle_timeout, or let the client reconnect.",
        ),
        ("slow_consumer", _) => (
            "The client read too slowly: more messages waited for it than may wait.",
            "Send less to it, or raise limits.send_buffer_bytes. Its line may be slow, or its program busy.",
        ),
        ("rate_limited", _) => (
            "The client sent more messages a second than it may.",
            "Correct the client, or raise limits.messages_per_second.",
        ),
        ("strikes", _) => (
            "The client sent too many messages that are not valid.",
            "Correct the client: each one was answered with an error.",
        ),
        ("too_big", _) => (
            "The client sent a message that is too large.",
            "Correct the client, or raise limits.max_message_bytes.",
        ),
        ("too_many_fragments", _) => (
            "The client sent a message in too many fragments.",
            "Correct the client, or raise limits.max_fragments.",
        ),
        ("protocol_error" | "not_utf8" | "bad_deflate" | "unsupported", _) => (
            "The client sent what WebSocket or the endpoint does not allow.",
            "Correct the client, or look for a proxy that changes its bytes.",
        ),
        ("backend", _) => (
            "A worker or an operator ended it.",
            "The log has the call with the name of its key: look for “ends”, or “sent members out”. Without such a line \
             the command came over Redis.",
        ),
        ("replaced", _) => (
            "A newer connection took its place.",
            "Nothing, unless it repeats: then two clients have one name.",
        ),
        ("expired", _) => (
            "Its token expired.",
            "The client comes back with a new token, or sends one before the old one expires.",
        ),
        ("revoked", _) => ("Its token or secret was revoked.", "Nothing, if that was meant."),
        ("restart", _) => ("The instance was restarted.", "Nothing: the client reconnects."),
        ("bus_lost", _) => (
            "The instance lost Redis, and sends its clients away then.",
            "Look at Redis at that time.",
        ),
        ("try_later", _) => {
            ("The instance was short of memory or of place.", "Look at the overview at that time.")
        }
        ("server_lost", _) => ("The instance was killed.", "Look at its supervisor's log."),
        _ => ("The gateway had a fault.", "Report it with the log lines of that time."),
    };
    Words { what, advice }
}

/// Returns the words for a refused token: the reason as the client was told it, or as only the log has it.
pub(super) fn of_token(message: &str, cause: Option<&str>) -> (String, &'static str) {
    let because =
        |wrong: WrongToken| cause.is_some_and(|cause| cause.starts_with(&wrong.to_string()));
    let what = if because(WrongToken::Missing) {
        "The gateway has no token of this session: it was used, it expired, or it was stored elsewhere."
    } else if because(WrongToken::Another) {
        "The gateway has another token of this session: a newer one took the place of the client's."
    } else if because(WrongToken::Agent) {
        "The token is bound to another agent id than the one in the path."
    } else if because(WrongToken::Malformed) {
        "The stored token has a binding to an agent id that cannot be read."
    } else {
        message
    };
    let is_of_key = message == JwtError::Signature.to_string()
        || message == JwtError::UnknownKey.to_string()
        || message == JwtError::Algorithm.to_string();
    let advice = if is_of_key {
        "The key of the token's issuer is another one than the gateway's: compare it with [jwt]."
    } else {
        NEW_TOKEN
    };
    (what.to_owned(), advice)
}

/// Returns the words for a code of the table of refusals.
pub(super) fn of_refusal(code: &str) -> Words {
    let (what, advice) = match code {
        "missing_credentials" => ("The client sent no token.", "Correct the client."),
        "malformed_credentials" => {
            ("The client's token cannot be read.", "Correct the client, or what issues its tokens.")
        }
        "invalid_token" => ("The token does not open this path.", NEW_TOKEN),
        "invalid_credentials" => (
            "The user is unknown, or the secret is wrong, expired or revoked.",
            "Issue a new secret with wsproxy agents.",
        ),
        "room_forbidden" => {
            ("The token does not open this room.", "The claim rooms of the token must name it.")
        }
        "origin_not_allowed" | "host_not_allowed" => (
            "The client's page has an origin that may not connect.",
            "If it is yours, add it to server.allowed_origins.",
        ),
        "rate_limited" => (
            "The client tried too often.",
            "It may try again later. Behind a proxy, set server.trusted_proxies.",
        ),
        "too_many_connections" => (
            "The user or session has as many connections as it may.",
            "End old ones, or raise limits.connections_per_user; for a session, connections_per_session.",
        ),
        "full" | "too_many_handshakes" | "room_full" => {
            ("There was no room.", "Start another instance, or raise the limit.")
        }
        "taken" => (
            "Another user has this client id in the room.",
            "Clients of a room need different client ids.",
        ),
        "replaced" => ("A newer connection was faster.", NOTHING),
        "draining" => ("The instance is about to restart.", NOTHING),
        "bus_unavailable" | "deadline" | NOT_DONE => {
            ("Redis was away or slow.", "Look at Redis. The client tries again by itself.")
        }
        "database_unavailable" => ("The database was away.", "Look at the database."),
        "issuer_unavailable" => (
            "The keys of the issuer of tokens could not be fetched.",
            "Look at jwt.jwks_url and the network to it.",
        ),
        "not_found" => (
            "Nothing is served at this path.",
            "Is the endpoint switched on, and does the client use the right path?",
        ),
        "bad_request" | "bad_id" | "method_not_allowed" | "upgrade_required" => (
            "The request is no proper handshake.",
            "Correct the client, or a proxy that does not pass Upgrade on.",
        ),
        _ => ("The gateway had a fault.", "Report it with the log lines of that time."),
    };
    Words { what, advice }
}

const NEW_TOKEN: &str =
    "Let the client get a new token. All clients at once: a wrong key, prefix or Redis.";

const NOTHING: &str = "Nothing is to be done.";

const NOT_DONE: &str = "not_done";

#[cfg(test)]
mod tests {
    use wsproxy_proto::disconnect::Disconnect;

    use super::*;
    use crate::http::rejection::OF_HANDSHAKES;

    #[test]
    fn a_refused_token_is_told_with_its_reason() {
        let vague = "The token is wrong, expired, used or for another path.";
        let what = |cause: &str| of_token(vague, Some(cause)).0;
        assert!(
            what("no token is stored (key session:s-1:auth, bus memory)").contains("it was used")
        );
        assert!(what("another token is stored (key session:s-1:auth)").contains("newer"));
        let (expired, advice) = of_token("The token has expired.", Some("expired"));
        assert_eq!((expired.as_str(), advice), ("The token has expired.", NEW_TOKEN));
        assert!(of_token("The signature of the token is wrong.", None).1.contains("[jwt]"));
    }

    #[test]
    fn every_ending_and_refusal_has_words() {
        let fault = "The gateway had a fault.";
        for label in Disconnect::ALL.iter().map(|ending| ending.label) {
            assert_eq!(of_end(label, false).what == fault, label == "internal", "{label}");
        }
        for code in OF_HANDSHAKES {
            assert_eq!(of_refusal(code).what == fault, code == "internal", "{code}");
        }
    }
}
