//! The claims of a token, checked against the configuration; knows no signatures.

use serde_json::{Map, Value};
use wsproxy_proto::names::Id;

use crate::{auth::jwt::JwtError, config};

/// The claims of a good token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claims {
    /// The user.
    pub user: Id,
    /// The token's own name (`jti`), which revocations use.
    pub jti: Option<String>,
    /// Time of issue, in unix seconds.
    pub issued_at: Option<u64>,
    /// Expiry, in unix seconds, without the leeway; `None`: never.
    pub expires_at: Option<u64>,
    /// Rooms that the token opens (`rooms`). Other endpoints do not read it.
    pub rooms: RoomsClaim,
    /// Cluster whose agent the token names (`cluster`). Only the tunnel reads it.
    pub cluster: Option<String>,
    /// Clusters that the token opens (`clusters`). Only the tunnel reads them.
    pub clusters: Vec<String>,
    /// Name that others see (`name`), at most [`DISPLAY_NAME_BYTES_MAX`] bytes without control characters.
    pub display_name: Option<String>,
}

/// Rooms that a token opens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RoomsClaim {
    /// All: the token has no such claim.
    All,
    /// Those that one of these patterns names. A pattern is a room, or the beginning of one with `*` behind it.
    Some(Vec<String>),
    /// The claim is no list of texts: no room is opened.
    Malformed,
}

impl RoomsClaim {
    fn read(claims: &Map<String, Value>) -> Self {
        match claims.get("rooms") {
            None | Some(Value::Null) => Self::All,
            Some(Value::Array(patterns)) => {
                let text = |pattern: &Value| pattern.as_str().map(ToOwned::to_owned);
                patterns.iter().map(text).collect::<Option<_>>().map_or(Self::Malformed, Self::Some)
            }
            Some(_) => Self::Malformed,
        }
    }

    /// Returns whether the token opens `room`.
    #[must_use]
    pub fn opens(&self, room: &Id) -> bool {
        let fits = |pattern: &String| match pattern.strip_suffix('*') {
            Some(beginning) => room.as_str().starts_with(beginning),
            None => room.as_str() == pattern,
        };
        match self {
            Self::All => true,
            Self::Some(patterns) => patterns.iter().any(fits),
            Self::Malformed => false,
        }
    }
}

/// The configured rules of claims.
pub(super) struct Rules {
    pub(super) audience: Vec<String>,
    pub(super) issuer: Option<String>,
    pub(super) leeway: u64,
    pub(super) user_claim: String,
    pub(super) require_exp: bool,
}

impl Rules {
    pub(super) fn new(config: &config::JwtConfig) -> Self {
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
        // The issuer's clock is too far ahead: a revocation, which covers tokens issued until then plus the leeway,
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
        Ok(Claims {
            user: self.user(claims)?,
            jti: name(claims)?,
            issued_at,
            expires_at,
            rooms: RoomsClaim::read(claims),
            cluster: claims.get("cluster").and_then(Value::as_str).map(ToOwned::to_owned),
            clusters: texts(claims.get("clusters")),
            display_name: display_name(claims),
        })
    }

    /// Checks the audience. A token with an audience is refused by all others: RFC 7519, 4.1.3.
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

    /// Reads an id that is text or a number: existing systems put the key of a database row into a claim.
    pub(super) fn user(&self, claims: &Map<String, Value>) -> Result<Id, JwtError> {
        match claims.get(&self.user_claim) {
            Some(Value::String(user)) => Id::parse(user).map_err(|_| JwtError::User),
            Some(Value::Number(user)) if user.is_u64() => {
                Id::parse(&user.to_string()).map_err(|_| JwtError::User)
            }
            _ => Err(JwtError::User),
        }
    }
}

/// Reads a list of texts; another value is none.
fn texts(claim: Option<&Value>) -> Vec<String> {
    let list = claim.and_then(Value::as_array);
    let text = |one: &Value| one.as_str().map(ToOwned::to_owned);
    list.and_then(|list| list.iter().map(text).collect()).unwrap_or_default()
}

