//! Tables that are out of date, Redis that is away, instances and agents that leave.

use wsproxy_conn::clock::Micros;

use super::*;

#[tokio::test]
async fn a_stale_entry_costs_no_request_and_doubles_none() {
    let redis = RedisServer::start();
    let ghost = peered(&redis, "s3");
    let address = ghost.tunnel.peer_bind.unwrap();
    let one = TestInstance::start(peered(&redis, "s1")).await;
    let two = TestInstance::start(peered(&redis, "s2")).await;
    let three = TestInstance::start(ghost).await;
    let seen = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&seen);
    let agent = ClusterAgent::start(two.address(), move |mut stream| {
        counted.fetch_add(1, Relaxed);
        async move {
            let body = read_body(&mut stream).await;
            answer(stream, 200, &format!("{} bytes", body.len())).await;
        }
    })
    .await;
    for n in 0..10 {
        // Another instance is said to have a lane, and one that does not exist.
        let entry = |server: &str, peer: &str| {
            format!(
                r#"{{"server_id":"{server}","peer":"{peer}","boot_id":"b","number":1,"registration":{n}}}"#
            )
        };
        let stale = entry("s3", &format!("http://{address}"));
        let told =
            stale.replacen('{', r#"{"event":"connected","cluster_id":"c1","agent_id":"stale","#, 1);
        redis.call(&["HSET", "tunnel:c1", "stale", &stale]);
        redis.call(&["PUBLISH", "tunnels:events", &told]);
        let mut raw = Raw::connect(one.address()).await;
        raw.write(head("POST", "/", "Content-Length: 50000\r\n").as_bytes()).await;
        raw.write(&[b'x'; 50_000]).await;
        let answer = raw.response().await;
        assert_eq!((answer.status, &*answer.body), (200, "50000 bytes"));
        redis.call(&["HDEL", "tunnel:c1", "stale"]);
    }
    assert_eq!(seen.load(Relaxed), 10);
    assert!(one.metric("wsproxy_tunnel_forwards_missed_total") > 0.0);
    drop(agent);
    for instance in [one, two, three] {
        instance.drain().await;
    }
}

