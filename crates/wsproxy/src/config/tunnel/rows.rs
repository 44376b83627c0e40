//! Values of `[tunnel]` that are tables or addresses; checks no token.

use std::{net::SocketAddr, time::Duration};

use wsproxy_proto::names::Id;

use crate::config::{
    kind::{Raw, Time, ValueKind, quoted},
    tables::{Row, Table, field},
};

/// `[[tunnel.agents]]`: a token with which agents of one cluster connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentToken {
    /// Cluster of the agent.
    pub cluster: Id,
    /// Hash of the token.
    pub token: TokenHash,
}

/// `[[tunnel.clients]]`: a token with which clients open clusters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientToken {
    /// Hash of the token.
    pub token: TokenHash,
    /// Clusters that the token opens.
    pub clusters: Vec<ClusterPattern>,
}

/// `[[tunnel.patterns]]`: a pattern of paths, `{}` for each segment that varies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PatternRule {
    /// Pattern.
    pub pattern: String,
}

/// `[[tunnel.cache]]`: answers that are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheRule {
    /// Pattern of their paths, `{}` for each segment that varies.
    pub pattern: String,
    /// Time for which an answer is kept.
    pub ttl: Duration,
}

/// SHA-256 of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TokenHash(pub [u8; 32]);

/// The id of a cluster, or with a `*` at its end the beginning of ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterPattern(String);

impl TokenHash {
    /// Reads 64 hexadecimal digits.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim().as_bytes();
        let digit = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
        let mut hash = [0; 32];
        if text.len() != 2 * hash.len() {
            return None;
        }
        for (byte, pair) in hash.iter_mut().zip(text.chunks_exact(2)) {
            *byte = digit(pair[0])? << 4 | digit(pair[1])?;
        }
        Some(Self(hash))
    }

    fn write(self) -> String {
        use std::fmt::Write as _;
        self.0.iter().fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
    }
}

impl ClusterPattern {
    /// Reads a pattern: an id, the beginning of one with `*` behind it, or `*`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let beginning = text.strip_suffix('*').unwrap_or(text);
        let is_good = Id::parse(beginning).is_ok() || text == "*";
        is_good.then(|| Self(text.to_owned()))
    }

    /// Returns whether the pattern is the id of `cluster`, or its beginning.
    #[must_use]
    pub fn fits(&self, cluster: &Id) -> bool {
        match self.0.strip_suffix('*') {
            Some(beginning) => cluster.as_str().starts_with(beginning),
            None => cluster.as_str() == self.0,
        }
    }
}

impl Row for AgentToken {
    const NOUN: &'static str = "agent";
    const FIELDS: &'static [&'static str] = &["cluster", "token_sha256"];
    const ALLOWED: &'static str =
        "cluster (an id) and token_sha256 (the SHA-256 of the token, 64 hexadecimal digits)";

    fn read(table: &Table) -> Result<Self, String> {
        let cluster = text(table, "cluster").and_then(|text| Id::parse(text).ok());
        let cluster = cluster.ok_or("cluster must be 1 to 128 letters, digits and -_.~@+=|")?;
        Ok(Self { cluster, token: token(table)? })
    }

    fn write(&self) -> String {
        let (cluster, token) = (quoted(self.cluster.as_str()), self.token.write());
        format!("{{ cluster = {cluster}, token_sha256 = \"{token}\" }}")
    }
}

impl Row for ClientToken {
    const NOUN: &'static str = "client";
    const FIELDS: &'static [&'static str] = &["token_sha256", "clusters"];
    const ALLOWED: &'static str = "token_sha256 (the SHA-256 of the token, 64 hexadecimal digits) and clusters (a \
         list of cluster ids, each perhaps with a * at its end)";

    fn read(table: &Table) -> Result<Self, String> {
        let clusters = match field(table, "clusters") {
            Some(Raw::List(texts)) if !texts.is_empty() => {
                texts.iter().map(|text| ClusterPattern::parse(text)).collect()
            }
            _ => None,
        };
        let clusters = clusters
            .ok_or("clusters must be a list of cluster ids, each perhaps with a * at its end")?;
        Ok(Self { token: token(table)?, clusters })
    }

    fn write(&self) -> String {
        let clusters: Vec<_> = self.clusters.iter().map(|pattern| quoted(&pattern.0)).collect();
        let token = self.token.write();
        format!("{{ token_sha256 = \"{token}\", clusters = [{}] }}", clusters.join(", "))
    }
}

impl Row for PatternRule {
    const NOUN: &'static str = "pattern";
    const FIELDS: &'static [&'static str] = &["pattern"];
    const ALLOWED: &'static str =
        "pattern (a path without a query, {} for each segment that varies)";

    fn read(table: &Table) -> Result<Self, String> {
        Ok(Self { pattern: pattern(table)? })
    }

    fn write(&self) -> String {
        format!("{{ pattern = {} }}", quoted(&self.pattern))
    }
}

