//! Rules of text values: levels, origins, URLs of Redis, and others.

use http::Uri;
use jsonwebtoken::Algorithm;
use tracing_subscriber::EnvFilter;
use wsproxy_proto::names::Id;

use super::kind::Text;

fn level(text: &str) -> Option<String> {
    let text = text.to_ascii_lowercase();
    // Python's names of levels are common, but the filter would take them for names of modules.
    match text.as_str() {
        "warning" => return Some("warn".into()),
        "critical" | "fatal" => return Some("error".into()),
        _ => {}
    }
    let good = text.split(',').all(is_directive) && EnvFilter::try_new(&text).is_ok();
    good.then_some(text)
}

fn is_directive(text: &str) -> bool {
    let is_level =
        |text: &str| ["off", "error", "warn", "info", "debug", "trace"].contains(&text.trim());
    match text.rsplit_once('=') {
        Some((target, level)) => !target.trim().is_empty() && is_level(level),
        None => is_level(text),
    }
}

/// Returns the wrong part of a URL of Redis. Checks the form only: the bus parses the URL when it
/// starts. Quotes no part, since any may be a piece of a password.
fn check_redis_url(text: &str) -> Result<(), &'static str> {
    if !text.bytes().all(|b| b.is_ascii_graphic()) {
        return Err("a character must be percent-encoded: a space, or one that is not ASCII");
    }
    let Some((scheme, rest)) = text.split_once("://") else {
        return Err(
            "the scheme is missing: the URL must begin with redis://, rediss://, redis+sentinel://, \
             rediss+sentinel://, redis+cluster://, rediss+cluster:// or unix://",
        );
    };
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let place = rest.rsplit_once('@').map_or(rest, |(_, place)| place);
    // Names of options only: their values may be passwords.
    let options = query.split('&').filter_map(|option| option.split('=').next());
    let words: Vec<_> = options.chain([scheme]).map(str::to_ascii_lowercase).collect();
    let names = |kind: &str| words.iter().any(|word| word.contains(kind));
    match scheme {
        "unix" | "redis+unix" | "valkey+unix" if place.starts_with('/') => Ok(()),
        "unix" | "redis+unix" | "valkey+unix" => {
            Err("the path must be absolute, as in unix:///run/redis.sock")
        }
        "redis+sentinel" | "rediss+sentinel" | "valkey+sentinel" | "valkeys+sentinel" => {
            check_sentinels(place)
        }
        "redis+cluster" | "rediss+cluster" | "valkey+cluster" | "valkeys+cluster" => {
            check_cluster(place)
        }
        _ if names("sentinel") => Err("this is another client's form for Redis Sentinel: write \
             redis+sentinel://host:26379,host:26379/name-of-the-master, or rediss+sentinel for TLS"),
        _ if names("cluster") => Err("this is another client's form for Redis Cluster: write \
             redis+cluster://host:6379,host:6379, or rediss+cluster for TLS"),
        "redis" | "rediss" | "valkey" | "valkeys" => check_redis_place(place),
        _ => Err(
            "the scheme is unknown: it must be redis, rediss (TLS), unix, redis+sentinel, rediss+sentinel, \
             redis+cluster or rediss+cluster",
        ),
    }
}

/// Checks `host[:port][/database]`; without a host the server is on this machine.
fn check_redis_place(place: &str) -> Result<(), &'static str> {
    let (authority, database) = place.split_once('/').unwrap_or((place, ""));
    if authority.contains(',') {
        return Err("several hosts need another scheme: for Redis Sentinel write \
             redis+sentinel://host:26379,host:26379/name-of-the-master, for Redis Cluster redis+cluster://host:6379,host:6379");
    }
    check_authority(authority)?;
    check_database(database)
}

