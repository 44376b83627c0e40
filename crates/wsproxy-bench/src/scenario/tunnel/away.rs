//! The link is away for a while under a steady rate of requests: which of them fail, and how soon.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use parking_lot::Mutex;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use super::{Options, histogram};
use crate::clock::now_ns;
use crate::report::Report;
use crate::tunnel::client::{Connection, Site};

/// One request: when it was due, how long it took, and its end; times in nanoseconds.
struct Outcome {
    due: u64,
    took: u64,
    end: String,
}

/// Runs the case.
pub(super) async fn run(options: &Options, report: &mut Report) -> Result<()> {
    report.set("rate_per_s", options.rate);
    let requests = options.rate * (LEAD + options.down + TAIL).as_secs() as u32;
    let pool = Arc::new(Mutex::new(Vec::new()));
    let mut running = JoinSet::new();
    let (start, mut cut) = (Instant::now(), None);
    for number in 0..requests {
        let due = start + Duration::from_secs(1) * number / options.rate;
        sleep_until(due).await;
        if cut.is_none() && due >= start + LEAD {
            options.away(options.down).await?;
            cut = Some(now_ns());
        }
        let (site, pool) = (options.site.clone(), pool.clone());
        running.spawn(async move {
            let due = now_ns();
            let end = match timeout(PATIENCE, get(&site, &pool)).await {
                Ok(Ok(end)) => end,
                Ok(Err(error)) => error.to_string(),
                Err(_) => "no answer".to_owned(),
            };
            Outcome { due, took: now_ns() - due, end }
        });
    }
    let cut = cut.unwrap_or_default();
    let mut ends: BTreeMap<String, u32> = BTreeMap::new();
    let (mut refused, mut waited, mut first_back) = (histogram()?, 0u32, u64::MAX);
    while let Some(one) = running.join_next().await {
        let Outcome { due, took, end } = one?;
        if end == "200" {
            if due > cut && took > WAITED_NS {
                waited += 1;
                first_back = first_back.min(due + took);
            }
        } else if end == "cluster_reconnecting" {
            refused.saturating_record(took);
        }
        *ends.entry(end).or_default() += 1;
    }
    let succeeded = ends.remove("200").unwrap_or_default();
    report.figure("succeeded", succeeded);
    report.figure("failed", requests - succeeded);
    report.figure("waited_and_succeeded", waited);
    report.quantiles("refused", &refused);
    if first_back != u64::MAX {
        report.ratio("back_after_s", (first_back - cut) as f64, 1e9);
    }
    let reconnecting = ends.remove("cluster_reconnecting").unwrap_or_default();
    report.figure("cluster_reconnecting", reconnecting);
    for (end, count) in ends {
        report.problems.push(format!("{count} requests ended with: {end}"));
    }
    Ok(())
}

/// Sends a GET on a connection of the pool or a new one; returns the status, or the gateway's reason.
async fn get(site: &Site, pool: &Mutex<Vec<Connection>>) -> Result<String> {
    let idle = pool.lock().pop();
    let mut connection = match idle {
        Some(connection) => connection,
        None => site.connect().await?,
    };
    let head = connection.get(&site.request("GET", "/small", None)).await?;
    if !head.closes {
        pool.lock().push(connection);
    }
    Ok(head.reason.unwrap_or_else(|| head.status.to_string()))
}

const LEAD: Duration = Duration::from_secs(2);
const TAIL: Duration = Duration::from_secs(6);
const PATIENCE: Duration = Duration::from_secs(20);
/// A request that took longer than this waited for the link.
const WAITED_NS: u64 = 100_000_000;
