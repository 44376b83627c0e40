//! Instances that serve agents, and agents that are connected to them.

use std::{net::SocketAddr, time::Duration};

use serde_json::{Value, json};
use sqlx::{Connection, SqliteConnection};
use tempfile::TempDir;
use wsproxy::config::Config;

use crate::support::{
    client::Client,
    eventually, eventually_ok,
    gateway::{API_KEY, Backend, TestInstance},
    http::{self, Response},
    raw::Raw,
};

/// Instances on one bus and one database. A request goes to the first one, and agents connect to the last one.
pub struct Stage {
    pub backend: Backend,
    pub instances: Vec<TestInstance>,
    folder: TempDir,
}

/// An agent after its `connected`.
pub struct TestAgent {
    pub client: Client,
    pub secret: String,
}

/// A row of the audit log.
#[derive(Debug)]
pub struct AuditedCall {
    pub outcome: String,
    pub tool: String,
    pub details: String,
}

/// A request whose answer is not read yet. Dropping it hangs up.
pub struct Open(pub Raw);

impl Open {
    /// Sends a call.
    pub async fn call(
        instance: &TestInstance,
        user: &str,
        headers: &[(&str, &str)],
        body: &Value,
    ) -> Self {
        let body = body.to_string();
        let mut head = format!(
            "POST /api/v1/agents/{user}/calls HTTP/1.1\r\nHost: x\r\n\
             Authorization: Bearer {API_KEY}\r\nContent-Length: {}\r\n",
            body.len()
        );
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        let mut raw = Raw::connect(instance.admin_address()).await;
        raw.write(format!("{head}\r\n{body}").as_bytes()).await;
        Self(raw)
    }

    /// Reads the answer.
    pub async fn answer(&mut self) -> Response {
        self.0.response().await
    }

    /// Reads on until this text has come; returns all that came.
    pub async fn expect(&mut self, text: &str) -> String {
        loop {
            let seen = String::from_utf8_lossy(self.0.rest()).into_owned();
            if seen.contains(text) {
                return seen;
            }
            assert!(self.0.read().await > 0, "{text:?} did not come: {seen:?}");
        }
    }
}

impl Stage {
    /// Two instances on Redis, or one on the embedded bus.
    pub async fn start(backend: Backend) -> Self {
        Self::with(backend, |_| {}).await
    }

    /// The same with a change of the configuration.
    pub async fn with(backend: Backend, change: impl Fn(&mut Config)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let count = if matches!(backend, Backend::Memory) { 1 } else { 2 };
        let mut stage = Self { backend, instances: Vec::new(), folder };
        for _ in 0..count {
            let config = stage.config(&change);
            let is_there = config.database.url.is_none();
            let instance = TestInstance::start(config).await;
            let database = instance.families().agents.database.clone().unwrap();
            eventually("the database is ready", || database.status().connected || !is_there).await;
            stage.instances.push(instance);
        }
        stage
    }

    /// A configuration of an instance of this stage.
    pub fn config(&self, change: impl Fn(&mut Config)) -> Config {
        let mut config = self.backend.config();
        config.endpoints.agents = true;
        config.database.path = Some(self.database());
        config.limits.max_connections = 20_000;
        change(&mut config);
        config
    }

    fn database(&self) -> std::path::PathBuf {
        self.folder.path().join("agents.db")
    }

    /// The instance that takes requests.
    pub fn caller(&self) -> &TestInstance {
        &self.instances[0]
    }

    /// The instance that holds agents.
    pub fn holder(&self) -> &TestInstance {
        &self.instances[self.instances.len() - 1]
    }

    /// Gives a user a secret.
    pub async fn add_user(&self, user: &str) -> String {
        let path = format!("/api/v1/agents/{user}/secrets");
        let add = async || {
            let made = self.holder().api("POST", &path, "").await;
            // The database may not be ready yet.
            if made.status == 503 { Err(made) } else { Ok(made) }
        };
        let made = eventually_ok("the user is added", add).await;
        assert_eq!(made.status, 201, "{made:?}");
        made.json()["secret"].as_str().unwrap().to_owned()
    }

    /// Ended calls with an outcome, at all instances.
    pub fn calls(&self, outcome: &str) -> f64 {
        let series = format!("wsproxy_agent_calls_total{{outcome=\"{outcome}\"}}");
        self.instances.iter().map(|instance| instance.metric(&series)).sum()
    }

