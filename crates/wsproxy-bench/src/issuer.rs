//! An issuer of tokens that the gateway trusts; knows one secret and no servers.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use serde_json::json;

/// Makes tokens for users.
#[derive(Clone)]
pub struct Issuer {
    key: EncodingKey,
    issued_at: u64,
}

impl Issuer {
    /// Creates an issuer that shares `secret` with the gateway.
    #[must_use]
    pub fn new(secret: &str) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        Self { key: EncodingKey::from_secret(secret.as_bytes()), issued_at: now }
    }

    /// Signs a token for a user that lives longer than any benchmark.
    #[must_use]
    pub fn token(&self, user: &str) -> String {
        let claims =
            json!({ "sub": user, "iat": self.issued_at, "exp": self.issued_at + LIFE_SECONDS });
        // Text and numbers can always be signed; an empty token is refused, and the run says so.
        encode(&Header::new(Algorithm::HS256), &claims, &self.key).unwrap_or_default()
    }
}

impl fmt::Debug for Issuer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Issuer").finish_non_exhaustive()
    }
}

const LIFE_SECONDS: u64 = 6 * 3600;
