//! The address of a Redis and the login there, read from a URL; opens no connection.

use std::{fmt, path::PathBuf};

use percent_encoding::percent_decode_str;

/// A parsed URL. Prints the server's address only, since it holds a password.
#[derive(Clone)]
pub(crate) struct RedisAddress {
    /// The server's endpoint.
    pub(super) endpoint: RedisEndpoint,
    /// User and password; the user is `default` if the URL names none.
    pub(super) login: Option<(String, String)>,
    /// The database of keys; channels have none.
    pub(super) database: u32,
}

/// The endpoint on which a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum RedisEndpoint {
    /// `redis://` and `rediss://`.
    Tcp {
        /// Name or address, without brackets.
        host: String,
        /// The port.
        port: u16,
        /// Set for TLS.
        tls: bool,
    },
    /// `unix://`.
    Unix(PathBuf),
}

impl RedisAddress {
    /// Reads `redis://[user][:password]@host[:port][/database]`, the same with `rediss`, or
    /// `unix:///path[?db=1&user=…&password=…]`. The error never quotes the URL, which may hold a password.
    pub(crate) fn parse(url: &str) -> Result<Self, &'static str> {
        let Some((scheme, rest)) = url.split_once("://") else {
            return Err("the URL has no scheme such as redis://");
        };
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (credentials, rest) = match rest.rsplit_once('@') {
            Some((credentials, rest)) => (Some(credentials), rest),
            None => (None, rest),
        };
        let (endpoint, path) = match scheme {
            "redis" | "valkey" => tcp(rest, false)?,
            "rediss" | "valkeys" => tcp(rest, true)?,
            "unix" | "redis+unix" | "valkey+unix" => {
                if !rest.starts_with('/') {
                    return Err(
                        "the path of a Unix socket must be absolute: unix:///run/redis.sock",
                    );
                }
                (RedisEndpoint::Unix(PathBuf::from(decode(rest)?)), "")
            }
            _ => return Err("the scheme must be redis, rediss or unix"),
        };
        let (user, password) = credentials.map_or(("", None), |text| match text.split_once(':') {
            Some((user, password)) => (user, Some(password)),
            None => (text, None),
        });
        let (mut user, mut password) = (decode(user)?, password.map(decode).transpose()?);
        let mut database = path;
        for (key, value) in query.split('&').filter_map(|pair| pair.split_once('=')) {
            match key {
                "db" | "database" => database = value,
                "user" | "username" => user = decode(value)?,
                "pass" | "password" => password = Some(decode(value)?),
                // Options of other clients (`protocol=3`, …) do not concern this one.
                _ => {}
            }
        }
        let database = match database {
            "" => 0,
            text => text.parse().map_err(|_| "the database must be a number")?,
        };
        let login = match (user, password) {
            (user, Some(password)) if user.is_empty() => Some(("default".into(), password)),
            (user, Some(password)) => Some((user, password)),
            (user, None) if user.is_empty() => None,
            (_, None) => return Err("a user without a password; write redis://user:password@…"),
        };
        Ok(Self { endpoint, login, database })
    }
}

/// Splits `host[:port][/database]`.
fn tcp(rest: &str, tls: bool) -> Result<(RedisEndpoint, &str), &'static str> {
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let (host, port) = if let Some(bracketed) = authority.strip_prefix('[') {
        let Some((host, port)) = bracketed.split_once(']') else {
            return Err("an IPv6 address lacks its closing bracket");
        };
        (host, port.strip_prefix(':').unwrap_or(port))
    } else {
        authority.rsplit_once(':').unwrap_or((authority, ""))
    };
    let port = match port {
        "" => DEFAULT_PORT,
        text => text.parse().map_err(|_| "the port must be a number up to 65535")?,
    };
    let host = if host.is_empty() { "localhost" } else { host };
    if host.contains(':') && !authority.starts_with('[') {
        return Err("an IPv6 address must be in brackets");
    }
    Ok((RedisEndpoint::Tcp { host: host.into(), port, tls }, path))
}

fn decode(text: &str) -> Result<String, &'static str> {
    let decoded = percent_decode_str(text).decode_utf8();
    decoded.map(String::from).map_err(|_| "a percent-encoded part is not UTF-8")
}

impl fmt::Display for RedisAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.endpoint {
            RedisEndpoint::Tcp { host, port, .. } if host.contains(':') => {
                write!(f, "[{host}]:{port}")
            }
            RedisEndpoint::Tcp { host, port, .. } => write!(f, "{host}:{port}"),
            RedisEndpoint::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

impl fmt::Debug for RedisAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

const DEFAULT_PORT: u16 = 6379;

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16, tls: bool) -> RedisEndpoint {
        RedisEndpoint::Tcp { host: host.into(), port, tls }
    }

    fn login(user: &str, password: &str) -> Option<(String, String)> {
        Some((user.into(), password.into()))
    }

    #[test]
    fn urls_of_every_form_are_read() {
        for (url, endpoint, who, database) in [
            ("redis://localhost", tcp("localhost", 6379, false), None, 0),
            ("redis://", tcp("localhost", 6379, false), None, 0),
            ("redis://:7000/", tcp("localhost", 7000, false), None, 0),
            ("redis://10.0.0.1:1/2", tcp("10.0.0.1", 1, false), None, 2),
            ("redis://h/2?db=3&protocol=3", tcp("h", 6379, false), None, 3),
            ("rediss://me:p%40ss@h:1", tcp("h", 1, true), login("me", "p@ss"), 0),
            ("rediss://:a:b@@h:1", tcp("h", 1, true), login("default", "a:b@"), 0),
            ("redis://[::1]:5/1", tcp("::1", 5, false), None, 1),
            ("redis://[::1]", tcp("::1", 6379, false), None, 0),
            ("unix:///run/r.sock?db=4", RedisEndpoint::Unix("/run/r.sock".into()), None, 4),
            (
                "redis+unix:///r%20s?user=u&password=p",
                RedisEndpoint::Unix("/r s".into()),
                login("u", "p"),
                0,
            ),
            ("unix://:pw@/r", RedisEndpoint::Unix("/r".into()), login("default", "pw"), 0),
        ] {
            let address = RedisAddress::parse(url).unwrap();
            assert_eq!(
                (address.endpoint, address.login, address.database),
                (endpoint, who, database)
            );
        }
    }

    #[test]
    fn bad_urls_are_refused_without_quoting_them() {
        for url in [
            "localhost:6379",
            "http://h",
            "redis://h:99999",
            "redis://h:x",
            "redis://h/x",
            "redis://secret@h",
            "redis://::1",
            "redis://[::1",
            "unix://run/r.sock",
            "redis://u:%ff@h",
        ] {
            assert!(RedisAddress::parse(url).is_err(), "{url}");
        }
    }

    #[test]
    fn the_password_is_not_printed() {
        let address = RedisAddress::parse("redis://user:secret@host:1/2").unwrap();
        assert_eq!(format!("{address} {address:?}"), "host:1 host:1");
    }
}
