//! Instances that serve agents, on a Redis and a database of the test's own; agents, and callers as existing workers are.

use std::{collections::VecDeque, path::PathBuf, time::Duration};

use ::http::StatusCode;
use serde_json::{Value, json};
use sqlx::SqlitePool;
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
};
use wsproxy::config::Config;

use crate::support::{
    client::Client,
    eventually, eventually_yes,
    gateway::{TestInstance, config},
    redis_server::RedisServer,
    soon,
};

/// A Redis and a database, for instances that serve agents.
pub struct Site {
    /// The Redis.
    pub server: RedisServer,
    folder: TempDir,
}

impl Site {
    /// Starts the Redis.
    pub fn start() -> Self {
        Self { server: RedisServer::start(), folder: TempDir::new().unwrap() }
    }

    /// The configuration of an instance.
    pub fn config(&self, name: &str) -> Config {
        let mut config = config(Some(&self.server.url()));
        config.server.server_id = Some(name.into());
        config.endpoints.agents = true;
        config.database.path = Some(self.path());
        config
    }

    /// Starts an instance.
    pub async fn instance(&self, name: &str) -> TestInstance {
        self.instance_with(self.config(name)).await
    }

    /// Starts an instance with a configuration, and waits for its bus and its database.
    pub async fn instance_with(&self, config: Config) -> TestInstance {
        let instance = TestInstance::start(config).await;
        let database = instance.families().agents.database.clone().unwrap();
        eventually("the database is ready", || database.status().connected).await;
        instance
    }

    /// Adds users whose secret an application keeps in clear. An instance has made the tables already.
    pub async fn add(&self, users: &[&str]) {
        let url = format!("sqlite://{}", self.path().display());
        let pool = SqlitePool::connect(&url).await.unwrap();
        for user in users {
            let sql = "INSERT INTO agent_credentials (user_id, shared_secret, platform, status) \
                       VALUES ($1, $2, 'linux', 'pending')";
            sqlx::query(sql).bind(*user).bind(secret(user)).execute(&pool).await.unwrap();
        }
        pool.close().await;
    }

    /// As [`Self::add`], once a gateway outside of this process has made the tables.
    pub async fn add_when_ready(&self, users: &[&str]) {
        let url = format!("sqlite://{}", self.path().display());
        eventually_yes("the tables are there", async || {
            let Ok(pool) = SqlitePool::connect(&url).await else { return false };
            sqlx::query("SELECT 1 FROM agent_credentials").execute(&pool).await.is_ok()
        })
        .await;
        self.add(users).await;
    }

    /// The path of the database.
    pub fn database_path(&self) -> String {
        self.path().display().to_string()
    }

    /// Reads the first column of a statement's rows, each time that the result is called.
    pub fn rows(&self, sql: &'static str) -> impl AsyncFn() -> Vec<String> {
        let url = format!("sqlite://{}", self.path().display());
        async move || {
            let pool = SqlitePool::connect(&url).await.unwrap();
            let rows = sqlx::query_scalar(sql).fetch_all(&pool).await.unwrap();
            pool.close().await;
            rows
        }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("agents.db")
    }

    /// Publishes a command to a user's agent; returns the number of its receivers.
    pub fn command(&self, user: &str, command: &Value) -> i64 {
        let channel = format!("agent:{user}:commands");
        self.server.call(&["PUBLISH", &channel, &command.to_string()]).integer()
    }

    /// Returns whether a key exists.
    pub fn exists(&self, key: &str) -> bool {
        self.server.call(&["EXISTS", key]).integer() == 1
    }

    /// A caller as existing workers are.
    pub async fn caller(&self) -> Caller {
        Caller::connect(self.server.port()).await
    }
}

/// The secret of a test's user.
pub fn secret(user: &str) -> String {
    format!("secret-of-{user}-0123456789abcdef0123456789abcdef")
}

