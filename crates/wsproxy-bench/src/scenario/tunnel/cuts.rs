//! The link is cut again and again while POSTs pass: none may come twice, and none that was answered may be missing.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Result;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::{Options, growth_mib};
use crate::clock::now_ns;
use crate::report::Report;
use crate::tunnel::client::Site;

/// Runs the case.
pub(super) async fn run(options: &Options, report: &mut Report) -> Result<()> {
    let direct = options.direct()?;
    let memory = options.memory();
    let first = now_ns() & 0xffff_ffff_ffff;
    let (start, mut number) = (Instant::now(), 0);
    let mut running = JoinSet::new();
    let cutting = tokio::spawn(cut(options.clone()));
    while start.elapsed() < options.duration {
        sleep_until(start + Duration::from_secs(1) * number / options.rate).await;
        let (site, id) = (options.site.clone(), first + u64::from(number));
        running.spawn(async move {
            let end = match timeout(PATIENCE, post(&site, id)).await {
                Ok(Ok(end)) => end,
                Ok(Err(_)) => "broken".to_owned(),
                Err(_) => "no answer".to_owned(),
            };
            (id, end)
        });
        number += 1;
    }
    let cuts = cutting.await??;
    let mut asking = direct.connect().await?;
    let (mut ends, mut twice, mut missing) = (BTreeMap::<String, u32>::new(), 0u32, 0u32);
    while let Some(one) = running.join_next().await {
        let (id, end) = one?;
        let text = asking.text(&direct.request("GET", &format!("/posts/{id}"), None)).await?;
        let came: u32 = text.parse()?;
        twice += u32::from(came > 1);
        missing += u32::from(came == 0 && end == "200");
        *ends.entry(end).or_default() += 1;
    }
    report.figure("posts", number);
    report.figure("cuts", cuts);
    report.figure("twice", twice);
    report.figure("answered_and_missing", missing);
    report.ratio("growth_mib", growth_mib(&options.memory(), &memory), 1.0);
    report.problem_if(twice > 0, || format!("{twice} POSTs came twice"));
    report.problem_if(missing > 0, || format!("{missing} POSTs were answered and never came"));
    for (end, count) in &ends {
        report.figure(&format!("ended_{end}"), *count);
    }
    let unreported = ends.get("no answer").copied().unwrap_or_default();
    report.problem_if(unreported > 0, || format!("{unreported} POSTs got no answer"));
    Ok(())
}

/// Cuts the link at irregular times until the end; returns how often.
async fn cut(options: Options) -> Result<u32> {
    let (start, mut cuts) = (Instant::now(), 0);
    loop {
        // The clock's last digits are as irregular as it needs.
        sleep(Duration::from_millis(300 + now_ns() / 1_000 % 1_400)).await;
        if start.elapsed() >= options.duration {
            return Ok(cuts);
        }
        options.away(Duration::from_millis(20)).await?;
        cuts += 1;
    }
}

async fn post(site: &Site, id: u64) -> Result<String> {
    let mut connection = site.connect().await?;
    connection.send(site.request("POST", &format!("/post/{id}"), Some(4)).as_bytes()).await?;
    connection.send(b"body").await?;
    let head = connection.head().await?;
    connection.skip(head.length.unwrap_or_default()).await?;
    Ok(head.reason.unwrap_or_else(|| head.status.to_string()))
}

const PATIENCE: Duration = Duration::from_secs(30);
