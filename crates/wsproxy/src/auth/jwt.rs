//! JSON Web Tokens: who signed them, with what, and what they say. Knows neither requests nor endpoints.

use std::{path::Path, sync::Arc};

use jsonwebtoken::{Algorithm, AlgorithmFamily};
use secrecy::ExposeSecret;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::warn;

pub use crate::auth::{claims::Claims, jwks::JwksCounters};
use crate::{
    auth::{
        claims::Rules,
        jwks::{Jwks, Lookup},
        key::Key,
    },
    config,
};

/// Believes the tokens that a configuration says are to be believed.
pub struct JwtVerifier {
    /// Keys that never change: the secret, the public key.
    fixed: Vec<Key>,
    /// Keys that their issuer changes.
    published: Option<Arc<Jwks>>,
    rules: Rules,
    /// What the header must say, as [`media_type`] writes it.
    typ: Option<String>,
}

/// Why a token is not believed. Says nothing of what the token holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum JwtError {
    /// No three parts of base64, no JSON, no header of a signed token; or too long.
    #[error("The token is no JSON Web Token.")]
    Malformed,
    /// The header names an algorithm for which there is no key here.
    #[error("The token is signed with an algorithm that is not accepted.")]
    Algorithm,
    /// The header lists extensions that must be understood.
    #[error("The token demands an extension that is not supported.")]
    Critical,
    /// The issuer publishes no such key.
    #[error("The token is signed with a key that is not known.")]
    UnknownKey,
    /// The signature is not that of the key.
    #[error("The signature of the token is wrong.")]
    Signature,
    /// Too late.
    #[error("The token has expired.")]
    Expired,
    /// Too early.
    #[error("The token is not valid yet.")]
    NotYetValid,
    /// Made in the future: the issuer's clock is ahead by more than the leeway.
    #[error("The token was issued in the future.")]
    IssuedAhead,
    /// The header says that it is something else, or nothing where it has to say something.
    #[error("The token is of another type.")]
    Type,
    /// It is for somebody else, or for nobody in particular where it has to be for us.
    #[error("The token is for another audience.")]
    Audience,
    /// Somebody else issued it.
    #[error("The token comes from another issuer.")]
    Issuer,
    /// A claim that it must have.
    #[error("The token has no {0}.")]
    Missing(&'static str),
    /// A claim that is not what such a claim is.
    #[error("The {0} of the token is malformed.")]
    Invalid(&'static str),
    /// It names no user, or none that can be part of a channel's name.
    #[error("The token names no user, or one that is no valid id.")]
    User,
    /// The issuer's keys are not known, so that nothing can be said about the token.
    #[error("The keys of the token's issuer cannot be reached.")]
    Unavailable,
}

impl JwtVerifier {
    /// Reads keys and, where they are published, begins to fetch them on `tasks` until `end`.
    ///
    /// # Errors
    /// A file cannot be used, as a sentence for the operator.
    pub fn new(
        config: &config::Jwt,
        tasks: &TaskTracker,
        end: CancellationToken,
    ) -> Result<Self, String> {
        let mut fixed = Vec::new();
        if let Some(secret) = &config.secret_key {
            let secret = secret.expose_secret().as_bytes();
            let key = Key::secret(secret, &config.algorithms);
            if key.is_some() && secret.len() < SECRET_BYTES_GOOD {
                warn!(
                    bytes = secret.len(),
                    "jwt.secret_key is shorter than 32 bytes: who has a token can try to guess it."
                );
            }
            fixed.extend(key);
        }
        if let Some(path) = &config.public_key_file {
            let key = read_public_key(path, &config.algorithms);
            fixed.push(key.map_err(|problem| format!("jwt.public_key_file {problem}"))?);
        }
        let published = config.jwks_url.as_ref().map(|url| Jwks::start(config, url, tasks, end));
        let (published, typ) = (published.transpose()?, config.typ.as_deref().map(media_type));
        if published.is_some() && config.issuer.is_none() {
            warn!(
                "jwt.jwks_url is set without jwt.issuer: every issuer that shares these keys is believed."
            );
        }
        if published.is_some() && config.audience.is_empty() {
            warn!(
                "jwt.jwks_url is set without jwt.audience: tokens are believed that do not say for which \
                 application they were issued."
            );
        }
        Ok(Self { fixed, published, rules: Rules::new(config), typ })
    }

    /// The claims of `token` at `now` (unix seconds). Waits only where the issuer has to be asked
    /// for a key that is not known, and never longer than `jwt.jwks_timeout`.
    ///
    /// # Errors
    /// Why it is not believed.
    pub async fn verify(&self, token: &str, now: u64) -> Result<Claims, JwtError> {
        match self.verify_now(token, now) {
            Err(JwtError::UnknownKey | JwtError::Unavailable) => {}
            result => return result,
        }
        let Some(published) = &self.published else { return Err(JwtError::UnknownKey) };
        published.ask_again().await?;
        self.verify_now(token, now)
    }

    /// The same with the keys that are known at this moment.
    ///
    /// # Errors
    /// Why it is not believed; [`JwtError::UnknownKey`] and [`JwtError::Unavailable`] where
    /// [`Self::verify`] could say more.
    pub fn verify_now(&self, token: &str, now: u64) -> Result<Claims, JwtError> {
        let dots = token.bytes().filter(|byte| *byte == b'.').count();
        if token.len() > TOKEN_BYTES_MAX || dots != 2 {
            return Err(JwtError::Malformed);
        }
        let header = jsonwebtoken::decode_header(token).map_err(|error| cause(&error))?;
        if header.crit.is_some() {
            return Err(JwtError::Critical);
        }
        if self.typ.is_some() && header.typ.as_deref().map(media_type) != self.typ {
            return Err(JwtError::Type);
        }
        if let Some(key) = self.fixed.iter().find(|key| key.is_for(header.alg)) {
            let claims = key.open(token).map_err(|error| cause(&error))?;
            return self.rules.check(&claims, now);
        }
        // Secrets are never published.
        let published = match &self.published {
            Some(published) if header.alg.family() != AlgorithmFamily::Hmac => published,
            _ => return Err(JwtError::Algorithm),
        };
        published
            .open(&Lookup { token, id: header.kid.as_deref(), algorithm: header.alg })
            .and_then(|claims| self.rules.check(&claims, now))
    }

    /// How fetching keys went, where they are published.
    #[must_use]
    pub fn jwks_counters(&self) -> Option<&JwksCounters> {
        self.published.as_ref().map(|published| &published.counters)
    }
}

impl JwtError {
    /// What it is called in logs and metrics.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Algorithm => "algorithm",
            Self::Critical => "critical",
            Self::UnknownKey => "unknown_key",
            Self::Signature => "signature",
            Self::Expired => "expired",
            Self::NotYetValid => "not_yet_valid",
            Self::IssuedAhead => "issued_ahead",
            Self::Type => "type",
            Self::Audience => "audience",
            Self::Issuer => "issuer",
            Self::Missing(_) | Self::Invalid(_) => "claim",
            Self::User => "user",
            Self::Unavailable => "unavailable",
        }
    }
}