/// Connects an agent of the first version, as existing agents do: the secret is in the URL.
pub async fn connect(instance: &TestInstance, user: &str) -> Result<Client, StatusCode> {
    connect_as(instance, &format!("/?userId={user}&secret={}", secret(user))).await
}

/// Connects to a path.
pub async fn connect_as(instance: &TestInstance, path: &str) -> Result<Client, StatusCode> {
    Client::connect(instance.address(), path, &[]).await
}

/// Connects an agent, and reads its first message.
pub async fn agent(instance: &TestInstance, user: &str) -> Client {
    let mut agent = connect(instance, user).await.unwrap();
    let connected = agent.json().await;
    assert_eq!((&connected["type"], &connected["userId"]), (&json!("connected"), &json!(user)));
    agent
}

/// A call as existing callers publish it.
pub fn call(request: &str) -> Value {
    json!({ "type": "tool_call", "requestId": request, "tool": "read_file", "params": { "path": "/x" } })
}

/// A response as existing agents send it.
pub fn response(request: &str, result: &Value) -> String {
    json!({ "type": "tool_response", "requestId": request, "success": true, "result": result,
        "executionTime": 12 })
    .to_string()
}

/// A connection with subscriptions.
pub struct Caller {
    stream: BufReader<TcpStream>,
    messages: VecDeque<(String, String)>,
}

impl Caller {
    async fn connect(port: u16) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        Self { stream: BufReader::new(stream), messages: VecDeque::new() }
    }

    /// Subscribes, and waits until Redis has confirmed that.
    pub async fn subscribe(&mut self, channel: &str) {
        self.send("SUBSCRIBE", channel).await;
        loop {
            let words = soon("the confirmation", read_array(&mut self.stream)).await;
            match &words[..] {
                [kind, name, _] if kind == "subscribe" && name == channel => return,
                [kind, name, payload] if kind == "message" => {
                    self.messages.push_back((name.clone(), payload.clone()));
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// The next message: its channel and payload.
    pub async fn next(&mut self) -> (String, Value) {
        let (channel, payload) = soon("a message for the caller", self.read()).await;
        (channel, serde_json::from_str(&payload).unwrap())
    }

    /// Asserts that no message comes within a time.
    pub async fn silent(&mut self, time: Duration) {
        if let Ok(message) = tokio::time::timeout(time, self.read()).await {
            panic!("a message came: {message:?}");
        }
    }

    /// The next message, for as long as it takes.
    pub async fn read(&mut self) -> (String, String) {
        if let Some(message) = self.messages.pop_front() {
            return message;
        }
        let words = read_array(&mut self.stream).await;
        let [kind, channel, payload] = &words[..] else { panic!("{words:?}") };
        assert_eq!(kind, "message");
        (channel.clone(), payload.clone())
    }

    async fn send(&mut self, command: &str, word: &str) {
        let (commands, words) = (command.len(), word.len());
        let text = format!("*2\r\n${commands}\r\n{command}\r\n${words}\r\n{word}\r\n");
        self.stream.get_mut().write_all(text.as_bytes()).await.unwrap();
    }
}

async fn read_array(stream: &mut BufReader<TcpStream>) -> Vec<String> {
    let count: usize = read_line(stream).await.strip_prefix('*').unwrap().parse().unwrap();
    let mut words = Vec::new();
    for _ in 0..count {
        let line = read_line(stream).await;
        match line.split_at(1) {
            ("$", length) => {
                let mut bytes = vec![0; length.parse::<usize>().unwrap() + 2];
                stream.read_exact(&mut bytes).await.unwrap();
                bytes.truncate(bytes.len() - 2);
                words.push(String::from_utf8(bytes).unwrap());
            }
            (":", number) => words.push(number.to_owned()),
            _ => panic!("{line:?}"),
        }
    }
    words
}

async fn read_line(stream: &mut BufReader<TcpStream>) -> String {
    let mut line = String::new();
    stream.read_line(&mut line).await.unwrap();
    line.trim_end().to_owned()
}
