//! The identity of a client that opens a room: its token, or what it says of itself in development mode.

use std::net::IpAddr;

use http::{HeaderMap, Request};
use percent_encoding::percent_decode_str;
use secrecy::{ExposeSecret, SecretString};
use uuid::Uuid;
use wsproxy_conn::clock;
use wsproxy_proto::names::Id;

use crate::{
    auth::jwt::{Claims, DISPLAY_NAME_BYTES_MAX, JwtVerifier},
    config::rooms::Development,
    core::Core,
    endpoint::rooms::{Rooms, attempts::Subject},
    http::{
        handshake::{
            self,
            address::RemotePeer,
            credentials::{self, Protocols},
        },
        rejection::Rejection,
    },
    telemetry::time,
};

/// The identity of a member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Identity {
    /// The user.
    pub(super) user: Id,
    /// The client, unique in its room.
    pub(super) client: Id,
    /// Name that others see, at most [`DISPLAY_NAME_BYTES_MAX`] bytes without control characters.
    pub(super) display_name: Option<String>,
    /// The name is the token's, so the member cannot change it.
    pub(super) is_name_of_token: bool,
    /// Expiry of the token in unix seconds, without the leeway; `None`: never.
    pub(super) expires_at: Option<u64>,
}

/// Parts of a request that tell who the client is. Not `Debug`, since they hold a token.
pub(super) struct Asked {
    address: IpAddr,
    words: Words,
}

/// Words of a client about itself.
struct Words {
    token: Option<SecretString>,
    user: Option<String>,
    client: Option<String>,
    display_name: Option<String>,
}

impl Asked {
    /// Checks whether the client's address may try to open a room, and reads the request. Warns of a proxy that is not
    /// trusted.
    ///
    /// # Errors
    /// 400: a parameter is malformed or given twice. 401: the token is malformed, or there are two of a kind. 429: the
    /// address has used up its attempts. 500: the listener set no address.
    pub(super) fn read<B>(
        rooms: &Rooms,
        core: &Core,
        request: &Request<B>,
    ) -> Result<Self, Rejection> {
        let (headers, now) = (request.headers(), clock::now());
        let address = handshake::client_address(core, request)?;
        let peer = request.extensions().get::<RemotePeer>();
        if let Some(peer) = peer.filter(|_| rooms.attempts.is_on()) {
            let trusted = &core.config.server.trusted_proxies;
            rooms.proxy_warning.look(peer.0, headers, trusted, now);
        }
        rooms.attempts.check_address(address, now)?;
        match Words::read(headers, request.uri().query()) {
            Ok(words) => Ok(Self { address, words }),
            Err(refused) => {
                rooms.attempts.count(Subject::Address(address), now)?;
                Err(refused)
            }
        }
    }
}

/// Identifies a client, and counts its attempt: for the user of a valid token, else for the client's address.
///
/// # Errors
/// 400: a client id or a name cannot be used. 401: no token, a malformed one, or no user id in development mode. 403: the
/// token is not valid or was revoked, is that of another user, or does not open the room. 429: too many attempts. 503:
/// the issuer's keys cannot be fetched, or the store does not answer.
pub(super) async fn identify(
    rooms: &Rooms,
    asked: Asked,
    room: &Id,
) -> Result<Identity, Rejection> {
    let Asked { address, words } = asked;
    let claims = verify(rooms.jwt.as_ref(), words.token.as_ref()).await;
    let subject = match &claims {
        Ok(Some(claims)) => Subject::User(&claims.user),
        Ok(None) | Err(_) => Subject::Address(address),
    };
    rooms.attempts.count(subject, clock::now())?;
    match claims? {
        Some(claims) => {
            let user = claims.user.clone();
            // Behind the limit of attempts, since it asks the store.
            let checked = check_revoked(rooms, &claims).await;
            let identity = checked.and_then(|()| words.with_token(claims, room));
            identity.map_err(|rejection| rejection.of_user(&user))
        }
        None => words.without_token(rooms.config.development),
    }
}

/// Checks that no worker has revoked a token.
///
/// # Errors
/// 403: the token was revoked. 503: the store does not answer.
async fn check_revoked(rooms: &Rooms, claims: &Claims) -> Result<(), Rejection> {
    let revocations = &rooms.revocations;
    match revocations.cover(&claims.user, claims.jti.as_deref(), claims.issued_at).await? {
        true => Err(Rejection::invalid_token("The token was revoked.")),
        false => Ok(()),
    }
}

