//! Numbers of an agent, for Prometheus on a port of their own. Bounded: no label comes from a client.

use std::{
    convert::Infallible,
    fmt::Write,
    io,
    net::Ipv4Addr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use http::{HeaderValue, Request, Response, StatusCode, header::CONTENT_TYPE};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{net::TcpListener, sync::Semaphore};
use wsproxy_proto::tunnel::code::Code;

use crate::serve::Server;

/// Counters of a process.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    /// Lanes that were ready.
    pub(crate) lanes: AtomicU64,
    /// Dials that brought no lane.
    pub(crate) refusals: AtomicU64,
    /// Bytes of requests that went to the upstream.
    pub(crate) bytes_up: AtomicU64,
    /// Bytes of answers that went to the gateway.
    pub(crate) bytes_down: AtomicU64,
    /// Whether the last probe found the upstream healthy.
    pub(crate) upstream_is_ok: AtomicU64,
    /// Whole answers by the first digit of their status; 0: others.
    statuses: [AtomicU64; 6],
    /// Streams without a whole answer, by code.
    codes: [AtomicU64; Code::ALL.len()],
}

impl Counters {
    /// Counts a stream that has ended.
    pub(crate) fn ended(&self, status: Option<u16>, code: Option<Code>) {
        let counter = match code {
            Some(code) => self.codes.get(usize::from(code.number())),
            None => self.statuses.get(usize::from(status.unwrap_or(0) / 100)),
        };
        counter.unwrap_or(&self.statuses[0]).fetch_add(1, Relaxed);
    }

    /// Returns the page in the text format of Prometheus.
    fn page(&self, streams: u32) -> String {
        let get = |counter: &AtomicU64| counter.load(Relaxed);
        let mut page = String::new();
        let mut add = |name: &str, kind: &str, help: &str, values: &[(String, u64)]| {
            // Writing to memory does not fail.
            let _ = write!(page, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
            for (labels, value) in values {
                let _ = writeln!(page, "{name}{labels} {value}");
            }
        };
        let one = |value| [(String::new(), value)];
        add("wsproxy_agent_lanes_total", "counter", LANES, &one(get(&self.lanes)));
        add("wsproxy_agent_dials_failed_total", "counter", REFUSALS, &one(get(&self.refusals)));
        add("wsproxy_agent_streams", "gauge", STREAMS, &one(streams.into()));
        add("wsproxy_agent_upstream_healthy", "gauge", HEALTHY, &one(get(&self.upstream_is_ok)));
        let directions = [("up", &self.bytes_up), ("down", &self.bytes_down)];
        let bytes = directions.map(|(way, count)| (format!("{{direction=\"{way}\"}}"), get(count)));
        add("wsproxy_agent_bytes_total", "counter", BYTES, &bytes);
        let statuses = (1..).zip(&self.statuses[1..]);
        let statuses =
            statuses.map(|(digit, count)| (format!("{{code=\"{digit}xx\"}}"), get(count)));
        let codes = Code::ALL.into_iter().zip(&self.codes);
        let codes =
            codes.map(|(code, count)| (format!("{{code=\"{}\"}}", code.label()), get(count)));
        let requests: Vec<_> = statuses.chain(codes).filter(|(_, count)| *count > 0).collect();
        add("wsproxy_agent_requests_total", "counter", REQUESTS, &requests);
        page
    }
}

/// Serves as [`serve`] does, where there is a port. An agent whose port cannot be used goes on without it.
pub(crate) async fn serve_if(port: Option<u16>, server: Arc<Server>) -> Infallible {
    if let Some(port) = port {
        match serve(server, port).await {
            Ok(never) => match never {},
            Err(error) => tracing::error!(port, %error, "There is no port for metrics."),
        }
    }
    std::future::pending().await
}

/// Serves `/metrics` on all addresses. Has neither credentials nor secrets.
///
/// # Errors
/// The port cannot be used.
async fn serve(server: Arc<Server>, port: u16) -> io::Result<Infallible> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).await?;
    // Connections beyond the bound wait in the kernel.
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { continue };
        let Ok((socket, _)) = listener.accept().await else {
            // No descriptor is free: those of ended streams are soon.
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            continue;
        };
        let shared = Arc::clone(&server);
        let service = service_fn(move |request| {
            let answer = answer(&shared, &request);
            async move { Ok::<_, Infallible>(answer) }
        });
        let mut builder = http1::Builder::new();
        builder.timer(TokioTimer::new()).keep_alive(false);
        let connection = builder.serve_connection(TokioIo::new(socket), service);
        server.tasks.spawn(async move {
            // A client that is slow or breaks the rules loses its connection.
            let _ = tokio::time::timeout(CONNECTION_TIME_MAX, connection).await;
            drop(place);
        });
    }
}

fn answer(server: &Server, request: &Request<Incoming>) -> Response<Full<bytes::Bytes>> {
    if request.uri().path() != "/metrics" {
        let mut answer = Response::new(Full::default());
        *answer.status_mut() = StatusCode::NOT_FOUND;
        return answer;
    }
    let page = server.counters.page(server.streams.load(Relaxed));
    let mut answer = Response::new(Full::new(page.into()));
    answer
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; version=0.0.4"));
    answer
}

const LANES: &str = "Lanes to a gateway that were ready.";
const REFUSALS: &str = "Dials that brought no lane.";
const STREAMS: &str = "Requests in flight.";
const HEALTHY: &str = "Whether the last probe found the upstream healthy.";
const BYTES: &str = "Bytes of bodies: up to the upstream, down to the gateway.";
const REQUESTS: &str =
    "Requests that ended, by the status of a whole answer or the reason of another end.";

/// Upper bound of the connections at once.
const CONNECTIONS_MAX: usize = 8;

/// Time after which a connection is closed.
const CONNECTION_TIME_MAX: std::time::Duration = std::time::Duration::from_secs(10);