#[tokio::test]
async fn requests_pass_while_redis_is_away() {
    let mut pair = Pair::start().await;
    assert_eq!(pair.ask(&head("GET", "/x", "")).await.status, 200);
    pair.redis.kill();
    eventually("Redis is missed", || !pair.one.gateway().bus.status().connected).await;
    assert_eq!(pair.ask(&head("GET", "/x", "")).await.status, 200);
    // The agent connects again meanwhile, to the other instance.
    let name = Name { number: 2, ..Name::default() };
    let settings = LaneSettings::default();
    let again = ClusterAgent::named(pair.one.address(), name, settings, serve).await.unwrap();
    assert_eq!(pair.ask(&head("GET", "/x", "")).await.status, 200);
    pair.redis.restart();
    let entered = || match pair.redis.call(&["HGET", "tunnel:c1", "node-1"]) {
        Answer::Text(entry) => entry.contains(r#""server_id":"s1""#),
        _ => false,
    };
    eventually("the lane is entered", entered).await;
    // The older lane gives way, and its instance brings requests to the newer one.
    soon("the end of the older lane", pair.agent.lane.going_away()).await.unwrap();
    eventually_yes("requests pass", async || {
        ask(&pair.two, &head("GET", "/x", "")).await.status == 200
    })
    .await;
    drop(again);
    pair.one.drain().await;
    pair.two.drain().await;
}

#[tokio::test]
async fn an_agent_that_comes_back_while_redis_is_away_is_found_by_others() {
    let mut redis = RedisServer::start();
    let mut of_one = peered(&redis, "s1");
    of_one.tunnel.reconnect_grace = Duration::from_secs(10);
    let one = TestInstance::start(of_one).await;
    let two = TestInstance::start(peered(&redis, "s2")).await;
    let agent = ClusterAgent::start(two.address(), serve).await;
    assert_eq!(ask(&one, &head("GET", "/x", "")).await.status, 200);
    redis.kill();
    eventually("Redis is missed", || !one.gateway().bus.status().connected).await;
    let lanes = || two.metric("wsproxy_tunnel_lanes");
    let mut last = agent;
    // It leaves twice: the name of its lane is not used up.
    for number in 2..4 {
        last.cut();
        eventually("the lane has ended", || lanes() == 0.0).await;
        let mut waiting = Raw::connect(one.address()).await;
        waiting.write(head("POST", "/body", "Content-Length: 3\r\n").as_bytes()).await;
        waiting.write(b"one").await;
        let missed = || one.metric("wsproxy_tunnel_forwards_missed_total");
        let before = missed();
        eventually("the other instance was asked", || missed() > before).await;
        let name = Name { number, ..Name::default() };
        let settings = LaneSettings::default();
        last = ClusterAgent::named(two.address(), name, settings, serve).await.unwrap();
        let answer = waiting.response().await;
        assert_eq!((answer.status, &*answer.body), (200, "3 bytes"), "{answer:?}");
    }
    assert!(!one.gateway().bus.status().connected);
    redis.restart();
    drop(last);
    one.drain().await;
    two.drain().await;
}

#[tokio::test]
async fn a_frozen_redis_does_not_hold_requests_without_a_lane() {
    let redis = RedisServer::start();
    let mut config = config(Some(&redis.url()));
    config.redis.response_timeout = Duration::from_millis(300);
    config.tunnel.reconnect_grace = Duration::ZERO;
    let gateway = TestInstance::start(config).await;
    redis.stop();
    for _ in 0..3 {
        // Only Redis could know this cluster.
        let request = head("GET", "/", "").replace("/c1/", "/d1/");
        let began = std::time::Instant::now();
        let refused = ask(&gateway, &request).await;
        assert_eq!((refused.status, refused.header("x-wsproxy-error")), (503, "cluster_offline"));
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
        // The next one finds no connection, and would wait for one.
        eventually("Redis is missed", || !gateway.gateway().bus.status().connected).await;
    }
    redis.cont();
    gateway.drain().await;
}

#[tokio::test]
async fn a_healthy_lane_elsewhere_is_better_than_an_unhealthy_one() {
    let pair = Pair::start().await;
    let name = Name { agent: "node-2", ..Name::default() };
    let settings = LaneSettings::default();
    let here = |stream| async { answer(stream, 200, "here").await };
    let near = ClusterAgent::named(pair.one.address(), name, settings, here).await.unwrap();
    let of_here = async || pair.ask(&head("GET", "/x", "")).await.body == "here";
    assert!(of_here().await);
    near.tell_health(false);
    eventually_yes("the other one is taken", async || !of_here().await).await;
    assert!(!of_here().await);
    // The unhealthy one serves where there is no other.
    pair.agent.lane.drain(Code::Restarting, Micros(0));
    eventually_yes("this one is taken", of_here).await;
    pair.one.drain().await;
    pair.two.drain().await;
}

#[tokio::test]
async fn a_retry_at_another_instance_is_marked() {
    let redis = RedisServer::start();
    let one = TestInstance::start(peered(&redis, "s1")).await;
    let two = TestInstance::start(peered(&redis, "s2")).await;
    let near = ClusterAgent::start(one.address(), serve).await;
    let name = Name { agent: "node-2", ..Name::default() };
    let _far = ClusterAgent::named(two.address(), name, LaneSettings::default(), |stream| async {
        let text = format!("retried: {}", stream.request.retried);
        answer(stream, 200, &text).await;
    })
    .await
    .unwrap();
    let mut raw = Raw::connect(one.address()).await;
    raw.write(head("GET", "/silent", "").as_bytes()).await;
    eventually("it is open", || near.lane.streams() == 1).await;
    near.cut();
    assert_eq!(raw.response().await.body, "retried: true");
    assert_eq!(ask(&one, &head("GET", "/", "")).await.body, "retried: false");
    one.drain().await;
    two.drain().await;
}

#[tokio::test]
async fn an_agent_of_a_killed_instance_is_found_at_its_next_one() {
    let redis = RedisServer::start();
    let mut of_one = peered(&redis, "s1");
    of_one.tunnel.wait = Duration::from_millis(200);
    let one = TestInstance::start(of_one).await;
    let three = TestInstance::start(peered(&redis, "s3")).await;
    let of_killed = peered(&redis, "killed");
    let start = async move || {
        let instance = TestInstance::start(of_killed).await;
        let address = instance.address();
        std::mem::forget(instance);
        address
    };
    let (killed, address) = Killable::start(start).await;
    let agent = ClusterAgent::start(address, serve).await;
    assert_eq!(ask(&one, &head("GET", "/x", "")).await.status, 200);
    let mut raw = Raw::connect(one.address()).await;
    raw.write(head("GET", "/endless", "").as_bytes()).await;
    raw.read_until("xxx").await;
    killed.kill();
    // The answer breaks off.
    while raw.read().await > 0 {}
    assert!(!String::from_utf8_lossy(raw.rest()).ends_with("0\r\n\r\n"));
    let refused = ask(&one, &head("POST", "/x", "Content-Length: 0\r\n")).await;
    assert_eq!(refused.status, 503, "{refused:?}");
    drop(agent);
    let name = Name { number: 2, ..Name::default() };
    let settings = LaneSettings::default();
    let again = ClusterAgent::named(three.address(), name, settings, serve).await.unwrap();
    eventually_yes("requests pass", async || ask(&one, &head("GET", "/x", "")).await.status == 200)
        .await;
    drop(again);
    one.drain().await;
    three.drain().await;
}

#[tokio::test]
async fn a_drained_instance_hands_its_requests_over() {
    let pair = Pair::start().await;
    let (begun, mut begins) = mpsc::channel(1);
    let name = Name { agent: "node-2", ..Name::default() };
    let other = TestInstance::start(peered(&pair.redis, "s3")).await;
    let second = ClusterAgent::named(other.address(), name, LaneSettings::default(), serve);
    let _second = second.await.unwrap();
    let one = pair.one.address();
    let asking = tokio::spawn(async move {
        for n in 0.. {
            let mut raw = Raw::connect(one).await;
            raw.write(head("GET", "/x", "").as_bytes()).await;
            let answer = raw.response().await;
            assert_eq!(answer.status, 200, "{n}: {answer:?}");
            if begun.send(()).await.is_err() {
                return n;
            }
        }
        0
    });
    soon("an answer", begins.recv()).await.unwrap();
    pair.two.drain().await;
    for _ in 0..20 {
        soon("an answer", begins.recv()).await.unwrap();
    }
    drop(begins);
    assert!(soon("the last answer", asking).await.unwrap() > 20);
    pair.one.drain().await;
    other.drain().await;
}
