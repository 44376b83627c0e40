//! The composition root: makes and starts the parts of an instance. The only file that chooses the bus's backend.

use std::{
    net::SocketAddr,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use anyhow::Context;
use axum::Router;
use parking_lot::Mutex;
use sd_notify::NotifyState;
use tokio::{task::JoinHandle, time::MissedTickBehavior};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{info, warn};
use uuid::Uuid;
use wsproxy_conn::{Runtime, clock};
use wsproxy_proto::names::Names;

use crate::{
    auth::{
        api_keys::{ApiKeys, KeyTable},
        fixed_keys::{FixedKeys, KeyRing},
    },
    bus::{Bus, watch},
    cli::{exit::Failure, version},
    config::{
        Config, ServerConfig,
        load::{ConfigSources, Origins},
    },
    core::{
        Core,
        admission::{Attempts, Bounds, Resumes, Seats},
        caller::Texts,
        origins::AllowedOrigins,
        recent::Recent,
        sockets::Sockets,
        waiting::WaitingRoom,
    },
    descriptors::{self, Descriptors},
    endpoint::{
        Families,
        console::{Console, page},
        routes::{self, Routes},
    },
    http::{
        admin::{self, Details},
        api,
        listener::{
            self, HeadLimits, Listening,
            open::{Listener, Place},
            tls::TlsListener,
        },
        rejection,
    },
    hub::{Hub, delivery::Delivery, healer},
    registry::lease::LeaseCounters,
    reload::{self, Reloader},
    shutdown,
    telemetry::{
        family::Family,
        metrics::{Metrics, process::Process},
        scrape::Source,
        throttle::{Throttle, Throttles},
    },
    tls::pair::TlsPair,
    traces::Tracer,
};

/// A running instance. Dropping it does not end it: see [`Self::drain`].
pub struct Instance {
    core: Arc<Core>,
    families: Arc<Families>,
    reloader: Arc<Reloader>,
    address: Option<SocketAddr>,
    admin_address: Option<SocketAddr>,
    /// The listener of clients; it ends after `accepting`.
    listener: JoinHandle<()>,
    /// Cancelled when no further client is accepted.
    accepting: CancellationToken,
    /// Cancelled when no further request of a client is answered.
    answering: CancellationToken,
    /// The bus and the timers, which outlive the connections.
    background: TaskTracker,
    background_end: CancellationToken,
}

/// Runs an instance until a signal tells it to end.
///
/// # Errors
/// The instance could not start: see [`Instance::start`].
pub async fn run(config: Config, origins: Origins, sources: ConfigSources) -> anyhow::Result<()> {
    let signals = shutdown::Signals::new().context("cannot listen to signals")?;
    let hangups = shutdown::Hangups::new().context("cannot listen to signals")?;
    let instance = Instance::start_from(config, Some(sources), |_, _| Router::new()).await?;
    let in_force = (instance.core.config.clone(), origins);
    *instance.core.in_force.lock() = Some(Arc::new(in_force));
    let (reloader, end) = (Arc::clone(&instance.reloader), instance.background_end.clone());
    instance.background.spawn(reload_at_hangups(hangups, reloader, end));
    if let Bus::Embedded(_) = instance.core.bus {
        // An operator who forgot the URL would otherwise only see that all tokens are refused with 403.
        warn!(
            bus = instance.core.bus.kind(),
            "No Redis is configured: this instance knows only tokens that its own API made, and no other instance or \
             worker on a Redis reaches its clients. Where there should be one set redis.url (REDIS_URL)."
        );
    }
    // An error means that no supervisor asked to be notified.
    let _ = sd_notify::notify(&[NotifyState::Ready]);
    signals.wait().await;
    instance.drain(signals).await;
    Ok(())
}

impl Instance {
    /// Binds, connects the bus in the background and accepts connections. The routes of `extra` are
    /// served beside the admin routes.
    ///
    /// # Errors
    /// An address is taken, the bus's URL cannot be used, or the tables of the database do not allow what is configured.
    pub async fn start(
        config: Config,
        extra: impl FnOnce(&Arc<Core>, &Arc<Families>) -> Router,
    ) -> anyhow::Result<Self> {
        Self::start_from(config, None, extra).await
    }

    /// The same, with the sources that a reload reads again; without sources nothing is reloaded.
    ///
    /// # Errors
    /// See [`Self::start`].
    pub async fn start_from(
        config: Config,
        sources: Option<ConfigSources>,
        extra: impl FnOnce(&Arc<Core>, &Arc<Families>) -> Router,
    ) -> anyhow::Result<Self> {
        let (main, admin) = (listen(&config)?, listen_for_admin(&config)?);
        let address = main.address()?;
        let admin_address = admin.as_ref().map_or(Ok(address), Listener::address)?;

        let pair = load_pair(&config)?;
        let (background, background_end) = (TaskTracker::new(), CancellationToken::new());
        let descriptors = descriptors::take(config.limits.max_connections).context(Failure::Os)?;
        let core = compose(config, descriptors, &background, &background_end)?;
        let families = Families::start(&core, &background, &background_end);
        let families = families.map_err(anyhow::Error::msg).context(Failure::Config)?;
        if let Err(why) = families.check(&core).await {
            background_end.cancel();
            return Err(anyhow::Error::msg(why).context(Failure::Config));
        }
        listen_for_instances(&core, &families, &pair)?;
        let reloader = Reloader::new(sources, &core, &families, pair.clone());
        show(&core, &families, &reloader);
        let told = if admin.is_some() { Details::Always } else { Details::WithKey };
        let console = Console::start(&core, &families, &background, &background_end);
        let mut rest = admin::probes(&core, told)
            .merge(admin::metrics(&core, told))
            .merge(families.probes(told).with_state(Arc::clone(&core)))
            .merge(api::router(
                Arc::clone(&core),
                families.api().merge(console.api()).merge(reload::router(&reloader)),
            ))
            .merge(extra(&core, &families));
        if admin.is_some() {
            rest = rest.merge(page::router());
        }
        let rest = rest.fallback(routes::not_found);
        let (accepting, answering) = (CancellationToken::new(), CancellationToken::new());
        let data_rest = if admin.is_some() { probes_only(&core, &families) } else { rest.clone() };
        let routes = Routes::new(Arc::clone(&core), Arc::clone(&families), true, data_rest);
        let (sockets, tls_of_clients) = (Arc::clone(&core.sockets), tls(&core, &pair));
        let listening = Listening {
            sockets,
            // A rule of the configuration: over a unix socket there is no TLS.
            tls: tls_of_clients.filter(|_| address.is_some()),
            proxy_protocol: core.config.server.proxy_protocol,
            header_timeout: core.config.server.header_timeout,
            head: HeadLimits::of_clients(core.config.server.header_bytes_max),
            accepting: accepting.clone(),
            answering: answering.clone(),
        };
        let listener = core.tasks.spawn(listener::run(main, routes, listening));
        if let Some(admin) = admin {
            let routes = Routes::new(Arc::clone(&core), Arc::clone(&families), false, rest);
            let listening = admin_listening(&core, &pair, descriptors.admin, &background_end);
            background.spawn(listener::run(admin, routes, listening));
        }
        if let Some(pair) = pair {
            background.spawn(read_pair_again(pair, Arc::clone(&core), background_end.clone()));
        }
        run_background(&core, &background, &background_end);
        tell(&core, address, admin_address);
        Ok(Self {
            core,
            families,
            reloader,
            address,
            admin_address,
            listener,
            accepting,
            answering,
            background,
            background_end,
        })
    }

    /// Returns the address of the clients' port; `None`: clients come over a unix socket.
    #[must_use]
    pub const fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    /// Returns the address of the admin routes and the worker API; `None`: they are on the unix socket of the clients.
    #[must_use]
    pub const fn admin_address(&self) -> Option<SocketAddr> {
        self.admin_address
    }

    /// Returns the shared state.
    #[must_use]
    pub const fn core(&self) -> &Arc<Core> {
        &self.core
    }

    /// Returns the endpoint families.
    #[must_use]
    pub const fn families(&self) -> &Arc<Families> {
        &self.families
    }

    /// Returns the reload of the configuration.
    #[must_use]
    pub const fn reloader(&self) -> &Arc<Reloader> {
        &self.reloader
    }

    /// Drains and ends the instance: see [`shutdown::Shutdown`].
    pub async fn drain(self, hurry: impl shutdown::Hurry) {
        let end = shutdown::Shutdown {
            core: self.core,
            families: self.families,
            listener: self.listener,
            accepting: self.accepting,
            answering: self.answering,
            background: self.background,
            background_end: self.background_end,
        };
        end.run(hurry).await;
    }
}

/// Returns the place where clients come.
fn main_place(server: &ServerConfig) -> Place {
    match &server.unix {
        Some(path) => Place::Unix(path.clone(), server.unix_mode),
        None => Place::Tcp(SocketAddr::new(server.bind, server.port)),
    }
}

fn listen(config: &Config) -> anyhow::Result<Listener> {
    open(&main_place(&config.server), config.server.reuse_port)
}

fn listen_for_admin(config: &Config) -> anyhow::Result<Option<Listener>> {
    let listener = config.admin.port.map(|port| {
        let bind = config.admin.bind.unwrap_or(config.server.bind);
        // Which process answers must not be the kernel's choice here.
        open(&Place::Tcp(SocketAddr::new(bind, port)), false)
    });
    listener.transpose()
}

fn open(place: &Place, shares: bool) -> anyhow::Result<Listener> {
    Listener::open(place, shares).with_context(|| format!("cannot listen on {place}"))
}

/// Reads the certificate and key of the listeners, if any.
fn load_pair(config: &Config) -> anyhow::Result<Option<Arc<TlsPair>>> {
    let pair = config.tls.files().map(|(certificate, key)| TlsPair::load(certificate, key));
    let pair = pair.transpose().map_err(anyhow::Error::msg).context(Failure::Config)?;
    Ok(pair.map(Arc::new))
}

/// Runs the tasks that outlive the connections, until `end`.
fn run_background(core: &Arc<Core>, background: &TaskTracker, end: &CancellationToken) {
    let (hub, store) = (Arc::clone(&core.hub), core.store.clone());
    background.spawn(healer::run(hub, store, end.clone()));
    background.spawn(watch::run(core.bus.clone(), end.clone()));
    let (reports, interval) = (Arc::clone(&core.reports), core.config.log.summary_interval);
    let lines_end = end.clone();
    background.spawn(async move { reports.sum_up(interval, lines_end).await });
    background.spawn(keep_time(Arc::clone(core), end.clone()));
}

/// Returns the parts of the admin listener.
fn admin_listening(
    core: &Core,
    pair: &Option<Arc<TlsPair>>,
    sockets_max: usize,
    end: &CancellationToken,
) -> Listening {
    Listening {
        sockets: Sockets::new(sockets_max),
        tls: tls(core, pair).filter(|_| core.config.tls.admin),
        // Monitoring and workers come without a balancer.
        proxy_protocol: false,
        header_timeout: core.config.server.header_timeout,
        head: HeadLimits::of_clients(core.config.server.header_bytes_max),
        // Health and metrics answer as long as anything runs.
        accepting: end.clone(),
        answering: end.clone(),
    }
}

/// Opens the listener for requests that other instances bring, if there is one.
fn listen_for_instances(
    core: &Arc<Core>,
    families: &Families,
    pair: &Option<Arc<TlsPair>>,
) -> anyhow::Result<()> {
    let listening = families.listen(core, tls(core, pair), core.seats.max());
    listening.context("cannot listen on tunnel.peer_bind")
}

/// The routes beside the endpoints on the clients' port, where the admin routes have a port of their own.
fn probes_only(core: &Arc<Core>, families: &Families) -> Router {
    admin::probes(core, Details::Never)
        .merge(families.probes(Details::Never).with_state(Arc::clone(core)))
        .fallback(routes::not_found)
}

/// Logs that the instance listens, and where.
fn tell(core: &Core, address: Option<SocketAddr>, admin_address: Option<SocketAddr>) {
    let place = |address: Option<SocketAddr>| {
        let unix = || main_place(&core.config.server).to_string();
        address.map_or_else(unix, |address| address.to_string())
    };
    info!(
        address = place(address),
        admin_address = place(admin_address),
        server_id = &*core.server_id,
        tls = core.config.tls.certificate.is_some(),
        bus = core.bus.kind(),
        connections_max = core.seats.max(),
        version = env!("CARGO_PKG_VERSION"),
        commit = version::COMMIT,
        "Listening."
    );
}

fn compose(
    config: Config,
    descriptors: Descriptors,
    background: &TaskTracker,
    background_end: &CancellationToken,
) -> anyhow::Result<Arc<Core>> {
    let names = Names::new(&config.redis.channel_prefix);
    let server_id: Arc<str> = match &config.server.server_id {
        Some(id) => id.as_str().into(),
        None => Uuid::now_v7().to_string().into(),
    };
    let hub = Hub::new();
    let delivery = Box::new(Delivery::new(Arc::clone(&hub)));
    let (tasks, end) = (background, background_end.clone());
    let table = KeyTable::read(&config.api, None).map_err(anyhow::Error::msg);
    let api_keys = Arc::new(ApiKeys::new(table.context(Failure::Config)?));
    background.spawn(read_keys_again(Arc::clone(&api_keys), background_end.clone()));
    let jwt_keys = match config.verifies_jwt() {
        true => KeyRing::read(&config.jwt).map_err(anyhow::Error::msg).context(Failure::Config)?,
        false => KeyRing::default(),
    };
    let bus = if config.redis.url.is_some() {
        Bus::redis(&config.redis, &server_id, &names, delivery, tasks, end)
            .context(Failure::Config)?
    } else {
        Bus::embedded(&config.redis, &config.limits, delivery, tasks, end)
    };
    hub.connect(bus.clone());
    let traces = Tracer::start(&config.traces, &server_id, background, background_end);
    let traces = traces.map_err(anyhow::Error::msg).context(Failure::Config)?;
    let Descriptors { connections, spare, .. } = descriptors;
    let runtime = Runtime::new(config.limits.send_buffers_total_bytes, clock::now());
    let core = Arc::new(Core {
        server_id,
        waiting_room: WaitingRoom::new(Arc::clone(&hub), Arc::clone(&runtime)),
        hub,
        store: bus.store(),
        bus,
        runtime,
        event_streams: Arc::default(),
        seats: Seats::new(connections),
        handshakes: Seats::new((connections - connections / HANDSHAKES_PART).max(spare / 2)),
        sockets: Sockets::new(connections + spare),
        attempts: Arc::new(Attempts::new(config.rate_limit.max_requests, config.rate_limit.window)),
        resumes: Resumes::new(config.limits.resumes_per_second),
        allowed_origins: AllowedOrigins::new(&config.server.allowed_origins),
        jwt_keys: FixedKeys::new(jwt_keys),
        api_keys,
        api_failures: Throttle::default(),
        lines: Throttles::default(),
        texts: Texts::default(),
        recent: Recent::default(),
        lease: OnceLock::new(),
        names,
        metrics: Metrics::new(),
        reports: Arc::default(),
        traces,
        tasks: TaskTracker::new(),
        followers_end: CancellationToken::new(),
        draining: false.into(),
        closing: false.into(),
        in_force: Mutex::new(None),
        started: Instant::now(),
        config,
    });
    Ok(core)
}

/// Registers the instance's sources of metrics.
fn show(core: &Core, families: &Arc<Families>, reloader: &Arc<Reloader>) {
    let served = Family::ALL.into_iter().filter(|family| Families::serves(core, *family));
    core.metrics.begin(served, &rejection::OF_HANDSHAKES);
    let bounds = Bounds {
        connections: Arc::clone(&core.seats),
        handshakes: Arc::clone(&core.handshakes),
        attempts: Arc::clone(&core.attempts),
    };
    let lease = match core.lease.get() {
        Some(lease) => Arc::clone(lease) as Arc<dyn Source>,
        None => Arc::new(LeaseCounters::default()),
    };
    core.reports.read(families.reporters());
    core.metrics.read([
        Arc::clone(families) as Arc<dyn Source>,
        Arc::clone(&core.runtime) as Arc<dyn Source>,
        Arc::new(bounds),
        Arc::clone(&core.hub) as Arc<dyn Source>,
        Arc::new(core.bus.clone()),
        Arc::clone(&core.api_keys) as Arc<dyn Source>,
        lease,
        Arc::clone(reloader) as Arc<dyn Source>,
        Arc::new(core.traces.clone()),
        Arc::new(Process { started: core.started }),
    ]);
}

/// Reloads the configuration at each SIGHUP, until `end`. Tells the supervisor when a reload begins and ends.
async fn reload_at_hangups(
    mut hangups: shutdown::Hangups,
    reloader: Arc<Reloader>,
    end: CancellationToken,
) {
    loop {
        tokio::select! {
            () = end.cancelled() => return,
            () = hangups.wait() => {}
        }
        let begins = [Some(NotifyState::Reloading), NotifyState::monotonic_usec_now().ok()];
        let _ = sd_notify::notify(&begins.into_iter().flatten().collect::<Vec<_>>());
        // The log tells the result.
        let _ = reloader.reload("SIGHUP").await;
        let _ = sd_notify::notify(&[NotifyState::Ready]);
    }
}

/// Reads the files of API keys again at intervals, until `end`.
async fn read_keys_again(keys: Arc<ApiKeys>, end: CancellationToken) {
    loop {
        tokio::select! {
            () = end.cancelled() => return,
            () = tokio::time::sleep(READ_FILES_EVERY) => {}
        }
        if !keys.has_files() {
            continue;
        }
        // A file system may be slow, and connections must not wait for it.
        let keys = Arc::clone(&keys);
        if let Err(error) = tokio::task::spawn_blocking(move || keys.read_again()).await {
            warn!(%error, "The files of API keys cannot be read again.");
        }
    }
}

/// Returns the TLS of one more listener.
fn tls(core: &Core, pair: &Option<Arc<TlsPair>>) -> Option<Arc<TlsListener>> {
    let (most, time_max) = (core.config.tls.handshakes_max, core.config.server.header_timeout);
    pair.as_ref().map(|pair| Arc::new(TlsListener::new(Arc::clone(pair), most, time_max)))
}

/// Reads the files of the certificate and its key again at intervals, until `end`.
async fn read_pair_again(pair: Arc<TlsPair>, core: Arc<Core>, end: CancellationToken) {
    loop {
        tokio::select! {
            () = end.cancelled() => return,
            () = tokio::time::sleep(READ_FILES_EVERY) => {}
        }
        // A file system may be slow, and connections must not wait for it.
        let pair = Arc::clone(&pair);
        match tokio::task::spawn_blocking(move || pair.read_again()).await {
            Ok(true) => core.metrics.error("tls_files"),
            Ok(false) => {}
            Err(error) => warn!(%error, "The files of the TLS certificate cannot be read again."),
        }
    }
}

/// Drives the timers of all connections, and forgets idle addresses at intervals, until `end`.
async fn keep_time(core: Arc<Core>, end: CancellationToken) {
    let mut ticks = tokio::time::interval(Runtime::tick_interval());
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut forgotten = Instant::now();
    loop {
        tokio::select! {
            () = end.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let now = clock::now();
        core.event_streams.relieve(&core.runtime);
        core.runtime.tick(now);
        core.event_streams.cut_off(&core.runtime);
        if forgotten.elapsed() > FORGET_EVERY {
            forgotten = Instant::now();
            core.attempts.forget_idle(now.0.saturating_mul(1000));
        }
    }
}

/// Divisor of the seats that gives the part kept free of handshakes. The rest is large, since all clients of a killed
/// instance come to another one at once. Half of the spare sockets may be handshakes in any case.
const HANDSHAKES_PART: usize = 4;

/// Interval at which the files of API keys and of the TLS certificate are read again.
const READ_FILES_EVERY: Duration = Duration::from_secs(2);

/// Interval at which idle addresses are forgotten.
const FORGET_EVERY: Duration = Duration::from_secs(60);
