//! Large bodies down and up, one after the other on one connection.

use anyhow::{Result, ensure};

use super::Options;
use crate::clock::now_ns;
use crate::report::Report;
use crate::tunnel::client::{Connection, Site};

/// Runs the case.
pub(super) async fn run(options: &Options, report: &mut Report) -> Result<()> {
    report.set("bytes", options.bytes);
    report.set("times", options.times);
    let processes = options.processes();
    for (name, up) in [("down", false), ("up", true)] {
        let mut connection = options.site.connect().await?;
        if !options.fresh {
            transfer(&mut connection, &options.site, options.bytes, up).await?;
        }
        let (start, cpu) = (now_ns(), processes.cpu());
        for _ in 0..options.times {
            transfer(&mut connection, &options.site, options.bytes, up).await?;
        }
        let (elapsed, spent) = (now_ns() - start, processes.cpu().since(&cpu));
        let all = options.bytes as f64 * f64::from(options.times);
        report.ratio(&format!("{name}_mb_per_s"), all * 1e3, elapsed as f64);
        report.ratio(&format!("{name}_s"), elapsed as f64 / 1e9, f64::from(options.times));
        if !processes.is_empty() {
            report.ratio(&format!("{name}_cpu_s_per_gb"), spent as f64, all);
        }
    }
    Ok(())
}

/// Passes one body.
pub(super) async fn transfer(
    connection: &mut Connection,
    site: &Site,
    bytes: u64,
    up: bool,
) -> Result<()> {
    if !up {
        let head = connection.get(&site.request("GET", &format!("/bytes/{bytes}"), None)).await?;
        ensure!(head.status == 200 && head.length == Some(bytes), "the answer is {head:?}");
        return Ok(());
    }
    connection.send(site.request("POST", "/sink", Some(bytes)).as_bytes()).await?;
    let mut left = bytes;
    while left > 0 {
        let part = left.min(CHUNK.len() as u64);
        connection.send(&CHUNK[..part as usize]).await?;
        left -= part;
    }
    let counted = connection.text("").await?;
    ensure!(counted == bytes.to_string(), "{counted} bytes came of {bytes}");
    Ok(())
}

static CHUNK: &[u8] = &[b'u'; 128 * 1024];
