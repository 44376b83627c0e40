//! `wsproxy jwt`: a JSON Web Token to try things out with, signed with the configured secret.

use std::time::{Duration, SystemTime};

use anyhow::Context;
use serde_json::Value;
use wsproxy_proto::names::Id;

use super::{
    exit::Failure,
    settings::{CliSettings, Reads},
    token,
};
use crate::{auth::sign, config::keys::Key};

/// The keys that `jwt` reads, those of `[jwt]`; none of them has a flag.
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
    /// User of the token.
    #[arg(long, value_name = "USER", value_parser = |text: &str| Id::parse(text).map_err(|e| format!("a user {e}")))]
    sub: Id,
    /// Lifetime of the token, such as 60s.
    #[arg(long, value_name = "TIME", value_parser = token::ttl, default_value = "1h")]
    ttl: Duration,
    /// Adds a claim or replaces one. A value that is valid JSON is used as JSON, any other as text. May be given
    /// several times.
    #[arg(long = "claim", value_name = "NAME=VALUE", value_parser = claim)]
    claims: Vec<(String, Value)>,
    #[command(flatten)]
    settings: CliSettings<JwtKeys>,
}

pub(super) fn run(args: JwtArgs) -> anyhow::Result<()> {
    let config = args.settings.load()?.config;
    let now = SystemTime::UNIX_EPOCH.elapsed().context("the clock is before 1970")?;
    let token = sign::sign(&config.jwt, &args.sub, now, args.ttl, args.claims);
    let token = token.map_err(anyhow::Error::msg).context(Failure::Config)?;
    super::print(&format!("{token}\n"))
}

fn claim(text: &str) -> Result<(String, Value), String> {
    let (name, value) = text.split_once('=').ok_or("must be NAME=VALUE")?;
    if name.is_empty() {
        return Err("must be NAME=VALUE".into());
    }
    Ok((name.into(), serde_json::from_str(value).unwrap_or_else(|_| value.into())))
}

const EXAMPLE: &str = "Example:
  export SECRET_KEY=$(openssl rand -hex 32) WSPROXY_ENDPOINTS__EVENTS=true WSPROXY_ENDPOINTS__ROOMS=true
  wsproxy serve &
  wsproxy jwt --sub alice --ttl 10m --claim role=admin
  wsproxy jwt --sub alice --claim name=Alice --claim 'rooms=[\"lobby\"]'

The token has iat, exp and jti, and iss, aud and typ where jwt.issuer, jwt.audience and jwt.typ are set. \
Without the claim rooms it opens every room. It needs an HS algorithm in jwt.algorithms: with public keys only the issuer can sign.";

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

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
