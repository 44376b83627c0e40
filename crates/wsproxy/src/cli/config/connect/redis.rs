//! Redis: version, memory, persistence, clock; and by `rights`, what its user may do. Leaves nothing behind.

use std::time::{Duration, Instant};

use super::{ANSWER_MAX, Finding, cluster, nodes, rights};
use crate::{
    config::Config,
    redis::{
        address::{RedisEndpoint, RedisServers},
        trial::{self, Trial, TrialAnswer, TrialFault},
    },
    telemetry::time,
};

pub(super) async fn examine(config: &Config, findings: &mut Vec<Finding>) {
    if config.redis.url.is_none() {
        let what =
            "not configured: the embedded bus serves one instance, and workers over HTTP only";
        findings.push(Finding::ok(PART, what));
        return;
    }
    if let Err(TrialFault { why, advice, .. }) = look(config, findings).await {
        findings.push(Finding::error(PART, why, advice));
    }
}

async fn look(config: &Config, findings: &mut Vec<Finding>) -> Result<(), TrialFault> {
    let servers = trial::servers(&config.redis)?;
    if let RedisServers::Cluster { seeds } = &servers {
        cluster::examine(config, seeds, findings).await;
        return Ok(());
    }
    findings.extend(nodes::sentinels(config, &servers).await);
    let mut trial = Trial::connect(&config.redis, ANSWER_MAX).await?;
    let replicas = look_at_one(&mut trial, config, findings).await?;
    if matches!(servers, RedisServers::Sentinel { .. }) {
        findings.extend(nodes::replicas(config, &replicas).await);
    }
    Ok(())
}

/// Looks at one server, and returns the replicas that it names.
pub(super) async fn look_at_one(
    trial: &mut Trial,
    config: &Config,
    findings: &mut Vec<Finding>,
) -> Result<Vec<RedisEndpoint>, TrialFault> {
    let mut replicas = Vec::new();
    if trial.takes_any_password().await? {
        findings.push(Finding::error(
            PART,
            "redis.url has a password, but Redis has none: it takes every password, and clients without one",
            "set requirepass of Redis to this password, or remove the password: the libraries of workers fail with it",
        ));
    }
    match trial.ask(&["INFO"]).await? {
        TrialAnswer::Text(text) => {
            findings.extend(of_info(&Info(&text)));
            replicas = nodes::replicas_in(&text, trial.is_tls());
        }
        _ => findings.push(Finding::warning(
            PART,
            "connected, but the user may not ask INFO: version, memory and persistence are not known",
            "look at them yourself, or grant +info to the user for this check",
        )),
    }
    findings.push(output_buffer(trial).await?);
    findings.push(clock(trial).await?);
    findings.extend(rights::examine(trial, config).await?);
    Ok(replicas)
}

/// Looks at the bytes that may wait for an instance before Redis closes its connection.
async fn output_buffer(trial: &mut Trial) -> Result<Finding, TrialFault> {
    let answer = trial.ask(&["CONFIG", "GET", "client-output-buffer-limit"]).await?;
    let TrialAnswer::List(words) = answer else {
        return Ok(Finding {
            advice:
                "grant +config|get to the user for this check, or look yourself: docs/deploy/sizing"
                    .into(),
            ..Finding::ok(PART, "the output buffer for subscribers is not known")
        });
    };
    Ok(of_output_buffer(words.get(1).map_or("", String::as_str)))
}

/// Judges limits such as `normal 0 0 0 slave 268435456 67108864 60 pubsub 33554432 8388608 60`.
fn of_output_buffer(limits: &str) -> Finding {
    let mut words = limits.split(' ').skip_while(|word| *word != "pubsub").skip(1);
    let mut number = || words.next().and_then(|word| word.parse::<u64>().ok()).unwrap_or_default();
    let (hard, soft, seconds) = (number(), number(), number());
    let what = format!("output buffer for subscribers: {hard} bytes, or {soft} for {seconds} s");
    match hard {
        0 | OUTPUT_BUFFER_GOOD.. => Finding::ok(PART, what),
        _ => Finding {
            advice: "client-output-buffer-limit pubsub 256mb 64mb 60, where an instance may lag for a moment".into(),
            ..Finding::ok(PART, what)
        },
    }
}

/// The answer to `INFO`.
pub(super) struct Info<'a>(pub(super) &'a str);

impl Info<'_> {
    pub(super) fn value(&self, name: &str) -> &str {
        let mut lines = self.0.lines();
        lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap_or_default().trim()
    }

    fn number(&self, name: &str) -> u64 {
        self.value(name).parse().unwrap_or_default()
    }
}

fn of_info(info: &Info<'_>) -> Vec<Finding> {
    let version = info.value("redis_version");
    let major: u32 = version.split('.').next().unwrap_or_default().parse().unwrap_or_default();
    let mut findings = vec![match major {
        7.. => Finding::ok(PART, format!("connected, version {version}")),
        _ => Finding::warning(
            PART,
            format!("connected, version {version}: older than what is tested"),
            "use Redis 7",
        ),
    }];
    findings.push(memory(info));
    findings.push(persistence(info));
    let (clients, most) = (info.number("connected_clients"), info.number("maxclients"));
    if most > 0 && clients * 10 >= most * 9 {
        let what = format!("{clients} of {most} connections are taken");
        findings.push(Finding::warning(PART, what, "raise maxclients of Redis"));
    }
    findings
}

