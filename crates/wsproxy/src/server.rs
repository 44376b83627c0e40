//! The composition root: starts what a configuration asks for. The only place that names backends.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context;
use axum::Router;
use tokio::time::MissedTickBehavior;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{info, warn};
use uuid::Uuid;
use wsproxy_conn::{Runtime, clock};
use wsproxy_proto::names::Names;

use crate::{
    auth::{api_keys::ApiKeys, jwt::JwtVerifier},
    bus::{Bus, watch},
    cli::{exit::Failure, version},
    config::Config,
    descriptors::{self, Descriptors},
    endpoint::{
        caller::Texts,
        events::EventEndpoint,
        session::{SessionCounters, SessionEndpoint},
    },
    gateway::{self, Gateway},
    http::{
        admin::{self, Details},
        admission::{Attempts, Places, Resumes},
        api, listener,
        routes::{self, Routes},
        sockets::Sockets,
    },
    hub::{Histories, Hub, delivery::Delivery, healer},
    registry::{
        self, Registry,
        lease::{self, Lease},
        sessions::{self, SessionLog},
    },
    shutdown, streams,
    telemetry::{
        metrics::Metrics,
        throttle::{Throttle, Throttles},
    },
};

/// All but this part of the connections may wait for a verdict on their credentials: the clients of an instance that
/// was killed come to another one at once. And half of the spare sockets may in any case.
const HANDSHAKES_PART: usize = 4;

/// How often the files of API keys are read again.
const READ_KEYS_EVERY: Duration = Duration::from_secs(2);

/// How often addresses with nothing owed are forgotten.
const FORGET_EVERY: Duration = Duration::from_secs(60);

/// A running instance. Dropping it does not end it: see [`Self::drain`].
pub struct Instance {
    gateway: Arc<Gateway>,
    address: SocketAddr,
    admin_address: SocketAddr,
    /// Cancelled when listeners must stop.
    accepting: CancellationToken,
    /// The bus and the timers, which outlive the connections.
    background: TaskTracker,
    background_end: CancellationToken,
}

/// Runs an instance until a signal tells it to end.
///
/// # Errors
/// Why it could not start.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let signals = shutdown::Signals::new().context("cannot listen to signals")?;
    let instance = Instance::start(config, |_| Router::new()).await?;
    if let Bus::Memory(_) = instance.gateway.bus {
        // The first thing to know where a Redis was meant: then all tokens are refused with 403.
        warn!(
            bus = instance.gateway.bus.kind(),
            "No Redis is configured: this instance knows only tokens that its own API made, and no other instance or \
             worker on a Redis reaches its clients. Where there should be one set redis.url (REDIS_URL)."
        );
    }
    // Without a supervisor that wants to know there is nobody to tell.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    signals.wait().await;
    instance.drain(signals).await;
    Ok(())
}

