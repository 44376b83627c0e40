//! Instances of the gateway in this process, alone or several on one Redis.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use ::http::StatusCode;
use bytes::Bytes;

use wsproxy::{
    auth::session::{TokenScope, issue},
    bus::publish::{Keep, Publish},
    config::{
        Config,
        load::{ConfigSources, load},
    },
    core::Core,
    endpoint::Families,
    hub::{follower::FollowerQueue, sink::Sink, subscription::Subscription},
    server::Instance,
};
use wsproxy_proto::names::Id;

use super::{
    bus::config as redis_config,
    client::Client,
    cluster::Cluster,
    eventually,
    http::{self, Response},
    redis_server::RedisServer,
    soon,
};

/// Carrier of the messages in a test that runs over both.
pub enum Backend {
    /// Inside this process: one instance.
    Memory,
    /// A server of the test's own: any number of instances.
    Redis(RedisServer),
    /// A Cluster: any number of instances.
    Cluster(Arc<Cluster>),
}

impl Backend {
    /// A server of the test's own.
    pub fn redis() -> Self {
        Self::Redis(RedisServer::start())
    }

    /// A configuration on it.
    pub fn config(&self) -> Config {
        config(self.url().as_deref())
    }

    /// The address, where several instances can share it.
    pub fn url(&self) -> Option<String> {
        match self {
            Self::Memory => None,
            Self::Redis(server) => Some(server.url()),
            Self::Cluster(cluster) => Some(cluster.admin_url()),
        }
    }
}

/// A configuration for a test: a free port, short times, an API key, the echo.
pub fn config(redis: Option<&str>) -> Config {
    let mut config = Config { redis: redis_config(redis), ..Config::default() };
    config.server.bind = IpAddr::V4(Ipv4Addr::LOCALHOST);
    config.server.port = 0;
    config.server.drain_delay = Duration::ZERO;
    config.server.drain_spread = Duration::ZERO;
    config.server.shutdown_timeout = Duration::from_secs(10);
    config.api.keys = vec![API_KEY.into()];
    config.endpoints.echo = true;
    config.limits.max_connections = 1000;
    config
}

/// A running instance.
pub struct TestInstance {
    instance: Instance,
}

/// A subscriber of topics, as a worker is one.
pub struct Follower {
    queue: Arc<FollowerQueue>,
    _subscription: Subscription,
}

impl TestInstance {
    /// Starts it, and waits for its bus.
    pub async fn start(config: Config) -> Self {
        let instance = Self::start_unready(config).await;
        instance.ready().await;
        instance
    }

    /// Starts it.
    pub async fn start_unready(config: Config) -> Self {
        let instance = Instance::start(config, |_, _| axum::Router::new()).await.unwrap();
        Self { instance }
    }

    /// One whose configuration comes from sources, which a reload reads again.
    pub async fn from_sources(sources: ConfigSources) -> Self {
        let config = load(sources.clone()).unwrap().config;
        let extra = |_: &Arc<Core>, _: &Arc<Families>| axum::Router::new();
        let instance = Instance::start_from(config, Some(sources), extra).await.unwrap();
        let instance = Self { instance };
        instance.ready().await;
        instance
    }

    /// One with the embedded bus and the configuration that `change` makes.
    pub async fn with(change: impl FnOnce(&mut Config)) -> Self {
        let mut config = config(None);
        change(&mut config);
        Self::start(config).await
    }

    /// Waits until `/ready` would say yes.
    pub async fn ready(&self) {
        eventually("the bus is ready", || {
            let status = self.gateway().bus.status();
            status.connected && status.subscribed
        })
        .await;
    }

    /// The state that its parts share.
    pub fn gateway(&self) -> &Arc<Core> {
        self.instance.core()
    }

    /// The endpoint families.
    pub fn families(&self) -> &Arc<Families> {
        self.instance.families()
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.instance.address().unwrap()
    }

    /// Where health, metrics and the API are.
    pub fn admin_address(&self) -> SocketAddr {
        self.instance.admin_address().unwrap()
    }

    /// Ends it politely.
    pub async fn drain(self) {
        soon("the drain", self.instance.drain(())).await;
    }

    /// A token that opens one connection of a session.
    pub async fn token(&self, session: &str) -> String {
        self.token_for(session, &TokenScope::default()).await
    }

    /// A token that opens a session's event streams until it expires.
    pub async fn stream_token(&self, session: &str) -> String {
        self.token_for(session, &TokenScope { agent: None, event_stream: true }).await
    }

    /// A token for a session.
    pub async fn token_for(&self, session: &str, scope: &TokenScope) -> String {
        let gateway = self.gateway();
        let key = gateway.names.session_auth(&id(session));
        issue(&gateway.store, &key, Duration::from_secs(60), scope).await.unwrap()
    }

    /// Whether a session's token is still there.
    pub async fn has_token(&self, session: &str) -> bool {
        let key = self.gateway().names.session_auth(&id(session));
        self.gateway().store.load(&key).await.unwrap().is_some()
    }

    /// A client of a session, whose agent is `agent`.
    pub async fn client(&self, session: &str) -> Client {
        let token = self.token(session).await;
        self.connect(session, &token).await.expect("the token is right")
    }

    /// A handshake with a token.
    pub async fn connect(&self, session: &str, token: &str) -> Result<Client, StatusCode> {
        Client::connect(self.address(), &format!("/agent/ws/{session}"), &bearer(token)).await
    }

    /// A client of the echo.
    pub async fn echo(&self) -> Client {
        Client::connect(self.address(), "/echo", &[]).await.unwrap()
    }

    /// The answer to a handshake that is refused.
    pub async fn handshake(&self, path: &str, headers: &[(&str, &str)]) -> Response {
        http::handshake(self.address(), path, headers).await
    }

