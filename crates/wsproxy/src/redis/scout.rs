//! Probes the server to which the name leads now, over a connection made for each probe.
//!
//! After a change of the name's address older connections may live on, and agree with each other.

use std::sync::Arc;

use tokio::time::timeout;

use crate::{
    bus::publish::{Outcome, Publish},
    redis::{
        answer::outcome_of, connect::Part, connection::RedisConnection, fault::Fault,
        publish::spell_publish, resp::RespValue, shared::RedisShared,
    },
};

/// Publishes each message that is put into the scout's outlet, until shutdown.
pub(super) async fn run(shared: Arc<RedisShared>) {
    loop {
        tokio::select! {
            () = shared.scout.nudged() => {}
            () = shared.shutdown.cancelled() => return,
        }
        let Some(publish) = shared.scout.take() else { continue };
        let published = timeout(shared.response_timeout, probe(&shared, &publish));
        let outcome = match published.await {
            Ok(Ok(outcome)) => outcome,
            // A server that accepts no further connection proves nothing about the present ones.
            Ok(Err(error)) => {
                tracing::debug!(%error, "No further connection to Redis can be made now.");
                Outcome::Lost
            }
            Err(_) => Outcome::Lost,
        };
        if let Some(receipt) = publish.receipt {
            receipt.published(outcome);
        }
    }
}

async fn probe(shared: &RedisShared, publish: &Publish) -> Result<Outcome, Fault> {
    let birth = shared.next_birth();
    let name = format!("{}-probe", shared.client_name);
    let master = shared.topology.master().await;
    let mut connection = shared.connector.connect(&master, Part::Master, &name).await?;
    shared.scout.connected(birth);
    spell_publish(publish, false, &mut connection.output);
    answer(&mut connection).await
}

async fn answer(connection: &mut RedisConnection) -> Result<Outcome, Fault> {
    loop {
        if let Some(frame) = connection.input.next()? {
            let (value, _) = RespValue::parse(frame)?;
            if !matches!(value, RespValue::Push(_)) {
                return Ok(outcome_of(&value));
            }
        }
        connection.drive().await?;
    }
}