/// Checks `host[:port][,host[:port]…]/master[/database]`.
fn check_sentinels(place: &str) -> Result<(), &'static str> {
    let Some((authorities, path)) = place.split_once('/') else {
        return Err(NO_MASTER);
    };
    let (master, database) = path.split_once('/').unwrap_or((path, ""));
    let known = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    match master {
        "" => return Err(NO_MASTER),
        master if !master.bytes().all(known) => {
            return Err(
                "the name of the master, behind the hosts, may hold only letters, digits and -_.",
            );
        }
        _ => {}
    }
    if authorities.split(',').count() > SENTINELS_MAX {
        return Err("there are more than 16 sentinels");
    }
    check_authorities(authorities, "the host of a sentinel is missing")?;
    check_database(database)
}

/// Checks `host[:port][,host[:port]…][/0]`.
fn check_cluster(place: &str) -> Result<(), &'static str> {
    let (authorities, database) = place.split_once('/').unwrap_or((place, ""));
    if authorities.split(',').count() > SEEDS_MAX {
        return Err("there are more than 64 nodes: name a few, they know the others");
    }
    check_authorities(authorities, "the host of a node is missing")?;
    match database {
        "" | "0" => Ok(()),
        _ => Err("a Cluster has database 0 only"),
    }
}

/// Checks `host[:port][,host[:port]…]`.
fn check_authorities(authorities: &str, without_host: &'static str) -> Result<(), &'static str> {
    authorities.split(',').try_for_each(|authority| match authority {
        "" => Err(without_host),
        authority => check_authority(authority),
    })
}

/// Checks `host[:port]`; the host may be missing.
fn check_authority(authority: &str) -> Result<(), &'static str> {
    if !authority.starts_with('[') && authority.matches(':').count() > 1 {
        return Err("the host is an IPv6 address without its brackets, or there are two ports");
    }
    let (host, port) = match authority.find(']') {
        Some(end) => authority.split_at(end + 1),
        None => authority.split_at(authority.find(':').unwrap_or(authority.len())),
    };
    if !host.is_empty() && !is_host(host) {
        return Err(
            "the host is neither a name nor an address (IPv6 in brackets); in a password write : / ? # @ \
             and % percent-encoded",
        );
    }
    if !is_host(&format!("localhost{port}")) {
        return Err(
            "the port must be a number from 1 to 65535; in a password write : / ? # @ and % \
             percent-encoded",
        );
    }
    Ok(())
}

fn check_database(database: &str) -> Result<(), &'static str> {
    if !database.is_empty() && database.parse::<u32>().is_err() {
        return Err("the database, behind the last /, must be a number");
    }
    Ok(())
}

/// Returns the wrong part of the URL of a JWKS; quotes no part, since it may hold a password.
fn check_jwks_url(text: &str) -> Result<(), &'static str> {
    let scheme = text.split_once("://").map(|(scheme, _)| scheme.to_ascii_lowercase());
    if !matches!(scheme.as_deref(), Some("http" | "https")) {
        return Err("the scheme must be http:// or https://");
    }
    let url: Uri =
        text.parse().map_err(|_| "it is no URL: a character is not allowed, or no host")?;
    let Some(place) = url.authority().filter(|place| !place.host().is_empty()) else {
        return Err("the host is missing");
    };
    if place.as_str().contains('@') {
        return Err(
            "the user and the password before the host must go: the issuer's keys are public",
        );
    }
    Ok(())
}

/// Checks a name or an address, an IPv6 address in brackets, with or without a port.
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

const NO_MASTER: &str = "the name of the master is missing: it stands behind the hosts, as in \
                         redis+sentinel://host:26379/mymaster";

/// Upper bound of sentinels: an instance holds a connection to each.
const SENTINELS_MAX: usize = 16;

/// Upper bound of the nodes of a Cluster in its URL.
const SEEDS_MAX: usize = 64;

/// A log level, or directives.
pub(super) const LEVEL: Text = Text {
    allowed: "off, error, warn, info, debug, trace, or directives such as \"info,wsproxy::bus=debug\"",
    read: level,
    explain: |text| {
        let text = text.to_ascii_lowercase();
        let mut unknown = text.split(',').map(str::trim).filter(|part| !is_directive(part));
        let unknown = unknown.next().filter(|_| text.contains([',', '=']))?;
        Some(format!("\"{unknown}\" is neither a level nor a directive such as wsproxy::bus=debug"))
    },
};