    /// Waits until all that the instances put on the bus before has arrived.
    pub async fn settled(&self) {
        for instance in &self.instances {
            let mut follower = instance.follow("settled").await;
            for sender in &self.instances {
                sender.publish("settled", "x");
                follower.next().await;
            }
        }
    }

    /// The first row of a user in the audit log, once it is there.
    pub async fn audited(&self, user: &str) -> AuditedCall {
        let read = async || {
            let url = format!("sqlite://{}", self.database().display());
            let mut connection = SqliteConnection::connect(&url).await?;
            let sql = "SELECT outcome, tool_name, details FROM tool_execution_logs \
                       WHERE user_id = ? ORDER BY id LIMIT 1";
            sqlx::query_as::<_, (String, String, String)>(sql)
                .bind(user)
                .fetch_one(&mut connection)
                .await
        };
        let (outcome, tool, details) = eventually_ok("the row is written", read).await;
        AuditedCall { outcome, tool, details }
    }

    /// A connected agent of the older protocol.
    pub async fn agent(&self, user: &str) -> TestAgent {
        let secret = self.add_user(user).await;
        TestAgent::connect(self.holder(), user, &secret, "").await
    }

    /// A connected agent that understands cancels and sends progress.
    pub async fn agent_v2(&self, user: &str) -> TestAgent {
        let secret = self.add_user(user).await;
        let mut agent = TestAgent::connect(self.holder(), user, &secret, "&v=2").await;
        let hello = json!({
            "type": "hello", "version": "1.0", "platform": "linux",
            "capabilities": ["cancel", "progress"],
        });
        agent.client.send(hello.to_string()).await;
        agent
    }
}

impl TestAgent {
    /// Connects to an instance, with further parameters `&name=value`.
    pub async fn connect(
        instance: &TestInstance,
        user: &str,
        secret: &str,
        parameters: &str,
    ) -> Self {
        Self::connect_to(instance.address(), user, secret, parameters).await
    }

    /// Connects to an address.
    pub async fn connect_to(
        address: SocketAddr,
        user: &str,
        secret: &str,
        parameters: &str,
    ) -> Self {
        let path = format!("/?userId={user}&secret={secret}{parameters}");
        let connect = async || Client::connect(address, &path, &[]).await;
        let mut client = eventually_ok("the agent connects", connect).await;
        let connected = client.json().await;
        assert_eq!((&connected["type"], &connected["userId"]), (&json!("connected"), &json!(user)));
        Self { client, secret: secret.into() }
    }

    /// The next call.
    pub async fn call(&mut self) -> Value {
        let call = self.client.json().await;
        assert_eq!(call["type"], "tool_call", "{call}");
        call
    }

    /// Answers a call with a result.
    pub async fn respond(&mut self, call: &Value, result: Value) {
        self.respond_with(call, json!({ "success": true, "result": result, "error": null })).await;
    }

    /// Answers a call with these members.
    pub async fn respond_with(&mut self, call: &Value, mut members: Value) {
        members["type"] = "tool_response".into();
        members["requestId"] = call["requestId"].clone();
        members["executionTime"] = 12.into();
        self.client.send(members.to_string()).await;
    }

    /// Takes the next call and answers it with its parameters.
    pub async fn echo(&mut self) -> Value {
        let call = self.call().await;
        self.respond(&call, call["params"].clone()).await;
        call
    }

    /// Sends progress of a call.
    pub async fn progress(&mut self, call: &Value, progress: u64) {
        let message = json!({
            "type": "tool_progress", "requestId": call["requestId"],
            "progress": progress, "total": 10, "message": "indexing",
        });
        self.client.send(message.to_string()).await;
    }
}

/// Calls a tool over HTTP with further headers.
pub async fn call_with(
    instance: &TestInstance,
    user: &str,
    headers: &[(&str, &str)],
    body: &Value,
) -> Response {
    let key = format!("Bearer {API_KEY}");
    let mut all = vec![("authorization", key.as_str())];
    all.extend_from_slice(headers);
    let path = format!("/api/v1/agents/{user}/calls");
    http::request(instance.admin_address(), "POST", &path, &all, body.to_string().as_bytes()).await
}

/// Calls the tool `echo`.
pub async fn call(instance: &TestInstance, user: &str, body: &Value) -> Response {
    call_with(instance, user, &[], body).await
}

/// The body of a call that may take this long.
pub fn echo(timeout: Duration) -> Value {
    let timeout = u64::try_from(timeout.as_millis()).unwrap();
    json!({ "tool": "echo", "params": { "n": 1.5 }, "timeout_ms": timeout })
}
