//! Exit codes, those of sysexits.h. Every exit code is chosen here.

use std::{fmt, io::ErrorKind};

use crate::config::problem::Problems;

/// The kind of a failure whose error type does not tell it; attached with [`anyhow::Context`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// A required service does not answer, such as Redis.
    Unavailable,
    /// The operating system refused, such as a port that is taken.
    Os,
    /// The command contradicts the configuration.
    Config,
    /// There is no such user.
    NoUser,
    /// The values that were given do not fit to what is stored.
    Data,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unavailable => "a needed service is unavailable",
            Self::Os => "the operating system refused",
            Self::Config => "the configuration does not allow it",
            Self::NoUser => "the user is not known",
            Self::Data => "the values do not fit",
        })
    }
}

/// Returns the exit code for `error`.
#[must_use]
pub fn code(error: &anyhow::Error) -> u8 {
    if error.is::<Problems>() {
        return CONFIG;
    }
    if let Some(failure) = error.downcast_ref::<Failure>() {
        return match failure {
            Failure::Unavailable => UNAVAILABLE,
            Failure::Os => OS,
            Failure::Config => CONFIG,
            Failure::NoUser => NO_USER,
            Failure::Data => DATA,
        };
    }
    let io = error.chain().find_map(|cause| cause.downcast_ref::<std::io::Error>());
    match io.map(std::io::Error::kind) {
        Some(ErrorKind::PermissionDenied) => NO_PERMISSION,
        // A place to listen at: a port, or the file of a unix socket.
        Some(
            ErrorKind::AddrInUse
            | ErrorKind::AddrNotAvailable
            | ErrorKind::AlreadyExists
            | ErrorKind::NotFound,
        ) => OS,
        Some(ErrorKind::ConnectionRefused | ErrorKind::TimedOut | ErrorKind::HostUnreachable) => {
            UNAVAILABLE
        }
        _ => SOFTWARE,
    }
}

/// The command line was wrong.
pub const USAGE: u8 = 64;
const DATA: u8 = 65;
const NO_USER: u8 = 67;
const UNAVAILABLE: u8 = 69;
const SOFTWARE: u8 = 70;
const OS: u8 = 71;
const NO_PERMISSION: u8 = 77;
const CONFIG: u8 = 78;

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn codes_follow_the_cause_through_the_chain() {
        let io = |kind| anyhow::Error::from(std::io::Error::from(kind)).context("cannot listen");
        assert_eq!(code(&io(ErrorKind::AddrInUse)), 71);
        assert_eq!(code(&io(ErrorKind::AlreadyExists)), 71);
        assert_eq!(code(&io(ErrorKind::NotFound)), 71);
        assert_eq!(code(&io(ErrorKind::PermissionDenied)), 77);
        assert_eq!(code(&io(ErrorKind::ConnectionRefused)), 69);
        assert_eq!(code(&Problems(Vec::new()).into()), 78);
        assert_eq!(code(&anyhow::anyhow!("x")), 70);
        let redis: anyhow::Result<()> = Err(anyhow::anyhow!("x")).context(Failure::Unavailable);
        assert_eq!(code(&redis.unwrap_err().context("at start")), 69);
    }
}