impl Instance {
    /// Binds, connects the bus in the background and accepts connections. What `extra` makes is
    /// served beside the admin routes.
    ///
    /// # Errors
    /// An address is taken, or the bus's URL cannot be used.
    #[expect(clippy::unused_async, reason = "being async says that it needs a runtime")]
    pub async fn start(
        config: Config,
        extra: impl FnOnce(&Arc<Gateway>) -> Router,
    ) -> anyhow::Result<Self> {
        let address = SocketAddr::new(config.server.bind, config.server.port);
        let main = listen(address)?;
        let admin = config.admin.port.map(|port| {
            listen(SocketAddr::new(config.admin.bind.unwrap_or(config.server.bind), port))
        });
        let admin = admin.transpose()?;
        let address = main.local_addr()?;
        let admin_address = admin.as_ref().map_or(Ok(address), |admin| admin.local_addr())?;

        let (background, background_end) = (TaskTracker::new(), CancellationToken::new());
        let descriptors = descriptors::take(config.limits.max_connections).context(Failure::Os)?;
        let gateway = compose(config, descriptors, &background, &background_end)?;
        let told = if admin.is_some() { Details::Always } else { Details::WithKey };
        let rest = admin::probes(&gateway, told)
            .merge(admin::metrics(&gateway))
            .merge(admin::events(&gateway))
            .merge(api::router(Arc::clone(&gateway)))
            .merge(extra(&gateway))
            .fallback(routes::not_found);
        let accepting = CancellationToken::new();
        let data_rest = match admin {
            Some(_) => admin::probes(&gateway, Details::Never)
                .merge(admin::events(&gateway))
                .fallback(routes::not_found),
            None => rest.clone(),
        };
        let routes = Routes::new(Arc::clone(&gateway), true, data_rest);
        let sockets = Arc::clone(&gateway.sockets);
        gateway.tasks.spawn(listener::run(main, routes, sockets, accepting.clone()));
        if let Some(admin) = admin {
            let routes = Routes::new(Arc::clone(&gateway), false, rest);
            let sockets = Sockets::new(descriptors.admin);
            // Health and metrics answer as long as anything runs.
            background.spawn(listener::run(admin, routes, sockets, background_end.clone()));
        }
        let (hub, store) = (Arc::clone(&gateway.hub), gateway.store.clone());
        background.spawn(healer::run(hub, store, background_end.clone()));
        background.spawn(watch::run(gateway.bus.clone(), background_end.clone()));
        if gateway.session_histories.is_some() {
            background.spawn(streams::reap(Arc::clone(&gateway), background_end.clone()));
        }
        background.spawn(keep_time(Arc::clone(&gateway), background_end.clone()));
        info!(%address, %admin_address, server_id = &*gateway.server_id,
            bus = gateway.bus.kind(), connections_max = gateway.places.max(),
            version = env!("CARGO_PKG_VERSION"), commit = version::COMMIT,
            "Listening.");
        Ok(Self { gateway, address, admin_address, accepting, background, background_end })
    }

    /// Where clients arrive.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where admin routes and the API are.
    #[must_use]
    pub const fn admin_address(&self) -> SocketAddr {
        self.admin_address
    }

    /// What the parts share.
    #[must_use]
    pub const fn gateway(&self) -> &Arc<Gateway> {
        &self.gateway
    }

    /// Ends politely, in the order of contract section 2.9.
    pub async fn drain(self, hurry: impl shutdown::Hurry) {
        let end = shutdown::Ending {
            gateway: self.gateway,
            accepting: self.accepting,
            background: self.background,
            background_end: self.background_end,
        };
        end.run(hurry).await;
    }
}

fn listen(address: SocketAddr) -> anyhow::Result<tokio::net::TcpListener> {
    listener::bind(address).with_context(|| format!("cannot listen on {address}"))
}

fn compose(
    config: Config,
    descriptors: Descriptors,
    background: &TaskTracker,
    background_end: &CancellationToken,
) -> anyhow::Result<Arc<Gateway>> {
    let names = Names::new(&config.redis.channel_prefix);
    let server_id: Arc<str> = match &config.server.server_id {
        Some(id) => id.as_str().into(),
        None => Uuid::now_v7().to_string().into(),
    };
    let hub = Hub::new();
    let delivery = Box::new(Delivery::new(Arc::clone(&hub)));
    let (tasks, end) = (background, background_end.clone());
    let jwt = config.endpoints.events.then(|| JwtVerifier::new(&config.jwt, tasks, end.clone()));
    let jwt = jwt.transpose().map_err(anyhow::Error::msg).context(Failure::Config)?;
    let api_keys = ApiKeys::new(&config.api).map_err(anyhow::Error::msg);
    let api_keys = Arc::new(api_keys.context(Failure::Config)?);
    if api_keys.has_files() {
        background.spawn(read_keys_again(Arc::clone(&api_keys), background_end.clone()));
    }
    let bus = if config.redis.url.is_some() {
        Bus::redis(&config.redis, &server_id, &names, delivery, tasks, end)
            .context(Failure::Config)?
    } else {
        Bus::memory(&config.redis, &config.limits, delivery, tasks, end)
    };
    hub.connect(bus.clone());
    let (session_histories, event_histories) = histories(&config, &names);
    let Descriptors { connections, spare, .. } = descriptors;
    let Registries { lease, registry, session_log } =
        registries(&config, (&server_id, &names), &hub, &bus);
    let gateway = Arc::new(Gateway {
        session_histories,
        event_histories,
        server_id: Arc::clone(&server_id),
        hub,
        store: bus.store(),
        bus,
        runtime: Runtime::new(config.limits.send_buffers_total_bytes, clock::now()),
        event_streams: Arc::default(),
        places: Places::new(connections),
        handshakes: Places::new((connections - connections / HANDSHAKES_PART).max(spare / 2)),
        sockets: Sockets::new(connections + spare),
        attempts: Attempts::new(config.rate_limit.max_requests, config.rate_limit.window),
        resumes: Resumes::new(config.limits.resumes_per_second),
        api_keys,
        api_failures: Throttle::default(),
        lines: Throttles::default(),
        texts: Texts::default(),
        jwt,
        events: Arc::new(EventEndpoint::new(&config, &names, &server_id)),
        registry,
        lease,
        session_log: session_log.clone(),
        sessions: Arc::new(SessionEndpoint {
            log: session_log,
            config: config.sessions.clone(),
            names: names.clone(),
            server_id,
            counters: SessionCounters::default(),
        }),
        session_profile: Arc::new(gateway::profile(&config)),
        event_profile: Arc::new(gateway::event_profile(&config)),
        echo_profile: Arc::new(gateway::profile(&config)),
        names,
        metrics: Metrics::new(),
        tasks: TaskTracker::new(),
        followers_end: CancellationToken::new(),
        draining: false.into(),
        closing: false.into(),
        started: Instant::now(),
        config,
    });
    gateway.metrics.connect(&gateway);
    Ok(gateway)
}

