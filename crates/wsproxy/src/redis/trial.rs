//! One connection to Redis for a command that examines it: asks, waits for each answer, and keeps nothing.

use std::time::Duration;

use secrecy::{ExposeSecret as _, SecretString};

use crate::{
    config,
    redis::{
        address::{RedisEndpoint, RedisServers},
        connect::{Connector, Part},
        connection::RedisConnection,
        fault::{Fault, tell},
        resp::{self, RespValue},
    },
};

/// The connection, made as those of an instance are.
pub(crate) struct Trial {
    connection: RedisConnection,
    answer_max: Duration,
    is_tls: bool,
    /// Password of the user `default`, where the address names one.
    password: Option<SecretString>,
}

/// An answer of Redis.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum TrialAnswer {
    /// A text.
    Text(String),
    /// Texts; parts of another kind are left out.
    List(Vec<String>),
    /// An error, without the arguments that it may quote.
    Error(String),
    /// Anything else.
    Other,
}

/// The reason why there is no connection, or no answer, and the thing to do.
#[derive(Debug, Clone)]
pub(crate) struct TrialFault {
    /// The reason, with the address and without secrets.
    pub(crate) why: String,
    /// The thing to do.
    pub(crate) advice: &'static str,
}

impl Trial {
    /// Connects to the master as an instance does, in at most `time_max`. No answer is waited for longer.
    ///
    /// # Errors
    /// The reason, and the thing to do.
    pub(crate) async fn connect(
        config: &config::RedisConfig,
        time_max: Duration,
    ) -> Result<Self, TrialFault> {
        let (connector, answer_max) = connector(config, time_max)?;
        let connected = connector.connect_master(NAME).await;
        let connection = connected.map_err(|fault| TrialFault {
            why: format!("Redis at {} cannot be used: {fault}", connector.address()),
            advice: advice(&fault),
        })?;
        Ok(Self::of(connection, &connector, answer_max))
    }

    /// Connects to one server of the configuration, which plays `part`. See [`Self::connect`].
    ///
    /// # Errors
    /// The reason, and the thing to do.
    pub(crate) async fn connect_to(
        config: &config::RedisConfig,
        server: &RedisEndpoint,
        part: Part,
        time_max: Duration,
    ) -> Result<Self, TrialFault> {
        let (connector, answer_max) = connector(config, time_max)?;
        let connected = connector.connect(server, part, NAME).await;
        let connection = connected.map_err(|fault| TrialFault {
            why: format!("{server} cannot be used: {fault}"),
            advice: advice(&fault),
        })?;
        Ok(Self::of(connection, &connector, answer_max))
    }

    /// Returns whether TLS is spoken with the servers of the configuration.
    pub(crate) fn is_tls(&self) -> bool {
        self.is_tls
    }

    fn of(connection: RedisConnection, connector: &Connector, answer_max: Duration) -> Self {
        let login = connector.address().login.as_ref().filter(|(user, _)| user == "default");
        let password = login.map(|(_, password)| password.as_str().into());
        Self { connection, answer_max, is_tls: connector.address().is_tls(), password }
    }

    /// Returns whether Redis would take any other password than that of the address too: its user `default` has none. A
    /// greeting with a password succeeds then, but `AUTH`, with which many libraries begin, does not.
    ///
    /// # Errors
    /// The connection was lost, or Redis does not answer in time.
    pub(crate) async fn takes_any_password(&mut self) -> Result<bool, TrialFault> {
        let Some(password) = self.password.clone() else { return Ok(false) };
        let answer = self.ask(&["AUTH", password.expose_secret()]).await?;
        Ok(matches!(answer, TrialAnswer::Error(error) if error.contains(NO_PASSWORD)))
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// The connection was lost, or Redis does not answer in time.
    pub(crate) async fn ask(&mut self, words: &[&str]) -> Result<TrialAnswer, TrialFault> {
        let words: Vec<_> = words.iter().map(|word| word.as_bytes()).collect();
        resp::words(&mut self.connection.output, &words);
        let answer = tokio::time::timeout(self.answer_max, self.answer()).await;
        answer.unwrap_or(Err(Fault::Silent)).map_err(|fault| TrialFault {
            why: format!("Redis does not answer: {fault}"),
            advice: advice(&fault),
        })
    }

    async fn answer(&mut self) -> Result<TrialAnswer, Fault> {
        loop {
            if let Some(frame) = self.connection.input.next()? {
                return Ok(TrialAnswer::of(&RespValue::parse(frame)?.0));
            }
            self.connection.drive().await?;
        }
    }
}

impl TrialAnswer {
    fn of(value: &RespValue<'_>) -> Self {
        match value {
            RespValue::Error(error) => Self::Error(tell(error)),
            RespValue::Array(parts) => {
                let texts = parts.iter().filter_map(RespValue::text);
                Self::List(texts.map(|text| String::from_utf8_lossy(text).into_owned()).collect())
            }
            value => match value.text() {
                Some(text) => Self::Text(String::from_utf8_lossy(text).into_owned()),
                None => Self::Other,
            },
        }
    }
}

/// Returns the servers that a configuration names.
///
/// # Errors
/// The reason, and the thing to do.
pub(crate) fn servers(config: &config::RedisConfig) -> Result<RedisServers, TrialFault> {
    let (connector, _) = connector(config, config.connect_timeout)?;
    Ok(connector.address().servers.clone())
}

fn connector(
    config: &config::RedisConfig,
    time_max: Duration,
) -> Result<(Connector, Duration), TrialFault> {
    let answer_max = config.connect_timeout.min(time_max);
    let config = config::RedisConfig { connect_timeout: answer_max, ..config.clone() };
    let connector = Connector::of(&config)
        .map_err(|why| TrialFault { why, advice: "correct redis.url or redis.ca_file" })?;
    Ok((connector, answer_max))
}

fn advice(fault: &Fault) -> &'static str {
    match fault {
        Fault::Login(_) => "correct user and password in redis.url, or the user's ACL",
        Fault::Role(_) => "give the address of the master, or of a proxy that leads to it",
        Fault::ConnectTimeout | Fault::Silent => {
            "see whether the server hangs (redis-cli PING) and whether a firewall drops packets"
        }
        Fault::Io(_) | Fault::Closed => {
            "see whether the server runs, and correct host, port and TLS (redis or rediss) in redis.url"
        }
        Fault::NoMaster(_) | Fault::UnknownMaster(_) => {
            "see the sentinels (redis-cli -p 26379 SENTINEL MASTERS), and correct their addresses and the name of the \
             master in redis.url, and redis.sentinel_username and redis.sentinel_password"
        }
        Fault::NoCluster(_) => {
            "name nodes that run with cluster-enabled yes, and grant +cluster|nodes to the user"
        }
        Fault::Broken(_) | Fault::Refused(_) | Fault::Moved | Fault::Probe => {
            "see the log of the server; Redis 7 is what is tested"
        }
        Fault::Torn | Fault::FailedOver => "see the log of the server; Redis 7 is what is tested",
    }
}

/// Name of the connection in the server's `CLIENT LIST`.
const NAME: &str = "wsproxy-check";

/// Words of Redis where a user without a password shows one.
const NO_PASSWORD: &str = "without any password configured";