/// The path of an endpoint: segments of ids.
pub(super) const ENDPOINT_PATH: Text =
    Text::new("a path such as / or /agents, without a query", |text| {
        let rest = text.strip_prefix('/')?;
        let good = rest.is_empty() || rest.split('/').all(|segment| Id::parse(segment).is_ok());
        good.then(|| text.to_owned())
    });

/// The URL of a database. A deployment without agents may have one of another service, so that the form is checked only
/// where agents are served.
pub(super) const DATABASE_URL: Text =
    Text::new("postgres://[user[:password]@]host[:port]/database (percent-encoded)", |text| {
        (!text.is_empty()).then(|| text.to_owned())
    });

/// The name of a member of an object.
pub(super) const MEMBER: Text = Text::new("a name of a member, such as pin_code", |text| {
    let text = text.trim();
    (!text.is_empty() && text.len() <= 128).then(|| text.to_owned())
});

/// The name of an instance.
pub(super) const SERVER_ID: Text = Text::new("1 to 128 letters, digits and -_.~@+=|", |text| {
    Id::parse(text).ok().map(|id| id.as_str().to_owned())
});

/// The prefix of keys and channels.
pub(super) const PREFIX: Text =
    Text::new("up to 64 letters, digits and -_.:, without the colon at its end", |text| {
        // No braces: keys that belong together have their name in braces, which choose the slot of a cluster.
        let known = |b: u8| b.is_ascii_alphanumeric() || b"-_.:".contains(&b);
        let good = text.len() <= 64 && text.bytes().all(known) && !text.ends_with(':');
        good.then(|| text.to_owned())
    });

/// The URL of Redis.
pub(super) const REDIS_URL: Text = Text {
    allowed: REDIS_URL_FORM,
    read: |text| check_redis_url(text).is_ok().then(|| text.to_owned()),
    explain: |text| {
        let broken = check_redis_url(text).err()?;
        Some(format!("{broken}. The form is {REDIS_URL_FORM}"))
    },
};

const REDIS_URL_FORM: &str = "redis://[user:password@]host[:port][/database] (percent-encoded), rediss://…, \
                              redis+sentinel://[user:password@]host[:port],…/master[/database], rediss+sentinel://…, \
                              redis+cluster://[user:password@]host[:port],…, rediss+cluster://… or unix:///path";

/// The name of a user of Redis.
pub(super) const REDIS_USER: Text = Text::new("1 to 128 visible characters", |text| {
    let good = (1..=128).contains(&text.len()) && !text.contains(|c: char| c.is_whitespace());
    good.then(|| text.to_owned())
});

/// A password at Redis.
pub(super) const REDIS_PASSWORD: Text =
    Text::new("1 to 4096 bytes", |text| (1..=4096).contains(&text.len()).then(|| text.to_owned()));

/// A bearer key of the API.
pub(super) const API_KEY: Text =
    Text::new("16 to 256 visible ASCII characters without a comma", |text| {
        let good = (16..=256).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_graphic() && b != b',');
        good.then(|| text.to_owned())
    });

/// A secret that signs tokens. Its shortest length depends on its use.
pub(super) const JWT_SECRET: Text = Text::new(
    "the secret itself, up to 4096 bytes; a PEM key belongs into jwt.public_key_file",
    |text| {
        // Anyone has a public key, and could sign tokens with it as the secret.
        (text.len() <= 4096 && !text.contains("-----BEGIN")).then(|| text.to_owned())
    },
);

/// The algorithms of signatures.
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

/// The URL of a JWKS.
pub(super) const JWKS_URL: Text = Text {
    allowed: "an http:// or https:// URL without a user and a password",
    read: |text| check_jwks_url(text).is_ok().then(|| text.to_owned()),
    explain: |text| check_jwks_url(text).err().map(str::to_owned),
};

