//! Signs JSON Web Tokens with the configured secret, to try things out with.

use std::time::Duration;

use jsonwebtoken::{Algorithm, AlgorithmFamily, EncodingKey, Header};
use secrecy::ExposeSecret;
use serde_json::{Map, Value, json};
use uuid::Uuid;
use wsproxy_proto::names::Id;

use crate::config;

/// Signs a token of `user` that is good for `ttl` from `now` on, which is the time since 1970. `further` claims replace
/// those of the same name.
///
/// # Errors
/// A sentence for the operator: there is no secret, or no algorithm that signs with one.
pub fn sign(
    config: &config::JwtConfig,
    user: &Id,
    now: Duration,
    ttl: Duration,
    further: Vec<(String, Value)>,
) -> Result<String, String> {
    let secret = config.secret_key.as_ref().ok_or("jwt.secret_key (SECRET_KEY) is not set")?;
    let algorithm = config.algorithms.iter().find(|algorithm| is_shared(**algorithm));
    let algorithm = algorithm
        .ok_or("no HS algorithm is in jwt.algorithms, and with others only the issuer can sign")?;
    let mut claims = Map::from_iter([
        (config.user_claim.clone(), json!(user.as_str())),
        ("iat".into(), json!(now.as_secs())),
        ("exp".into(), json!((now + ttl).as_secs())),
        ("jti".into(), json!(Uuid::new_v4())),
    ]);
    claims.extend(config.issuer.as_ref().map(|issuer| ("iss".into(), json!(issuer))));
    claims.extend(config.audience.first().map(|audience| ("aud".into(), json!(audience))));
    claims.extend(further);
    let key = EncodingKey::from_secret(secret.expose_secret().as_bytes());
    let mut header = Header::new(*algorithm);
    header.typ = config.typ.clone().or(header.typ);
    jsonwebtoken::encode(&header, &claims, &key).map_err(|error| format!("cannot sign: {error}"))
}

/// Returns whether an algorithm signs and verifies with one secret.
#[must_use]
pub fn is_shared(algorithm: Algorithm) -> bool {
    algorithm.family() == AlgorithmFamily::Hmac
}

#[cfg(test)]
mod tests {
    use tokio_util::{sync::CancellationToken, task::TaskTracker};

    use super::*;
    use crate::auth::{
        fixed_keys::{FixedKeys, KeyRing},
        jwt::{JwtError, JwtVerifier},
    };

    #[test]
    fn a_gateway_accepts_a_token_signed_with_its_configuration() {
        let config = config::JwtConfig {
            secret_key: Some("0123456789abcdef0123456789abcdef".into()),
            issuer: Some("https://issuer.example/".into()),
            audience: vec!["gateway".into()],
            user_claim: "uid".into(),
            typ: Some("at+jwt".into()),
            ..config::JwtConfig::default()
        };
        let (tasks, end) = (TaskTracker::new(), CancellationToken::new());
        let keys = FixedKeys::new(KeyRing::read(&config).unwrap());
        let verifier = JwtVerifier::new(&config, &keys, &tasks, end).unwrap();
        let (user, now) = (Id::parse("alice").unwrap(), Duration::from_secs(1_800_000_000));
        let ttl = Duration::from_secs(60);
        let token = sign(&config, &user, now, ttl, Vec::new()).unwrap();
        let claims = verifier.verify_now(&token, now.as_secs()).unwrap();
        assert_eq!((claims.user.as_str(), claims.jti.is_some()), ("alice", true));
        assert_eq!(claims.issued_at, Some(1_800_000_000));
        assert_eq!(claims.expires_at, Some(1_800_000_060));

        let further = vec![("exp".into(), json!(5)), ("role".into(), json!("admin"))];
        let token = sign(&config, &user, now, ttl, further).unwrap();
        assert_eq!(verifier.verify_now(&token, now.as_secs()), Err(JwtError::Expired));
    }

    #[test]
    fn without_a_shared_secret_nothing_is_signed() {
        let user = Id::parse("alice").unwrap();
        let sign = |config: &config::JwtConfig| {
            let signed = sign(config, &user, Duration::ZERO, Duration::ZERO, Vec::new());
            signed.unwrap_err()
        };
        assert!(sign(&config::JwtConfig::default()).contains("jwt.secret_key"));
        let public = config::JwtConfig {
            secret_key: Some("0123456789abcdef".into()),
            algorithms: vec![Algorithm::ES256],
            ..config::JwtConfig::default()
        };
        assert!(sign(&public).contains("jwt.algorithms"));
    }
}
