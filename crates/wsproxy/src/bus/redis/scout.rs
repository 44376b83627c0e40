//! Finds out where the server's name leads now: publishes a probe over a connection made for it alone.
//!
//! Links that were made before a name was pointed elsewhere may live on, and agree with each other.

use std::sync::Arc;

use tokio::time::timeout;

use crate::bus::{
    Outcome, Publish,
    redis::{
        Shared, answer::outcome_of, fault::Fault, link::Link, pipeline::spell_publish, resp::Value,
    },
};

/// Publishes each message that is put into the scout's outlet, until shutdown.
pub(super) async fn run(shared: Arc<Shared>) {
    loop {
        tokio::select! {
            () = shared.scout.nudged() => {}
            () = shared.shutdown.cancelled() => return,
        }
        let Some(publish) = shared.scout.take() else { continue };
        let published = timeout(shared.response_timeout, probe(&shared, &publish));
        let outcome = match published.await {
            Ok(Ok(outcome)) => outcome,
            // A server that takes no further connection says nothing about those that there are.
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

async fn probe(shared: &Shared, publish: &Publish) -> Result<Outcome, Fault> {
    let birth = shared.next_birth();
    let mut link = shared.connector.connect(&format!("{}-probe", shared.client_name)).await?;
    shared.scout.connected(birth);
    spell_publish(publish, false, &mut link.output);
    answer(&mut link).await
}

async fn answer(link: &mut Link) -> Result<Outcome, Fault> {
    loop {
        if let Some(frame) = link.input.next()? {
            let (value, _) = Value::parse(frame)?;
            if !matches!(value, Value::Push(_)) {
                return Ok(outcome_of(&value));
            }
        }
        link.drive().await?;
    }
}
