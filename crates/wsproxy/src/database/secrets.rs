//! Secrets of agents: how they are made, stored and compared. Knows no database.
//!
//! A fast hash is right for secrets that cannot be guessed, and only for those: ours have 256 random bits.

use std::time::SystemTime;

use aws_lc_rs::digest::{Context, SHA256};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use secrecy::SecretString;
use subtle::{Choice, ConstantTimeEq};
use uuid::Uuid;

use crate::{config::agents::LegacySecrets, database::error::reveal};

/// The credential of a user, as it is stored.
#[derive(Clone)]
pub struct Credential {
    /// The value of an application that keeps secrets in clear; `None` if the value is marked as ours.
    pub(super) clear: Option<SecretString>,
    /// Secrets that were not revoked; they count where `clear` is `None`.
    pub(super) secrets: Vec<StoredSecret>,
}

/// A stored secret.
#[derive(Debug, Clone)]
pub(super) struct StoredSecret {
    pub(super) id: Uuid,
    pub(super) digest: Option<Digest>,
    pub(super) expires_at: Option<SystemTime>,
}

/// The secret that opened a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SecretId {
    /// A row of `agent_secrets`.
    Stored(Uuid),
    /// The clear value of an application.
    Clear,
}

/// The presented secret is not one of the user's, or is no longer valid, or there is no such user.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the credentials are not valid")]
pub struct BadSecret;

/// A salted hash: `sha256$<salt in hex>$<SHA-256 of salt and secret in hex>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Digest {
    salt: [u8; SALT_BYTES],
    hash: [u8; HASH_BYTES],
}

impl Credential {
    /// Judges a presented secret. The work is the same whether the user exists or not, and whatever is stored: as many
    /// hashes as a user may have secrets, and one comparison in clear.
    ///
    /// # Errors
    /// [`BadSecret`]
    pub fn check(
        credential: Option<&Self>,
        presented: &[u8],
        now: SystemTime,
        legacy: LegacySecrets,
    ) -> Result<SecretId, BadSecret> {
        let clear = credential.and_then(|credential| credential.clear.as_ref());
        let stored = credential.map_or(&[][..], |credential| &credential.secrets);
        let mut opened = None;
        for index in 0..SECRETS_MAX {
            let secret = stored.get(index);
            let digest = secret.and_then(|secret| secret.digest.as_ref());
            let is_it: bool = digest.unwrap_or(&NOBODY).matches(presented).into();
            let is_valid = secret.is_some_and(|secret| !secret.has_expired(now));
            if is_it && is_valid && digest.is_some() && clear.is_none() {
                opened = secret.map(|secret| SecretId::Stored(secret.id));
            }
        }
        // Hashes have one length, so that the comparison does not tell how long the stored value is.
        let value = clear.map_or(&b""[..], |clear| reveal(clear).as_bytes());
        let is_clear: bool = sha256(&[value]).ct_eq(&sha256(&[presented])).into();
        if is_clear && !value.is_empty() && legacy == LegacySecrets::Accept {
            opened = Some(SecretId::Clear);
        }
        opened.ok_or(BadSecret)
    }
}

impl StoredSecret {
    fn has_expired(&self, now: SystemTime) -> bool {
        self.expires_at.is_some_and(|end| end <= now)
    }
}

impl Digest {
    /// Hashes a secret with a fresh salt.
    pub(super) fn new(secret: &[u8]) -> Self {
        let salt: [u8; SALT_BYTES] = random();
        Self { salt, hash: sha256(&[&salt, secret]) }
    }

    /// Reads the stored form.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (salt, hash) = text.strip_prefix(MARK)?.split_once('$')?;
        Some(Self { salt: unhex(salt)?, hash: unhex(hash)? })
    }

    /// Returns the stored form.
    pub(super) fn text(&self) -> String {
        format!("{MARK}{}${}", hex(&self.salt), hex(&self.hash))
    }

    fn matches(&self, secret: &[u8]) -> Choice {
        sha256(&[&self.salt, secret]).ct_eq(&self.hash)
    }
}

/// Makes a secret: `wsa_` and 256 random bits in base64url.
#[must_use]
pub fn make_secret() -> SecretString {
    let bytes: [u8; HASH_BYTES] = random();
    format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes)).into()
}

/// Returns whether a value of `shared_secret` is ours, and not the secret itself.
pub(super) fn is_marked(value: &str) -> bool {
    value.starts_with(MARK)
}

fn sha256(parts: &[&[u8]]) -> [u8; HASH_BYTES] {
    let mut context = Context::new(&SHA256);
    for part in parts {
        context.update(part);
    }
    let mut hash = [0; HASH_BYTES];
    hash.copy_from_slice(context.finish().as_ref());
    hash
}