/// The URL of an instance's listener for other instances.
pub(super) const PEER_URL: Text = Text {
    allowed: "an http:// or https:// URL of a host and a port, without a path",
    read: |text| {
        let url = text.parse::<Uri>().ok().filter(|_| check_jwks_url(text).is_ok())?;
        let is_bare = matches!(url.path(), "" | "/") && url.query().is_none();
        is_bare.then(|| text.trim_end_matches('/').to_owned())
    },
    explain: |text| check_jwks_url(text).err().map(str::to_owned),
};

/// A claim's name or value.
pub(super) const CLAIM: Text = Text::new("1 to 512 characters", |text| {
    (1..=512).contains(&text.len()).then(|| text.to_owned())
});

/// The type of a token: a media type, with or without `application/`.
pub(super) const TYP: Text = Text::new("1 to 128 visible ASCII characters", |text| {
    let good = (1..=128).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic());
    good.then(|| text.to_owned())
});

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
            "redis://redis-cluster.local?password=sentinel&client=cluster",
            "redis://:p%40ss%3Aw%2Frd@[::1]:6379/3",
            "rediss://user:pw@[::1]:6380",
            "unix:///run/redis.sock",
            "redis+sentinel://h/m",
            "rediss+sentinel://user:pw@s1:26379,s2,[::1]:5/my-master.1/0",
            "redis+cluster://h",
            "rediss+cluster://user:pw@n1:6379,n2,[::1]:5/0",
        ] {
            assert_eq!(check_redis_url(good), Ok(()), "{good}");
        }
    }

    #[test]
    fn the_wrong_part_of_a_redis_url_is_named() {
        for (bad, part) in [
            ("localhost:6379", "the scheme is missing"),
            ("http://localhost", "the scheme is unknown"),
            ("redis://h:port", "the port must be"),
            ("redis://h:0", "the port must be"),
            ("redis://::1", "without its brackets"),
            ("redis://:p?w@h", "the port must be"),
            ("redis://h/two", "the database"),
            ("redis://a_b!c", "the host is neither"),
            ("redis://[::1:6379", "the host is neither"),
            ("REDIS://h", "the scheme is unknown"),
            ("unix://redis.sock", "the path must be absolute"),
            ("redis://a b", "must be percent-encoded"),
            ("redis-sentinel://h:26379/mymaster", "another client's form for Redis Sentinel"),
            ("redis://h:26379?sentinelMasterId=m", "another client's form for Redis Sentinel"),
            ("redis://h:26379,i:26379/0", "several hosts need another scheme"),
            ("redis+sentinel://:secret@h", "the name of the master is missing"),
            ("redis+sentinel://:secret@h//0", "the name of the master is missing"),
            ("redis+sentinel://:secret@h,i/m/two", "the database"),
            ("redis+sentinel://h:port/m", "the port must be"),
            ("redis+sentinel://h,,i/m", "the host of a sentinel is missing"),
            ("redis+sentinel://h/m%20n", "the name of the master, behind the hosts"),
            ("redis+sentinel+cluster://h/m", "another client's form"),
            ("redis+cluster://h/1", "database 0 only"),
            ("redis+cluster://:secret@h,,i", "the host of a node is missing"),
            ("redis+cluster://:secret@h:port", "the port must be"),
            ("rediss-cluster://:secret@h", "another client's form for Redis Cluster"),
        ] {
            let why = (REDIS_URL.explain)(bad).unwrap();
            assert!(why.contains(part) && why.ends_with("unix:///path"), "{bad}: {why}");
            assert!(!why.contains("secret") && (REDIS_URL.read)(bad).is_none(), "{bad}: {why}");
        }
    }

    #[test]
    fn the_wrong_part_of_a_level_or_a_jwks_url_is_named() {
        let level = |text| (LEVEL.explain)(text).unwrap();
        assert!(level("info,wsproxy::bus=loud").starts_with("\"wsproxy::bus=loud\" is neither"));
        assert_eq!((LEVEL.explain)("loud"), None);
        for (bad, part) in [
            ("ftp://a/", "the scheme"),
            ("a.example/jwks", "the scheme"),
            ("https://u:p@a/", "the user and the password"),
            ("http://a b", "a character"),
        ] {
            assert!((JWKS_URL.explain)(bad).unwrap().contains(part), "{bad}");
        }
    }
}
