//! The upstream: its connections, kept alive between requests, and one request with its head. Knows no frames.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use http::Response;
use hyper::{
    body::Incoming,
    client::conn::http1::{self, SendRequest},
};
use hyper_util::rt::TokioIo;
use tokio::{sync::Notify, time::Instant};
use tokio_util::task::{AbortOnDropHandle, TaskTracker};
use wsproxy_proto::tunnel::code::Code;

use crate::{
    config::UpstreamConfig, credential::Credential, failure::Failure, request::RequestHead,
};

pub(crate) mod body;
mod connect;
pub(crate) mod wire;

use body::RequestBody;
use wire::{Traffic, Wire};

/// The one HTTP service of an agent.
///
/// Bound: [`IDLE_MAX`] connections without a request are kept; beyond it the one that is longest without is closed. A
/// connection with a request belongs to the request's stream.
#[derive(Debug)]
pub(crate) struct Upstream {
    config: UpstreamConfig,
    credential: Credential,
    /// Lock: held for one push or pop. Used last comes last.
    idle: std::sync::Mutex<VecDeque<Idle>>,
    tasks: TaskTracker,
}

/// Connection to the upstream. Dropping it closes it.
#[derive(Debug)]
pub(crate) struct Connection {
    sender: SendRequest<RequestBody>,
    traffic: Arc<Traffic>,
    _task: AbortOnDropHandle<()>,
}

#[derive(Debug)]
struct Idle {
    connection: Connection,
    since: Instant,
}

impl Idle {
    fn is_over(&self, now: Instant) -> bool {
        let (sender, age) = (&self.connection.sender, now - self.since);
        sender.is_closed() || age >= IDLE_TIMEOUT || (age >= READY_TIMEOUT && !sender.is_ready())
    }
}

/// Head of an answer, with the connection from which its body comes.
#[derive(Debug)]
pub(crate) struct Exchange {
    pub(crate) response: Response<Incoming>,
    pub(crate) connection: Connection,
}

impl Upstream {
    pub(crate) fn new(config: UpstreamConfig, tasks: TaskTracker) -> Self {
        let credential = Credential::new(config.token.clone());
        Self { config, credential, idle: std::sync::Mutex::default(), tasks }
    }

    /// Sends a request, and waits for the head of its answer. `went_on` is told of a head with status 100. Dropping the
    /// future closes the connection.
    ///
    /// A connection that was used before may have been closed by the upstream meanwhile. Then the request is sent once
    /// more, on a new connection, if the upstream cannot have acted on it, or may act twice: nothing of the body was
    /// taken, and not one byte was written, or the method is safe and no byte came back. `again` makes its head anew.
    ///
    /// # Errors
    /// [`Failure`], by the part that failed.
    pub(crate) async fn send(
        &self,
        mut head: RequestHead,
        again: impl Fn() -> Result<RequestHead, Failure>,
        body: RequestBody,
        is_retry: bool,
        went_on: Option<&Arc<Notify>>,
    ) -> Result<Exchange, Failure> {
        let token = self.credential.header()?;
        let mut reused = if is_retry { None } else { self.take() };
        loop {
            let is_reused = reused.is_some();
            let mut connection = match reused.take() {
                Some(connection) => connection,
                None => self.connect().await?,
            };
            let is_safe = head.is_safe;
            let request = head.request(body.clone(), token.clone(), went_on);
            let before = connection.traffic.counts();
            let sent = connection.sender.try_send_request(request).await;
            let mut error = match sent {
                Ok(response) => return Ok(Exchange { response, connection }),
                Err(error) => error,
            };
            // The request may still hold the body.
            drop(error.take_message());
            let (written, read) = connection.traffic.since(before);
            let may_repeat = written == 0 || (read == 0 && is_safe);
            if is_reused && may_repeat && !body.is_taken() {
                tracing::debug!(
                    "The upstream had closed a connection; the request takes a new one."
                );
                head = again()?;
                continue;
            }
            return Err(failed(error.error()));
        }
    }

    /// Keeps a connection whose answer has come whole for another request. Its task has to run before it can take one.
    pub(crate) fn keep(&self, connection: Connection) {
        let since = Instant::now();
        let mut idle = self.idle();
        let oldest = if idle.len() < IDLE_MAX { None } else { idle.pop_front() };
        idle.push_back(Idle { connection, since });
        drop(idle);
        drop(oldest);
    }

    /// Closes connections without a request that are too old, or do not become ready for another one, and forgets those
    /// that the upstream closed. Reads the token again where it is due. To be called about every second.
    pub(crate) fn tick(&self) {
        let now = Instant::now();
        let mut over = Vec::new();
        let mut idle = self.idle();
        let all = std::mem::take(&mut *idle);
        for one in all {
            let is_over = one.is_over(now);
            if is_over { over.push(one) } else { idle.push_back(one) }
        }
        drop(idle);
        drop(over);
        self.credential.refresh();
    }

    /// Opens a connection, and closes it again.
    ///
    /// # Errors
    /// As of [`Self::send`].
    pub(crate) async fn probe(&self) -> Result<(), Failure> {
        self.connect().await.map(drop)
    }

    fn take(&self) -> Option<Connection> {
        let mut idle = self.idle();
        let now = Instant::now();
        let at = idle
            .iter()
            .rposition(|one| one.connection.sender.is_ready() && now - one.since < IDLE_TIMEOUT)?;
        idle.remove(at).map(|one| one.connection)
    }

    async fn connect(&self) -> Result<Connection, Failure> {
        let socket = connect::open(&self.config).await?;
        let traffic = Arc::new(Traffic::default());
        let wire = Wire::new(socket, Arc::clone(&traffic));
        let mut builder = http1::Builder::new();
        builder.max_buf_size(BUFFER_BYTES);
        let (sender, connection) =
            builder.handshake(TokioIo::new(wire)).await.map_err(|error| failed(&error))?;
        let task = self.tasks.spawn(async move {
            // A failure is told to the request, or makes an idle connection unusable.
            let _ = connection.with_upgrades().await;
        });
        Ok(Connection { sender, traffic, _task: AbortOnDropHandle::new(task) })
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, VecDeque<Idle>> {
        self.idle.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Returns the failure of a request, or of the body of its answer.
pub(crate) fn failed(error: &hyper::Error) -> Failure {
    let code = match error {
        error if error.is_parse_too_large() => Code::HeadTooLarge,
        error if error.is_parse() => Code::UpstreamProtocol,
        // The body of the request failed, so that the client left.
        error if error.is_user() => Code::Cancelled,
        _ => Code::UpstreamReset,
    };
    Failure::new(code, chain(error))
}

/// Returns an error with its causes.
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |error| (*error).source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// Upper bound of the connections that are kept without a request.
const IDLE_MAX: usize = 1024;

/// Time for which a connection is kept without a request.
const IDLE_TIMEOUT: Duration = Duration::from_secs(90);

/// Time for a connection to be ready for the next request behind its last answer.
const READY_TIMEOUT: Duration = Duration::from_secs(1);

/// Upper bound of the read buffer and of the write buffer of a connection. A head of an answer must fit into it.
const BUFFER_BYTES: usize = 32 << 10;
