//! Requests that wait for their head, and watches that are idle: a further request beside them, and their memory.

use std::time::Duration;

use anyhow::{Result, ensure};
use tokio::time::{sleep, timeout};

use super::{Options, growth_mib, open_all, probe, settled_memory};
use crate::report::Report;

/// Runs the case of requests that wait.
pub(super) async fn run(options: &Options, report: &mut Report) -> Result<()> {
    report.set("connections", options.connections);
    probe(options, report, "alone", PROBES, PAUSE).await?;
    let before = settled_memory(options, PATIENCE).await;
    let waiting = open_all(options.connections, |_| {
        let site = options.site.clone();
        async move {
            let mut connection = site.connect().await?;
            connection.send(site.request("GET", HOLD, None).as_bytes()).await?;
            Ok(connection)
        }
    })
    .await?;
    sleep(Duration::from_secs(1)).await;
    let during = settled_memory(options, PATIENCE).await;
    report.ratio("growth_mib", growth_mib(&during, &before), 1.0);
    probe(options, report, "beside", PROBES, PAUSE).await?;
    // None of them may have been answered meanwhile.
    let mut answered = 0u32;
    for mut connection in waiting {
        answered += u32::from(timeout(Duration::ZERO, connection.head()).await.is_ok());
    }
    report.problem_if(answered > 0, || format!("{answered} requests did not wait"));
    Ok(())
}

/// Runs the case of watches: as many as there may be, and one more.
pub(super) async fn watches(options: &Options, report: &mut Report) -> Result<()> {
    report.set("connections", options.connections);
    probe(options, report, "alone", PROBES, PAUSE).await?;
    let before = settled_memory(options, PATIENCE).await;
    let watches = open_all(options.connections, |_| {
        let site = options.site.clone();
        async move {
            let mut connection = site.connect().await?;
            connection.send(site.request("GET", WATCH, None).as_bytes()).await?;
            let head = connection.head().await?;
            ensure!(head.status == 200, "the answer is {head:?}");
            Ok(connection)
        }
    })
    .await?;
    let during = settled_memory(options, PATIENCE).await;
    for (number, (after, before)) in during.iter().zip(&before).enumerate() {
        let kib = after.saturating_sub(*before) as f64 / 1024.0;
        // In the order of --pid.
        let name = format!("process_{}_kib_per_watch", number + 1);
        report.ratio(&name, kib, f64::from(options.connections));
    }
    probe(options, report, "beside", PROBES, PAUSE).await?;
    let mut further = options.site.connect().await?;
    further.send(options.site.request("GET", WATCH, None).as_bytes()).await?;
    let head = further.head().await?;
    report.figure("further_status", head.status);
    report.figure("further_reason", head.reason.unwrap_or_default());
    drop(watches);
    Ok(())
}

const HOLD: &str = "/hold/600000";
const WATCH: &str = "/idle?watch=true";
const PROBES: u32 = 300;
const PAUSE: Duration = Duration::from_millis(5);
const PATIENCE: Duration = Duration::from_secs(10);
