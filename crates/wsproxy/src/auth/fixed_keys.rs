//! The keys of JSON Web Tokens that the configuration names: a shared secret, an issuer's public key. Knows no tokens.

use std::{path::Path, sync::Arc};

use aws_lc_rs::digest::{SHA256, digest};
use jsonwebtoken::Algorithm;
use parking_lot::RwLock;
use secrecy::ExposeSecret;
use tracing::warn;

use crate::{auth::key::JwtKey, config::JwtConfig};

/// The keys in force. A reload of the configuration replaces them; connections that they opened stay.
pub struct FixedKeys(RwLock<Arc<KeyRing>>);

/// The keys of one configuration.
#[derive(Default)]
pub struct KeyRing {
    keys: Vec<JwtKey>,
    /// Hash of the file of the public key.
    public: Option<Vec<u8>>,
    /// Length of a secret that can be guessed.
    short: Option<usize>,
}

impl FixedKeys {
    /// Puts keys in force.
    #[must_use]
    pub fn new(keys: KeyRing) -> Arc<Self> {
        keys.warn();
        Arc::new(Self(RwLock::new(Arc::new(keys))))
    }

    /// Returns the keys in force.
    #[must_use]
    pub fn in_force(&self) -> Arc<KeyRing> {
        Arc::clone(&self.0.read())
    }

    /// Replaces the keys.
    pub fn replace(&self, keys: KeyRing) {
        keys.warn();
        *self.0.write() = Arc::new(keys);
    }
}

impl KeyRing {
    /// Reads the keys of a configuration. Blocks.
    ///
    /// # Errors
    /// A sentence for the operator: a file cannot be used.
    pub fn read(config: &JwtConfig) -> Result<Self, String> {
        let mut ring = Self::default();
        if let Some(secret) = &config.secret_key {
            let secret = secret.expose_secret().as_bytes();
            let key = JwtKey::secret(secret, &config.algorithms);
            ring.short =
                Some(secret.len()).filter(|bytes| key.is_some() && *bytes < SECRET_BYTES_GOOD);
            ring.keys.extend(key);
        }
        if let Some(path) = &config.public_key_file {
            let read = read_public_key(path, &config.algorithms);
            let (key, hash) = read.map_err(|problem| format!("jwt.public_key_file {problem}"))?;
            ring.keys.push(key);
            ring.public = Some(hash);
        }
        Ok(ring)
    }

    /// Returns the key for an algorithm.
    pub(super) fn find(&self, algorithm: Algorithm) -> Option<&JwtKey> {
        self.keys.iter().find(|key| key.is_for(algorithm))
    }

    /// Returns whether there is no key.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Returns whether the file of the public key has other contents than that of `other`.
    #[must_use]
    pub fn differs_in_public_key(&self, other: &Self) -> bool {
        self.public != other.public
    }

    fn warn(&self) {
        if let Some(bytes) = self.short {
            warn!(
                bytes,
                "jwt.secret_key is shorter than 32 bytes: an attacker with a token can try to guess it."
            );
        }
    }
}

/// Checks that a file holds a public key for one of `algorithms`; the error completes "jwt.public_key_file …".
pub(crate) fn check_public_key(path: &Path, algorithms: &[Algorithm]) -> Result<(), String> {
    read_public_key(path, algorithms).map(drop)
}

fn read_public_key(path: &Path, algorithms: &[Algorithm]) -> Result<(JwtKey, Vec<u8>), String> {
    let pem = std::fs::read(path);
    let pem = pem.map_err(|error| format!("{} cannot be read: {error}", path.display()))?;
    let key = JwtKey::pem(&pem, algorithms);
    let key = key.map_err(|problem| format!("{} {problem}", path.display()))?;
    Ok((key, digest(&SHA256, &pem).as_ref().to_vec()))
}

/// Shortest good secret: shorter ones are easier to guess than the hash is to break (RFC 7518, 3.2).
const SECRET_BYTES_GOOD: usize = 32;
