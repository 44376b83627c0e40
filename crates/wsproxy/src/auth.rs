//! Credentials: tokens of sessions, JSON Web Tokens, keys of the worker API and the comparison of secrets; knows neither
//! requests nor endpoints.

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use subtle::ConstantTimeEq;

pub mod api_keys;
mod claims;
pub mod fixed_keys;
mod jwks;
pub mod jwt;
mod key;
pub mod session;
pub mod sign;

/// Makes a secret of 256 random bits, in characters that every kind of credential allows.
#[must_use]
pub fn new_token() -> String {
    BASE64_URL_SAFE_NO_PAD.encode(rand::random::<[u8; 32]>())
}

/// Compares two secrets, in a time that depends on their lengths only.
#[must_use]
pub fn equal(a: &[u8], b: &[u8]) -> bool {
    a.ct_eq(b).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_long_differ_and_need_no_encoding() {
        let (one, other) = (new_token(), new_token());
        assert_eq!(one.len(), 43);
        assert!(
            !equal(one.as_bytes(), other.as_bytes()) && equal(b"a", b"a") && !equal(b"a", b"ab")
        );
        assert!(wsproxy_proto::names::Id::parse(&one).is_ok());
    }
}
