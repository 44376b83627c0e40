//! `wsproxy jwt`: a JSON Web Token to try things out with, signed with the configured secret.

use std::time::{Duration, SystemTime};

use anyhow::{Context, anyhow};
use jsonwebtoken::{AlgorithmFamily, EncodingKey, Header};
use secrecy::ExposeSecret;
use serde_json::{Map, Value, json};
use uuid::Uuid;
use wsproxy_proto::names::Id;

use super::{
    exit::Failure,
    settings::{Reads, Settings},
    token,
};
use crate::config::{self, keys::Key};

/// The keys that say how tokens are signed; none of them has a flag.
pub(super) struct JwtKeys;

impl Reads for JwtKeys {
    fn reads(key: &Key) -> bool {
        key.section == "jwt"
    }
}

/// Arguments of the command.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct JwtArgs {
    /// The user whom the token names.
    #[arg(long, value_name = "USER", value_parser = |text: &str| Id::parse(text).map_err(|e| format!("a user {e}")))]
    sub: Id,
    /// How long the token is good, such as 60s.
    #[arg(long, value_name = "TIME", value_parser = token::ttl, default_value = "1h")]
    ttl: Duration,
    /// A further claim, or another value for one that the token has anyway; a value that can be read as JSON
    /// is JSON, any other is text. May be given several times.
    #[arg(long = "claim", value_name = "NAME=VALUE", value_parser = claim)]
    claims: Vec<(String, Value)>,
    #[command(flatten)]
    settings: Settings<JwtKeys>,
}

pub(super) fn run(args: JwtArgs) -> anyhow::Result<()> {
    let config = args.settings.load()?.config;
    let now = SystemTime::UNIX_EPOCH.elapsed().context("the clock is before 1970")?;
    let token = sign(&config.jwt, &args.sub, now, args.ttl, args.claims);
    super::print(&format!("{}\n", token.context(Failure::Config)?))
}

fn sign(
    config: &config::Jwt,
    user: &Id,
    now: Duration,
    ttl: Duration,
    further: Vec<(String, Value)>,
) -> anyhow::Result<String> {
    let secret = config.secret_key.as_ref().context("jwt.secret_key (SECRET_KEY) is not set")?;
    let shared =
        |algorithm: &&_| jsonwebtoken::Algorithm::family(**algorithm) == AlgorithmFamily::Hmac;
    let algorithm = config.algorithms.iter().find(shared).ok_or_else(|| {
        anyhow!("no HS algorithm is in jwt.algorithms, and with others only the issuer can sign")
    })?;
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
    jsonwebtoken::encode(&header, &claims, &key).context("cannot sign")
}

fn claim(text: &str) -> Result<(String, Value), String> {
    let (name, value) = text.split_once('=').ok_or("must be NAME=VALUE")?;
    if name.is_empty() {
        return Err("must be NAME=VALUE".into());
    }
    Ok((name.into(), serde_json::from_str(value).unwrap_or_else(|_| value.into())))
}

const EXAMPLE: &str = "Example:
  export SECRET_KEY=$(openssl rand -hex 32) WSPROXY_ENDPOINTS__EVENTS=true
  wsproxy serve &
  wsproxy jwt --sub alice --ttl 10m --claim role=admin

The token has iat, exp and jti, and iss, aud and typ where jwt.issuer, jwt.audience and jwt.typ are set.
It needs an HS algorithm in jwt.algorithms: with public keys only the issuer can sign.";

#[cfg(test)]
mod tests {
    use tokio_util::{sync::CancellationToken, task::TaskTracker};

    use super::*;
    use crate::auth::jwt::{JwtError, JwtVerifier};

    #[test]
    fn what_is_signed_is_believed_by_a_gateway_with_the_same_configuration() {
        let config = config::Jwt {
            secret_key: Some("0123456789abcdef0123456789abcdef".into()),
            issuer: Some("https://issuer.example/".into()),
            audience: vec!["gateway".into()],
            user_claim: "uid".into(),
            typ: Some("at+jwt".into()),
            ..config::Jwt::default()
        };
        let (tasks, end) = (TaskTracker::new(), CancellationToken::new());
        let verifier = JwtVerifier::new(&config, &tasks, end).unwrap();
        let (user, now) = (Id::parse("alice").unwrap(), Duration::from_secs(1_800_000_000));
        let ttl = Duration::from_secs(60);
        let token = sign(&config, &user, now, ttl, Vec::new()).unwrap();
        let claims = verifier.verify_now(&token, now.as_secs()).unwrap();
        assert_eq!((claims.user.as_str(), claims.jti.is_some()), ("alice", true));
        assert_eq!(claims.issued_at, Some(1_800_000_000));
        assert_eq!(claims.expires_at, Some(1_800_000_060));

        let further = vec![claim("exp=5").unwrap(), claim("role=admin").unwrap()];
        let token = sign(&config, &user, now, ttl, further).unwrap();
        assert_eq!(verifier.verify_now(&token, now.as_secs()), Err(JwtError::Expired));
    }

    #[test]
    fn without_a_shared_secret_nothing_is_signed() {
        let user = Id::parse("alice").unwrap();
        let sign = |config: &config::Jwt| {
            let signed = sign(config, &user, Duration::ZERO, Duration::ZERO, Vec::new());
            signed.unwrap_err().to_string()
        };
        assert!(sign(&config::Jwt::default()).contains("jwt.secret_key"));
        let public = config::Jwt {
            secret_key: Some("0123456789abcdef".into()),
            algorithms: vec![jsonwebtoken::Algorithm::ES256],
            ..config::Jwt::default()
        };
        assert!(sign(&public).contains("jwt.algorithms"));
    }

    #[test]
    fn a_claim_is_json_where_it_can_be() {
        for (text, value) in [
            ("a=1", json!(1)),
            ("a=\"1\"", json!("1")),
            ("a=[\"x\"]", json!(["x"])),
            ("a=x y", json!("x y")),
            ("a=b=c", json!("b=c")),
            ("a=", json!("")),
        ] {
            assert_eq!(claim(text), Ok(("a".into(), value)));
        }
        assert!(claim("a").is_err() && claim("=1").is_err());
    }
}
