//! The URL of a PostgreSQL, in the forms that deployments have. Connects to nothing, and quotes no part of a URL.

use std::str::FromStr;

use sqlx::postgres::{PgConnectOptions, PgSslMode};

/// Parses a URL. Parameters that only another program understands are left out.
///
/// # Errors
/// The wrong part, without any piece of the URL, since it may be a piece of a password.
pub fn parse(url: &str) -> Result<PgConnectOptions, &'static str> {
    if !url.bytes().all(|b| b.is_ascii_graphic()) {
        return Err("a character must be percent-encoded: a space, or one that is not ASCII");
    }
    let (scheme, rest) = url.split_once("://").ok_or("the scheme postgres:// is missing")?;
    check_scheme(scheme)?;
    if rest.contains('#') {
        return Err("a # must be written as %23");
    }
    let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, path) = place.split_once('/').unwrap_or((place, ""));
    if path.contains('@') {
        return Err("in a user or a password write / as %2F");
    }
    if query.contains('@') && !authority.contains('@') {
        return Err("in a user or a password write ? as %3F");
    }
    let (user, host) = authority.rsplit_once('@').unwrap_or(("", authority));
    if user.contains('@') {
        return Err("in a user or a password write @ as %40");
    }
    check_host(host)?;
    let mut parameters = Parameters::default();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        parameters.take(name, value)?;
    }
    let kept = parameters.kept.join("&");
    // The library logs names and values of parameters that it does not know, so that it gets only those that it knows.
    let options = PgConnectOptions::from_str(&format!("postgres://{authority}/{path}?{kept}"));
    let mut options = options.map_err(|_| FORM)?;
    if let Some(mode) = parameters.ssl_mode {
        options = options.ssl_mode(mode);
    }
    if let Some(schema) = parameters.schema {
        options = options.options([("search_path", format!("\"{schema}\""))]);
    }
    if options.get_application_name().is_none() {
        options = options.application_name("wsproxy");
    }
    Ok(options)
}

/// Parameters behind the `?`.
#[derive(Default)]
struct Parameters<'a> {
    kept: Vec<String>,
    ssl_mode: Option<PgSslMode>,
    schema: Option<&'a str>,
}

impl<'a> Parameters<'a> {
    fn take(&mut self, name: &str, value: &'a str) -> Result<(), &'static str> {
        match name {
            "sslmode" | "ssl-mode" | "ssl" => self.ssl_mode = Some(ssl_mode(value)?),
            "schema" => {
                let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"_-".contains(&b);
                if value.is_empty() || !value.bytes().all(is_plain) {
                    return Err("the schema must be one name of letters, digits, _ and -");
                }
                self.schema = Some(value);
            }
            "target_session_attrs" if !["any", "read-write", "primary"].contains(&value) => {
                return Err("target_session_attrs must be read-write: agents' status is written");
            }
            name if KNOWN.contains(&name) => self.kept.push(format!("{name}={value}")),
            _ => {}
        }
        Ok(())
    }
}

fn check_scheme(scheme: &str) -> Result<(), &'static str> {
    // SQLAlchemy names its driver: postgresql+asyncpg.
    let base = scheme.split('+').next().unwrap_or_default().to_ascii_lowercase();
    match base.as_str() {
        "postgres" | "postgresql" => Ok(()),
        "sqlite" | "sqlite3" | "file" => {
            Err("it is no PostgreSQL; for SQLite set database.path, the file, in its place")
        }
        _ => Err("the scheme must be postgres:// or postgresql://"),
    }
}

fn check_host(host: &str) -> Result<(), &'static str> {
    if host.contains(',') {
        return Err(
            "several hosts are not supported: give the address of one server, or of a proxy",
        );
    }
    let port = match host.rsplit_once(']') {
        Some((_, port)) => port.strip_prefix(':'),
        None if host.matches(':').count() > 1 => {
            return Err("the host is an IPv6 address without its brackets, or there are two ports");
        }
        None => host.split_once(':').map(|(_, port)| port),
    };
    let is_port = |port: &str| port.is_empty() || port.parse::<u16>().is_ok_and(|port| port > 0);
    if !port.is_none_or(is_port) {
        return Err(
            "the port must be a number from 1 to 65535; in a password write : / ? # @ and % percent-encoded",
        );
    }
    Ok(())
}

