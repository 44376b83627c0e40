//! Credentials of clients and of cluster agents: which token opens which clusters. Knows no lanes.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use aws_lc_rs::digest;
use http::{HeaderMap, HeaderName, header};
use parking_lot::{Mutex, RwLock};
use tokio::time::timeout;
use wsproxy_proto::names::Id;

use crate::{
    auth::{
        self,
        jwt::{JwtError, JwtVerifier},
    },
    config::tunnel::{
        ClientAuth, TunnelConfig,
        rows::{AgentToken, ClientToken, ClusterPattern, TokenHash},
    },
    core::Core,
    endpoint::tunnel::refusal::{Code, Refusal},
    http::rejection::Rejection,
    telemetry::time,
};

/// Credentials that the configuration names, and the verifier of others.
pub struct Credentials {
    /// Guards the tokens, which a reload replaces.
    tokens: RwLock<Tokens>,
    client_auth: ClientAuth,
    agent_jwt: bool,
    jwt: Option<JwtVerifier>,
    /// Guards what the store said of clusters' tokens.
    looked_up: Mutex<HashMap<Id, LookedUp>>,
}

struct Tokens {
    agents: Vec<AgentToken>,
    clients: Vec<ClientToken>,
}

struct LookedUp {
    at: Instant,
    has_token: bool,
}

/// Credential of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Credential {
    /// Hash of the token; zeros for none.
    pub hash: TokenHash,
    /// Hash of the party whose requests have one rate: the user of a JSON Web Token, else the token.
    pub rated: TokenHash,
    /// Whether the credential came in `Authorization`, which then is not the upstream's affair.
    pub in_authorization: bool,
}

impl Credentials {
    /// Takes the credentials of a configuration.
    #[must_use]
    pub fn new(config: &TunnelConfig, jwt: Option<JwtVerifier>) -> Self {
        Self {
            tokens: RwLock::new(Tokens::new(config)),
            client_auth: config.client_auth,
            agent_jwt: config.agent_jwt,
            jwt,
            looked_up: Mutex::default(),
        }
    }

    /// Puts the tokens of another configuration into force.
    pub fn reload(&self, config: &TunnelConfig) {
        *self.tokens.write() = Tokens::new(config);
    }

    /// Checks the token of an agent of `cluster`.
    ///
    /// # Errors
    /// 401: the token is wrong. 403: it is that of another cluster. 404: nothing knows the cluster. 503: neither the
    /// configuration nor the keys know the token, and the store cannot be reached.
    pub async fn check_agent(
        &self,
        core: &Core,
        cluster: &Id,
        token: &str,
    ) -> Result<(), Rejection> {
        let hash = hash(token);
        let (mut is_known, mut opens, mut is_named) = (false, false, false);
        for agent in &self.tokens.read().agents {
            // All are compared, so that the duration tells nothing.
            let is_it = auth::equal(&agent.token.0, &hash.0);
            is_known |= is_it;
            opens |= is_it && agent.cluster == *cluster;
            is_named |= agent.cluster == *cluster;
        }
        if opens {
            return Ok(());
        }
        if let Some(jwt) = self.jwt.as_ref().filter(|_| self.agent_jwt)
            && token.bytes().filter(|byte| *byte == b'.').count() == 2
        {
            let claims = jwt.verify(token, time::since_epoch().as_secs()).await?;
            return match claims.cluster.as_deref() == Some(cluster.as_str()) {
                true => Ok(()),
                false => Err(other_cluster()),
            };
        }
        let stored = core.store.load(&core.names.tunnel_auth(cluster)).await?;
        let stored_hash = stored.as_ref().and_then(|text| std::str::from_utf8(text).ok());
        if stored_hash.and_then(TokenHash::parse).is_some_and(|one| auth::equal(&one.0, &hash.0)) {
            return Ok(());
        }
        Err(match () {
            () if is_known => other_cluster(),
            () if is_named || stored.is_some() || self.agent_jwt => {
                let mut wrong = Rejection::missing_credentials("The token of the agent is wrong.");
                wrong.code = "invalid_token";
                wrong
            }
            () => Rejection::not_found("There is no such cluster."),
        })
    }

    /// Checks the credential of a client of `cluster`; `None`: the path names none.
    ///
    /// # Errors
    /// `unauthorized`, `forbidden`, `cluster_unknown`
    pub async fn check_client(
        &self,
        headers: &HeaderMap,
        cluster: Option<&Id>,
    ) -> Result<Credential, Refusal> {
        let unknown = || Refusal::new(Code::ClusterUnknown);
        if self.client_auth == ClientAuth::None {
            let hash = TokenHash([0; 32]);
            let credential = Credential { hash, rated: hash, in_authorization: false };
            return cluster.map(|_| credential).ok_or_else(unknown);
        }
        let (token, in_authorization) = token_of(headers)?;
        let hash = hash(token);
        let (opens, rated) = match self.client_auth {
            ClientAuth::Jwt => self.jwt_opens(token, cluster).await?,
            ClientAuth::Token | ClientAuth::None => (self.token_opens(hash, cluster)?, hash),
        };
        match cluster {
            Some(_) if opens => Ok(Credential { hash, rated, in_authorization }),
            Some(_) => Err(Refusal::new(Code::Forbidden)),
            None => Err(unknown()),
        }
    }