    /// The same for a session and a token.
    pub async fn refused(&self, session: &str, token: &str) -> Response {
        let token = format!("Bearer {token}");
        self.handshake(&format!("/agent/ws/{session}"), &[("authorization", &token)]).await
    }

    /// A request of a worker, with its key.
    pub async fn api(&self, method: &str, path: &str, body: &str) -> Response {
        let key = format!("Bearer {API_KEY}");
        let headers = [("authorization", key.as_str())];
        http::request(self.admin_address(), method, path, &headers, body.as_bytes()).await
    }

    /// A GET without a key.
    pub async fn get(&self, path: &str) -> Response {
        http::request(self.admin_address(), "GET", path, &[], b"").await
    }

    /// Publishes on a topic, without the prefix of the configuration.
    pub fn publish(&self, topic: &str, payload: impl Into<Bytes>) {
        let channel = topic.into();
        let payload = payload.into();
        let publish = Publish { channel, payload, keep: Keep::Nothing, receipt: None };
        self.gateway().hub.publish(publish).unwrap();
    }

    /// Publishes a session's message with history; answers its event id.
    pub async fn keep(&self, session: &str, payload: &str) -> String {
        let path = format!("/api/v1/sessions/{session}/messages?history=true");
        let response = self.api("POST", &path, payload).await;
        assert_eq!(response.status, 200, "{response:?}");
        response.json()["event_id"].as_str().unwrap().to_owned()
    }

    /// A client of a session with further parameters in its URL, `&name=value`.
    pub async fn client_with(&self, session: &str, parameters: &str) -> Client {
        let token = self.token(session).await;
        let path = format!("/agent/ws/{session}?token={token}{parameters}");
        Client::connect(self.address(), &path, &[]).await.expect("the token is right")
    }

    /// Subscribes to a topic as a worker does.
    pub async fn follow(&self, topic: &str) -> Follower {
        let queue = FollowerQueue::new(64 * 1024 * 1024);
        let sinks = [(topic.into(), Sink::Follower(Arc::clone(&queue)))];
        let subscription = soon("the subscription", self.gateway().hub.subscribe(sinks)).await;
        Follower { queue, _subscription: subscription.unwrap() }
    }

    /// The value of a series of `/metrics`; 0 where it is not there yet.
    pub fn metric(&self, series: &str) -> f64 {
        http::metric(&self.gateway().metrics.text(), series)
    }

    /// Refused handshakes of sessions with this outcome.
    pub fn refusals(&self, outcome: &str) -> f64 {
        let labels = format!("{{endpoint=\"sessions\",outcome=\"{outcome}\"}}");
        self.metric(&format!("wsproxy_handshakes_total{labels}"))
    }

    /// Connections of an endpoint that ended with this reason.
    pub fn ended(&self, endpoint: &str, reason: &str) -> f64 {
        let labels = format!("{{endpoint=\"{endpoint}\",reason=\"{reason}\"}}");
        self.metric(&format!("wsproxy_disconnects_total{labels}"))
    }

    /// Waits until a connection of an endpoint ended with this reason.
    #[track_caller]
    pub fn wait_ended<'a>(
        &'a self,
        endpoint: &'a str,
        reason: &'a str,
    ) -> impl Future<Output = ()> + 'a {
        eventually("the ending is counted", move || self.ended(endpoint, reason) == 1.0)
    }

    /// Waits until nothing is left of any connection.
    pub async fn wait_empty(&self) {
        let gateway = self.gateway();
        // The commands to all instances are followed as long as events are served.
        let kept = usize::from(self.families().events.registry.is_some());
        eventually("nothing is left behind", || {
            gateway.seats.taken() == 0
                && gateway.hub.topics() == kept
                && gateway.bus.status().channels == kept
                && gateway.runtime.budget.used() == 0
                && self.metric("wsproxy_active_connections{endpoint=\"sessions\"}") == 0.0
                && self.metric("wsproxy_active_connections{endpoint=\"echo\"}") == 0.0
        })
        .await;
    }

    /// A message goes down and another one up: the instance serves this client.
    pub async fn assert_serves(&self, client: &mut Client, session: &str) {
        let mut worker = self.follow(&format!("session:{session}:up")).await;
        client.send(r#"{"alive":"up"}"#).await;
        assert_eq!(worker.next().await, r#"{"alive":"up"}"#);
        self.publish(&format!("session:{session}:down"), "alive, down");
        assert_eq!(client.text().await, "alive, down");
    }
}

impl Follower {
    /// The next message.
    pub async fn next(&mut self) -> String {
        let message = soon("a message", self.queue.next_message()).await.expect("no overflow");
        String::from_utf8(message.to_vec()).unwrap()
    }

    /// The next message, as JSON.
    pub async fn json(&mut self) -> serde_json::Value {
        serde_json::from_str(&self.next().await).unwrap()
    }
}

/// An `Authorization` header.
pub fn bearer(token: &str) -> [(&'static str, String); 1] {
    [("authorization", format!("Bearer {token}"))]
}

/// An id that is one.
pub fn id(text: &str) -> Id {
    Id::parse(text).unwrap()
}

/// Runs tests of sessions over both buses: each takes a [`Backend`].
macro_rules! over_both {
    ($($name:ident),* $(,)?) => {
        mod memory {
            $(#[tokio::test] async fn $name() {
                super::$name($crate::support::gateway::Backend::Memory).await;
            })*
        }
        mod redis {
            $(#[tokio::test] async fn $name() {
                super::$name($crate::support::gateway::Backend::redis()).await;
            })*
        }
    };
}

pub(crate) use over_both;

/// The key of the worker API in every test.
pub const API_KEY: &str = "key-of-the-tests-0123456789";
