//! A fast reader beside a slow one.

use std::time::Duration;

use anyhow::{Result, ensure};
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval};

use super::Options;
use crate::clock::{now_ns, ns};
use crate::report::Report;
use crate::tunnel::client::{READ_BYTES, Site};

/// Runs the case: in turns alone and beside the slow reader, so that a slow spell of the machine hits both.
pub(super) async fn run(options: &Options, report: &mut Report) -> Result<()> {
    let (mut alone, mut beside) = (0.0, 0.0);
    read(&options.site, options.duration / 4).await?;
    for _ in 0..TURNS {
        alone += read(&options.site, options.duration / TURNS).await?;
        let slow = slowly(options.site.clone());
        read(&options.site, options.duration / 10).await?;
        beside += read(&options.site, options.duration / TURNS).await?;
        ensure!(!slow.is_finished(), "the slow reader was cut off");
        slow.abort();
    }
    report.ratio("alone_mb_per_s", alone, f64::from(TURNS));
    report.ratio("beside_mb_per_s", beside, f64::from(TURNS));
    report.ratio("kept", beside, alone);
    Ok(())
}

/// Reads as fast as it can; returns MB/s.
async fn read(site: &Site, duration: Duration) -> Result<f64> {
    let mut connection = site.connect().await?;
    connection.send(site.request("GET", "/endless", None).as_bytes()).await?;
    ensure!(connection.head().await?.status == 200, "no answer");
    let (start, mut bytes) = (now_ns(), 0);
    let mut scratch = vec![0; READ_BYTES];
    while now_ns() < start + ns(duration) {
        bytes += connection.some(&mut scratch).await?;
    }
    Ok(bytes as f64 * 1e3 / (now_ns() - start) as f64)
}

/// Reads 50 KB a second until it is dropped.
fn slowly(site: Site) -> JoinHandle<Result<()>> {
    tokio::spawn(async move {
        let mut connection = site.connect_narrow().await?;
        connection.send(site.request("GET", "/endless", None).as_bytes()).await?;
        let mut ticks = interval(Duration::from_millis(20));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut scratch = vec![0; 1_000];
        loop {
            ticks.tick().await;
            connection.some(&mut scratch).await?;
        }
    })
}

const TURNS: u32 = 10;
