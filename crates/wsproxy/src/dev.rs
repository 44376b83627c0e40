//! `wsproxy dev`: a gateway for a person who tries it out, with a page, a demo worker and a proof that it works.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context, anyhow};
use jsonwebtoken::Algorithm;
use tokio::time::timeout;
use tracing::warn;

use crate::{
    auth::{
        self,
        session::{self, TokenScope},
        sign,
    },
    config::{
        Config,
        api_key::{ApiKey, KeySecret, Scope},
        rooms::Development,
    },
    core::Core,
    dev::worker::DemoWorker,
    http::{handshake, listener::open, path, rejection::Rejection},
    server::Instance,
    shutdown::Signals,
};
use wsproxy_proto::names::Id;

mod page;
mod probe;
mod rooms;
mod worker;

/// Runs the instance until a signal ends it. `tell` prints to the terminal.
///
/// # Errors
/// The reason why the instance could not start.
pub async fn run(mut config: Config, tell: impl Fn(&str)) -> anyhow::Result<()> {
    if config.admin.port.take().is_some() {
        warn!("admin.port is ignored: the page needs everything on one port.");
    }
    if config.server.unix.take().is_some() {
        warn!("server.unix is ignored: a browser needs a port.");
    }
    if config.server.proxy_protocol {
        config.server.proxy_protocol = false;
        warn!("server.proxy_protocol is ignored: a browser sends no PROXY header.");
    }
    // No load balancer looks at this instance, and a person waits for its end.
    config.server.drain_delay = Duration::ZERO;
    // The page demonstrates that a lost connection loses no message.
    config.sessions.history = true;
    // Other machines cannot reach a loopback address, but pages of other sites in this machine's browser can.
    config.server.local_hosts_only = config.server.bind.is_loopback();
    open_rooms(&mut config);
    let api_key = auth::new_token();
    config.api.key.push(ApiKey {
        name: KEY_NAME.into(),
        secret: KeySecret::Text(api_key.clone().into()),
        scopes: [Scope::Sessions, Scope::Rooms].into_iter().collect(),
    });
    let signals = Signals::new().context("cannot listen to signals")?;
    let mut started = None;
    let instance = Instance::start(config, |core, families| {
        let worker = started.insert(DemoWorker::start(core));
        page::router(Arc::clone(worker), rooms::router(core, &families.rooms), api_key)
    })
    .await?;
    let worker = started.context("the instance has no routes")?;
    let address = instance.address().context("the instance has no port")?;
    let address = open::reachable(address);
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

/// Switches rooms on. Clients of this machine name themselves; those of others need a token, which the page gets.
fn open_rooms(config: &mut Config) {
    config.endpoints.rooms = true;
    let (development, jwt) = (&mut config.rooms.development, &mut config.jwt);
    if config.server.bind.is_loopback() {
        *development = Development::Loopback;
        return;
    }
    if *development == Development::Loopback {
        *development = Development::Off;
    }
    jwt.secret_key.get_or_insert_with(|| auth::new_token().into());
    if !jwt.algorithms.iter().any(|algorithm| sign::is_shared(*algorithm)) {
        jwt.algorithms.push(Algorithm::HS256);
    }
}

/// Makes a token for a session. The demo worker subscribes first, so that it gets the client's first message.
async fn open_session(
    worker: &Arc<DemoWorker>,
    agent: &str,
    session: &Id,
    event_stream: bool,
) -> Result<String, Rejection> {
    let core: &Core = worker.core();
    let key = core.names.session_auth(session);
    let ttl = core.config.sessions.token_ttl;
    let scope = TokenScope { agent: Some(path::parse_id("agent_id", agent)?), event_stream };
    handshake::deadline(core, async {
        if agent == AGENT {
            worker.adopt(session).await?;
        }
        Ok(session::issue(&core.store, &key, ttl, &scope).await?)
    })
    .await
}

/// Sends a message to the demo worker and back, as any client would, and returns the result as text.
async fn prove(worker: &Arc<DemoWorker>, address: SocketAddr) -> String {
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
wsproxy dev: gateway, bus and demo worker in one process. Every caller gets a token: not for production.
Rooms, with cursors and chat, are at http://{address}/dev/rooms

A client without a page, to paste into a second terminal (curl, and npx of Node.js):

  R=$(curl -s -X POST http://{address}/dev/session)
  field() {{ echo "$R" | sed "s/.*\"$1\":\"\([^\"]*\)\".*/\1/"; }}
  npx -y wscat -c "ws://{address}/{AGENT}/ws/$(field session_id)" -H "Authorization: Bearer $(field token)" \
    -w 20 -x '{{"type":"prompt","text":"hello"}}'

"#
    )
}

/// Agent id of the sessions that the demo worker serves.
const AGENT: &str = "demo";

/// Agent id of the sessions that are left to a worker of the user's own.
const OWN_AGENT: &str = "mine";

/// Name of the API key that the page shows for such a worker. The brackets keep it apart from configured keys.
const KEY_NAME: &str = "(dev)";

/// Time for the proof. The gateway goes on after it, since a Redis may come later.
const PROOF_TIMEOUT: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn printed_addresses_can_be_reached() {
        let any = "[::]:80".parse().unwrap();
        assert!(welcome(open::reachable(any)).contains("http://[::1]:80/dev/session"));
    }

    #[test]
    fn only_clients_of_this_machine_name_themselves_in_rooms() {
        let mut local = Config::default();
        local.server.bind = "127.0.0.1".parse().unwrap();
        open_rooms(&mut local);
        assert!(local.endpoints.rooms && local.rooms.development == Development::Loopback);
        assert!(local.jwt.secret_key.is_none());

        let mut open = Config::default();
        open.server.bind = "0.0.0.0".parse().unwrap();
        open.rooms.development = Development::Loopback;
        open.jwt.algorithms = vec![Algorithm::ES256];
        open_rooms(&mut open);
        assert!(open.endpoints.rooms && open.rooms.development == Development::Off);
        let (user, time) = (Id::parse("ann").unwrap(), Duration::from_secs(60));
        assert!(sign::sign(&open.jwt, &user, time, time, Vec::new()).is_ok());
    }
}
