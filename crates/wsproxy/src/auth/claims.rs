//! What a token says, checked against what the operator wants; knows no signatures.

use serde_json::{Map, Value};
use wsproxy_proto::names::Id;

use crate::{auth::jwt::JwtError, config};

/// What a good token says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claims {
    /// Whom it is about.
    pub user: Id,
    /// The token's own name, by which it can be revoked.
    pub jti: Option<String>,
    /// When it was made, in unix seconds.
    pub issued_at: Option<u64>,
    /// When it expires, in unix seconds and without the leeway for which it stays good; `None`: never.
    pub expires_at: Option<u64>,
}

/// What the operator wants tokens to say.
pub(super) struct Rules {
    pub(super) audience: Vec<String>,
    pub(super) issuer: Option<String>,
    pub(super) leeway: u64,
    pub(super) user_claim: String,
    pub(super) require_exp: bool,
}

impl Rules {
    pub(super) fn new(config: &config::Jwt) -> Self {
        Self {
            audience: config.audience.clone(),
            issuer: config.issuer.clone(),
            leeway: config.leeway_seconds(),
            user_claim: config.user_claim.clone(),
            require_exp: config.require_exp,
        }
    }

    /// Checks the claims of a token with a good signature.
    pub(super) fn check(&self, claims: &Map<String, Value>, now: u64) -> Result<Claims, JwtError> {
        let expires_at = time(claims, "exp")?;
        match expires_at {
            Some(end) if now >= end.saturating_add(self.leeway) => return Err(JwtError::Expired),
            None if self.require_exp => return Err(JwtError::Missing("exp")),
            _ => {}
        }
        let latest = now.saturating_add(self.leeway);
        if time(claims, "nbf")?.is_some_and(|start| start > latest) {
            return Err(JwtError::NotYetValid);
        }
        // The issuer's clock is too far ahead: a revocation, which covers what was issued until then and the leeway,
        // would not cover this token.
        let issued_at = time(claims, "iat")?;
        if issued_at.is_some_and(|issued| issued > latest) {
            return Err(JwtError::IssuedAhead);
        }
        self.check_audience(claims.get("aud"))?;
        if let Some(issuer) = &self.issuer
            && claims.get("iss").and_then(Value::as_str) != Some(issuer)
        {
            return Err(JwtError::Issuer);
        }
        Ok(Claims { user: self.user(claims)?, jti: name(claims)?, issued_at, expires_at })
    }

    /// A token that is for somebody in particular is refused by all others: RFC 7519, 4.1.3.
    fn check_audience(&self, claim: Option<&Value>) -> Result<(), JwtError> {
        let wanted = |one: &Value| {
            one.as_str().is_some_and(|one| self.audience.iter().any(|known| known == one))
        };
        let good = match claim {
            None | Some(Value::Null) => self.audience.is_empty(),
            Some(Value::Array(several)) => several.iter().any(wanted),
            Some(one) => wanted(one),
        };
        if good { Ok(()) } else { Err(JwtError::Audience) }
    }

    /// Existing systems put the key of a database row into claims of their own, as a number.
    fn user(&self, claims: &Map<String, Value>) -> Result<Id, JwtError> {
        match claims.get(&self.user_claim) {
            Some(Value::String(user)) => Id::parse(user).map_err(|_| JwtError::User),
            Some(Value::Number(user)) if user.is_u64() => {
                Id::parse(&user.to_string()).map_err(|_| JwtError::User)
            }
            _ => Err(JwtError::User),
        }
    }
}

/// A time in unix seconds, which may have a fraction.
fn time(claims: &Map<String, Value>, name: &'static str) -> Result<Option<u64>, JwtError> {
    match claims.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Number(time)) => match (time.as_u64(), time.as_f64()) {
            (Some(seconds), _) => Ok(Some(seconds)),
            (None, Some(seconds)) if (0.0..SECONDS_MAX).contains(&seconds) => {
                Ok(Some(seconds as u64))
            }
            _ => Err(JwtError::Invalid(name)),
        },
        Some(_) => Err(JwtError::Invalid(name)),
    }
}

/// A name of another kind could not be revoked, which its issuer would not notice.
fn name(claims: &Map<String, Value>) -> Result<Option<String>, JwtError> {
    match claims.get("jti") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(name)) if (1..=NAME_BYTES_MAX).contains(&name.len()) => {
            Ok(Some(name.clone()))
        }
        Some(_) => Err(JwtError::Invalid("jti")),
    }
}

/// Up to here a float holds every second exactly.
const SECONDS_MAX: f64 = (1_u64 << 53) as f64;