/// The type in a header in one spelling: RFC 7515, 4.1.9.
fn media_type(typ: &str) -> String {
    let typ = typ.to_ascii_lowercase();
    typ.strip_prefix("application/").map(ToOwned::to_owned).unwrap_or(typ)
}

/// Whether a file holds a public key for one of `algorithms`; completes "jwt.public_key_file …".
pub(crate) fn check_public_key(path: &Path, algorithms: &[Algorithm]) -> Result<(), String> {
    read_public_key(path, algorithms).map(drop)
}

fn read_public_key(path: &Path, algorithms: &[Algorithm]) -> Result<Key, String> {
    let pem = std::fs::read(path);
    let pem = pem.map_err(|error| format!("{} cannot be read: {error}", path.display()))?;
    Key::pem(&pem, algorithms).map_err(|problem| format!("{} {problem}", path.display()))
}

/// The library's errors may quote the token.
pub(super) fn cause(error: &jsonwebtoken::errors::Error) -> JwtError {
    use jsonwebtoken::errors::ErrorKind;
    match error.kind() {
        ErrorKind::InvalidSignature => JwtError::Signature,
        ErrorKind::InvalidAlgorithm => JwtError::Algorithm,
        _ => JwtError::Malformed,
    }
}

/// Longest token, in bytes: what fits into the head of a request beside the rest.
const TOKEN_BYTES_MAX: usize = 8 * 1024;

/// Shorter secrets than the hash are guessed more easily than the hash is broken: RFC 7518, 3.2.
const SECRET_BYTES_GOOD: usize = 32;

#[cfg(test)]
mod tests;
