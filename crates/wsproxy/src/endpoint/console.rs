//! The console of operators: samples of the last hour, what is wrong, where a client is and why one is gone, and the page
//! that shows it. Knows all families, and none knows it.

use std::sync::Arc;

use axum::{Extension, Router};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    core::Core,
    endpoint::{
        Families,
        console::{ask::Asker, samples::Samples},
    },
};

pub mod api;
mod ask;
mod find;
pub mod page;
mod reach;
mod samples;
mod troubles;
mod words;

/// State of the console.
pub struct Console {
    families: Arc<Families>,
    samples: Samples,
    /// The way to other instances; `None` where the instance has no admin port, or there is no other instance.
    asker: Option<Arc<Asker>>,
}

impl Console {
    /// Starts taking samples and listening to other instances, on `background` until `end`. Without an admin port there is
    /// no page, and an instance does neither.
    #[must_use]
    pub fn start(
        core: &Arc<Core>,
        families: &Arc<Families>,
        background: &TaskTracker,
        end: &CancellationToken,
    ) -> Arc<Self> {
        let has_page = core.config.admin.port.is_some();
        let is_reachable = has_page && core.config.redis.url.is_some();
        let asker = is_reachable.then(Asker::new).map(Arc::new);
        let console = Arc::new(Self {
            families: Arc::clone(families),
            samples: Samples::default(),
            asker: asker.clone(),
        });
        if has_page {
            background.spawn(samples::run(Arc::clone(&console), Arc::clone(core), end.clone()));
        }
        if let Some(asker) = asker {
            let families = Arc::clone(families);
            background.spawn(ask::run(asker, Arc::clone(core), families, end.clone()));
        }
        console
    }

    /// Returns the console's routes of the worker API.
    pub fn api(self: &Arc<Self>) -> Router<Arc<Core>> {
        api::router().layer(Extension(Arc::clone(self)))
    }
}