/// The services by which an instance shares with others what is connected to it.
struct Registries {
    lease: Option<Arc<Lease>>,
    registry: Option<Arc<Registry>>,
    session_log: Option<Arc<SessionLog>>,
}

/// The registries that the configuration needs, and the lease below them.
fn registries(
    config: &Config,
    (server_id, names): (&Arc<str>, &Names),
    hub: &Arc<Hub>,
    bus: &Bus,
) -> Registries {
    let logs_sessions = config.endpoints.sessions && config.sessions.events_log;
    let lease = (config.endpoints.events || logs_sessions)
        .then(|| Lease::start(lease::Settings::new(config, server_id, names), bus));
    let registry = lease.as_ref().filter(|_| config.endpoints.events).map(|lease| {
        let settings = registry::Settings::new(config, server_id, names);
        Registry::start(settings, Arc::clone(hub), bus, lease)
    });
    let session_log = lease
        .as_ref()
        .filter(|_| logs_sessions)
        .map(|lease| SessionLog::start(sessions::Limits::new(&config.sessions), hub, bus, lease));
    Registries { lease, registry, session_log }
}

/// Keys of the worker API change in their files while the instance runs.
async fn read_keys_again(keys: Arc<ApiKeys>, end: CancellationToken) {
    loop {
        tokio::select! {
            () = end.cancelled() => return,
            () = tokio::time::sleep(READ_KEYS_EVERY) => {}
        }
        // A file system may take its time, and connections must not wait for it.
        let keys = Arc::clone(&keys);
        if let Err(error) = tokio::task::spawn_blocking(move || keys.read_again()).await {
            warn!(%error, "The files of API keys cannot be read again.");
        }
    }
}

/// The histories of sessions and of events, where they have any.
fn histories(config: &Config, names: &Names) -> (Option<Arc<Histories>>, Option<Arc<Histories>>) {
    let limits = config.history.limits();
    let sessions = || Histories {
        limits,
        names: names.clone(),
        clock: None,
        private: None,
        capture: config.sessions.capture,
    };
    let events = || Histories {
        clock: Some(names.events_clock().into()),
        private: Some(names.events_connection("").into()),
        capture: config.events.capture,
        ..sessions()
    };
    let sessions = config.sessions.history.then(|| Arc::new(sessions()));
    (sessions, config.events.history.then(|| Arc::new(events())))
}

/// Timers of all connections, and the forgetting of addresses.
async fn keep_time(gateway: Arc<Gateway>, end: CancellationToken) {
    let mut ticks = tokio::time::interval(Runtime::tick_interval());
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut forgotten = Instant::now();
    loop {
        tokio::select! {
            () = end.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let now = clock::now();
        gateway.event_streams.relieve(&gateway.runtime);
        gateway.runtime.tick(now);
        if forgotten.elapsed() > FORGET_EVERY {
            forgotten = Instant::now();
            gateway.attempts.forget_idle(now.0.saturating_mul(1000));
        }
    }
}