fn ssl_mode(value: &str) -> Result<PgSslMode, &'static str> {
    Ok(match value {
        "disable" | "false" | "0" => PgSslMode::Disable,
        "allow" => PgSslMode::Allow,
        "prefer" => PgSslMode::Prefer,
        "require" | "no-verify" | "true" | "1" | "" => PgSslMode::Require,
        "verify-ca" => PgSslMode::VerifyCa,
        "verify-full" => PgSslMode::VerifyFull,
        _ => {
            return Err(
                "sslmode must be disable, allow, prefer, require, verify-ca or verify-full",
            );
        }
    })
}

/// Parameters that the library understands.
const KNOWN: [&str; 18] = [
    "sslrootcert",
    "ssl-root-cert",
    "ssl-ca",
    "sslcert",
    "ssl-cert",
    "sslkey",
    "ssl-key",
    "statement-cache-capacity",
    "host",
    "hostaddr",
    "port",
    "dbname",
    "user",
    "password",
    "application_name",
    "options",
    "options[statement_timeout]",
    "options[search_path]",
];

const FORM: &str =
    "the form is postgres://[user[:password]@]host[:port]/database (percent-encoded)";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_of_other_programs_work() {
        for good in [
            "postgres://h/d",
            "postgresql://u:p%40ss@h:5433/d",
            "postgresql+asyncpg://u@h/d",
            "POSTGRES://h/d",
            "postgres://u:p@[::1]:5432/d",
            "postgres://u@%2Fvar%2Frun%2Fpostgresql/d",
            "postgres:///d?host=/var/run/postgresql&user=u",
            "postgres://h/d?schema=public&connection_limit=5&pgbouncer=true&passwrod=x",
            "postgres://h/d?sslmode=no-verify&connect_timeout=10&application_name=a",
            "postgres://h/d?ssl=true",
            "postgres://h",
        ] {
            assert!(parse(good).is_ok(), "{good}: {:?}", parse(good).err());
        }
    }

    #[test]
    fn parts_of_a_url_are_used() {
        let options =
            parse("postgresql+psycopg://u:p@db.example:5433/main?sslmode=no-verify&schema=App");
        let options = options.unwrap();
        assert_eq!((options.get_host(), options.get_port()), ("db.example", 5433));
        assert_eq!((options.get_username(), options.get_database()), ("u", Some("main")));
        assert!(matches!(options.get_ssl_mode(), PgSslMode::Require));
        assert_eq!(options.get_application_name(), Some("wsproxy"));
        assert_eq!(options.get_options(), Some("-c search_path=\"App\""));
        let socket = parse("postgres://u@%2Frun%2Fpg/d").unwrap();
        assert_eq!(socket.get_socket().map(|path| path.as_path()), Some("/run/pg".as_ref()));
    }

    #[test]
    fn the_wrong_part_of_a_url_is_named_without_it() {
        for (bad, part) in [
            ("", "the scheme"),
            ("h/secret", "the scheme"),
            ("mysql://u:secret@h/d", "the scheme must be"),
            ("sqlite://secret.db", "database.path"),
            ("postgres://u:sec#ret@h/d", "%23"),
            ("postgres://u:sec/ret@h/d", "%2F"),
            ("postgres://u:sec?ret@h/d", "%3F"),
            ("postgres://u:sec@secret@h/d", "%40"),
            ("postgres://u:sec ret@h/d", "percent-encoded"),
            ("postgres://u:secret@h:port/d", "the port"),
            ("postgres://u:secret@h:0/d", "the port"),
            ("postgres://u:secret@a,b/d", "several hosts"),
            ("postgres://u:secret@::1/d", "brackets"),
            ("postgres://u:secret@h/d?sslmode=secret", "sslmode"),
            ("postgres://h/d?schema=a%20secret", "the schema"),
            ("postgres://h/d?port=secret", "the form"),
            ("postgres://h/d?target_session_attrs=read-only", "read-write"),
        ] {
            let why = parse(bad).unwrap_err();
            assert!(why.contains(part), "{bad}: {why}");
            assert!(!why.contains("secret"), "{bad}: {why}");
        }
    }
}
