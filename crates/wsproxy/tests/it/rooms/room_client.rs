//! A member of a room that speaks JSON.

use std::net::SocketAddr;

use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;
use wsproxy::config::rooms::Development;

use crate::support::{
    binary::Binary,
    client::Client,
    gateway::{Backend, TestInstance},
    redis_server::RedisServer,
    soon,
};

/// An instance that believes its clients.
pub async fn instance(backend: &Backend) -> TestInstance {
    instance_with(backend, |_| {}).await
}

/// One with the configuration that `change` makes.
pub async fn instance_with(
    backend: &Backend,
    change: impl FnOnce(&mut wsproxy::config::Config),
) -> TestInstance {
    let mut config = backend.config();
    config.endpoints.rooms = true;
    config.rooms.development = Development::Loopback;
    config.rate_limit.max_requests_is_set = true;
    config.rooms.leave_grace = std::time::Duration::from_millis(300);
    change(&mut config);
    TestInstance::start(config).await
}

/// The program with rooms, on a Redis.
pub async fn binary(redis: &RedisServer) -> Binary {
    binary_with(redis, &[]).await
}

/// One with further variables of its environment.
pub async fn binary_with(redis: &RedisServer, variables: &[(&str, &str)]) -> Binary {
    let url = redis.url();
    let environment = [
        ("REDIS_URL", url.as_str()),
        ("WSPROXY_ENDPOINTS__ROOMS", "true"),
        ("WSPROXY_ROOMS__DEVELOPMENT", "true"),
        ("WSPROXY_ROOMS__LEAVE_GRACE", "300ms"),
        ("WSPROXY_ROOMS__MEMBERS_MAX", "2000"),
        ("WSPROXY_RATE_LIMIT__MAX_REQUESTS", "0"),
        ("LOG_LEVEL", "info"),
    ];
    Binary::start(&[&environment[..], variables].concat()).await
}

/// A member.
pub struct RoomClient {
    pub client: Client,
    /// The ServerHello, with the state of all pages.
    pub hello: Value,
}

impl RoomClient {
    /// Joins the room `lobby`. The client's id is also its user.
    pub async fn join(instance: &TestInstance, client: &str) -> Self {
        Self::join_as(instance, "lobby", client, client, json!({})).await
    }

    /// Joins with a user and the words of the hello.
    pub async fn join_as(
        instance: &TestInstance,
        room: &str,
        user: &str,
        client: &str,
        hello: Value,
    ) -> Self {
        Self::join_at(instance.address(), (room, user, client), hello).await
    }

    /// Joins with a room, a user and a client at an address.
    pub async fn join_at(
        address: SocketAddr,
        (room, user, client): (&str, &str, &str),
        hello: Value,
    ) -> Self {
        let path = format!("/ws/{room}?user_id={user}&client_id={client}");
        let client = Client::connect(address, &path, &[]).await.unwrap();
        Self::greeted(client, hello).await.whole().await
    }

    /// Joins over a connection that takes little before it is read. The hello has the first page of the state.
    pub async fn join_narrow(instance: &TestInstance, client: &str, hello: Value) -> Self {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        let socket = socket.connect(instance.address()).await.unwrap();
        let url =
            format!("ws://{}/ws/lobby?user_id={client}&client_id={client}", instance.address());
        let opening = tokio_tungstenite::client_async(url, socket);
        let (stream, response) = soon("the handshake", opening).await.unwrap();
        let headers = response.into_parts().0.headers;
        Self::greeted(Client { stream, headers }, hello).await
    }

    /// Sends the hello, and waits for the first page of its answer.
    pub async fn greeted(mut client: Client, hello: Value) -> Self {
        client.send(json!({ "clientHello": hello }).to_string()).await;
        let hello = Self::page(&mut client).await;
        Self { client, hello }
    }

    /// Reads the further pages of the state.
    pub async fn whole(mut self) -> Self {
        let mut page = self.hello.clone();
        while page["more"] == true {
            page = Self::page(&mut self.client).await;
            for list in ["players", "entities"] {
                let further = page["initialState"][list].as_array().cloned().unwrap_or_default();
                match &mut self.hello["initialState"][list] {
                    Value::Array(all) => all.extend(further),
                    none => *none = further.into(),
                }
            }
        }
        self
    }