impl Row for CacheRule {
    const NOUN: &'static str = "rule";
    const FIELDS: &'static [&'static str] = &["pattern", "ttl"];
    const ALLOWED: &'static str = "pattern (a path without a query, {} for each segment that varies) and ttl (a \
         time of at most 60s)";

    fn read(table: &Table) -> Result<Self, String> {
        let ttl = field(table, "ttl").and_then(|raw| TTL.read(raw));
        let ttl = ttl.ok_or_else(|| format!("ttl must be {}", TTL.allowed()))?;
        Ok(Self { pattern: pattern(table)?, ttl })
    }

    fn write(&self) -> String {
        let (pattern, ttl) = (quoted(&self.pattern), TTL.write(&self.ttl));
        format!("{{ pattern = {pattern}, ttl = {ttl} }}")
    }
}

/// An address with a port.
pub(in crate::config) struct SocketAddress;

impl ValueKind<SocketAddr> for SocketAddress {
    fn allowed(&self) -> String {
        "an IP address with a port, such as \"10.0.0.5:7000\" or \"[::1]:7000\"".into()
    }
    fn read(&self, raw: &Raw) -> Option<SocketAddr> {
        raw.text()?.parse().ok()
    }
    fn write(&self, value: &SocketAddr) -> String {
        quoted(&value.to_string())
    }
}

fn text<'t>(table: &'t Table, name: &str) -> Option<&'t str> {
    field(table, name).and_then(Raw::text)
}

fn token(table: &Table) -> Result<TokenHash, String> {
    let token = text(table, "token_sha256").and_then(TokenHash::parse);
    token.ok_or_else(|| {
        "token_sha256 must be the SHA-256 of the token, 64 hexadecimal digits".to_owned()
    })
}

fn pattern(table: &Table) -> Result<String, String> {
    let is_plain = |text: &str| {
        let good = |byte: u8| byte.is_ascii_graphic() && !b"?#".contains(&byte);
        text.starts_with('/') && text.len() <= PATTERN_BYTES_MAX && text.bytes().all(good)
    };
    let pattern = text(table, "pattern").filter(|text| is_plain(text));
    let allowed = "pattern must be a path without a query, {} for each segment that varies";
    pattern.map(str::to_owned).ok_or_else(|| allowed.into())
}

const TTL: Time = Time(100, 60_000);

const PATTERN_BYTES_MAX: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tables::Tables;

    const HASH: &str = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";

    #[test]
    fn tables_are_read_and_written() {
        let json = format!(r#"[{{"cluster":"c1","token_sha256":"{HASH}"}}]"#);
        let agents: Vec<AgentToken> = Tables.read(&Raw::Text(json)).unwrap();
        assert_eq!(agents[0].cluster.as_str(), "c1");
        assert_eq!(
            Tables.write(&agents),
            format!("[{{ cluster = \"c1\", token_sha256 = \"{HASH}\" }}]")
        );
        let json = r#"[{"pattern":"/api/v1/namespaces/{}/pods","ttl":"2s"}]"#;
        let rules: Vec<CacheRule> = Tables.read(&Raw::Text(json.into())).unwrap();
        assert_eq!(rules[0].ttl, Duration::from_secs(2));
    }

    #[test]
    fn a_broken_table_is_named() {
        fn explain<T: Row>(json: &str) -> Option<String> {
            ValueKind::<Vec<T>>::explain(&Tables, &Raw::Text(json.into()))
        }
        for (said, part) in [
            (explain::<AgentToken>(r#"[{"cluster":"c1"}]"#), "of agent 1, token_sha256 must"),
            (explain::<AgentToken>(r#"[{"cluster":"a b"}]"#), "cluster must"),
            (explain::<ClientToken>(r#"[{"cluster":["c1"]}]"#), "did you mean clusters?"),
            (explain::<ClientToken>(r#"[{"clusters":["*c"]}]"#), "clusters must"),
            (explain::<CacheRule>(r#"[{"pattern":"/a","ttl":"2m"}]"#), "ttl must"),
            (explain::<PatternRule>(r#"[{"pattern":"/a?b"}]"#), "pattern must"),
        ] {
            assert!(said.as_ref().is_some_and(|said| said.contains(part)), "{said:?}");
        }
    }

    #[test]
    fn patterns_of_clusters_are_ids_or_beginnings() {
        let id = |text| Id::parse(text).unwrap();
        let fits = |pattern, cluster| ClusterPattern::parse(pattern).unwrap().fits(&id(cluster));
        assert!(fits("c1", "c1") && fits("c*", "c1") && fits("*", "c1"));
        assert!(!fits("c1", "c12") && !fits("d*", "c1"));
        assert!(["", "a*b", "**", "a/b"].iter().all(|bad| ClusterPattern::parse(bad).is_none()));
    }
}
