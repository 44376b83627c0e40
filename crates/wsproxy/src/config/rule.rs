//! Rules of text values: what a level, an origin, a Redis URL, … may look like.

use http::Uri;
use jsonwebtoken::Algorithm;
use tracing_subscriber::EnvFilter;
use wsproxy_proto::names::Id;

use super::kind::Text;

/// A log level, or directives.
pub(super) const LEVEL: Text = Text {
    allowed: "off, error, warn, info, debug, trace, or directives such as \"info,wsproxy::bus=debug\"",
    read: level,
};

/// The name of an instance.
pub(super) const SERVER_ID: Text = Text {
    allowed: "1 to 128 letters, digits and -_.~@+=|",
    read: |text| Id::parse(text).ok().map(|id| id.as_str().to_owned()),
};

/// What stands before the names of keys and channels.
pub(super) const PREFIX: Text = Text {
    allowed: "up to 64 letters, digits and -_.:, without the colon at its end",
    read: |text| {
        // No braces: further keys of a name put the whole name into braces, which choose its slot of a cluster.
        let known = |b: u8| b.is_ascii_alphanumeric() || b"-_.:".contains(&b);
        let good = text.len() <= 64 && text.bytes().all(known) && !text.ends_with(':');
        good.then(|| text.to_owned())
    },
};

/// Where Redis is.
pub(super) const REDIS_URL: Text = Text {
    allowed: "redis://[user:password@]host[:port][/database] (percent-encoded), rediss://… or unix:///path",
    read: redis_url,
};

/// A bearer key of the API.
pub(super) const API_KEY: Text = Text {
    allowed: "16 to 256 visible ASCII characters without a comma",
    read: |text| {
        let good = (16..=256).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_graphic() && b != b',');
        good.then(|| text.to_owned())
    },
};

/// A secret that signs tokens. How long it must be depends on whether it is used.
pub(super) const JWT_SECRET: Text = Text {
    allowed: "the secret itself, up to 4096 bytes; a PEM key belongs into jwt.public_key_file",
    read: |text| {
        // Who knows a public key, and everybody may, could sign tokens if it were a secret.
        (text.len() <= 4096 && !text.contains("-----BEGIN")).then(|| text.to_owned())
    },
};

/// How tokens may be signed.
pub(super) const JWT_ALGORITHMS: &[(&str, Algorithm)] = &[
    ("HS256", Algorithm::HS256),
    ("HS384", Algorithm::HS384),
    ("HS512", Algorithm::HS512),
    ("RS256", Algorithm::RS256),
    ("RS384", Algorithm::RS384),
    ("RS512", Algorithm::RS512),
    ("PS256", Algorithm::PS256),
    ("PS384", Algorithm::PS384),
    ("PS512", Algorithm::PS512),
    ("ES256", Algorithm::ES256),
    ("ES384", Algorithm::ES384),
    ("EdDSA", Algorithm::EdDSA),
];

/// Where keys are published.
pub(super) const JWKS_URL: Text = Text {
    allowed: "an http:// or https:// URL without a user and a password",
    read: |text| {
        let url: Uri = text.parse().ok()?;
        let host = url.authority().filter(|place| !place.as_str().contains('@'))?.host();
        let known = matches!(url.scheme_str(), Some("http" | "https")) && !host.is_empty();
        known.then(|| text.to_owned())
    },
};

/// A claim's name or value.
pub(super) const CLAIM: Text = Text {
    allowed: "1 to 512 characters",
    read: |text| (1..=512).contains(&text.len()).then(|| text.to_owned()),
};

/// The type of a token: a media type, whose `application/` may be left out.
pub(super) const TYP: Text = Text {
    allowed: "1 to 128 visible ASCII characters",
    read: |text| {
        let good = (1..=128).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic());
        good.then(|| text.to_owned())
    },
};

