//! Tests of verification with keys that never change: every algorithm, and every known trick.

use std::{io::Write, path::Path};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use rcgen::KeyPair;
use serde_json::{Value, json};
use tempfile::NamedTempFile;

use super::*;
use crate::{
    auth::{
        fixed_keys::{KeyRing, check_public_key},
        key::JwtKey,
    },
    http::rejection::Rejection,
};

fn claims() -> Value {
    json!({"sub": "u-1", "exp": NOW + 60})
}

fn file(text: &str) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

fn config(algorithms: &[Algorithm]) -> config::JwtConfig {
    let algorithms = algorithms.to_vec();
    config::JwtConfig {
        algorithms,
        secret_key: Some(SECRET.into()),
        ..config::JwtConfig::default()
    }
}

fn verifier(config: &config::JwtConfig) -> JwtVerifier {
    let keys = FixedKeys::new(KeyRing::read(config).unwrap());
    JwtVerifier::new(config, &keys, &TaskTracker::new(), CancellationToken::new()).unwrap()
}

/// Creates a verifier with a public key.
fn public(pem: &str, algorithms: &[Algorithm]) -> JwtVerifier {
    let file = file(pem);
    let config =
        config::JwtConfig { public_key_file: Some(file.path().into()), ..config(algorithms) };
    verifier(&config)
}

fn sign(header: &Header, key: &EncodingKey) -> String {
    jsonwebtoken::encode(header, &claims(), key).unwrap()
}

fn shared(secret: &[u8], algorithm: Algorithm) -> String {
    sign(&Header::new(algorithm), &EncodingKey::from_secret(secret))
}

/// Makes a token with this header, signed with the gateway's secret.
fn forged(header: &Value) -> String {
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let message = format!("{}.{}", part(header), part(&claims()));
    let key = EncodingKey::from_secret(SECRET.as_bytes());
    let signature = jsonwebtoken::crypto::sign(message.as_bytes(), &key, Algorithm::HS256);
    format!("{message}.{}", signature.unwrap())
}

/// A private key as PEM, and the key that signs with it.
fn pair(algorithm: Algorithm) -> (KeyPair, EncodingKey) {
    let kind = match algorithm {
        Algorithm::ES256 => &rcgen::PKCS_ECDSA_P256_SHA256,
        Algorithm::ES384 => &rcgen::PKCS_ECDSA_P384_SHA384,
        Algorithm::EdDSA => &rcgen::PKCS_ED25519,
        _ => &rcgen::PKCS_RSA_SHA256,
    };
    let pair = KeyPair::generate_for(kind).unwrap();
    let pem = pair.serialize_pem();
    let key = match algorithm.family() {
        AlgorithmFamily::Ec => EncodingKey::from_ec_pem(pem.as_bytes()),
        AlgorithmFamily::Ed => EncodingKey::from_ed_pem(pem.as_bytes()),
        _ => EncodingKey::from_rsa_pem(pem.as_bytes()),
    };
    (pair, key.unwrap())
}

#[test]
fn every_algorithm_is_verified_with_its_own_key_only() {
    use Algorithm::{ES256, ES384, EdDSA, HS256, HS384, HS512, PS256, PS384, PS512, RS256};
    for algorithm in [HS256, HS384, HS512] {
        let verifier = verifier(&config(&[algorithm]));
        assert!(verifier.verify_now(&shared(SECRET.as_bytes(), algorithm), NOW).is_ok());
        let other = shared(b"another secret, just as long....", algorithm);
        assert_eq!(verifier.verify_now(&other, NOW), Err(JwtError::Signature));
    }
    let (rsa, rsa_key) = pair(RS256);
    let all = [RS256, PS256, PS384, PS512];
    for algorithm in all {
        let token = sign(&Header::new(algorithm), &rsa_key);
        assert!(public(&rsa.public_key_pem(), &all).verify_now(&token, NOW).is_ok());
    }
    let token = sign(&Header::new(PS256), &rsa_key);
    let only = public(&rsa.public_key_pem(), &[RS256]);
    assert_eq!(only.verify_now(&token, NOW), Err(JwtError::Algorithm));
    for algorithm in [ES256, ES384, EdDSA] {
        let ((pair, key), (_, other)) = (pair(algorithm), pair(algorithm));
        let verifier = public(&pair.public_key_pem(), &[algorithm]);
        let header = Header::new(algorithm);
        assert!(verifier.verify_now(&sign(&header, &key), NOW).is_ok(), "{algorithm:?}");
        assert_eq!(verifier.verify_now(&sign(&header, &other), NOW), Err(JwtError::Signature));
    }
}

#[test]
fn a_public_key_is_never_used_as_a_secret() {
    let (pair, key) = pair(Algorithm::RS256);
    let pem = pair.public_key_pem();
    let der = pair.public_key_raw();
    for algorithms in [&[Algorithm::RS256][..], &[Algorithm::RS256, Algorithm::HS256]] {
        let verifier = public(&pem, algorithms);
        assert!(verifier.verify_now(&sign(&Header::new(Algorithm::RS256), &key), NOW).is_ok());
        for secret in [pem.as_bytes(), pem.trim().as_bytes(), der] {
            let error = verifier.verify_now(&shared(secret, Algorithm::HS256), NOW).unwrap_err();
            let expected =
                if algorithms.len() == 1 { JwtError::Algorithm } else { JwtError::Signature };
            assert_eq!(error, expected);
        }
    }
}