/// Reads a time in unix seconds, which may have a fraction.
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

/// Checks the token's name. A name of another type could not be revoked, and its issuer would not notice.
fn name(claims: &Map<String, Value>) -> Result<Option<String>, JwtError> {
    match claims.get("jti") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(name)) if (1..=NAME_BYTES_MAX).contains(&name.len()) => {
            Ok(Some(name.clone()))
        }
        Some(_) => Err(JwtError::Invalid("jti")),
    }
}

/// Reads the name that others see. Issuers write many kinds of names: a long one is cut, and what is no text is left out.
fn display_name(claims: &Map<String, Value>) -> Option<String> {
    let name = claims.get("name")?.as_str()?;
    let mut name: String = name.chars().filter(|c| !c.is_control()).collect();
    name.truncate(name.floor_char_boundary(DISPLAY_NAME_BYTES_MAX));
    (!name.is_empty()).then_some(name)
}

/// Longest name that others see, in bytes.
pub const DISPLAY_NAME_BYTES_MAX: usize = 128;

/// Latest time: up to here a float holds every second exactly.
const SECONDS_MAX: f64 = (1_u64 << 53) as f64;

const NAME_BYTES_MAX: usize = 256;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const NOW: u64 = 1_800_000_000;

    fn rules() -> Rules {
        Rules::new(&config::JwtConfig::default())
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
    fn a_token_without_expiry_is_refused_by_default() {
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
    fn the_configured_claim_names_the_user() {
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
    fn a_token_opens_the_rooms_of_its_claim() {
        let rooms = |claims: &Value| check(&rules(), &with(claims)).unwrap().rooms;
        for (claims, opened) in [
            (json!({}), [true, true, true]),
            (json!({"rooms": null}), [true, true, true]),
            (json!({"rooms": []}), [false, false, false]),
            (json!({"rooms": ["lobby"]}), [true, false, false]),
            (json!({"rooms": ["team-*"]}), [false, true, false]),
            (json!({"rooms": ["lobby", "team-*"]}), [true, true, false]),
            (json!({"rooms": ["*"]}), [true, true, true]),
            (json!({"rooms": ["lobb", "*lobby", "lob*by", ""]}), [false, false, false]),
        ] {
            let claim = rooms(&claims);
            let opens = ["lobby", "team-7", "hall"].map(|id| claim.opens(&Id::parse(id).unwrap()));
            assert_eq!(opens, opened, "{claims}");
        }
        // Events accept such a token, rooms do not.
        for bad in [json!("lobby"), json!({"lobby": 1}), json!(["lobby", 5]), json!(true)] {
            assert_eq!(rooms(&json!({"rooms": bad})), RoomsClaim::Malformed, "{bad}");
        }
        assert!(!RoomsClaim::Malformed.opens(&Id::parse("lobby").unwrap()));
    }

    #[test]
    fn a_display_name_is_short_text_of_one_line() {
        let name = |name: Value| check(&rules(), &with(&json!({ "name": name }))).unwrap();
        assert_eq!(name(json!("Ann\n\u{85}Lee")).display_name.as_deref(), Some("AnnLee"));
        assert_eq!(name(json!("\u{e4}".repeat(100))).display_name, Some("\u{e4}".repeat(64)));
        assert_eq!(
            name(json!(format!("x{}", "\u{e4}".repeat(64)))).display_name.unwrap().len(),
            127
        );
        for unusable in [json!(null), json!(5), json!(["Ann"]), json!(""), json!("\n")] {
            assert_eq!(name(unusable).display_name, None);
        }
    }

    #[test]
    fn a_token_with_an_unusable_name_is_refused() {
        for bad in [json!({"jti": 5}), json!({"jti": ""}), json!({"jti": "x".repeat(257)})] {
            assert_eq!(check(&rules(), &with(&bad)), Err(JwtError::Invalid("jti")), "{bad}");
        }
    }
}
