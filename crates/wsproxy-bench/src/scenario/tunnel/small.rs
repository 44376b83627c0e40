//! Small requests, some at once: each client sends the next when it has the answer.

use anyhow::Result;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::{Options, PATIENCE};
use crate::clock::{now_ns, ns};
use crate::report::Report;
use crate::tunnel::client::Site;

/// Runs the case.
pub(super) async fn run(options: &Options, report: &mut Report) -> Result<()> {
    let processes = options.processes();
    for &clients in &options.at_once {
        // The first round opens connections on all parts of the way.
        load(&options.site, clients, now_ns() + ns(options.duration) / 4).await?;
        let (start, cpu) = (now_ns(), processes.cpu());
        let (times, failed) = load(&options.site, clients, start + ns(options.duration)).await?;
        let (elapsed, spent) = (now_ns() - start, processes.cpu().since(&cpu));
        let name = format!("at_{clients}");
        let mut histogram = super::histogram()?;
        for time in &times {
            histogram.saturating_record(u64::from(*time) * 1_000);
        }
        report.quantiles(&name, &histogram);
        report.ratio(&format!("{name}_per_s"), times.len() as f64 * 1e9, elapsed as f64);
        report.figure(&format!("{name}_errors"), failed);
        if !processes.is_empty() {
            let spent_us = spent as f64 / 1e3;
            report.ratio(&format!("{name}_cpu_us_per_request"), spent_us, times.len() as f64);
        }
        report.problem_if(failed > 0, || format!("{failed} requests failed, {clients} at once"));
    }
    Ok(())
}

/// Sends requests until a point of the clock; returns their times in microseconds, and how many failed.
async fn load(site: &Site, clients: u32, end: u64) -> Result<(Vec<u32>, u32)> {
    let mut running = JoinSet::new();
    for _ in 0..clients {
        let (site, request) = (site.clone(), site.request("GET", "/small", None));
        running.spawn(async move {
            let (mut times, mut failed) = (Vec::new(), 0);
            let mut connection = site.connect().await?;
            while now_ns() < end {
                let start = now_ns();
                match timeout(PATIENCE, connection.get(&request)).await {
                    Ok(Ok(head)) if head.status == 200 => {
                        times.push(((now_ns() - start) / 1_000) as u32);
                        if !head.closes {
                            continue;
                        }
                    }
                    _ => failed += 1,
                }
                connection = site.connect().await?;
            }
            anyhow::Ok((times, failed))
        });
    }
    let (mut times, mut failed) = (Vec::new(), 0);
    while let Some(one) = running.join_next().await {
        let (more, lost) = one??;
        times.extend(more);
        failed += lost;
    }
    Ok((times, failed))
}