#[test]
fn what_the_header_says_about_keys_and_algorithms_is_not_believed() {
    let verifier = verifier(&config(&[Algorithm::HS256]));
    let verify = |header| verifier.verify_now(&forged(&header), NOW).err();
    assert_eq!(verify(json!({"alg": "HS256"})), None);
    assert_eq!(verify(json!({"alg": "HS256", "kid": "../../etc/passwd"})), None);
    let own = json!({"kty": "oct", "k": URL_SAFE_NO_PAD.encode("attacker")});
    let token = Header {
        jwk: Some(serde_json::from_value(own).unwrap()),
        jku: Some("https://attacker.example/".into()),
        ..Header::new(Algorithm::HS256)
    };
    let token = sign(&token, &EncodingKey::from_secret(b"attacker"));
    assert_eq!(verifier.verify_now(&token, NOW), Err(JwtError::Signature));
    for none in ["none", "None", "NONE", "nOnE", "", "HS1", "RSA1_5", "dir"] {
        assert_eq!(verify(json!({"alg": none})), Some(JwtError::Malformed), "{none}");
    }
    assert_eq!(verify(json!({"typ": "JWT"})), Some(JwtError::Malformed));
    assert_eq!(verify(json!({"alg": ["HS256"]})), Some(JwtError::Malformed));
    assert_eq!(verify(json!({"alg": "HS512"})), Some(JwtError::Algorithm));
    assert_eq!(verify(json!({"alg": "RS256"})), Some(JwtError::Algorithm));
    for crit in [json!([]), json!(["b64"]), json!(["exp"])] {
        let header = json!({"alg": "HS256", "crit": crit, "b64": false});
        assert_eq!(verify(header), Some(JwtError::Critical));
    }
}

#[test]
fn the_type_can_be_required() {
    let of_type = |typ: &str| {
        verifier(&config::JwtConfig { typ: Some(typ.into()), ..config(&[Algorithm::HS256]) })
    };
    let access = of_type("at+jwt");
    for (typ, result) in [
        (json!("at+jwt"), None),
        (json!("AT+JWT"), None),
        (json!("application/at+jwt"), None),
        (json!("Application/At+Jwt"), None),
        (json!("JWT"), Some(JwtError::Type)),
        (json!("text/at+jwt"), Some(JwtError::Type)),
        (json!("at+jwt "), Some(JwtError::Type)),
        (json!(""), Some(JwtError::Type)),
        (json!(null), Some(JwtError::Type)),
        (json!(["at+jwt"]), Some(JwtError::Malformed)),
    ] {
        let token = forged(&json!({"alg": "HS256", "typ": typ}));
        assert_eq!(access.verify_now(&token, NOW).err(), result, "{typ}");
        let lenient = of_type("application/AT+jwt");
        assert_eq!(lenient.verify_now(&token, NOW).err(), result, "{typ}");
    }
    let untyped = forged(&json!({"alg": "HS256"}));
    assert_eq!(access.verify_now(&untyped, NOW).err(), Some(JwtError::Type));
    assert!(verifier(&config(&[Algorithm::HS256])).verify_now(&untyped, NOW).is_ok());
}

#[test]
fn what_is_no_token_is_malformed() {
    let verifier = verifier(&config(&[Algorithm::HS256]));
    let good = forged(&json!({"alg": "HS256"}));
    let [header, claims, signature] = good.split('.').collect::<Vec<_>>()[..] else { panic!() };
    let array = {
        let message = format!("{header}.{}", URL_SAFE_NO_PAD.encode("[1]"));
        let key = EncodingKey::from_secret(SECRET.as_bytes());
        let made = jsonwebtoken::crypto::sign(message.as_bytes(), &key, Algorithm::HS256);
        format!("{message}.{}", made.unwrap())
    };
    for bad in [
        "",
        ".",
        "..",
        "a.b.c",
        "eyJ.eyJ.x",
        &format!("{header}.{claims}"),
        &format!("{good}."),
        &format!("{good}.{signature}.{signature}"),
        &format!(" {good}"),
        &format!("{good}="),
        &format!("{header}.{claims}.é"),
        &format!("{header}.{claims}.{}", "A".repeat(TOKEN_BYTES_MAX)),
        &array,
    ] {
        assert_eq!(verifier.verify_now(bad, NOW), Err(JwtError::Malformed), "{bad}");
    }
    for wrong in ["", &signature[1..], &signature.to_lowercase()] {
        let token = format!("{header}.{claims}.{wrong}");
        let error = verifier.verify_now(&token, NOW).unwrap_err();
        assert!(matches!(error, JwtError::Signature | JwtError::Malformed), "{wrong}: {error}");
    }
    let other = URL_SAFE_NO_PAD.encode(json!({"sub": "root", "exp": NOW + 60}).to_string());
    let token = format!("{header}.{other}.{signature}");
    assert_eq!(verifier.verify_now(&token, NOW), Err(JwtError::Signature));
}

