//! Health of the upstream, as the agent tells its gateway: probes, and facts of the process.

use std::{
    convert::Infallible,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use http_body_util::{BodyExt, Limited};
use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior, interval, timeout},
};
use wsproxy_conn::lane::LaneHandle;
use wsproxy_proto::tunnel::{code::Code, frame::Health};

use crate::{
    config::HealthConfig,
    failure::Failure,
    request::RequestHead,
    serve::Server,
    upstream::{Exchange, body::RequestBody, chain},
};

/// Outcome of the last probe.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Probed {
    is_ok: bool,
    round_trip: Duration,
    /// Reason of a failure; else empty.
    text: String,
}

impl Probed {
    /// Tells the gateway.
    pub(crate) fn tell(&self, server: &Server, lane: &LaneHandle) {
        lane.set_health(&Health {
            upstream_ok: self.is_ok,
            upstream_round_trip_us: u32::try_from(self.round_trip.as_micros()).unwrap_or(u32::MAX),
            streams: server.streams.load(Relaxed),
            memory_bytes: memory_bytes(),
            disk_free_bytes: disk_free_bytes(),
            text: &self.text,
        });
    }
}

/// Probes as [`probe`] does, where there is a configuration.
pub(crate) async fn probe_if(
    config: Option<HealthConfig>,
    server: Arc<Server>,
    news: watch::Sender<Option<Probed>>,
) -> Infallible {
    match config {
        Some(config) => probe(server, config, news).await,
        None => std::future::pending().await,
    }
}

/// Probes the upstream again and again. `news` has the outcome where it is another one.
async fn probe(
    server: Arc<Server>,
    config: HealthConfig,
    news: watch::Sender<Option<Probed>>,
) -> Infallible {
    let mut ticks = interval(config.interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let began = Instant::now();
        let asked = timeout(PROBE_TIMEOUT, ask(&server, &config)).await;
        let late = || Failure::new(Code::UpstreamTimeout, "the upstream did not answer in time");
        let outcome = asked.unwrap_or_else(|_| Err(late()));
        let text = outcome.as_ref().err().map_or_else(String::new, ToString::to_string);
        let probed = Probed { is_ok: outcome.is_ok(), round_trip: began.elapsed(), text };
        news.send_if_modified(|last| {
            let is_news = last.as_ref().is_none_or(|last| last.is_ok != probed.is_ok);
            if is_news && probed.is_ok {
                tracing::info!("The upstream is healthy.");
            } else if is_news {
                tracing::warn!(problem = probed.text, "The upstream is not healthy.");
            }
            server.counters.upstream_is_ok.store(probed.is_ok.into(), Relaxed);
            *last = Some(probed);
            is_news
        });
    }
}

async fn ask(server: &Server, config: &HealthConfig) -> Result<(), Failure> {
    let Some(path) = &config.path else { return server.upstream.probe().await };
    let head = || RequestHead::of_probe(path.clone(), &server.service);
    let sent = server.upstream.send(head(), || Ok(head()), RequestBody::empty(), false, None).await;
    let Exchange { response, connection } = sent?;
    let status = response.status();
    let read = Limited::new(response.into_body(), BODY_BYTES_MAX).collect().await;
    read.map_err(|error| Failure::new(Code::UpstreamReset, chain(&*error)))?;
    server.upstream.keep(connection);
    if status.is_server_error() {
        return Err(Failure::new(Code::UpstreamReset, format!("the upstream answers {status}")));
    }
    Ok(())
}

/// Returns the resident memory of the process; 0 where the system does not tell it.
fn memory_bytes() -> u64 {
    let Ok(text) = std::fs::read_to_string("/proc/self/statm") else { return 0 };
    let pages = text.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok());
    pages.unwrap_or(0) * rustix::param::page_size() as u64
}

/// Returns the free space of the disk with the working directory; 0 where the system does not tell it.
fn disk_free_bytes() -> u64 {
    rustix::fs::statvfs(".").map_or(0, |disk| disk.f_bavail * disk.f_frsize)
}

/// Time between two HEALTH frames without news.
pub(crate) const TOLD_AGAIN: Duration = Duration::from_secs(30);

/// Time of one probe.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);

/// Upper bound of the body of an answer to a probe.
const BODY_BYTES_MAX: usize = 64 << 10;
