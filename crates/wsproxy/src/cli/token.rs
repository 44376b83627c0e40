//! `wsproxy token`: a token for a session, stored where the gateway looks for it.

use std::time::Duration;

use anyhow::Context;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use wsproxy_proto::names::{Id, Names};

use super::{
    exit::Failure,
    settings::{CliSettings, Reads},
};
use crate::{
    auth::session::{self, TokenScope},
    bus::{
        Bus,
        deliver::{Deliver, Missed},
    },
    config::{Config, keys::Key},
    redis,
};

/// The keys that `token` reads: the Redis for tokens, and their lifetime.
pub(super) struct TokenKeys;

impl Reads for TokenKeys {
    fn reads(key: &Key) -> bool {
        key.section == "redis"
            || matches!(key.path().as_str(), "sessions.token_ttl" | "server.handshake_timeout")
    }
}

/// Arguments of the command.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct TokenArgs {
    /// The session that the token opens.
    #[arg(value_parser = |text: &str| Id::parse(text).map_err(|e| format!("a session id {e}")))]
    session_id: Id,
    /// Lifetime of the token, such as 60s. Default: sessions.token_ttl.
    #[arg(long, value_name = "TIME", value_parser = ttl)]
    ttl: Option<Duration>,
    /// Make a token for event streams (EventSource), which opens any number of them until it expires, and no
    /// WebSocket. Default: one connection or event stream, once.
    #[arg(long)]
    event_stream: bool,
    /// Bind the token to this agent id, /AGENT/ws/SESSION_ID. Default: any agent id.
    #[arg(long, value_name = "AGENT", value_parser = |text: &str| Id::parse(text).map_err(|e| format!("an agent id {e}")))]
    agent: Option<Id>,
    /// Print JSON: token, session_id, expires_in (seconds).
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    settings: CliSettings<TokenKeys>,
}

pub(super) fn run(args: TokenArgs) -> anyhow::Result<()> {
    let config = args.settings.load()?.config;
    let ttl = args.ttl.unwrap_or(config.sessions.token_ttl);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.context("cannot start the runtime")?;
    let scope = TokenScope { agent: args.agent, event_stream: args.event_stream };
    let token = runtime.block_on(save_token(&config, &args.session_id, ttl, &scope))?;
    if !args.json {
        return super::print(&format!("{token}\n"));
    }
    let fields = serde_json::json!({
        "token": token, "session_id": args.session_id.as_str(), "expires_in": ttl.as_secs(),
    });
    super::print(&format!("{fields}\n"))
}

/// Makes a token and stores it in the configured Redis for `ttl`.
///
/// # Errors
/// [`Failure::Config`] without a Redis; [`Failure::Unavailable`] if Redis did not answer or refused the token.
pub async fn save_token(
    config: &Config,
    session_id: &Id,
    ttl: Duration,
    scope: &TokenScope,
) -> anyhow::Result<String> {
    if config.redis.url.is_none() {
        let problem = anyhow::anyhow!(
            "tokens are stored in Redis, but redis.url is not set: set it (REDIS_URL), or ask the running instance with \
             POST /api/v1/sessions/{{session_id}}/token"
        );
        return Err(problem.context(Failure::Config));
    }
    // One attempt, so that the command fails at once: the bus of a gateway would try again for ever.
    redis::connect::try_once(&config.redis)
        .await
        .map_err(anyhow::Error::msg)
        .context(Failure::Unavailable)?;
    let (tasks, end) = (TaskTracker::new(), CancellationToken::new());
    let names = Names::new(&config.redis.channel_prefix);
    let bus = Bus::redis(&config.redis, "token", &names, Box::new(Nobody), &tasks, end.clone());
    let store = bus.context(Failure::Config)?.store();
    let key = names.session_auth(session_id);
    let issued = session::issue(&store, &key, ttl, scope);
    let token = tokio::time::timeout(config.server.handshake_timeout, issued);
    let token = token.await.context("Redis stopped answering");
    let token = token.context(Failure::Unavailable)?;
    end.cancel();
    token.context("Redis did not take the token").context(Failure::Unavailable)
}

/// Receiver of a bus without subscriptions: it never gets a message.
pub(super) struct Nobody;

impl Deliver for Nobody {
    fn message(&mut self, _channel: &[u8], _payload: &[u8], _last: bool) {}
    fn flush(&mut self) {}
    fn proceed(&mut self) -> bool {
        false
    }
    fn lost(&mut self, _cause: &str, _missed: &Missed) {}
    fn recovered(&mut self, _gap: Duration) {}
}

pub(super) fn ttl(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().map(Duration::from_secs);
    let time = seconds.or_else(|_| humantime::parse_duration(text)).ok();
    let range = Duration::from_secs(1)..=Duration::from_secs(86_400);
    let time = time.filter(|time| range.contains(time));
    time.ok_or_else(|| "must be a time from 1s to 1day, such as 60 (seconds) or \"5m\"".into())
}

const EXAMPLE: &str = "Example:
  export REDIS_URL=redis://127.0.0.1:6379
  wsproxy token s-1 --ttl 5m --agent demo

The client shows the token at /demo/ws/s-1, as ?token=TOKEN or in the header Authorization: Bearer TOKEN. \
The agent id is the first segment of a session's path; the session is announced to the workers of that agent id.";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ttl_is_a_time() {
        assert_eq!(ttl("90"), Ok(Duration::from_secs(90)));
        assert_eq!(ttl("2m"), Ok(Duration::from_secs(120)));
        assert!(ttl("0").is_err() && ttl("2days").is_err() && ttl("soon").is_err());
    }
}