/// Checks that verifiers can be shared: handshakes run on any thread.
#[test]
fn verification_may_move_between_threads() {
    fn is_send<T: Send>(_: &T) {}
    is_send(&verifier(&config(&[Algorithm::HS256])).verify("", NOW));
}

#[test]
fn claims_that_come_twice_are_refused() {
    let verifier = verifier(&config(&[Algorithm::HS256]));
    let header = URL_SAFE_NO_PAD.encode(r#"{"alg":"HS256"}"#);
    let twice = format!(r#"{{"sub":"u-1","exp":1,"exp":{}}}"#, NOW + 60);
    let message = format!("{header}.{}", URL_SAFE_NO_PAD.encode(twice));
    let key = EncodingKey::from_secret(SECRET.as_bytes());
    let made = jsonwebtoken::crypto::sign(message.as_bytes(), &key, Algorithm::HS256).unwrap();
    assert_eq!(verifier.verify_now(&format!("{message}.{made}"), NOW), Err(JwtError::Malformed));
}

#[test]
fn what_a_client_is_told_follows_from_the_error() {
    for (error, status, code, retryable) in [
        (JwtError::Malformed, 401, "malformed_credentials", false),
        (JwtError::Signature, 403, "invalid_token", false),
        (JwtError::UnknownKey, 403, "invalid_token", false),
        (JwtError::Expired, 403, "invalid_token", false),
        (JwtError::IssuedAhead, 403, "invalid_token", false),
        (JwtError::Type, 403, "invalid_token", false),
        (JwtError::Unavailable, 503, "issuer_unavailable", true),
    ] {
        let rejection = Rejection::from(error);
        assert_eq!((rejection.status.as_u16(), rejection.code), (status, code));
        assert_eq!(rejection.retry_after.is_some(), retryable);
    }
}

#[test]
fn a_key_file_that_cannot_be_used_is_named_with_the_reason() {
    let (rsa, ec) = (pair(Algorithm::RS256).0, pair(Algorithm::ES256).0);
    let certificate = rcgen::CertificateParams::new(vec!["a".into()]).unwrap();
    let certificate = certificate.self_signed(&ec).unwrap().pem();
    let both = format!("{}{}", rsa.public_key_pem(), ec.public_key_pem());
    for (pem, reason) in [
        (String::new(), "no PUBLIC KEY"),
        ("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n".into(), "not supported"),
        (rsa.serialize_pem(), "no PUBLIC KEY"),
        (certificate, "no PUBLIC KEY"),
        (both, "more than one"),
        (ec.public_key_pem(), "none of jwt.algorithms"),
        (SHORT_RSA.into(), "2048"),
    ] {
        let (file, algorithms) = (file(&pem), [Algorithm::RS256, Algorithm::ES384]);
        let error = check_public_key(file.path(), &algorithms).unwrap_err();
        assert!(error.contains(reason) && error.contains(file.path().to_str().unwrap()), "{error}");
    }
    assert!(check_public_key(file(&rsa.public_key_pem()).path(), &[Algorithm::PS512]).is_ok());
    let missing = check_public_key(Path::new("/does/not/exist"), &[]).unwrap_err();
    assert!(missing.contains("/does/not/exist cannot be read"), "{missing}");
}

/// Checks the examples of RFC 7515, appendices A.1 and A.3.
#[test]
fn the_examples_of_the_standard_are_verified() {
    let claims = "eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ";
    let secret =
        "AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow";
    let secret = JwtKey::secret(&URL_SAFE_NO_PAD.decode(secret).unwrap(), &[Algorithm::HS256]);
    let token = format!(
        "eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9.{claims}.dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk"
    );
    assert_eq!(secret.unwrap().open(&token).unwrap()["iss"], "joe");
    let ec = json!({
        "kty": "EC", "crv": "P-256",
        "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
        "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0",
    });
    let token = format!(
        "eyJhbGciOiJFUzI1NiJ9.{claims}.DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q"
    );
    let key = JwtKey::jwk(&ec, &[Algorithm::ES256]).ok().unwrap();
    assert_eq!(key.open(&token).unwrap()["exp"], 1_300_819_380);
}

const NOW: u64 = 1_800_000_000;
const SECRET: &str = "0123456789abcdef0123456789abcdef";

/// An RSA key of 1024 bits.
const SHORT_RSA: &str = "-----BEGIN PUBLIC KEY-----\n\
    MIGfMA0GCSqGSIb3DQEBAQUAA4GNADCBiQKBgQDf1qNnVmbCB3eDJV7z/mhGAaqc\n\
    JhghvLfDF+O0aEdwFZKFtSr5ilzAH6hztOgHH1CZLF3S5gghdGnuEXt6+jTeuCls\n\
    GQ+asIIzAVqcxv/2UGNIU482C599/v7JgsGZ49QabeRlLOQBBgnbNrCa3aGaQgdh\n\
    h09U5L1tLo5h028P2QIDAQAB\n\
    -----END PUBLIC KEY-----";
