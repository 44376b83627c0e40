//! `/echo`: sends every message back, so that conformance suites test the production path.

use std::{convert::Infallible, sync::Arc};

use http::{Request, Response};
use hyper::body::Incoming;
use wsproxy_conn::{End, Profile};
use wsproxy_proto::ws::frame::Kind;

use crate::{
    client::event::Event,
    core::{self, Core, recent::Who},
    http::{
        Body,
        handshake::{Opening, credentials::Protocols},
        rejection::Rejection,
    },
    logic::{Actions, Logic},
    telemetry::{
        family::Family,
        metrics::connections,
        scrape::{Scrape, Source},
    },
};

/// The echo family of an instance.
pub struct Echo {
    pub(super) profile: Arc<Profile>,
}

impl Echo {
    /// Starts the family.
    pub(super) fn start(core: &Core) -> Arc<Self> {
        Arc::new(Self { profile: Arc::new(core::profile(&core.config)) })
    }

    /// Opens a connection to the echo, which needs no credentials.
    ///
    /// # Errors
    /// 400, 403, 405, 426, 429, 503.
    pub fn open(
        &self,
        core: &Arc<Core>,
        mut request: Request<Incoming>,
    ) -> Result<Response<Body>, Rejection> {
        let opening = Opening::begin_websocket(
            core,
            &mut request,
            (Family::Echo, &self.profile),
            Protocols::COMMON,
        )?;
        Ok(opening.admit(core)?.accept(core, None, EchoLogic, ()))
    }
}

impl Source for Echo {
    fn collect(&self, scrape: &mut Scrape) {
        connections::collect_profile(Family::Echo, &self.profile, scrape);
    }
}

/// Logic of one connection.
#[derive(Debug)]
pub struct EchoLogic;

impl Logic for EchoLogic {
    type Request = Infallible;
    type Server = ();

    fn on_open(&mut self, _actions: &mut dyn Actions<Infallible>) {}

    fn on_message(&mut self, kind: Kind, payload: &[u8], actions: &mut dyn Actions<Infallible>) {
        actions.reply(kind, payload);
    }

    fn on_event(&mut self, _event: Event, _actions: &mut dyn Actions<Infallible>) {}

    fn who(&self) -> Who<'_> {
        Who::default()
    }

    fn on_end(&mut self, _end: End, _sent: (u64, u64), _actions: &mut dyn Actions<Infallible>) {}
}
