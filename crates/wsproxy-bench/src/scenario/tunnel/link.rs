//! Small requests on a slow link: alone, beside one large body, and beside eight.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Result;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::{Options, probe};
use crate::clock::now_ns;
use crate::report::Report;
use crate::tunnel::client::{READ_BYTES, Site};

/// Runs the case.
pub(super) async fn run(options: &Options, report: &mut Report) -> Result<()> {
    probe(options, report, "idle", PROBES, PAUSE).await?;
    for streams in [1, 8] {
        let stop = Arc::new(AtomicBool::new(false));
        let mut bulk = JoinSet::new();
        for _ in 0..streams {
            bulk.spawn(read(options.site.clone(), stop.clone()));
        }
        sleep(Duration::from_secs(1)).await;
        probe(options, report, &format!("beside_{streams}"), PROBES, PAUSE).await?;
        stop.store(true, Ordering::Relaxed);
        let mut speed = 0.0;
        while let Some(one) = bulk.join_next().await {
            speed += one??;
        }
        report.ratio(&format!("beside_{streams}_mb_per_s"), speed / 1e6, 1.0);
    }
    let above = |report: &Report, name: &str| {
        report.seconds(&format!("{name}_p99_ms")) - report.seconds("idle_p99_ms")
    };
    let (one, eight) = (above(report, "beside_1"), above(report, "beside_8"));
    report.ratio("beside_1_above_idle_ms", one, 1.0);
    report.ratio("beside_8_above_idle_ms", eight, 1.0);
    report.ratio(
        "eight_over_one",
        report.seconds("beside_8_p99_ms"),
        report.seconds("beside_1_p99_ms"),
    );
    Ok(())
}

/// Reads a body without end until it is told to stop; returns bytes per second.
async fn read(site: Site, stop: Arc<AtomicBool>) -> Result<f64> {
    let mut connection = site.connect().await?;
    connection.send(site.request("GET", "/endless", None).as_bytes()).await?;
    let mut scratch = vec![0; READ_BYTES];
    let (start, mut bytes) = (now_ns(), 0);
    while !stop.load(Ordering::Relaxed) {
        bytes += connection.some(&mut scratch).await?;
    }
    Ok(bytes as f64 * 1e9 / (now_ns() - start) as f64)
}

const PROBES: u32 = 100;
const PAUSE: Duration = Duration::from_millis(15);
