//! Shares out the process's open files, so that the promised number of connections is always possible.

use std::io;

use tracing::warn;

/// Shares of the open files. Their sum, with [`OWN`], is at most the limit of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptors {
    /// Connections of clients.
    pub connections: usize,
    /// Further sockets on the clients' port: for refusals, and for `/health`.
    pub spare: usize,
    /// Sockets on the port of `[admin]`, reserved against clients.
    pub admin: usize,
}

/// The limit of open files leaves too few for clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the limit of open files is {limit}, and at least {LIMIT_MIN} are needed (ulimit -n, LimitNOFILE)"
)]
pub struct TooFew {
    limit: usize,
}

/// Raises the limit of open files as far as possible and shares it out, with at most `wanted` connections unless
/// that is 0.
///
/// # Errors
/// [`TooFew`] below [`LIMIT_MIN`].
pub fn take(wanted: usize) -> Result<Descriptors, TooFew> {
    let shared = Descriptors::of(raise_limit())?;
    let possible = shared.connections;
    if wanted > possible {
        warn!(
            wanted,
            possible, "limits.max_connections is more than the limit of open files allows."
        );
    }
    let connections = if wanted == 0 { possible } else { wanted.min(possible) };
    Ok(Descriptors { connections, ..shared })
}

impl Descriptors {
    /// Shares out a limit of open files.
    ///
    /// # Errors
    /// [`TooFew`] below [`LIMIT_MIN`].
    pub(crate) fn of(limit: usize) -> Result<Self, TooFew> {
        if limit < LIMIT_MIN {
            return Err(TooFew { limit });
        }
        let free = limit - OWN;
        let (spare, admin) = ((free / 4).min(SPARE_MAX), (free / 8).min(ADMIN_MAX));
        Ok(Self { connections: free - spare - admin, spare, admin })
    }
}

/// Raises the soft limit of open files to the hard one, and returns the limit then.
fn raise_limit() -> usize {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let mut current = limit.current;
    if limit.current != limit.maximum {
        let all = Rlimit { current: limit.maximum, maximum: limit.maximum };
        match setrlimit(Resource::Nofile, all).map_err(io::Error::from) {
            Ok(()) => current = limit.maximum,
            Err(error) => warn!(%error, "The limit of open files cannot be raised."),
        }
    }
    current.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(usize::MAX / 2)
}

/// Open files of the instance itself: listeners, the bus, the issuer of tokens, files of secrets, logs.
pub const OWN: usize = 64;

/// Smallest limit of open files with which an instance starts.
pub const LIMIT_MIN: usize = OWN + 16;

const SPARE_MAX: usize = 512;
const ADMIN_MAX: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_descriptors_are_promised_than_there_are() {
        for limit in (LIMIT_MIN..3000).chain([20_000, 1 << 20, usize::MAX / 2]) {
            let Descriptors { connections, spare, admin } = Descriptors::of(limit).unwrap();
            assert_eq!(connections + spare + admin + OWN, limit);
            assert!(spare >= 4 && admin >= 2 && connections > spare + admin, "{limit}");
        }
        let many = Descriptors::of(1 << 20).unwrap();
        assert_eq!((many.spare, many.admin), (512, 256));
    }

    #[test]
    fn a_limit_that_leaves_nothing_is_refused() {
        let why = Descriptors::of(LIMIT_MIN - 1).unwrap_err().to_string();
        assert!(why.contains("is 79, and at least 80 are needed"), "{why}");
    }
}
