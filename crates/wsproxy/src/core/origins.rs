//! The origins of browsers that may connect, while an instance runs. Knows no headers.

use std::sync::Arc;

use parking_lot::RwLock;

use crate::config::origin::OriginRule;

/// The allow-list of origins, which a reload of the configuration replaces.
#[derive(Debug)]
pub struct AllowedOrigins(RwLock<Arc<[OriginRule]>>);

impl AllowedOrigins {
    /// Allows the origins that these rules name; none: all.
    #[must_use]
    pub fn new(rules: &[OriginRule]) -> Self {
        Self(RwLock::new(rules.into()))
    }

    /// Returns the rules in force.
    #[must_use]
    pub fn rules(&self) -> Arc<[OriginRule]> {
        Arc::clone(&self.0.read())
    }

    /// Replaces the rules.
    pub fn replace(&self, rules: &[OriginRule]) {
        *self.0.write() = rules.into();
    }
}
