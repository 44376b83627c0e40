//! The state of an instance's three connections. Makes none of them.

use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use crate::redis::{answer::Writes, fault::Fault};

/// One of the three connections of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Carries subscriptions and their messages.
    Subscribe,
    /// Carries publishes.
    Publish,
    /// Carries the store's commands.
    Command,
}

impl Purpose {
    /// Returns the name in logs and in the server's `CLIENT LIST`.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Subscribe => "subscribe",
            Self::Publish => "publish",
            Self::Command => "command",
        }
    }
}

/// State of the three connections.
#[derive(Default)]
pub(super) struct Health {
    /// Trouble of each connection, by [`Purpose`]; `None` inside: the connection is being made for the first time.
    troubles: Mutex<[Trouble; 3]>,
    subscribed: AtomicBool,
    /// Set while the connections end at different servers or one is deaf, until a probe proves otherwise.
    differ: AtomicBool,
    pub(super) writes: Writes,
}

#[derive(Default)]
struct Trouble {
    up: bool,
    fault: Option<String>,
}

impl Health {
    pub(super) fn up(&self, purpose: Purpose) {
        self.troubles.lock()[purpose as usize] = Trouble { up: true, fault: None };
    }

    pub(super) fn down(&self, purpose: Purpose, fault: &Fault) {
        self.troubles.lock()[purpose as usize] =
            Trouble { up: false, fault: Some(fault.to_string()) };
    }

    pub(super) fn is_up(&self, purpose: Purpose) -> bool {
        self.troubles.lock()[purpose as usize].up
    }

    pub(super) fn set_subscribed(&self, is: bool) {
        if is {
            self.troubles.lock()[Purpose::Subscribe as usize].fault = None;
        }
        self.subscribed.store(is, Ordering::Release);
    }

    pub(super) fn is_subscribed(&self) -> bool {
        self.subscribed.load(Ordering::Acquire)
    }

    pub(super) fn differ(&self) {
        self.differ.store(true, Ordering::Release);
    }

    pub(super) fn agree(&self) {
        self.differ.store(false, Ordering::Release);
    }

    /// Notes that the connection is up, but refused.
    pub(super) fn denied(&self, why: &str) {
        self.subscribed.store(false, Ordering::Release);
        self.troubles.lock()[Purpose::Subscribe as usize].fault = Some(why.to_owned());
    }

    pub(super) fn report(&self) -> (bool, Option<String>) {
        let troubles = self.troubles.lock();
        let fault = troubles.iter().find_map(|trouble| trouble.fault.clone());
        let differ = self.differ.load(Ordering::Acquire).then(|| Fault::Probe.to_string());
        (troubles.iter().all(|trouble| trouble.up), fault.or(differ))
    }
}