fn random<const N: usize>() -> [u8; N] {
    rand::random()
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    if text.len() != 2 * N || !text.is_ascii() {
        return None;
    }
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).ok()?;
    }
    Some(bytes)
}

/// Most valid secrets of a user.
pub const SECRETS_MAX: usize = 8;

/// Fewest characters of a secret that the gateway did not make.
pub const SECRET_CHARACTERS_MIN: usize = 32;

/// Beginning of a stored hash. A value of `shared_secret` without it is the secret itself.
pub(super) const MARK: &str = "sha256$";

const PREFIX: &str = "wsa_";
const SALT_BYTES: usize = 16;
const HASH_BYTES: usize = 32;

/// Digest against which a secret is compared that has none to be compared with.
const NOBODY: Digest = Digest { salt: [0; SALT_BYTES], hash: [0; HASH_BYTES] };

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const NOW: SystemTime = SystemTime::UNIX_EPOCH;

    fn stored(secret: &[u8], expires_at: Option<SystemTime>) -> StoredSecret {
        StoredSecret { id: Uuid::new_v4(), digest: Some(Digest::new(secret)), expires_at }
    }

    fn check(credential: &Credential, presented: &str) -> Result<SecretId, BadSecret> {
        Credential::check(Some(credential), presented.as_bytes(), NOW, LegacySecrets::Accept)
    }

    #[test]
    fn secrets_are_random_and_of_one_form() {
        let [a, b] = [make_secret(), make_secret()];
        assert_ne!(reveal(&a), reveal(&b));
        let rest = reveal(&a).strip_prefix("wsa_").unwrap();
        assert_eq!(rest.len(), 43);
        assert!(rest.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b)));
    }

    #[test]
    fn digests_are_salted_and_read_back() {
        let [a, b] = [Digest::new(b"secret"), Digest::new(b"secret")];
        assert_ne!(a, b);
        assert_eq!(a.text().len(), 7 + 32 + 1 + 64);
        assert_eq!(Digest::parse(&a.text()), Some(a));
        for bad in ["", "sha256$", "sha256$00$11", "sha256$é$11", &"0".repeat(64)] {
            assert_eq!(Digest::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn each_valid_secret_opens_until_it_expires() {
        let later = NOW + Duration::from_secs(1);
        let secrets = vec![stored(b"a", None), stored(b"b", Some(later)), stored(b"c", Some(NOW))];
        let credential = Credential { clear: None, secrets: secrets.clone() };
        assert_eq!(check(&credential, "a"), Ok(SecretId::Stored(secrets[0].id)));
        assert_eq!(check(&credential, "b"), Ok(SecretId::Stored(secrets[1].id)));
        for bad in ["c", "d", "", "ab"] {
            assert_eq!(check(&credential, bad), Err(BadSecret), "{bad}");
        }
        let nobody = Credential::check(None, b"a", NOW, LegacySecrets::Accept);
        assert_eq!(nobody, Err(BadSecret));
    }

    #[test]
    fn a_clear_value_is_the_only_truth() {
        let secrets = vec![stored(b"ours", None)];
        let credential = Credential { clear: Some("theirs".to_owned().into()), secrets };
        assert_eq!(check(&credential, "theirs"), Ok(SecretId::Clear));
        assert_eq!(check(&credential, "ours"), Err(BadSecret));
        let rejected = Credential::check(Some(&credential), b"theirs", NOW, LegacySecrets::Reject);
        assert_eq!(rejected, Err(BadSecret));
        let empty = Credential { clear: Some(String::new().into()), secrets: Vec::new() };
        assert_eq!(check(&empty, ""), Err(BadSecret));
    }

    #[test]
    fn a_leaked_hash_is_no_password() {
        let hash = hex(&sha256(&[b"secret"]));
        let credential = Credential { clear: Some(hash.clone().into()), secrets: Vec::new() };
        assert_eq!(check(&credential, "secret"), Err(BadSecret));
        assert_eq!(check(&credential, &hash), Ok(SecretId::Clear));
        let marked = Digest::new(b"secret");
        let text = marked.text();
        let secrets =
            vec![StoredSecret { id: Uuid::nil(), digest: Some(marked), expires_at: None }];
        assert_eq!(check(&Credential { clear: None, secrets }, &text), Err(BadSecret));
    }

    #[test]
    fn an_unreadable_digest_opens_nothing() {
        let secrets = vec![StoredSecret { id: Uuid::nil(), digest: None, expires_at: None }];
        assert_eq!(check(&Credential { clear: None, secrets }, ""), Err(BadSecret));
    }
}
