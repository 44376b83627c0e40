//! Metrics of sessions.

use crate::{
    endpoint::session::{SessionCounters, Sessions},
    registry::sessions::SessionLogCounters,
    telemetry::{
        family::Family,
        metrics::{connections, messages},
        scrape::{Scrape, Source},
    },
};

impl Source for Sessions {
    fn collect(&self, scrape: &mut Scrape) {
        connections::collect_profile(Family::Sessions, &self.profile, scrape);
        self.counters.collect(scrape);
        match &self.log {
            Some(log) => log.collect(scrape),
            None => SessionLogCounters::default().collect(scrape),
        }
    }
}

impl Source for SessionCounters {
    fn collect(&self, scrape: &mut Scrape) {
        let errors = [
            ("invalid", &self.upstream.invalid),
            ("bad_command", &self.bad_commands),
            ("unannounced", &self.unannounced),
            ("lost", &self.upstream.lost),
            ("refused", &self.upstream.refused),
        ];
        messages::collect_errors(Family::Sessions, errors, scrape);
        messages::collect_unheard(Family::Sessions, &self.upstream.unheard, scrape);
    }
}
