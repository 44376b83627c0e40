//! The servers of a Redis and the login there, read from a URL; opens no connection.

use std::{fmt, path::PathBuf};

use percent_encoding::percent_decode_str;

/// A parsed URL. Prints the servers' addresses only, since it holds a password.
#[derive(Clone)]
pub(crate) struct RedisAddress {
    /// The servers that the URL names.
    pub(super) servers: RedisServers,
    /// User and password; the user is `default` if the URL names none.
    pub(super) login: Option<(String, String)>,
    /// The database of keys; channels have none.
    pub(super) database: u32,
}

/// The servers that a URL names, in one of its forms.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum RedisServers {
    /// One server, the master for ever.
    One(RedisEndpoint),
    /// The sentinels that know which server is the master now.
    Sentinel {
        /// The sentinels, at least one.
        sentinels: Vec<RedisEndpoint>,
        /// Name under which the sentinels watch the master.
        master: String,
    },
    /// Some nodes of a Cluster, at least one; they name the others.
    Cluster {
        /// The nodes.
        seeds: Vec<RedisEndpoint>,
    },
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
    /// Reads `redis://[user][:password]@host[:port][/database]`, the same with `rediss`,
    /// `unix:///path[?db=1&user=…&password=…]`,
    /// `redis+sentinel://[user][:password]@host[:port][,host[:port]…]/master[/database]`, the same with
    /// `rediss+sentinel`, or `redis+cluster://[user][:password]@host[:port][,host[:port]…]`, the same with
    /// `rediss+cluster`. The error never quotes the URL, which may hold a password.
    pub(crate) fn parse(url: &str) -> Result<Self, &'static str> {
        let Some((scheme, rest)) = url.split_once("://") else {
            return Err("the URL has no scheme such as redis://");
        };
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (credentials, rest) = match rest.rsplit_once('@') {
            Some((credentials, rest)) => (Some(credentials), rest),
            None => (None, rest),
        };
        let (servers, path) = match scheme {
            "redis" | "valkey" => tcp(rest, false)?,
            "rediss" | "valkeys" => tcp(rest, true)?,
            "unix" | "redis+unix" | "valkey+unix" => {
                if !rest.starts_with('/') {
                    return Err(
                        "the path of a Unix socket must be absolute: unix:///run/redis.sock",
                    );
                }
                (RedisServers::One(RedisEndpoint::Unix(PathBuf::from(decode(rest)?))), "")
            }
            "redis+sentinel" | "valkey+sentinel" => sentinels(rest, false)?,
            "rediss+sentinel" | "valkeys+sentinel" => sentinels(rest, true)?,
            "redis+cluster" | "valkey+cluster" => cluster(rest, false)?,
            "rediss+cluster" | "valkeys+cluster" => cluster(rest, true)?,
            _ => {
                return Err(
                    "the scheme must be redis, rediss, unix, redis+sentinel, rediss+sentinel, redis+cluster or \
                     rediss+cluster",
                );
            }
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
        if database != 0 && matches!(servers, RedisServers::Cluster { .. }) {
            return Err("a Cluster has database 0 only");
        }
        let login = match (user, password) {
            (user, Some(password)) if user.is_empty() => Some(("default".into(), password)),
            (user, Some(password)) => Some((user, password)),
            (user, None) if user.is_empty() => None,
            (_, None) => return Err("a user without a password; write redis://user:password@…"),
        };
        Ok(Self { servers, login, database })
    }

    /// Returns whether TLS is spoken with every server.
    pub(super) fn is_tls(&self) -> bool {
        let first = match &self.servers {
            RedisServers::One(endpoint) => Some(endpoint),
            RedisServers::Sentinel { sentinels, .. } => sentinels.first(),
            RedisServers::Cluster { seeds } => seeds.first(),
        };
        first.is_some_and(RedisEndpoint::is_tls)
    }
}

impl RedisEndpoint {
    /// Returns whether TLS is spoken with the server.
    pub(super) fn is_tls(&self) -> bool {
        matches!(self, Self::Tcp { tls: true, .. })
    }
}

/// Splits `host[:port][/database]`.
fn tcp(rest: &str, tls: bool) -> Result<(RedisServers, &str), &'static str> {
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    Ok((RedisServers::One(endpoint(authority, DEFAULT_PORT, tls)?), path))
}

/// Splits `host[:port][,host[:port]…]/master[/database]`.
fn sentinels(rest: &str, tls: bool) -> Result<(RedisServers, &str), &'static str> {
    let (authorities, path) = rest.split_once('/').unwrap_or((rest, ""));
    let (master, database) = path.split_once('/').unwrap_or((path, ""));
    let master = decode(master)?;
    if master.is_empty() {
        return Err(
            "the name of the master is missing: write redis+sentinel://host:26379/mymaster",
        );
    }
    let sentinels = authorities.split(',');
    let sentinels = sentinels.map(|authority| endpoint(authority, DEFAULT_SENTINEL_PORT, tls));
    let sentinels = sentinels.collect::<Result<Vec<_>, _>>()?;
    Ok((RedisServers::Sentinel { sentinels, master }, database))
}

