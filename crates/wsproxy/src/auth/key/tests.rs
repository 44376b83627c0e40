//! Tests of entries of a JWKS.

use rcgen::KeyPair;
use serde_json::json;

use super::*;

fn point(kind: &'static rcgen::SignatureAlgorithm, curve: &str, algorithm: &str) -> Value {
    let pair = KeyPair::generate_for(kind).unwrap();
    let encode = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
    let raw = pair.public_key_raw();
    let mut jwk = match raw.len() {
        32 => json!({"kty": "OKP", "x": encode(raw)}),
        length => {
            let (x, y) = raw[1..].split_at((length - 1) / 2);
            json!({"kty": "EC", "x": encode(x), "y": encode(y)})
        }
    };
    for (name, value) in [("crv", curve), ("alg", algorithm), ("use", "sig"), ("kid", "k-1")] {
        jwk[name] = value.into();
    }
    jwk
}

fn with(jwk: &Value, name: &str, value: Value) -> Value {
    let mut jwk = jwk.clone();
    jwk[name] = value;
    jwk
}

fn without(jwk: &Value, name: &str) -> Value {
    let mut jwk = jwk.clone();
    jwk.as_object_mut().unwrap().remove(name);
    jwk
}

#[test]
fn a_published_key_is_for_its_curve_and_its_algorithm() {
    let p256 = point(&rcgen::PKCS_ECDSA_P256_SHA256, "P-256", "ES256");
    let p384 = point(&rcgen::PKCS_ECDSA_P384_SHA384, "P-384", "ES384");
    let ed = point(&rcgen::PKCS_ED25519, "Ed25519", "EdDSA");
    for (jwk, algorithm) in
        [(&p256, Algorithm::ES256), (&p384, Algorithm::ES384), (&ed, Algorithm::EdDSA)]
    {
        for jwk in
            [jwk.clone(), without(jwk, "alg"), without(jwk, "use"), with(jwk, "x5t", json!("x"))]
        {
            let key = JwtKey::jwk(&jwk, ALL).ok().unwrap();
            assert_eq!(key.id.as_deref(), Some("k-1"));
            let fits: Vec<_> = ALL.iter().copied().filter(|known| key.is_for(*known)).collect();
            assert_eq!(fits, [algorithm]);
        }
    }
    let modulus = URL_SAFE_NO_PAD.encode([0xc5; 256]);
    let rsa = json!({"kty": "RSA", "n": modulus, "e": "AQAB"});
    assert_eq!(JwtKey::jwk(&rsa, ALL).ok().unwrap().validation.algorithms, ALL[..2]);
    let only = with(&rsa, "alg", json!("PS256"));
    assert_eq!(JwtKey::jwk(&only, ALL).ok().unwrap().validation.algorithms, ALL[1..2]);
}

#[test]
fn what_is_no_key_for_signatures_is_left_out() {
    let ec = point(&rcgen::PKCS_ECDSA_P256_SHA256, "P-256", "ES256");
    let rsa = |bytes: &[u8]| json!({"kty": "RSA", "n": URL_SAFE_NO_PAD.encode(bytes), "e": "AQAB"});
    let leading_zeros: Vec<u8> = [0; 192].into_iter().chain([0xc5; 128]).collect();
    for (jwk, reason) in [
        (with(&ec, "use", json!("enc")), "not for signatures"),
        (with(&ec, "key_ops", json!(["sign"])), "does not verify"),
        (with(&ec, "alg", json!("ES384")), "none of jwt.algorithms"),
        (with(&ec, "alg", json!("ECDH-ES")), "none of jwt.algorithms"),
        (with(&ec, "crv", json!("P-384")), "not of the size"),
        (with(&ec, "crv", json!("P-521")), "not of the size"),
        (with(&ec, "x", json!("AAAA")), "not of the size"),
        (with(&ec, "x", json!("?")), "malformed"),
        (with(&ec, "kty", json!("XX")), "not supported"),
        (with(&ec, "kid", json!(5)), "malformed"),
        (json!({"kty": "oct", "k": "c2VjcmV0c2VjcmV0c2VjcmV0", "alg": "HS256"}), "is a secret"),
        (rsa(&[0xc5; 128]), "2048"),
        (rsa(&leading_zeros), "2048"),
        (rsa(&[0xc5; 1025]), "2048"),
        (json!("key"), "malformed"),
        (json!({}), "not supported"),
    ] {
        let problem = JwtKey::jwk(&jwk, ALL).err().unwrap();
        assert!(problem.contains(reason), "{jwk}: {problem}");
    }
}

const ALL: &[Algorithm] = &[
    Algorithm::RS256,
    Algorithm::PS256,
    Algorithm::ES256,
    Algorithm::ES384,
    Algorithm::EdDSA,
    Algorithm::HS256,
];