    fn token_opens(&self, hash: TokenHash, cluster: Option<&Id>) -> Result<bool, Refusal> {
        let (mut is_known, mut opens) = (false, false);
        for client in &self.tokens.read().clients {
            let is_it = auth::equal(&client.token.0, &hash.0);
            is_known |= is_it;
            let fits = |cluster| client.clusters.iter().any(|pattern| pattern.fits(cluster));
            opens |= is_it && cluster.is_some_and(fits);
        }
        if is_known { Ok(opens) } else { Err(Refusal::new(Code::Unauthorized)) }
    }

    /// Returns whether a JSON Web Token opens a cluster, and the hash of its user: a client may fetch a new token for
    /// each request.
    async fn jwt_opens(
        &self,
        token: &str,
        cluster: Option<&Id>,
    ) -> Result<(bool, TokenHash), Refusal> {
        let Some(jwt) = &self.jwt else { return Err(Refusal::new(Code::Unauthorized)) };
        let claims = jwt.verify(token, time::since_epoch().as_secs()).await;
        let claims = claims
            .map_err(|error: JwtError| Refusal::because(Code::Unauthorized, error.to_string()))?;
        let mut patterns = claims.clusters.iter().filter_map(|text| ClusterPattern::parse(text));
        let opens = cluster.is_some_and(|cluster| patterns.any(|pattern| pattern.fits(cluster)));
        Ok((opens, hash(claims.user.as_str())))
    }

    /// Returns whether the configuration, the store or a key may know a cluster that has no lane. The store is asked at
    /// most every [`LOOK_UP_EVERY`] for each, with the deadline `redis.response_timeout`.
    pub async fn may_exist(&self, core: &Core, cluster: &Id) -> bool {
        let is_named = self.tokens.read().agents.iter().any(|agent| agent.cluster == *cluster);
        if is_named || self.agent_jwt {
            return true;
        }
        if let Some(known) = self.looked_up.lock().get(cluster)
            && known.at.elapsed() < LOOK_UP_EVERY
        {
            return known.has_token;
        }
        let key = core.names.tunnel_auth(cluster);
        let stored = timeout(core.config.redis.response_timeout, core.store.load(&key)).await;
        // While the store cannot be reached, its clusters are those that it may have.
        let Ok(Ok(stored)) = stored else { return true };
        let mut looked_up = self.looked_up.lock();
        if looked_up.len() >= LOOKED_UP_MAX {
            looked_up.retain(|_, known| known.at.elapsed() < LOOK_UP_EVERY);
        }
        if looked_up.len() < LOOKED_UP_MAX {
            let known = LookedUp { at: Instant::now(), has_token: stored.is_some() };
            looked_up.insert(cluster.clone(), known);
        }
        stored.is_some()
    }
}

impl Tokens {
    fn new(config: &TunnelConfig) -> Self {
        Self { agents: config.agents.clone(), clients: config.clients.clone() }
    }
}

/// Returns the token of a request, and whether it came in `Authorization`.
fn token_of(headers: &HeaderMap) -> Result<(&str, bool), Refusal> {
    let refused = || Refusal::new(Code::Unauthorized);
    let in_authorization = !headers.contains_key(&OWN_AUTHORIZATION);
    let name = if in_authorization { &header::AUTHORIZATION } else { &OWN_AUTHORIZATION };
    let mut values = headers.get_all(name).iter();
    let value = values.next().filter(|_| values.next().is_none()).ok_or_else(refused)?;
    let text = value.to_str().map_err(|_| refused())?.trim();
    let (scheme, token) = text.split_once(' ').ok_or_else(refused)?;
    let is_good = scheme.eq_ignore_ascii_case("bearer") && token.len() <= TOKEN_BYTES_MAX;
    is_good.then_some((token.trim(), in_authorization)).ok_or_else(refused)
}

fn hash(token: &str) -> TokenHash {
    let digest = digest::digest(&digest::SHA256, token.as_bytes());
    let mut hash = [0; 32];
    hash.copy_from_slice(digest.as_ref());
    TokenHash(hash)
}

fn other_cluster() -> Rejection {
    Rejection::invalid_token("The token is that of another cluster.")
}

/// Header with the credential of a client whose `Authorization` is the upstream's.
const OWN_AUTHORIZATION: HeaderName = HeaderName::from_static("x-wsproxy-authorization");

const TOKEN_BYTES_MAX: usize = 8192;

const LOOK_UP_EVERY: Duration = Duration::from_secs(10);

/// Upper bound of the clusters that were looked up.
const LOOKED_UP_MAX: usize = 1024;
