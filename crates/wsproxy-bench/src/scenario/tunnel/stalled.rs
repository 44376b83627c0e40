//! Clients that stop reading: the memory that they take, and how others fare beside them.

use std::time::Duration;

use anyhow::{Result, ensure};
use tokio::time::sleep;

use super::{Options, bulk, growth_mib, open_all, probe, settled_memory, socket_mib};
use crate::clock::now_ns;
use crate::report::Report;

/// Runs the case. Three in ten of the clients get lines of 100 bytes, the others as much as they take.
pub(super) async fn run(options: &Options, report: &mut Report) -> Result<()> {
    report.set("connections", options.connections);
    probe(options, report, "alone", PROBES, PAUSE).await?;
    let usual = speed(options).await?;
    report.figure("usual_mb_per_s", usual.round());
    let (before, sockets) = (settled_memory(options, PATIENCE).await, socket_mib());
    let stalled = open_all(options.connections, |number| {
        let site = options.site.clone();
        async move {
            let mut connection = site.connect_narrow().await?;
            let path = if number % 10 < 3 { "/lines/10" } else { "/endless" };
            connection.send(site.request("GET", path, None).as_bytes()).await?;
            let head = connection.head().await?;
            ensure!(head.status == 200, "the answer is {head:?}");
            Ok(connection)
        }
    })
    .await?;
    // Lines come slowly. Before all buffers on the way are full, they cost CPU, which is no part of this case.
    sleep(options.duration * 7).await;
    let during = settled_memory(options, PATIENCE).await;
    report.ratio("growth_mib", growth_mib(&during, &before), 1.0);
    report.ratio("growth_of_sockets_mib", (socket_mib() - sockets).max(0.0), 1.0);
    probe(options, report, "beside", PROBES, PAUSE).await?;
    let beside = speed(options).await?;
    report.figure("beside_mb_per_s", beside.round());
    report.ratio("speed_ratio", beside, usual);
    drop(stalled);
    // An allocator gives freed pages back to the kernel some seconds later, and little by little.
    sleep(options.duration * 4).await;
    let after = settled_memory(options, PATIENCE).await;
    report.ratio("left_mib", growth_mib(&after, &before), 1.0);
    Ok(())
}

/// Returns the speed of a large body on a new connection, the median of three, in MB/s.
async fn speed(options: &Options) -> Result<f64> {
    let mut speeds = Vec::new();
    for _ in 0..3 {
        let mut connection = options.site.connect().await?;
        let start = now_ns();
        bulk::transfer(&mut connection, &options.site, options.bytes, false).await?;
        speeds.push(options.bytes as f64 * 1e3 / (now_ns() - start) as f64);
    }
    speeds.sort_by(f64::total_cmp);
    Ok(speeds[1])
}

const PROBES: u32 = 300;
const PAUSE: Duration = Duration::from_millis(5);
const PATIENCE: Duration = Duration::from_secs(14);
