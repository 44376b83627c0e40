//! The sentinels that name the master, and its replicas: each may be the next one that an instance needs.

use futures_util::future::join_all;

use super::{ANSWER_MAX, Finding, Level, redis};
use crate::{
    config::Config,
    redis::{
        address::{RedisEndpoint, RedisServers},
        connect::Part,
        trial::{Trial, TrialAnswer, TrialFault},
    },
};

/// Examines the sentinels of a configuration, if it has any.
pub(super) async fn sentinels(config: &Config, servers: &RedisServers) -> Vec<Finding> {
    let RedisServers::Sentinel { sentinels, master } = servers else { return Vec::new() };
    let mut findings = Vec::new();
    if sentinels.len() < SENTINELS_GOOD {
        let what = format!("redis.url names {} sentinel(s)", sentinels.len());
        let advice = "name all sentinels, three at least: an instance without a sentinel misses the next failover";
        findings.push(Finding::warning(PART, what, advice));
    }
    let asked = sentinels.iter().map(|sentinel| of_sentinel(config, sentinel, master));
    let mut named = Vec::new();
    for (sentinel, answer) in sentinels.iter().zip(join_all(asked).await) {
        match answer {
            Ok((address, found)) => {
                named.extend(address);
                findings
                    .extend(found.into_iter().map(|one| one.of(&format!("sentinel {sentinel}"))));
            }
            Err(TrialFault { why, advice, .. }) => {
                findings.push(Finding::warning(PART, format!("sentinel {why}"), advice));
            }
        }
    }
    if named.iter().any(|address| Some(address) != named.first()) {
        let what = format!("the sentinels name different masters: {}", named.join(", "));
        let advice =
            "see SENTINEL MASTERS at each sentinel; during a failover it is so for a moment";
        findings.push(Finding::warning(PART, what, advice));
    }
    if named.is_empty() {
        findings.iter_mut().for_each(|finding| finding.level = Level::Error);
    }
    findings
}

/// Asks one sentinel. Returns the address of the master, if it names one, and findings.
async fn of_sentinel(
    config: &Config,
    sentinel: &RedisEndpoint,
    master: &str,
) -> Result<(Option<String>, Vec<Finding>), TrialFault> {
    let mut trial = Trial::connect_to(&config.redis, sentinel, Part::Sentinel, ANSWER_MAX).await?;
    let version = match trial.ask(&["INFO", "server"]).await? {
        TrialAnswer::Text(text) => format!("version {}", redis::Info(&text).value("redis_version")),
        _ => "version not known".to_owned(),
    };
    let address = match trial.ask(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", master]).await? {
        TrialAnswer::List(parts) => parts.join(":"),
        TrialAnswer::Error(error) => {
            let advice = "grant +sentinel|get-master-addr-by-name and +sentinel|master to the user at the sentinels";
            return Ok((None, vec![Finding::warning(PART, error, advice)]));
        }
        _ => {
            let what = format!("{version}, knows no master with the name {master}");
            let advice = "correct the name of the master in redis.url: SENTINEL MASTERS tells those that there are";
            return Ok((None, vec![Finding::warning(PART, what, advice)]));
        }
    };
    let mut findings = vec![Finding::ok(PART, format!("{version}, names the master {address}"))];
    if let TrialAnswer::Error(error) = trial.ask(&["SENTINEL", "CKQUORUM", master]).await?
        && !error.starts_with("NOPERM")
    {
        let advice = "see which sentinels are away: with too few of them there is no failover";
        findings.push(Finding::warning(PART, error, advice));
    }
    if let TrialAnswer::Error(error) = trial.ask(&["SENTINEL", "MASTER", master]).await? {
        let advice = "grant +sentinel|master to the user at the sentinels: without it an old answer may count as new";
        findings.push(Finding::warning(PART, error, advice));
    }
    if let TrialAnswer::Error(error) = trial.ask(&["SUBSCRIBE", "+switch-master"]).await? {
        let advice = "grant +subscribe and &+switch-master to the user at the sentinels: failovers are noticed later \
                      without";
        findings.push(Finding::warning(PART, error, advice));
    }
    Ok((Some(address), findings))
}

/// Examines replicas as the master was: after the next failover one of them is it.
pub(super) async fn replicas(config: &Config, replicas: &[RedisEndpoint]) -> Vec<Finding> {
    if replicas.is_empty() {
        let advice = "start a replica, two better: without one there is no failover";
        return vec![Finding::warning(PART, "the master has no replica", advice)];
    }
    let looked = join_all(replicas.iter().map(|replica| of_replica(config, replica))).await;
    let mut findings = Vec::new();
    for (replica, found) in replicas.iter().zip(looked) {
        match found {
            Ok(found) => {
                findings.extend(found.into_iter().map(|one| one.of(&format!("replica {replica}"))));
            }
            Err(TrialFault { why, advice, .. }) => {
                findings.push(Finding::error(PART, format!("replica {why}"), advice));
            }
        }
    }
    findings
}

async fn of_replica(config: &Config, replica: &RedisEndpoint) -> Result<Vec<Finding>, TrialFault> {
    let mut trial = Trial::connect_to(&config.redis, replica, Part::Node, ANSWER_MAX).await?;
    let mut findings = Vec::new();
    if let TrialAnswer::Text(text) = trial.ask(&["INFO", "replication"]).await? {
        let info = redis::Info(&text);
        if info.value("role") == "slave" && info.value("master_link_status") != "up" {
            let advice = "see the log of the replica: masterauth, network, disk";
            findings.push(Finding::warning(PART, "has lost its master", advice));
        }
    }
    redis::look_at_one(&mut trial, config, &mut findings).await?;
    Ok(findings)
}

/// Reads the replicas in a master's answer to `INFO`: `slave0:ip=10.0.0.12,port=6379,state=online,…`.
pub(super) fn replicas_in(info: &str, tls: bool) -> Vec<RedisEndpoint> {
    let replica = |line: &str| {
        let (name, values) = line.trim().split_once(':')?;
        let number = name.strip_prefix("slave")?;
        number.parse::<u32>().ok()?;
        let value = |name: &str| {
            values.split(',').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
        };
        let (host, port) = (value("ip")?.to_owned(), value("port")?.parse().ok()?);
        Some(RedisEndpoint::Tcp { host, port, tls })
    };
    info.lines().filter_map(replica).collect()
}

const PART: &str = "redis";

/// Number of sentinels of which one may fail.
const SENTINELS_GOOD: usize = 3;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replicas_are_read_from_the_masters_answer() {
        let info = "role:master\r\nconnected_slaves:2\r\n\
                    slave0:ip=10.0.0.12,port=6379,state=online,offset=1,lag=0\r\n\
                    slave1:ip=::1,port=6380,state=online,offset=1,lag=0\r\nslave_priority:100\r\n";
        let found: Vec<_> = replicas_in(info, false).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["10.0.0.12:6379", "[::1]:6380"]);
    }
}