fn level(text: &str) -> Option<String> {
    let text = text.to_ascii_lowercase();
    // Existing deployments use Python's names; to the filter they would be names of modules.
    match text.as_str() {
        "warning" => return Some("warn".into()),
        "critical" | "fatal" => return Some("error".into()),
        _ => {}
    }
    let levels = ["off", "error", "warn", "info", "debug", "trace"];
    let known = |directive: &str| match directive.rsplit_once('=') {
        Some((target, level)) => !target.trim().is_empty() && levels.contains(&level.trim()),
        None => levels.contains(&directive.trim()),
    };
    let good = text.split(',').all(known) && EnvFilter::try_new(&text).is_ok();
    good.then_some(text)
}

/// Only what can be said without knowing the bus, which parses the rest when it starts.
fn redis_url(text: &str) -> Option<String> {
    let (scheme, rest) = text.split_once("://")?;
    let rest = rest.split_once('?').map_or(rest, |(rest, _)| rest);
    let place = rest.rsplit_once('@').map_or(rest, |(_, place)| place);
    let good = match scheme {
        "unix" | "redis+unix" | "valkey+unix" => place.starts_with('/'),
        "redis" | "rediss" | "valkey" | "valkeys" => {
            let (host, database) = place.split_once('/').unwrap_or((place, ""));
            // Without a host it is this one.
            let known = is_host(host) || is_host(&format!("localhost{host}"));
            known && (database.is_empty() || database.parse::<u32>().is_ok())
        }
        _ => false,
    };
    let printable = text.bytes().all(|b| b.is_ascii_graphic());
    (good && printable).then(|| text.to_owned())
}

/// A name or an address, brackets around one of version 6, and perhaps a port.
fn is_host(text: &str) -> bool {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((host, port)) if host.parse::<std::net::Ipv6Addr>().is_ok() => (host, port),
            _ => return false,
        },
        None => text.split_at(text.find(':').unwrap_or(text.len())),
    };
    let named = host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.:".contains(&b));
    let port = port.is_empty()
        || port.strip_prefix(':').and_then(|port| port.parse::<u16>().ok()).is_some_and(|p| p > 0);
    !host.is_empty() && named && port
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_levels_or_directives() {
        assert_eq!(level("INFO").as_deref(), Some("info"));
        assert_eq!(level("WARNING").as_deref(), Some("warn"));
        assert_eq!(level("CRITICAL").as_deref(), Some("error"));
        assert!(level("info,wsproxy::bus=debug").is_some());
        for bad in ["", "verbose", "info,", "wsproxy=loud", "=info", "info debug"] {
            assert_eq!(level(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn channel_prefixes_hold_no_braces() {
        for good in ["", "eu", "eu:prod-1", "a_b.c"] {
            assert!((PREFIX.read)(good).is_some(), "{good}");
        }
        for bad in ["{eu}", "eu:{a}", "eu}", "{", "eu:", "e u", "\u{e4}"] {
            assert!((PREFIX.read)(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn a_public_key_is_no_secret() {
        assert!((JWT_SECRET.read)("correct horse battery staple").is_some());
        assert!((JWT_SECRET.read)("-----BEGIN PUBLIC KEY-----\nMIIB").is_none());
    }

    #[test]
    fn jwks_urls_are_http_and_hold_no_password() {
        for good in ["https://issuer.example/jwks.json?x=1", "http://127.0.0.1:80/", "HTTPS://a"] {
            assert!((JWKS_URL.read)(good).is_some(), "{good}");
        }
        for bad in
            ["/jwks", "a.example/jwks", "ftp://a/", "https://u:p@a/", "https://", "http://a b"]
        {
            assert!((JWKS_URL.read)(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn redis_urls_have_a_known_scheme_and_a_place() {
        for good in [
            "redis://localhost",
            "redis://",
            "redis://:7000/",
            "redis+unix:///r%20s?user=u&password=p",
            "redis://:p%40ss@redis.local:6379/2",
            "rediss://user:pw@[::1]:6380",
            "unix:///run/redis.sock",
        ] {
            assert!(redis_url(good).is_some(), "{good}");
        }
        for bad in [
            "localhost:6379",
            "http://localhost",
            "redis://h:port",
            "redis://h/two",
            "unix://redis.sock",
            "redis://a b",
        ] {
            assert!(redis_url(bad).is_none(), "{bad}");
        }
    }
}
