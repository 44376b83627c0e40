//! Messages to so many clients that others are delivered in between.

use std::sync::Arc;

use futures_util::future::join_all;
use serde_json::Value;
use tokio::sync::Notify;

use super::{connect, event, send, start_with};
use crate::support::{client::Client, gateway::Backend};

/// Numbers of the events that a client gets, up to the one with number `last`.
async fn numbers(client: &mut Client, last: u64) -> Vec<u64> {
    let mut numbers = Vec::new();
    while numbers.last() != Some(&last) {
        numbers.push(number(&client.json().await));
    }
    numbers
}

fn number(event: &Value) -> u64 {
    event["data"]["n"].as_u64().unwrap_or_else(|| panic!("no number: {event}"))
}

pub(super) async fn a_message_to_many_gives_way_and_keeps_its_place(backend: Backend) {
    let instance =
        Arc::new(start_with(&backend, |config| config.limits.max_connections = 5000).await);
    let mut clients = Vec::new();
    for first in (0..CLIENTS).step_by(50) {
        let opening = (first..first + 50).map(|n| {
            let instance = Arc::clone(&instance);
            async move { connect(&instance, &format!("u-{n}")).await }
        });
        clients.extend(join_all(opening).await);
    }

    // Clients that come and leave meanwhile get a run without holes.
    let over = Arc::new(Notify::new());
    let passers = tokio::spawn({
        let (instance, over) = (Arc::clone(&instance), Arc::clone(&over));
        async move {
            let mut seen = 0;
            let end = over.notified();
            tokio::pin!(end);
            loop {
                let visit = async {
                    let mut client = connect(&instance, "passer").await;
                    let first = number(&client.json().await);
                    for n in first + 1..first + 4 {
                        assert_eq!(number(&client.json().await), n);
                    }
                };
                tokio::select! {
                    () = visit => seen += 1,
                    () = &mut end => return seen,
                }
            }
        }
    });

    for n in 0..BROADCASTS {
        send(&instance, "broadcast", &event(n)).await;
        let user = format!("users/u-{}", n * 37 % CLIENTS);
        send(&instance, &user, &event(PRIVATE + n)).await;
    }
    let last = u64::from(BROADCASTS);
    send(&instance, "broadcast", &event(BROADCASTS)).await;
    for (client, at) in clients.iter_mut().zip(0_u32..) {
        let mut expected = Vec::new();
        for n in 0..BROADCASTS {
            expected.push(u64::from(n));
            if n * 37 % CLIENTS == at {
                expected.push(u64::from(PRIVATE + n));
            }
        }
        expected.push(last);
        assert_eq!(numbers(client, last).await, expected, "client {at}");
    }
    over.notify_one();
    assert!(passers.await.unwrap() > 0);
}

/// More than are written to before other messages are looked at.
const CLIENTS: u32 = 2500;
const BROADCASTS: u32 = 30;
/// Numbers of messages to one user begin here.
const PRIVATE: u32 = 1000;
