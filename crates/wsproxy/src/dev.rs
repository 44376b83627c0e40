//! `wsproxy dev`: a gateway for somebody who tries it out, with a page, a demo worker and a proof that it works.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context, anyhow};
use tokio::time::timeout;
use tracing::warn;

use crate::{
    auth::{
        self,
        session::{self, Scope},
    },
    config::{
        self, Config,
        api_key::{ApiKey, KeySecret},
    },
    dev::worker::Worker,
    gateway::Gateway,
    http::{listener, rejection::Rejection, upgrade},
    server::Instance,
    shutdown::Signals,
};
use wsproxy_proto::names::Id;

mod page;
mod probe;
mod worker;

/// Agent id of the sessions that the demo worker takes.
const AGENT: &str = "demo";

/// Agent id of the sessions that are left to a worker of the person who tries it out.
const OWN_AGENT: &str = "mine";

/// Name of the API key that the page shows for that worker. No key of a configuration can have it, because of the
/// brackets.
const KEY_NAME: &str = "(dev)";

/// After this the proof is given up; the gateway goes on, since a Redis may come later.
const PROOF_TIMEOUT: Duration = Duration::from_secs(10);

/// Runs the instance until a signal tells it to end. `tell` prints for the person who started it.
///
/// # Errors
/// Why it could not start.
pub async fn run(mut config: Config, tell: impl Fn(&str)) -> anyhow::Result<()> {
    if config.admin.port.take().is_some() {
        warn!("admin.port is ignored: the page needs everything on one port.");
    }
    // What the page shows is that a lost connection loses nothing.
    config.sessions.history = true;
    // Other machines cannot reach it, but pages of theirs in this machine's browser try.
    config.server.local_hosts_only = config.server.bind.is_loopback();
    let api_key = auth::new_token();
    config.api.key.push(ApiKey {
        name: KEY_NAME.into(),
        secret: KeySecret::Text(api_key.clone().into()),
        scopes: [config::api_key::Scope::Sessions].into_iter().collect(),
    });
    let signals = Signals::new().context("cannot listen to signals")?;
    let mut started = None;
    let instance = Instance::start(config, |gateway| {
        let worker = started.insert(Worker::start(gateway));
        page::router(Arc::clone(worker), api_key)
    })
    .await?;
    let worker = started.context("the instance has no routes")?;
    let address = listener::reachable(instance.address());
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    tell(&welcome(address));
    tokio::select! {
        () = signals.wait() => {}
        proof = prove(&worker, address) => {
            // The address is the last line, where a person looks for it.
            tell(&format!("{proof}\nOpen   http://{address}/\n"));
            signals.wait().await;
        }
    }
    instance.drain(signals).await;
    Ok(())
}

/// A fresh token for a session. Where the demo worker answers, it listens before anybody can use the token.
async fn open_session(
    worker: &Arc<Worker>,
    agent: &str,
    session: &Id,
    event_stream: bool,
) -> Result<String, Rejection> {
    let gateway: &Gateway = worker.gateway();
    let key = gateway.names.session_auth(session);
    let ttl = gateway.config.sessions.token_ttl;
    let scope = Scope { agent: Some(upgrade::id("agent_id", agent)?), event_stream };
    upgrade::deadline(gateway, async {
        if agent == AGENT {
            worker.adopt(session).await?;
        }
        Ok(session::issue(&gateway.store, &key, ttl, &scope).await?)
    })
    .await
}

/// Sends a message to the demo worker and back, as any client would, and says how that went.
async fn prove(worker: &Arc<Worker>, address: SocketAddr) -> String {
    let session = page::new_session();
    let proof = async {
        let token = open_session(worker, AGENT, &session, false).await?;
        probe::round_trip(address, &format!("/{AGENT}/ws/{session}"), &token).await
    };
    let proof = timeout(PROOF_TIMEOUT, proof).await.unwrap_or_else(|_| Err(anyhow!("timeout")));
    match proof {
        Ok(took) => {
            let ms = took.as_secs_f64() * 1000.0;
            format!("message through: client -> worker -> client in {ms:.1} ms\n")
        }
        Err(error) => format!("message through: FAILED: {error:#}\n"),
    }
}

fn welcome(address: SocketAddr) -> String {
    format!(
        r#"
wsproxy dev: gateway, bus and demo worker in one process. It gives a token to whoever asks: not for production.

A client without a page, to paste into a second terminal (curl, and npx of Node.js):

  R=$(curl -s -X POST http://{address}/dev/session)
  field() {{ echo "$R" | sed "s/.*\"$1\":\"\([^\"]*\)\".*/\1/"; }}
  npx -y wscat -c "ws://{address}/{AGENT}/ws/$(field session_id)" -H "Authorization: Bearer $(field token)" \
    -w 20 -x '{{"type":"prompt","text":"hello"}}'

"#
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn printed_addresses_can_be_reached() {
        let any = "[::]:80".parse().unwrap();
        assert!(welcome(listener::reachable(any)).contains("http://[::1]:80/dev/session"));
    }
}