/// Returns the claims of a token; `None` if there is no token.
async fn verify(
    verifier: Option<&JwtVerifier>,
    token: Option<&SecretString>,
) -> Result<Option<Claims>, Rejection> {
    let Some(token) = token else { return Ok(None) };
    let Some(verifier) = verifier.filter(|verifier| verifier.has_key()) else {
        // Only development mode has no key. A client with a token does not mean to name itself.
        return Err(Rejection::invalid_token(
            "No key for tokens is configured: set one in [jwt], or leave the token out.",
        ));
    };
    let claims = verifier.verify(token.expose_secret(), time::since_epoch().as_secs()).await;
    claims.map(Some).map_err(|error| {
        let rejection = Rejection::from(error).because(error.label());
        match verifier.named_user(token.expose_secret()) {
            Some(user) => rejection.of_user(&user),
            None => rejection,
        }
    })
}

/// Checks a newer token of a member.
///
/// # Errors
/// 403: the token is not valid or was revoked, or does not open the room. 503: the issuer's keys cannot be fetched, or
/// the store does not answer.
pub(super) async fn check(
    rooms: &Rooms,
    token: &SecretString,
    room: &Id,
) -> Result<Claims, Rejection> {
    let claims = verify(rooms.jwt.as_ref(), Some(token)).await?;
    let claims =
        claims.ok_or_else(|| Rejection::invalid_token("No token can be verified here."))?;
    check_revoked(rooms, &claims).await?;
    if !claims.rooms.opens(room) {
        return Err(Rejection::room_forbidden("The token does not open this room."));
    }
    Ok(claims)
}

impl Words {
    /// Reads them. `room_id` in the query means nothing: the path names the room.
    fn read(headers: &HeaderMap, query: Option<&str>) -> Result<Self, Rejection> {
        let token = credentials::find_any(headers, query, TOKEN_PARAMETERS, Protocols::PLAIN)?;
        let query = query.unwrap_or_default();
        let user = parameter(query, "user_id")?;
        let client = parameter(query, "client_id")?;
        let display_name = parameter(query, "display_name")?;
        Ok(Self { token, user, client, display_name })
    }

    fn with_token(self, claims: Claims, room: &Id) -> Result<Identity, Rejection> {
        if self.user.as_deref().is_some_and(|user| user != claims.user.as_str()) {
            return Err(Rejection::invalid_token("The token is not that of user_id."));
        }
        if !claims.rooms.opens(room) {
            return Err(Rejection::room_forbidden("The token does not open this room."));
        }
        let client = client(self.client)?;
        // The issuer knows the name better than the client does.
        let is_name_of_token = claims.display_name.is_some();
        let display_name = match claims.display_name {
            Some(name) => Some(name),
            None => display_name(self.display_name)?,
        };
        let (user, expires_at) = (claims.user, claims.expires_at);
        Ok(Identity { user, client, display_name, is_name_of_token, expires_at })
    }

    fn without_token(self, development: Development) -> Result<Identity, Rejection> {
        if development == Development::Off {
            let text = match self.user {
                Some(_) => {
                    "A bearer token is needed: user_id counts only where rooms.development is on."
                }
                None => "A bearer token is needed.",
            };
            return Err(Rejection::missing_credentials(text));
        }
        let user = self.user.ok_or_else(|| {
            Rejection::missing_credentials("A bearer token is needed, or user_id in the query.")
        })?;
        let user = Id::parse(&user)
            .map_err(|error| Rejection::malformed_credentials(format!("user_id {error}.")))?;
        let (client, display_name) = (client(self.client)?, display_name(self.display_name)?);
        Ok(Identity { user, client, display_name, is_name_of_token: false, expires_at: None })
    }
}

/// Returns the client's id, or a new one.
fn client(client: Option<String>) -> Result<Id, Rejection> {
    let client = client.filter(|client| !client.is_empty());
    let client = client.unwrap_or_else(|| Uuid::new_v4().to_string());
    Id::parse(&client).map_err(|error| Rejection::bad_id(format!("client_id {error}.")))
}

/// Checks the name that a client gives itself.
fn display_name(name: Option<String>) -> Result<Option<String>, Rejection> {
    match name {
        Some(name) if name.len() > DISPLAY_NAME_BYTES_MAX || name.contains(char::is_control) => {
            Err(Rejection::bad_request(format!(
                "display_name has at most {DISPLAY_NAME_BYTES_MAX} bytes and no control characters."
            )))
        }
        name => Ok(name.filter(|name| !name.is_empty())),
    }
}

/// Returns a parameter of the query. `+` is a space, as forms and `URLSearchParams` write it.
fn parameter(query: &str, name: &str) -> Result<Option<String>, Rejection> {
    let malformed = || Rejection::bad_request(format!("{name} is malformed or given twice."));
    let pairs = query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    let mut values = pairs.filter(|(key, _)| *key == name).map(|(_, value)| value);
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(malformed());
    }
    let value = value.replace('+', " ");
    let value = percent_decode_str(&value).decode_utf8().map_err(|_| malformed())?;
    Ok(Some(value.into_owned()))
}