    /// The next ServerHello in text. A client whose hello took more than a second was greeted in binary before: what came in
    /// binary is not for this client.
    async fn page(client: &mut Client) -> Value {
        loop {
            match client.next().await {
                Message::Binary(_) | Message::Ping(_) => {}
                Message::Text(text) => {
                    let hello = serde_json::from_str::<Value>(&text).unwrap()["serverHello"].take();
                    assert!(hello.is_object(), "{text}");
                    return hello;
                }
                other => panic!("no ServerHello: {other:?}"),
            }
        }
    }

    /// Names of the members in the hello, sorted.
    pub fn members(&self) -> Vec<String> {
        let players = self.hello["initialState"]["players"].as_array().cloned();
        let mut names: Vec<String> = players
            .unwrap_or_default()
            .iter()
            .map(|player| player["clientId"].as_str().unwrap().to_owned())
            .collect();
        names.sort();
        names
    }

    /// Sends an envelope.
    pub async fn send(&mut self, envelope: Value) {
        self.client.send(envelope.to_string()).await;
    }

    /// The next message in a few words, such as `join b`, `b: hi`, `spawn e of b`.
    #[track_caller]
    pub fn told(&mut self) -> impl Future<Output = String> {
        let next = self.client.json();
        async move { words(&next.await) }
    }

    /// All messages in a few words up to that one.
    pub async fn told_until(&mut self, last: &str) -> Vec<String> {
        let mut told = Vec::new();
        loop {
            match self.told().await {
                words if words == last => return told,
                words => told.push(words),
            }
        }
    }

    /// Reads all messages up to the close frame. Returns its code.
    pub async fn ended(&mut self) -> u16 {
        loop {
            match self.client.next().await {
                Message::Close(Some(frame)) => return frame.code.into(),
                Message::Close(None) => panic!("a close frame without a code"),
                _ => {}
            }
        }
    }

    /// Says something that all others hear.
    pub async fn say(&mut self, text: &str) {
        self.send(json!({ "chatMessage": { "message": text } })).await;
    }
}

/// A message in a few words.
pub fn words(message: &Value) -> String {
    let sender = message["sender"].as_str().unwrap_or_default();
    if let Some(event) = message.get("presenceEvent") {
        let kind = event["eventType"].as_str().unwrap_or("JOIN").to_lowercase();
        return format!("{kind} {}", event["clientId"].as_str().unwrap());
    }
    if let Some(chat) = message.get("chatMessage") {
        return format!("{sender}: {}", chat["message"].as_str().unwrap_or_default());
    }
    if let Some(custom) = message.get("custom") {
        return format!("{sender} custom {}", custom["name"].as_str().unwrap_or_default());
    }
    if let Some(spawn) = message.get("entitySpawn") {
        return format!("spawn {} of {sender}", spawn["entityId"].as_str().unwrap());
    }
    if let Some(update) = message.get("entityUpdate") {
        return format!("update {} of {sender}", update["entityId"].as_str().unwrap());
    }
    if let Some(despawn) = message.get("entityDespawn") {
        return format!("despawn {} of {sender}", despawn["entityId"].as_str().unwrap());
    }
    if let Some(update) = message.get("positionUpdate") {
        return format!(
            "move {} of {sender} to {}",
            update["entityId"].as_str().unwrap(),
            x(update)
        );
    }
    if let Some(batch) = message.get("positionBatch") {
        let entries = batch["entries"].as_array().unwrap().iter().map(|entry| {
            let (sender, update) = (entry["sender"].as_str().unwrap(), &entry["update"]);
            format!("{} of {sender} to {}", update["entityId"].as_str().unwrap(), x(update))
        });
        return format!("moves {}", entries.collect::<Vec<_>>().join(", "));
    }
    if let Some(error) = message.get("error") {
        return format!("error {}", error["code"].as_str().unwrap());
    }
    message.to_string()
}

fn x(update: &Value) -> f64 {
    update["position"]["x"].as_f64().unwrap_or_default()
}

/// A position.
pub fn position(entity: &str, x: f64) -> Value {
    json!({ "positionUpdate": { "entityId": entity, "position": { "x": x } } })
}
