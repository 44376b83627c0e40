//! Failures of the database, as callers see them; their causes go to the log only.

use std::{fmt, io};

use secrecy::ExposeSecret;

/// The reason why a statement failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DatabaseError {
    /// The database is away, busy or read-only, or its tables are not ready: a later attempt may succeed.
    #[error("the database is not available")]
    Unavailable,
    /// The database refused the statement: the same statement fails again.
    #[error("the database refused")]
    Refused,
}

/// The reason why credentials were not changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SecretsError {
    /// The statement failed; the text is the cause, for operators only.
    #[error("{0}: {1}")]
    Database(DatabaseError, String),
    /// The database did not answer, and the change may have been made; the text is the cause, for operators only.
    #[error("the database did not answer, and the change may have been made: {0}")]
    InDoubt(String),
    /// The table `agent_secrets` is absent; the text is the SQL that makes it.
    #[error(
        "the table agent_secrets is absent. Run `wsproxy migrate` with a role that may create tables, or this:\n{0}"
    )]
    NoTable(String),
    /// There is no such user.
    #[error("there is no such user")]
    UnknownUser,
    /// The user exists already.
    #[error("the user exists already")]
    Exists,
    /// The user has no such secret.
    #[error("the user has no such secret")]
    UnknownSecret,
    /// The user has as many valid secrets as allowed.
    #[error("the user has {} valid secrets already: revoke one", super::secrets::SECRETS_MAX)]
    TooMany,
    /// An application keeps the user's secret in clear, and it alone counts.
    #[error(
        "an application keeps this user's secret in clear in agent_credentials.shared_secret, and that value alone counts"
    )]
    Clear,
}

/// Text of a failure for the log: without values of statements, and without passwords.
pub(super) struct Cause<'a>(pub(super) &'a sqlx::Error);

impl fmt::Display for Cause<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(error) = self;
        match error {
            sqlx::Error::Database(error) => {
                let code = error.code().unwrap_or_default();
                // Messages of other classes may quote a value, such as "invalid input syntax: …".
                if has_plain_message(&code) {
                    write!(f, "{} ({code})", error.message())
                } else {
                    write!(f, "SQLSTATE {code}")?;
                    error.constraint().map_or(Ok(()), |name| write!(f, " of {name}"))
                }
            }
            // The library tries again while a server refuses, and then forgets that it did.
            sqlx::Error::PoolTimedOut => f.write_str(
                "no connection in two seconds: the server refuses, does not answer, or all connections are in use",
            ),
            sqlx::Error::ColumnDecode { index, .. } => {
                write!(f, "the column {index} has another type")
            }
            sqlx::Error::Encode(_) | sqlx::Error::Decode(_) => {
                f.write_str("a value has another type")
            }
            error => write!(f, "{error}"),
        }
    }
}

/// Returns whether a failure is one of the connection, so that another one may do better.
pub(super) fn is_broken(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(error) => error.kind() != io::ErrorKind::TimedOut,
        sqlx::Error::Protocol(_) | sqlx::Error::WorkerCrashed => true,
        // The server ends: it was told to shut down, or to drop this connection.
        sqlx::Error::Database(error) => {
            error.code().is_some_and(|code| code.starts_with("57P") || code.starts_with("08"))
        }
        _ => false,
    }
}

/// Returns whether the database itself said no, so that the statement was not done.
pub(super) fn is_answer(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::Database(_)) && !is_broken(error)
}

/// Returns whether a later attempt may succeed.
pub(super) fn is_passing(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Database(error) => {
            let code = error.code().unwrap_or_default();
            is_sqlite(&code) && is_sqlite_passing(&code)
                || PASSING.iter().any(|class| code.starts_with(class))
        }
        sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::Tls(_)
        | sqlx::Error::Io(_) => true,
        error => is_broken(error),
    }
}

fn has_plain_message(code: &str) -> bool {
    is_sqlite(code) || !["22", "23", "P0"].iter().any(|class| code.starts_with(class))
}

/// Codes of SQLite are numbers below 10,000; SQLSTATE has five characters.
fn is_sqlite(code: &str) -> bool {
    code.len() < 5
}

/// Returns whether a result code of SQLite, in its lowest byte, is one that passes: busy, locked, out of memory,
/// read-only, I/O, full, cannot open.
fn is_sqlite_passing(code: &str) -> bool {
    code.parse::<u32>().is_ok_and(|code| matches!(code & 0xff, 5..=8 | 10 | 13 | 14))
}

/// Reveals a secret for the one place that needs its text.
pub(super) fn reveal(secret: &secrecy::SecretString) -> &str {
    secret.expose_secret()
}

/// Classes of SQLSTATE whose failures pass: connection, invalid authorization (an operator repairs it), deadlock,
/// read-only, resources, operator's intervention, system.
const PASSING: [&str; 10] = ["08", "28", "3D", "40", "25006", "53", "55P03", "57", "58", "XX"];
