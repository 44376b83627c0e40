//! Exit codes, those of sysexits.h; the only place that chooses one.

use std::{fmt, io::ErrorKind};

use crate::config::problem::Problems;

/// The command line was wrong.
pub const USAGE: u8 = 64;
const UNAVAILABLE: u8 = 69;
const SOFTWARE: u8 = 70;
const OS: u8 = 71;
const NO_PERMISSION: u8 = 77;
const CONFIG: u8 = 78;

/// What kind of failure an error is, where its type does not tell: attach it with
/// [`anyhow::Context`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// Something that is needed does not answer, such as Redis.
    Unavailable,
    /// The operating system refused, such as a port that is taken.
    Os,
    /// What is asked for contradicts the configuration.
    Config,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unavailable => "a needed service is unavailable",
            Self::Os => "the operating system refused",
            Self::Config => "the configuration does not allow it",
        })
    }
}

/// The exit code for `error`.
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
        };
    }
    let io = error.chain().find_map(|cause| cause.downcast_ref::<std::io::Error>());
    match io.map(std::io::Error::kind) {
        Some(ErrorKind::PermissionDenied) => NO_PERMISSION,
        Some(ErrorKind::AddrInUse | ErrorKind::AddrNotAvailable) => OS,
        Some(ErrorKind::ConnectionRefused | ErrorKind::TimedOut | ErrorKind::HostUnreachable) => {
            UNAVAILABLE
        }
        _ => SOFTWARE,
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn codes_follow_the_cause_through_the_chain() {
        let io = |kind| anyhow::Error::from(std::io::Error::from(kind)).context("cannot listen");
        assert_eq!(code(&io(ErrorKind::AddrInUse)), 71);
        assert_eq!(code(&io(ErrorKind::PermissionDenied)), 77);
        assert_eq!(code(&io(ErrorKind::ConnectionRefused)), 69);
        assert_eq!(code(&Problems(Vec::new()).into()), 78);
        assert_eq!(code(&anyhow::anyhow!("x")), 70);
        let redis: anyhow::Result<()> = Err(anyhow::anyhow!("x")).context(Failure::Unavailable);
        assert_eq!(code(&redis.unwrap_err().context("at start")), 69);
    }
}
