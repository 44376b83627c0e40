//! Reasons to give a connection up, in words without secrets.

use std::{io, sync::Arc};

use crate::redis::resp::Broken;

/// The reason why a connection could not be made or had to be closed.
#[derive(Debug, Clone, thiserror::Error)]
pub(super) enum Fault {
    /// An error of the network.
    #[error("{0}")]
    Io(Arc<io::Error>),
    /// The server closed the connection.
    #[error("the server closed the connection")]
    Closed,
    /// Connecting or greeting took too long.
    #[error("the server did not answer in time when connecting")]
    ConnectTimeout,
    /// The server did not answer a request in time.
    #[error("the server stopped answering")]
    Silent,
    /// The server sent bytes that the protocol does not allow here.
    #[error("the server broke the protocol: {0}")]
    Broken(&'static str),
    /// User or password are wrong or missing.
    #[error("the server refused user or password: {0}")]
    Login(String),
    /// The server answered the greeting with another error.
    #[error("the server refused the connection: {0}")]
    Refused(String),
    /// The server is no master, at least not any more.
    #[error("the server is no master but a {0}")]
    Role(String),
    /// The sentinels name another master.
    #[error("the sentinels name another master")]
    Moved,
    /// A sentinel does not watch this master.
    #[error("it knows no master with the name {0}")]
    UnknownMaster(String),
    /// No sentinel could name a master.
    #[error("no sentinel names a master: {0}")]
    NoMaster(String),
    /// The server does not tell the nodes of a Cluster.
    #[error("it tells no nodes of a Cluster: {0}")]
    NoCluster(String),
    /// Messages between nodes of a Cluster may be lost.
    #[error("the node has lost its connection to another node of the Cluster")]
    Torn,
    /// Another node serves the slots of one that failed.
    #[error("another node serves the slots of one that failed")]
    FailedOver,
    /// A message to the instance's own channel did not come back.
    #[error("a probe did not come back: a connection is deaf, or they end at different servers")]
    Probe,
}

impl Fault {
    /// Reads the error to a greeting. Servers without `HELLO` quote it with its password, so only the first word of
    /// unknown errors is repeated.
    pub(super) fn greeting(error: &[u8]) -> Self {
        let text = tell(error);
        let code = text.split(' ').next().unwrap_or_default();
        match code {
            "WRONGPASS" | "NOAUTH" | "NOPERM" => Self::Login(text),
            "LOADING" | "MASTERDOWN" | "BUSY" => Self::Refused(text),
            "NOPROTO" => {
                Self::Refused("it does not speak RESP3, Redis 6 or newer is needed".into())
            }
            _ if text.starts_with("ERR max number of clients") => Self::Refused(text),
            _ if text.starts_with("ERR unknown command") => {
                Self::Refused("it does not know HELLO, Redis 6 or newer is needed".into())
            }
            _ if text.starts_with("ERR DB index") => Self::Refused(text),
            _ => Self::Refused(format!("it answered {code}")),
        }
    }

    /// Returns whether an operator must act first, so that quick retries do not help.
    pub(super) fn needs_a_person(&self) -> bool {
        matches!(self, Self::Login(_) | Self::Role(_))
    }
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self::Io(Arc::new(error))
    }
}

impl From<Broken> for Fault {
    fn from(Broken(why): Broken) -> Self {
        Self::Broken(why)
    }
}

/// Returns an error of the server as one line for a log, without the arguments that some servers quote: they may be
/// tokens or payloads.
pub(super) fn tell(error: &[u8]) -> String {
    let text = String::from_utf8_lossy(&error[..error.len().min(TOLD_BYTES_MAX)]);
    let text = text.split(", with args beginning with").next().unwrap_or_default();
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Length at which errors are cut.
const TOLD_BYTES_MAX: usize = 300;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoted_arguments_are_not_repeated() {
        let quoting =
            b"ERR unknown command `HELLO`, with args beginning with: `3`, `AUTH`, `secret`";
        assert!(!Fault::greeting(quoting).to_string().contains("secret"));
        assert_eq!(tell(quoting), "ERR unknown command `HELLO`");
        let odd = Fault::greeting(b"ERR syntax error near secret").to_string();
        assert!(!odd.contains("secret"), "{odd}");
    }
}
