//! The same relay on axum as it is usually written: its own `ws`, one channel per client, redis-rs pub/sub.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::extract::ws::{Message, Utf8Bytes, WebSocket, WebSocketUpgrade};
use axum::extract::{Path, State};
use axum::response::Response;
use axum::routing::get;
use futures_util::{SinkExt, StreamExt};
use redis::aio::{MultiplexedConnection, PubSubSink};
use tokio::sync::mpsc;

type Clients = HashMap<String, Vec<mpsc::Sender<Utf8Bytes>>>;

struct Relay {
    clients: Mutex<Clients>,
    subscriber: tokio::sync::Mutex<PubSubSink>,
    publisher: MultiplexedConnection,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let port: u16 = arguments.next().ok_or("which port?")?.parse()?;
    let client = redis::Client::open(arguments.next().ok_or("which Redis?")?)?;
    let (sink, mut stream) = client.get_async_pubsub().await?.split();
    let relay = Arc::new(Relay {
        clients: Mutex::default(),
        subscriber: tokio::sync::Mutex::new(sink),
        publisher: client.get_multiplexed_async_connection().await?,
    });
    let reader = Arc::clone(&relay);
    tokio::spawn(async move {
        while let Some(message) = stream.next().await {
            let Ok(text) = message.get_payload::<String>() else { continue };
            let text = Utf8Bytes::from(text);
            let clients = reader.clients.lock().unwrap();
            for sender in clients.get(message.get_channel_name()).into_iter().flatten() {
                let _ = sender.try_send(text.clone());
            }
        }
    });
    let routes = Router::new()
        .route("/health", get(|| async { "ok" }))
        .route("/ws/{session}", get(upgrade))
        .with_state(relay);
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await?;
    Ok(axum::serve(listener, routes).await?)
}

async fn upgrade(
    State(relay): State<Arc<Relay>>,
    Path(session): Path<String>,
    upgrade: WebSocketUpgrade,
) -> Response {
    let down = format!("session:{session}:down");
    let (sender, receiver) = mpsc::channel(1024);
    let first = {
        let mut clients = relay.clients.lock().unwrap();
        let members = clients.entry(down.clone()).or_default();
        members.push(sender);
        members.len() == 1
    };
    if first {
        let _ = relay.subscriber.lock().await.subscribe(&down).await;
    }
    upgrade.on_upgrade(move |socket| drive(relay, session, down, socket, receiver))
}

async fn drive(
    relay: Arc<Relay>,
    session: String,
    down: String,
    socket: WebSocket,
    mut receiver: mpsc::Receiver<Utf8Bytes>,
) {
    let (mut sink, mut stream) = socket.split();
    let mut publisher = relay.publisher.clone();
    let up = format!("session:{session}:up");
    loop {
        tokio::select! {
            text = receiver.recv() => {
                let Some(text) = text else { break };
                if sink.send(Message::Text(text)).await.is_err() {
                    break;
                }
            }
            message = stream.next() => match message {
                Some(Ok(Message::Text(text))) => {
                    let mut command = redis::cmd("PUBLISH");
                    let _ = command.arg(&up).arg(text.as_str())
                        .exec_async(&mut publisher).await;
                }
                Some(Ok(Message::Close(_)) | Err(_)) | None => break,
                Some(Ok(_)) => {}
            },
        }
    }
    drop(receiver);
    let last = {
        let mut clients = relay.clients.lock().unwrap();
        let members = clients.entry(down.clone()).or_default();
        members.retain(|sender| !sender.is_closed());
        let last = members.is_empty();
        if last {
            clients.remove(&down);
        }
        last
    };
    if last {
        let _ = relay.subscriber.lock().await.unsubscribe(&down).await;
    }
}
