//! Clients that leave, and deadlines that pass: how soon the connection to the service is closed.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::time::sleep;

use super::{Options, histogram, open_all};
use crate::clock::{NS_PER_SECOND, now_ns, ns};
use crate::report::Report;
use crate::tunnel::client::{Connection, READ_BYTES, Site};

/// Runs the case, for clients that read, that wait for a head, and that have stopped reading.
pub(super) async fn run(options: &Options, report: &mut Report) -> Result<()> {
    let direct = options.direct()?;
    let mut asking = direct.connect().await?;
    // Ids of this run: the service may have served others.
    let mut id = now_ns() & 0xffff_ffff_ffff;
    for state in ["streaming", "waiting", "stalled"] {
        let mut times = histogram()?;
        let mut open = 0u32;
        for _ in 0..options.connections {
            id += 1;
            let connection = begin(&options.site, state, id).await?;
            began(&mut asking, &direct, id).await?;
            if state == "stalled" {
                // Until nothing moves any more.
                sleep(Duration::from_millis(30)).await;
            }
            let left = now_ns();
            drop(connection);
            match ended(&mut asking, &direct, id, left).await? {
                Some(end) => times.saturating_record(end.saturating_sub(left)),
                None => open += 1,
            }
        }
        report.quantiles(state, &times);
        report.problem_if(open > 0, || {
            format!("{open} connections to the service were open after a second ({state})")
        });
    }
    Ok(())
}

/// Lets the deadline for a head and that for a body without a byte pass, for all clients at once. The server has to be
/// configured with the deadline that the options say.
pub(super) async fn deadlines(options: &Options, report: &mut Report) -> Result<()> {
    let direct = options.direct()?;
    let mut asking = direct.connect().await?;
    report.set("connections", options.connections);
    let mut id = now_ns() & 0xffff_ffff_ffff;
    // Heads come last: the breaker lets no request through behind so many that are late.
    for (name, path) in [("idle", "/idle"), ("head", "/hold/60000")] {
        let first = id + 1;
        let opened = open_all(options.connections, |number| {
            let site = options.site.clone();
            async move {
                let mut connection = site.connect().await?;
                let path = format!("{path}?id={}", first + u64::from(number));
                connection.send(site.request("GET", &path, None).as_bytes()).await?;
                Ok(connection)
            }
        })
        .await?;
        id += u64::from(options.connections);
        sleep(options.deadline + Duration::from_secs(1)).await;
        let (mut times, mut open) = (histogram()?, 0u32);
        for id in first..=id {
            let (start, end) = times_of(&mut asking, &direct, id).await?;
            ensure!(start > 0, "the service has got no request ({name})");
            let due = start + ns(options.deadline);
            if end > 0 {
                times.saturating_record(end.saturating_sub(due));
            } else {
                open += 1;
            }
        }
        drop(opened);
        report.quantiles(&format!("{name}_late"), &times);
        report.problem_if(open > 0, || {
            format!("{open} connections to the service were open a second late ({name})")
        });
    }
    Ok(())
}

/// Sends a request of a client that is going to leave.
async fn begin(site: &Site, state: &str, id: u64) -> Result<Connection> {
    let path = if state == "waiting" { "/hold/60000" } else { "/endless" };
    let mut connection =
        if state == "stalled" { site.connect_narrow().await? } else { site.connect().await? };
    let request = site.request("GET", &format!("{path}?id={id}"), None);
    connection.send(request.as_bytes()).await?;
    if state != "waiting" {
        connection.head().await?;
    }
    if state == "streaming" {
        let mut scratch = vec![0; READ_BYTES];
        for _ in 0..32 {
            connection.some(&mut scratch).await?;
        }
    }
    Ok(connection)
}

async fn times_of(asking: &mut Connection, direct: &Site, id: u64) -> Result<(u64, u64)> {
    let text = asking.text(&direct.request("GET", &format!("/times/{id}"), None)).await?;
    let (start, end) = text.split_once(' ').context("no times")?;
    Ok((start.parse()?, end.parse()?))
}

/// Waits until the service has a request.
async fn began(asking: &mut Connection, direct: &Site, id: u64) -> Result<()> {
    for _ in 0..5_000 {
        if times_of(asking, direct, id).await?.0 > 0 {
            return Ok(());
        }
        sleep(Duration::from_millis(1)).await;
    }
    anyhow::bail!("the service has got no request")
}

/// Returns when the service lost a request; `None` where that was not within a second.
async fn ended(asking: &mut Connection, direct: &Site, id: u64, left: u64) -> Result<Option<u64>> {
    while now_ns() < left + NS_PER_SECOND {
        let (_, end) = times_of(asking, direct, id).await?;
        if end > 0 {
            return Ok(Some(end));
        }
        sleep(Duration::from_millis(2)).await;
    }
    Ok(None)
}
