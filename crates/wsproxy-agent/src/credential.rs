//! Credentials as values of `Authorization`: given as text, or in a file that is read again. Never shown.

use std::{
    path::PathBuf,
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use http::HeaderValue;
use tokio::time::Instant;
use wsproxy_proto::tunnel::code::Code;

use crate::failure::Failure;

/// Origin of a token.
#[derive(Debug, Clone)]
pub enum TokenSource {
    /// The value of `Authorization`, marked as sensitive.
    Header(HeaderValue),
    /// File with the token. It is read again when it changes.
    File(PathBuf),
}

impl TokenSource {
    /// Returns the source of a token that is known.
    ///
    /// # Errors
    /// The token has bytes that cannot stand in a header.
    pub fn of_text(token: &str) -> Result<Self, BadToken> {
        bearer(token).map(Self::Header)
    }

    /// Returns the value of `Authorization`.
    ///
    /// # Errors
    /// The file cannot be read, or holds no token.
    pub(crate) fn read(&self) -> Result<HeaderValue, BadToken> {
        match self {
            Self::Header(value) => Ok(value.clone()),
            Self::File(path) => {
                let read = std::fs::read_to_string(path);
                let text =
                    read.map_err(|error| BadToken::Unreadable(path.clone(), error.kind()))?;
                bearer(&text)
            }
        }
    }
}

/// Reason why there is no token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadToken {
    /// The file cannot be read.
    #[error("{} cannot be read: {}", .0.display(), .1)]
    Unreadable(PathBuf, std::io::ErrorKind),
    /// There is no text.
    #[error("the token is empty")]
    Empty,
    /// The token has bytes that cannot stand in a header.
    #[error("the token has characters that cannot stand in a header")]
    Characters,
}

fn bearer(token: &str) -> Result<HeaderValue, BadToken> {
    let token = token.trim();
    if token.is_empty() {
        return Err(BadToken::Empty);
    }
    let is_good = token.bytes().all(|byte| byte.is_ascii_graphic());
    let value = is_good.then(|| HeaderValue::from_str(&format!("Bearer {token}")).ok()).flatten();
    let mut value = value.ok_or(BadToken::Characters)?;
    value.set_sensitive(true);
    Ok(value)
}

/// Credential of the agent at its upstream, of which there may be none.
#[derive(Debug)]
pub(crate) struct Credential {
    source: Option<TokenSource>,
    /// Lock: held for a copy of the value, or to put one there.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    value: Option<HeaderValue>,
    read_at: Option<Instant>,
    /// Time of change and size of the file as it was read.
    stamp: Option<(SystemTime, u64)>,
    has_failed: bool,
}

impl Credential {
    pub(crate) fn new(source: Option<TokenSource>) -> Self {
        let credential = Self { source, state: Mutex::default() };
        credential.refresh();
        credential
    }

    /// Returns the value of `Authorization`; `None` where the agent has no credential.
    ///
    /// # Errors
    /// The file could never be read. The request is not sent without its credential.
    pub(crate) fn header(&self) -> Result<Option<HeaderValue>, Failure> {
        if self.source.is_none() {
            return Ok(None);
        }
        let value = self.state().value.clone();
        let missing = || Failure::new(Code::UpstreamConnect, "the upstream's token is missing");
        value.map(Some).ok_or_else(missing)
    }

    /// Reads the file again where it changed, or a minute has passed. A file that cannot be read leaves the token as
    /// it was.
    pub(crate) fn refresh(&self) {
        let Some(source) = &self.source else { return };
        let stamp = match source {
            TokenSource::Header(_) => None,
            TokenSource::File(path) => std::fs::metadata(path)
                .and_then(|metadata| Ok((metadata.modified()?, metadata.len())))
                .ok(),
        };
        let (is_due, has_failed) = {
            let state = self.state();
            let is_old = state.read_at.is_none_or(|read_at| read_at.elapsed() >= REREAD);
            (is_old || stamp != state.stamp, state.has_failed)
        };
        if !is_due {
            return;
        }
        let read = source.read();
        if let Err(error) = &read
            && !has_failed
        {
            tracing::warn!(%error, "The upstream's token cannot be read; the last one stays.");
        }
        let mut state = self.state();
        state.has_failed = read.is_err();
        state.read_at = Some(Instant::now());
        state.stamp = stamp;
        if let Ok(value) = read {
            state.value = Some(value);
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Time after which a file is read again even if it does not look changed.
const REREAD: Duration = Duration::from_secs(60);