/// Parameters of the query that hold a token: that of rooms, and the common one.
const TOKEN_PARAMETERS: &[&str] = &["auth_token", "token"];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::jwt::RoomsClaim;

    fn asked(query: &str) -> Result<Words, Rejection> {
        Words::read(&HeaderMap::new(), Some(query))
    }

    fn claims() -> Claims {
        Claims {
            user: Id::parse("ann").unwrap(),
            jti: None,
            issued_at: None,
            expires_at: Some(1_900_000_000),
            rooms: RoomsClaim::All,
            cluster: None,
            clusters: Vec::new(),
            display_name: None,
        }
    }

    fn with_token(query: &str, claims: Claims) -> Result<Identity, &'static str> {
        let identity =
            asked(query).and_then(|asked| asked.with_token(claims, &Id::parse("lobby").unwrap()));
        identity.map_err(|refused| refused.code)
    }

    fn named(query: &str) -> Result<Identity, &'static str> {
        let identity = asked(query).and_then(|asked| asked.without_token(Development::Loopback));
        identity.map_err(|refused| refused.code)
    }

    #[test]
    fn the_token_names_the_user() {
        let identity = with_token("auth_token=x&client_id=c-1&room_id=other", claims()).unwrap();
        let expected = Identity {
            user: Id::parse("ann").unwrap(),
            client: Id::parse("c-1").unwrap(),
            display_name: None,
            is_name_of_token: false,
            expires_at: Some(1_900_000_000),
        };
        assert_eq!(identity, expected);
        assert!(with_token("token=x&user_id=ann", claims()).is_ok());
        for other in ["user_id=bob", "user_id=", "user_id=a%20b"] {
            assert_eq!(with_token(other, claims()), Err("invalid_token"), "{other}");
        }
    }

    #[test]
    fn a_token_opens_its_rooms_only() {
        let limited = |pattern: &str| Claims {
            rooms: RoomsClaim::Some(vec![pattern.to_owned()]),
            ..claims()
        };
        assert!(with_token("", limited("lob*")).is_ok());
        assert_eq!(with_token("", limited("hall")), Err("room_forbidden"));
        let malformed = Claims { rooms: RoomsClaim::Malformed, ..claims() };
        assert_eq!(with_token("", malformed), Err("room_forbidden"));
    }

    #[test]
    fn a_client_without_an_id_gets_one() {
        let [one, other] = [0, 1].map(|_| named("user_id=ann&client_id=").unwrap());
        assert_ne!(one.client, other.client);
        for bad in ["a%20b", "a%3Ab", "%2F", &"x".repeat(129)] {
            assert_eq!(named(&format!("user_id=ann&client_id={bad}")), Err("bad_id"), "{bad}");
        }
    }

    #[test]
    fn a_display_name_is_short_and_that_of_the_token_wins() {
        let name =
            |query: &str| named(&format!("user_id=ann&{query}")).map(|found| found.display_name);
        assert_eq!(name("display_name=Ann+%C3%84+%2B"), Ok(Some("Ann \u{c4} +".into())));
        assert_eq!(name("display_name="), Ok(None));
        for bad in ["a%0Ab", "%C2%85", &"x".repeat(129), "a&display_name=b", "%ff"] {
            assert_eq!(name(&format!("display_name={bad}")), Err("bad_request"), "{bad}");
        }
        let known = Claims { display_name: Some("Dr. Ann".into()), ..claims() };
        let identity = with_token("display_name=Root", known).unwrap();
        assert_eq!(identity.display_name.as_deref(), Some("Dr. Ann"));
        assert!(identity.is_name_of_token);
        let identity = with_token("display_name=Ann", claims()).unwrap();
        assert_eq!(identity.display_name.as_deref(), Some("Ann"));
    }

    #[test]
    fn without_a_token_a_client_names_itself_in_development_mode_only() {
        assert_eq!(named("user_id=ann").unwrap().user.as_str(), "ann");
        assert_eq!(named("client_id=c"), Err("missing_credentials"));
        for bad in ["", "a%20b", "a+b"] {
            assert_eq!(named(&format!("user_id={bad}")), Err("malformed_credentials"), "{bad}");
        }
        let refused = asked("user_id=ann").unwrap().without_token(Development::Off);
        assert_eq!(refused.unwrap_err().code, "missing_credentials");
    }

    #[test]
    fn two_different_tokens_are_refused() {
        assert!(asked("auth_token=a&token=a").is_ok());
        let refused = asked("auth_token=a&token=b").err().map(|refused| refused.code);
        assert_eq!(refused, Some("malformed_credentials"));
    }

    #[tokio::test]
    async fn a_token_without_a_key_to_verify_it_is_refused() {
        let token = SecretString::from("a.b.c");
        let refused = verify(None, Some(&token)).await.unwrap_err();
        assert_eq!(refused.code, "invalid_token");
        assert!(verify(None, None).await.unwrap().is_none());
    }
}
