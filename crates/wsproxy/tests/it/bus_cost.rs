//! The cost of the bus on Redis. Run by hand, optimised: the figures of a debug build say little.

use std::{
    fs,
    process::{Command, Stdio},
    sync::Arc,
    time::Instant,
};

use wsproxy::bus::publish::{History, Keep, Publish, Receipt};

use crate::support::{
    bus::{Receipts, TestBus, config, message},
    redis_server::RedisServer,
    soon,
};

/// CPU time of all threads of this process, in microseconds.
fn cpu() -> f64 {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    let nanoseconds = tasks.filter_map(|task| {
        let times = fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
        times.split(' ').next()?.parse::<u64>().ok()
    });
    nanoseconds.sum::<u64>() as f64 / 1000.0
}

#[tokio::test]
#[ignore = "a measurement"]
async fn cpu_time_of_a_message_that_is_read() {
    const MESSAGES: usize = 400_000;
    let server = RedisServer::start();
    let bus = TestBus::on(&config(Some(&server.url())));
    // redis-benchmark fills its random numbers up to twelve digits.
    let channels = (0..100).map(|n| Arc::from(format!("ch:{n:012}"))).collect();
    bus.bus.subscribe(channels).await.unwrap();
    bus.seen.notes(|notes| notes.only_count = true);
    let (cpu_before, start) = (cpu(), Instant::now());
    let mut publisher = Command::new("redis-benchmark")
        .args(["-p", &server.port().to_string(), "-n", &MESSAGES.to_string()])
        .args(["-P", "64", "-c", "4", "-r", "100", "publish", "ch:__rand_int__", &"x".repeat(256)])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    bus.seen.wait_for(MESSAGES).await;
    let (each, elapsed) = ((cpu() - cpu_before) / MESSAGES as f64, start.elapsed());
    publisher.wait().unwrap();
    println!("read: {each:.3} us CPU per message, {MESSAGES} in {elapsed:?}");
}

#[tokio::test]
#[ignore = "a measurement"]
async fn cpu_time_of_a_message_that_is_published() {
    measure_publishing("published", |_| Keep::Nothing).await;
}

#[tokio::test]
#[ignore = "a measurement"]
async fn cpu_time_of_a_message_that_is_published_with_history() {
    let limits = wsproxy::config::HistoryConfig::default().limits();
    let logs: Vec<Arc<str>> = (0..50).map(|n| format!("{{ch:{n}}}:log").into()).collect();
    measure_publishing("published with history", |n| {
        let log = logs[n % logs.len()].clone();
        Keep::History(Box::new(History {
            log,
            clock: None,
            event_id: None,
            dedup: None,
            unique: false,
            limits,
        }))
    })
    .await;
}

async fn measure_publishing(what: &str, keep: impl Fn(usize) -> Keep) {
    const MESSAGES: usize = 400_000;
    let server = RedisServer::start();
    let bus = TestBus::on(&config(Some(&server.url())));
    bus.ready().await;
    let (receipt, mut outcomes): (Arc<dyn Receipt>, _) = Receipts::channel();
    let (cpu_before, start) = (cpu(), Instant::now());
    for n in 0..MESSAGES {
        let receipt = Some(receipt.clone());
        let publish = Publish { receipt, keep: keep(n), ..message("ch", &b"0123456789"[..]) };
        bus.bus.publishable().await;
        assert!(bus.bus.publish(publish).is_ok());
    }
    for _ in 0..MESSAGES {
        soon("an outcome", outcomes.recv()).await.unwrap();
    }
    let (each, elapsed) = ((cpu() - cpu_before) / MESSAGES as f64, start.elapsed());
    println!("{what}: {each:.3} us CPU per message, receipt included, {MESSAGES} in {elapsed:?}");
}

#[tokio::test]
#[ignore = "a measurement"]
async fn memory_and_time_of_a_hundred_thousand_channels() {
    const CHANNELS: usize = 100_000;
    let rss = || {
        let pages = fs::read_to_string("/proc/self/statm").unwrap();
        pages.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
    };
    let server = RedisServer::start();
    let bus = TestBus::on(&config(Some(&server.url())));
    bus.ready().await;
    let channels: Vec<Arc<str>> =
        (0..CHANNELS).map(|n| format!("session:{n:08}:down").into()).collect();
    let (rss_before, cpu_before, start) = (rss(), cpu(), Instant::now());
    for some in channels.chunks(1000) {
        bus.bus.subscribe(some.to_vec()).await.unwrap();
    }
    println!(
        "{CHANNELS} channels: {:?}, {:.3} us CPU and {} bytes each",
        start.elapsed(),
        (cpu() - cpu_before) / CHANNELS as f64,
        (rss() - rss_before) / CHANNELS
    );
}
