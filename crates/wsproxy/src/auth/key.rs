//! Keys that verify signatures, each bound to its algorithms; knows no claims.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{
    Algorithm, AlgorithmFamily, DecodingKey, Validation,
    jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyOperations, PublicKeyUse},
};
use serde_json::{Map, Value};

/// A key and its algorithms. A token's header chooses among these only, so that no attacker can use a public key as a
/// secret.
pub(super) struct JwtKey {
    /// The issuer's name of the key, if it has one.
    pub(super) id: Option<Box<str>>,
    decoding: DecodingKey,
    validation: Validation,
}

impl JwtKey {
    /// Creates a key of a shared secret, for those of `algorithms` that use one; `None` if none does.
    pub(super) fn secret(secret: &[u8], algorithms: &[Algorithm]) -> Option<Self> {
        Self::new(None, DecodingKey::from_secret(secret), algorithms).ok()
    }

    /// Reads a public key from PEM, for those of `algorithms` that use its kind.
    ///
    /// # Errors
    /// Completes "the file …".
    pub(super) fn pem(pem: &[u8], algorithms: &[Algorithm]) -> Result<Self, &'static str> {
        let text = std::str::from_utf8(pem).map_err(|_| NO_PEM)?;
        let mut labels = text.lines().filter_map(|line| line.trim().strip_prefix("-----BEGIN "));
        let known = |label| matches!(label, "PUBLIC KEY-----" | "RSA PUBLIC KEY-----");
        match (labels.next(), labels.next()) {
            // Private keys do not belong on a gateway, and the dates of a certificate would not be checked.
            (Some(label), None) if known(label) => {}
            (Some(_), Some(_)) => return Err("holds more than one key; publish them as a JWKS"),
            _ => return Err(NO_PEM),
        }
        let decoding = DecodingKey::from_ed_pem(pem)
            .or_else(|_| DecodingKey::from_ec_pem(pem))
            .or_else(|_| DecodingKey::from_rsa_pem(pem))
            .map_err(|_| "holds a key of a kind that is not supported")?;
        Self::new(None, decoding, algorithms)
    }

    /// Reads one entry of a JWKS, for those of `algorithms` that it allows.
    ///
    /// # Errors
    /// Completes "the key …".
    pub(super) fn jwk(jwk: &Value, algorithms: &[Algorithm]) -> Result<Self, &'static str> {
        let jwk: Jwk = serde::Deserialize::deserialize(jwk).map_err(|_| "is malformed")?;
        let common = &jwk.common;
        if common.public_key_use.as_ref().is_some_and(|what| *what != PublicKeyUse::Signature) {
            return Err("is not for signatures");
        }
        if common.key_operations.as_ref().is_some_and(|ops| !ops.contains(&KeyOperations::Verify)) {
            return Err("does not verify");
        }
        let curve = match &jwk.algorithm {
            AlgorithmParameters::EllipticCurve(ec) => Some(&ec.curve),
            AlgorithmParameters::OctetKeyPair(ed) => Some(&ed.curve),
            AlgorithmParameters::RSA(_) => None,
            // Every reader of a published secret could sign with it.
            AlgorithmParameters::OctetKey(_) => return Err("is a secret"),
            _ => return Err("is of a kind that is not supported"),
        };
        let algorithms: Vec<_> = match common.key_algorithm {
            None => algorithms.to_vec(),
            Some(named) => {
                let named = Algorithm::try_from(named).ok();
                algorithms.iter().copied().filter(|known| Some(*known) == named).collect()
            }
        };
        let decoding = DecodingKey::from_jwk(&jwk).map_err(|_| "is malformed")?;
        if curve.is_some_and(|curve| curve_of(&decoding).as_ref() != Some(curve)) {
            return Err("is not of the size that its curve has");
        }
        Self::new(common.key_id.as_deref().map(Box::from), decoding, &algorithms)
    }

    /// Returns whether the key may sign tokens with this algorithm in their header.
    pub(super) fn is_for(&self, algorithm: Algorithm) -> bool {
        self.validation.algorithms.contains(&algorithm)
    }

    /// Returns the unchecked claims of `token` if this key signed it.
    pub(super) fn open(
        &self,
        token: &str,
    ) -> Result<Map<String, Value>, jsonwebtoken::errors::Error> {
        jsonwebtoken::decode(token, &self.decoding, &self.validation).map(|token| token.claims)
    }

    fn new(
        id: Option<Box<str>>,
        decoding: DecodingKey,
        algorithms: &[Algorithm],
    ) -> Result<Self, &'static str> {
        let family = decoding.family();
        let fitting: &[Algorithm] = match (family, curve_of(&decoding)) {
            (AlgorithmFamily::Ec, Some(EllipticCurve::P256)) => &[Algorithm::ES256],
            (AlgorithmFamily::Ec, Some(EllipticCurve::P384)) => &[Algorithm::ES384],
            (AlgorithmFamily::Ed, Some(EllipticCurve::Ed25519)) => &[Algorithm::EdDSA],
            (AlgorithmFamily::Ec | AlgorithmFamily::Ed, _) => {
                return Err("is on a curve that is not supported");
            }
            (AlgorithmFamily::Rsa, _) if !RSA_BITS.contains(&rsa_bits(&decoding)) => {
                return Err("is no RSA key of 2048 to 8192 bits");
            }
            _ => family.algorithms(),
        };
        let algorithms: Vec<_> =
            algorithms.iter().copied().filter(|algorithm| fitting.contains(algorithm)).collect();
        let Some(&first) = algorithms.first() else {
            return Err("is for none of jwt.algorithms");
        };
        let mut validation = Validation::new(first);
        validation.algorithms = algorithms;
        // `claims` checks them, more strictly and against a time that is an argument.
        validation.required_spec_claims.clear();
        (validation.validate_exp, validation.validate_aud) = (false, false);
        Ok(Self { id, decoding, validation })
    }
}

/// Returns the curve of a public key by the size of its point.
fn curve_of(key: &DecodingKey) -> Option<EllipticCurve> {
    let bytes = key.try_get_as_bytes().ok()?;
    match (key.family(), bytes.len()) {
        (AlgorithmFamily::Ec, 65) => Some(EllipticCurve::P256),
        (AlgorithmFamily::Ec, 97) => Some(EllipticCurve::P384),
        (AlgorithmFamily::Ed, 32) => Some(EllipticCurve::Ed25519),
        _ => None,
    }
}

/// Returns the size of an RSA key; 0 for other keys.
fn rsa_bits(key: &DecodingKey) -> usize {
    let Ok(Jwk { algorithm: AlgorithmParameters::RSA(rsa), .. }) =
        Jwk::from_decoding_key(key, None)
    else {
        return 0;
    };
    let modulus = URL_SAFE_NO_PAD.decode(rsa.n).unwrap_or_default();
    let zeros = modulus.iter().take_while(|byte| **byte == 0).count();
    let first = modulus.get(zeros).map_or(0, |byte| byte.leading_zeros() as usize);
    (modulus.len() - zeros) * 8 - first
}

const NO_PEM: &str = "holds no PUBLIC KEY in PEM form";

/// Sizes of RSA keys in bits: shorter keys can be broken, longer ones cost too much. The library has the same limits.
const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=8192;

#[cfg(test)]
mod tests;