fn memory(info: &Info<'_>) -> Finding {
    let policy = info.value("maxmemory_policy");
    let (used, most) = (info.number("used_memory"), info.number("maxmemory"));
    let bound = if most == 0 { "no maxmemory".into() } else { format!("maxmemory {most} bytes") };
    let what = format!("{used} bytes used, {bound}, maxmemory-policy {policy}");
    match policy {
        "noeviction" if most > 0 && used >= most => Finding::error(
            PART,
            format!("{what}: Redis takes no writes"),
            "raise maxmemory, or find out what fills it",
        ),
        "noeviction" => Finding::ok(PART, what),
        _ => Finding::error(
            PART,
            format!("{what}: under pressure Redis removes tokens, histories and leases"),
            "CONFIG SET maxmemory-policy noeviction, and the same in redis.conf",
        ),
    }
}

fn persistence(info: &Info<'_>) -> Finding {
    let (appends, saved) = (info.value("aof_enabled"), info.value("rdb_last_bgsave_status"));
    if saved != "ok" && !saved.is_empty() {
        return Finding::error(
            PART,
            format!("the last snapshot failed ({saved}): Redis may refuse writes"),
            "see the log of Redis: full disk, missing rights, or no memory for a fork",
        );
    }
    match appends {
        "1" => Finding::ok(PART, "the append-only file is on"),
        _ => Finding {
            advice: "appendonly yes where messages must survive a crash of Redis".into(),
            ..Finding::ok(PART, "the append-only file is off: a crash loses tokens and histories")
        },
    }
}

async fn clock(trial: &mut Trial) -> Result<Finding, TrialFault> {
    let asked = Instant::now();
    let answer = trial.ask(&["TIME"]).await?;
    let (here, way) = (time::since_epoch(), asked.elapsed());
    let TrialAnswer::List(parts) = answer else {
        let advice = "grant +time to the user";
        return Ok(Finding::warning("clock", "the user may not ask TIME of Redis", advice));
    };
    let number = |at: usize| parts.get(at).and_then(|part| part.parse::<u64>().ok());
    let there = Duration::from_secs(number(0).unwrap_or_default())
        + Duration::from_micros(number(1).unwrap_or_default());
    Ok(of_clocks(here, there, way))
}

/// Judges the clocks of this machine and of Redis, whose answer took `way`.
fn of_clocks(here: Duration, there: Duration, way: Duration) -> Finding {
    let apart = here.abs_diff(there).saturating_sub(way);
    let side = if here > there { "ahead of" } else { "behind" };
    let what = format!("this machine is {:.1} s {side} Redis", apart.as_secs_f64());
    let advice = "let both follow a time server (NTP): tokens are judged by this machine's clock, positions are made \
                  by that of Redis";
    match apart {
        _ if apart < CLOCK_GOOD => Finding::ok("clock", "agrees with that of Redis"),
        _ if apart < CLOCK_BAD => Finding::warning("clock", what, advice),
        _ => Finding::error("clock", what, advice),
    }
}

const PART: &str = "redis";

/// Output buffer with which an instance that lags for a moment stays connected.
const OUTPUT_BUFFER_GOOD: u64 = 256 * 1024 * 1024;

/// Difference of clocks that does no harm.
const CLOCK_GOOD: Duration = Duration::from_secs(2);

/// Difference of clocks from which on good tokens are refused.
const CLOCK_BAD: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::{super::Level, *};

    #[test]
    fn clocks_may_differ_by_a_moment() {
        let at = Duration::from_secs;
        let judged = |here, there, way| of_clocks(at(here), at(there), at(way));
        assert_eq!(judged(100, 101, 0).level, Level::Ok);
        assert_eq!(judged(100, 104, 3).level, Level::Ok);
        assert_eq!(judged(110, 100, 0).level, Level::Warning);
        assert_eq!(judged(110, 100, 0).what, "this machine is 10.0 s ahead of Redis");
        assert_eq!(judged(100, 200, 0).level, Level::Error);
    }

    #[test]
    fn a_small_output_buffer_is_told() {
        let of =
            |pubsub: &str| of_output_buffer(&format!("normal 0 0 0 slave 1 1 1 pubsub {pubsub}"));
        assert!(of("33554432 8388608 60").advice.contains("256mb"));
        assert!(of("268435456 67108864 60").advice.is_empty() && of("0 0 0").advice.is_empty());
        assert!(of("33554432 8388608 60").what.contains("33554432 bytes, or 8388608 for 60 s"));
    }

    #[test]
    fn memory_and_persistence_are_judged() {
        let of = |text: &str| {
            let findings = of_info(&Info(text));
            findings.iter().map(|finding| finding.level).collect::<Vec<_>>()
        };
        let good = "redis_version:7.0.15\r\nmaxmemory_policy:noeviction\r\naof_enabled:1\r\n\
                    rdb_last_bgsave_status:ok\r\n";
        assert_eq!(of(good), [Level::Ok; 3]);
        let bad = "redis_version:6.2.1\r\nmaxmemory_policy:allkeys-lru\r\nrdb_last_bgsave_status:err\r\n\
                   connected_clients:95\r\nmaxclients:100\r\n";
        assert_eq!(of(bad), [Level::Warning, Level::Error, Level::Error, Level::Warning]);
        let full = "redis_version:7.2.0\nused_memory:9\nmaxmemory:9\nmaxmemory_policy:noeviction\n";
        assert_eq!(of(full)[1], Level::Error);
    }
}