/// Splits `host[:port][,host[:port]…][/0]`.
fn cluster(rest: &str, tls: bool) -> Result<(RedisServers, &str), &'static str> {
    let (authorities, database) = rest.split_once('/').unwrap_or((rest, ""));
    let seeds = authorities.split(',').map(|authority| endpoint(authority, DEFAULT_PORT, tls));
    Ok((RedisServers::Cluster { seeds: seeds.collect::<Result<_, _>>()? }, database))
}

/// Reads `host[:port]`.
fn endpoint(authority: &str, default_port: u16, tls: bool) -> Result<RedisEndpoint, &'static str> {
    let (host, port) = if let Some(bracketed) = authority.strip_prefix('[') {
        let Some((host, port)) = bracketed.split_once(']') else {
            return Err("an IPv6 address lacks its closing bracket");
        };
        (host, port.strip_prefix(':').unwrap_or(port))
    } else {
        authority.rsplit_once(':').unwrap_or((authority, ""))
    };
    let port = match port {
        "" => default_port,
        text => text.parse().map_err(|_| "the port must be a number up to 65535")?,
    };
    let host = if host.is_empty() { "localhost" } else { host };
    if host.contains(':') && !authority.starts_with('[') {
        return Err("an IPv6 address must be in brackets");
    }
    Ok(RedisEndpoint::Tcp { host: host.into(), port, tls })
}

fn decode(text: &str) -> Result<String, &'static str> {
    let decoded = percent_decode_str(text).decode_utf8();
    decoded.map(String::from).map_err(|_| "a percent-encoded part is not UTF-8")
}

impl fmt::Display for RedisAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.servers {
            RedisServers::One(endpoint) => endpoint.fmt(f),
            RedisServers::Sentinel { sentinels, master } => {
                write!(f, "{master} of the sentinels ")?;
                list(f, sentinels)
            }
            RedisServers::Cluster { seeds } => {
                f.write_str("the Cluster of ")?;
                list(f, seeds)
            }
        }
    }
}

fn list(f: &mut fmt::Formatter<'_>, endpoints: &[RedisEndpoint]) -> fmt::Result {
    for (number, endpoint) in endpoints.iter().enumerate() {
        write!(f, "{}{endpoint}", if number == 0 { "" } else { "," })?;
    }
    Ok(())
}

impl fmt::Display for RedisEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port, .. } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port, .. } => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

impl fmt::Debug for RedisAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

const DEFAULT_PORT: u16 = 6379;

const DEFAULT_SENTINEL_PORT: u16 = 26379;

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
                (address.servers, address.login, address.database),
                (RedisServers::One(endpoint), who, database)
            );
        }
    }

    #[test]
    fn urls_of_sentinels_are_read() {
        let address =
            RedisAddress::parse("rediss+sentinel://me:p%40ss@s1,s2:7,[::1]/mymaster/3").unwrap();
        assert_eq!((&address.login, address.database), (&login("me", "p@ss"), 3));
        assert!(address.is_tls());
        let sentinels = vec![tcp("s1", 26379, true), tcp("s2", 7, true), tcp("::1", 26379, true)];
        let master = "mymaster".to_owned();
        assert_eq!(address.servers, RedisServers::Sentinel { sentinels, master });
        assert_eq!(address.to_string(), "mymaster of the sentinels s1:26379,s2:7,[::1]:26379");
        let plain = RedisAddress::parse("redis+sentinel://s1/m").unwrap();
        assert!(!plain.is_tls() && plain.login.is_none() && plain.database == 0);
    }

    #[test]
    fn urls_of_a_cluster_are_read() {
        let address = RedisAddress::parse("rediss+cluster://me:p%40ss@n1,n2:7,[::1]:8/0").unwrap();
        assert_eq!((&address.login, address.database), (&login("me", "p@ss"), 0));
        let seeds = vec![tcp("n1", 6379, true), tcp("n2", 7, true), tcp("::1", 8, true)];
        assert_eq!(address.servers, RedisServers::Cluster { seeds });
        assert_eq!(address.to_string(), "the Cluster of n1:6379,n2:7,[::1]:8");
        assert!(address.is_tls());
        assert!(!RedisAddress::parse("redis+cluster://n1").unwrap().is_tls());
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
            "redis+sentinel://s1",
            "redis+sentinel://s1//0",
            "redis+sentinel://s1:x/m",
            "redis+sentinel://s1/m/x",
            "redis+cluster://n1/1",
            "redis+cluster://n1,n2:x",
            "redis+cluster://me@n1",
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