const NAME_BYTES_MAX: usize = 256;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const NOW: u64 = 1_800_000_000;

    fn rules() -> Rules {
        Rules::new(&config::Jwt::default())
    }

    fn check(rules: &Rules, claims: &Value) -> Result<Claims, JwtError> {
        rules.check(claims.as_object().unwrap(), NOW)
    }

    /// Good claims with some of them replaced.
    fn with(other: &Value) -> Value {
        let mut claims = json!({"sub": "u-1", "exp": NOW + 60, "iat": NOW - 60, "jti": "t-1"});
        claims.as_object_mut().unwrap().extend(other.as_object().unwrap().clone());
        claims
    }

    #[test]
    fn good_claims_are_handed_on() {
        let claims = check(&rules(), &with(&json!({}))).unwrap();
        assert_eq!(claims.user.as_str(), "u-1");
        assert_eq!(claims.jti.as_deref(), Some("t-1"));
        assert_eq!((claims.issued_at, claims.expires_at), (Some(NOW - 60), Some(NOW + 60)));
        let least = check(&rules(), &json!({"sub": "u", "exp": NOW as f64 + 1.5})).unwrap();
        assert_eq!((least.jti, least.issued_at, least.expires_at), (None, None, Some(NOW + 1)));
    }

    #[test]
    fn times_of_a_token_may_be_off_by_the_leeway() {
        for (claims, result) in [
            (json!({"exp": NOW - 4}), None),
            (json!({"exp": NOW - 5}), Some(JwtError::Expired)),
            (json!({"exp": 0}), Some(JwtError::Expired)),
            (json!({"exp": null}), Some(JwtError::Missing("exp"))),
            (json!({"exp": "1900000000"}), Some(JwtError::Invalid("exp"))),
            (json!({"exp": -1}), Some(JwtError::Invalid("exp"))),
            (json!({"exp": 1e300}), Some(JwtError::Invalid("exp"))),
            (json!({"exp": u64::MAX}), None),
            (json!({"nbf": NOW + 5}), None),
            (json!({"nbf": NOW + 6}), Some(JwtError::NotYetValid)),
            (json!({"nbf": u64::MAX}), Some(JwtError::NotYetValid)),
            (json!({"nbf": [NOW]}), Some(JwtError::Invalid("nbf"))),
            (json!({"iat": "today"}), Some(JwtError::Invalid("iat"))),
            (json!({"iat": NOW + 5}), None),
            (json!({"iat": NOW as f64 + 5.9}), None),
            (json!({"iat": NOW + 6}), Some(JwtError::IssuedAhead)),
            (json!({"iat": u64::MAX}), Some(JwtError::IssuedAhead)),
        ] {
            assert_eq!(check(&rules(), &with(&claims)).err(), result, "{claims}");
        }
    }

    #[test]
    fn a_token_without_an_end_is_good_only_where_that_is_allowed() {
        let endless = json!({"sub": "u-1"});
        assert_eq!(check(&rules(), &endless), Err(JwtError::Missing("exp")));
        let lenient = Rules { require_exp: false, ..rules() };
        assert_eq!(check(&lenient, &endless).unwrap().expires_at, None);
        let expired = with(&json!({"exp": 1}));
        assert_eq!(check(&lenient, &expired), Err(JwtError::Expired));
    }

    #[test]
    fn a_token_must_be_for_us() {
        let ours = Rules { audience: vec!["gateway".into(), "all".into()], ..rules() };
        let anybodys = rules();
        for (claims, to_ours, to_anybodys) in [
            (json!({}), false, true),
            (json!({"aud": null}), false, true),
            (json!({"aud": "gateway"}), true, false),
            (json!({"aud": ["shop", "all"]}), true, false),
            (json!({"aud": ["shop"]}), false, false),
            (json!({"aud": []}), false, false),
            (json!({"aud": 5}), false, false),
            (json!({"aud": {"gateway": 1}}), false, false),
        ] {
            for (rules, good) in [(&ours, to_ours), (&anybodys, to_anybodys)] {
                let error = check(rules, &with(&claims)).err();
                assert_eq!(error, (!good).then_some(JwtError::Audience), "{claims}");
            }
        }
    }

    #[test]
    fn a_token_must_come_from_the_issuer() {
        let rules = Rules { issuer: Some("https://issuer.example/".into()), ..rules() };
        assert!(check(&rules, &with(&json!({"iss": "https://issuer.example/"}))).is_ok());
        for bad in [json!({}), json!({"iss": "https://issuer.example"}), json!({"iss": ["x"]})] {
            assert_eq!(check(&rules, &with(&bad)), Err(JwtError::Issuer), "{bad}");
        }
    }

    #[test]
    fn the_user_is_an_id_or_a_number_in_the_claim_that_is_configured() {
        for bad in [
            json!({"sub": ""}),
            json!({"sub": "a:b"}),
            json!({"sub": "a b"}),
            json!({"sub": null}),
            json!({"sub": -1}),
            json!({"sub": 1.5}),
            json!({"sub": ["u"]}),
            json!({"sub": "x".repeat(129)}),
        ] {
            assert_eq!(check(&rules(), &with(&bad)), Err(JwtError::User), "{bad}");
        }
        let rules = Rules { user_claim: "https://app.example/uid".into(), ..rules() };
        assert_eq!(check(&rules, &with(&json!({}))), Err(JwtError::User));
        let claims = with(&json!({"https://app.example/uid": 42}));
        assert_eq!(check(&rules, &claims).unwrap().user.as_str(), "42");
    }

    #[test]
    fn a_token_that_could_not_be_revoked_by_its_name_is_refused() {
        for bad in [json!({"jti": 5}), json!({"jti": ""}), json!({"jti": "x".repeat(257)})] {
            assert_eq!(check(&rules(), &with(&bad)), Err(JwtError::Invalid("jti")), "{bad}");
        }
    }
}
