//! Many streams at once, and handles that are dropped at any time: nothing is left.

use bytes::Bytes;
use tokio::task::JoinSet;
use wsproxy_conn::{
    clock::Micros,
    lane::{AcceptedStream, LaneEnd, LaneSettings, OpenedStream, Received},
};
use wsproxy_proto::tunnel::code::Code;

use super::pair::{Pair, Random, head, read_all, request, within};

#[tokio::test]
async fn a_thousand_streams_are_open_at_once() {
    let mut pair = Pair::new().await;
    let opened: Vec<_> = (0..1000).map(|_| pair.open(true)).collect();
    let mut accepted = Vec::new();
    while accepted.len() < opened.len() {
        accepted.push(pair.accept().await);
    }
    let mut answers = JoinSet::new();
    for mut stream in accepted.into_iter().rev() {
        answers.spawn(async move {
            let body = Bytes::from(stream.answer.number().to_string());
            stream.answer.send_head(&head(200, false)).unwrap();
            stream.answer.write(body).await.unwrap();
            stream.answer.finish().unwrap();
        });
    }
    for OpenedStream { mut answer, .. } in opened {
        assert_eq!(within(answer.head()).await.unwrap().status, 200);
        let (body, _) = read_all(&mut answer).await.unwrap();
        assert_eq!(body, answer.number().to_string().into_bytes());
    }
    answers.join_all().await;
    pair.is_empty().await;
}

/// Prints what an idle stream costs in user space, without its tasks.
#[tokio::test]
#[ignore = "a measurement, alone in its process"]
async fn idle_streams_cost_little() {
    const COUNT: usize = 4000;
    let mut settings = LaneSettings::default();
    settings.protocol.streams_max = 2 * COUNT as u32;
    let mut pair = Pair::with(&settings).await;
    let mut streams = Vec::with_capacity(2 * COUNT);
    let mut before = 0;
    for round in 0..2 * COUNT {
        if round == COUNT {
            before = resident_bytes();
        }
        let (mut opened, mut accepted) = pair.stream(true).await;
        accepted.answer.send_head(&head(200, false)).unwrap();
        assert_eq!(within(opened.answer.head()).await.unwrap().status, 200);
        streams.push((opened, accepted));
    }
    let each = (resident_bytes() - before) / COUNT;
    println!("{each} bytes for each, with its other end");
}

fn resident_bytes() -> usize {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

/// Does some of what a stream's tasks do, and drops the handles in the middle.
async fn ask(stream: OpenedStream, mut random: Random) {
    let OpenedStream { mut request, mut answer } = stream;
    let uploading = async {
        for _ in 0..random.below(6) {
            if request.write(vec![1; 20_000].into()).await.is_err() {
                return;
            }
        }
        if random.below(2) == 0 && request.finish().is_ok() {
            request.ended().await;
        }
        drop(request);
    };
    let reading = async {
        let mut reads = Random(u64::from(answer.number()));
        if reads.below(4) > 0 && answer.head().await.is_ok() {
            for _ in 0..reads.below(12) {
                if !matches!(answer.read().await, Ok(Received::Data(_))) {
                    break;
                }
            }
        }
        drop(answer);
    };
    tokio::join!(uploading, reading);
}

async fn answer(stream: AcceptedStream, mut random: Random) {
    let AcceptedStream { mut body, mut answer, .. } = stream;
    let reading = async {
        for _ in 0..random.below(12) {
            if !matches!(body.read().await, Ok(Received::Data(_))) {
                break;
            }
        }
        drop(body);
    };
    let mut writes = Random(u64::from(answer.number()) + 5000);
    let writing = async {
        if writes.below(4) == 0 || answer.send_head(&head(200, false)).is_err() {
            return drop(answer);
        }
        for _ in 0..writes.below(6) {
            if answer.write(vec![2; 20_000].into()).await.is_err() {
                return drop(answer);
            }
        }
        if writes.below(2) == 0 {
            let _ = answer.finish();
        }
        drop(answer);
    };
    tokio::join!(reading, writing);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handles_dropped_at_any_time_leave_nothing() {
    let mut pair = Pair::new().await;
    let mut tasks = JoinSet::new();
    let gateway = pair.gateway.clone();
    tasks.spawn(async move {
        let mut streams = JoinSet::new();
        let mut random = Random(42);
        for seed in 1..=400 {
            let stream = loop {
                match gateway.open(&request(random.below(2) == 0)) {
                    Ok(stream) => break stream,
                    Err(_) => tokio::task::yield_now().await,
                }
            };
            streams.spawn(ask(stream, Random(seed)));
            if random.below(20) == 0 {
                tokio::task::yield_now().await;
            }
        }
        streams.join_all().await;
        gateway.drain(Code::Restarting, Micros(60_000_000));
    });
    let mut seed = 1000;
    // The lane ends when no stream is left at the gateway.
    while let Some(stream) = within(pair.acceptor.accept()).await {
        seed += 1;
        tasks.spawn(answer(stream, Random(seed)));
    }
    within(tasks.join_all()).await;
    let expected = [LaneEnd::Drained(Code::Restarting), LaneEnd::GoneAway(Code::Restarting)];
    assert_eq!(pair.ends().await, expected);
    pair.is_empty().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lane_that_is_cut_under_load_ends_every_task() {
    for round in 0..4 {
        let mut pair = Pair::new().await;
        let mut tasks = JoinSet::new();
        for seed in 0..100 {
            let stream = pair.open(seed % 2 == 0);
            tasks.spawn(ask(stream, Random(1 + seed)));
        }
        for seed in 0..(10 * round) {
            let stream = pair.accept().await;
            tasks.spawn(answer(stream, Random(1000 + seed)));
        }
        // The gateway's side, or the agent's.
        pair.tasks[round as usize % 2].abort();
        while let Some(stream) = within(pair.acceptor.accept()).await {
            tasks.spawn(answer(stream, Random(2000)));
        }
        within(tasks.join_all()).await;
        within(pair.gateway.ended()).await;
        pair.is_empty().await;
    }
}
