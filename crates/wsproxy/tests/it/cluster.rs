//! Two instances on a Redis Cluster, started from the file of `deploy/redis/cluster`, with the rights that it gives.

use std::sync::Arc;

use wsproxy::config::Config;

use crate::support::{
    cluster::Cluster,
    gateway::{TestInstance, config},
};

mod families;
mod faults;
mod load;
mod receivers;
mod stage;

/// A Cluster with two instances.
struct Pair {
    cluster: Arc<Cluster>,
    one: TestInstance,
    two: TestInstance,
}

impl Pair {
    async fn start() -> Self {
        Self::with(|_| {}).await
    }

    async fn with(change: impl Fn(&mut Config)) -> Self {
        let cluster = Cluster::shared().await;
        let configured = || {
            let mut config = config(Some(&cluster.url()));
            change(&mut config);
            config
        };
        let one = TestInstance::start(configured()).await;
        let two = TestInstance::start(configured()).await;
        Self { cluster, one, two }
    }

    async fn drain(self) {
        self.one.drain().await;
        self.two.drain().await;
    }
}
