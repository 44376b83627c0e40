//! JSON Web Tokens: their signatures, keys and claims. Knows neither requests nor endpoints.

use std::sync::Arc;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::AlgorithmFamily;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::warn;
use wsproxy_proto::names::Id;

pub use crate::auth::{
    claims::{Claims, DISPLAY_NAME_BYTES_MAX, RoomsClaim},
    jwks::JwksCounters,
};
use crate::{
    auth::{
        claims::Rules,
        fixed_keys::FixedKeys,
        jwks::{Jwks, Lookup},
    },
    config,
    telemetry::scrape::{Scrape, Source},
};

/// The verifier of tokens, by configuration.
pub struct JwtVerifier {
    /// Keys that the configuration names: the secret, the public key.
    fixed: Arc<FixedKeys>,
    /// Keys that their issuer publishes and changes.
    published: Option<Arc<Jwks>>,
    rules: Rules,
    /// The required `typ` of the header, as [`media_type`] writes it.
    typ: Option<String>,
}

/// The reason why a token is refused. Quotes no part of the token.
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
    /// The key did not make the signature.
    #[error("The signature of the token is wrong.")]
    Signature,
    /// The token has expired.
    #[error("The token has expired.")]
    Expired,
    /// The token is not valid yet.
    #[error("The token is not valid yet.")]
    NotYetValid,
    /// The time of issue is in the future: the issuer's clock is ahead by more than the leeway.
    #[error("The token was issued in the future.")]
    IssuedAhead,
    /// The header names another type, or no type although one is required.
    #[error("The token is of another type.")]
    Type,
    /// The token has another audience, or none although one is required.
    #[error("The token is for another audience.")]
    Audience,
    /// Another issuer issued it.
    #[error("The token comes from another issuer.")]
    Issuer,
    /// A required claim is missing.
    #[error("The token has no {0}.")]
    Missing(&'static str),
    /// A claim has a wrong type or value.
    #[error("The {0} of the token is malformed.")]
    Invalid(&'static str),
    /// The token names no user, or one that cannot be part of a channel's name.
    #[error("The token names no user, or one that is no valid id.")]
    User,
    /// The issuer's keys are unknown, so the token cannot be verified.
    #[error("The keys of the token's issuer cannot be reached.")]
    Unavailable,
}

impl JwtVerifier {
    /// Accepts tokens with the keys in `fixed`, and starts fetching published ones on `tasks` until `end`.
    ///
    /// # Errors
    /// A sentence for the operator: a file cannot be used.
    pub fn new(
        config: &config::JwtConfig,
        fixed: &Arc<FixedKeys>,
        tasks: &TaskTracker,
        end: CancellationToken,
    ) -> Result<Self, String> {
        let published = config.jwks_url.as_ref().map(|url| Jwks::start(config, url, tasks, end));
        let (published, typ) = (published.transpose()?, config.typ.as_deref().map(media_type));
        if published.is_some() && config.issuer.is_none() {
            warn!(
                "jwt.jwks_url is set without jwt.issuer: tokens of every issuer with these keys are accepted."
            );
        }
        if published.is_some() && config.audience.is_empty() {
            warn!(
                "jwt.jwks_url is set without jwt.audience: tokens without an audience are accepted, \
                 whatever application they were issued for."
            );
        }
        let fixed = Arc::clone(fixed);
        Ok(Self { fixed, published, rules: Rules::new(config), typ })
    }

    /// Returns whether there is a key, so that a token can be good.
    #[must_use]
    pub fn has_key(&self) -> bool {
        self.published.is_some() || !self.fixed.in_force().is_empty()
    }

    /// Returns the claims of `token` at `now` (unix seconds). Waits only for the issuer's answer about an unknown key,
    /// and never longer than `jwt.jwks_timeout`.
    ///
    /// # Errors
    /// The reason why the token is refused.
    pub async fn verify(&self, token: &str, now: u64) -> Result<Claims, JwtError> {
        match self.verify_now(token, now) {
            Err(JwtError::UnknownKey | JwtError::Unavailable) => {}
            result => return result,
        }
        let Some(published) = &self.published else { return Err(JwtError::UnknownKey) };
        published.ask_again().await?;
        self.verify_now(token, now)
    }

    /// Returns the claims of `token`, verified with the known keys only.
    ///
    /// # Errors
    /// The reason why the token is refused. After [`JwtError::UnknownKey`] and [`JwtError::Unavailable`],
    /// [`Self::verify`] may still accept the token.
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
        if let Some(key) = self.fixed.in_force().find(header.alg) {
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

    /// Returns the user that a token names, whether or not the token is valid; for operators who look for a refused client.
    #[must_use]
    pub fn named_user(&self, token: &str) -> Option<Id> {
        if token.len() > TOKEN_BYTES_MAX {
            return None;
        }
        let claims = URL_SAFE_NO_PAD.decode(token.split('.').nth(1)?).ok()?;
        self.rules.user(&serde_json::from_slice(&claims).ok()?).ok()
    }

    /// Returns the counters of fetches, if an issuer publishes keys.
    #[must_use]
    pub fn jwks_counters(&self) -> Option<&JwksCounters> {
        self.published.as_ref().map(|published| &published.counters)
    }
}

impl Source for JwtVerifier {
    fn collect(&self, scrape: &mut Scrape) {
        match self.jwks_counters() {
            Some(counters) => counters.collect(scrape),
            None => JwksCounters::default().collect(scrape),
        }
    }
}

impl JwtError {
    /// Returns the word for logs and metrics.
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

/// Returns the type of a header in its full spelling: RFC 7515, 4.1.9.
fn media_type(typ: &str) -> String {
    let typ = typ.to_ascii_lowercase();
    typ.strip_prefix("application/").map(ToOwned::to_owned).unwrap_or(typ)
}

/// Maps the library's errors, which may quote the token.
pub(super) fn cause(error: &jsonwebtoken::errors::Error) -> JwtError {
    use jsonwebtoken::errors::ErrorKind;
    match error.kind() {
        ErrorKind::InvalidSignature => JwtError::Signature,
        ErrorKind::InvalidAlgorithm => JwtError::Algorithm,
        _ => JwtError::Malformed,
    }
}

/// Longest token in bytes: it must fit into the head of a request.
const TOKEN_BYTES_MAX: usize = 8 * 1024;

#[cfg(test)]
mod tests;
