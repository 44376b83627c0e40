//! The state of an instance's connections. Makes none of them.

use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use crate::redis::fault::Fault;

/// The use of a connection.
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

/// State of one connection, which is made again and again.
pub(super) struct Link {
    pub(super) purpose: Purpose,
    is_up: AtomicBool,
    /// `None`: all is well, or the connection is being made for the first time.
    fault: Mutex<Option<String>>,
}

impl Link {
    pub(super) fn new(purpose: Purpose) -> Self {
        Self { purpose, is_up: AtomicBool::new(false), fault: Mutex::default() }
    }

    pub(super) fn up(&self) {
        *self.fault.lock() = None;
        self.is_up.store(true, Ordering::Release);
    }

    pub(super) fn down(&self, fault: &Fault) {
        self.is_up.store(false, Ordering::Release);
        *self.fault.lock() = Some(fault.to_string());
    }

    pub(super) fn is_up(&self) -> bool {
        self.is_up.load(Ordering::Acquire)
    }

    /// Returns whether the connection was lost or could not be made.
    pub(super) fn is_away(&self) -> bool {
        !self.is_up() && self.fault.lock().is_some()
    }

    pub(super) fn fault(&self) -> Option<String> {
        self.fault.lock().clone()
    }
}

/// State of the subscribing connection, and of the instance's connections together.
pub(super) struct Health {
    pub(super) subscribe: Link,
    subscribed: AtomicBool,
    /// Set while the connections end at different servers or one is deaf, until a probe proves otherwise.
    differ: AtomicBool,
}

impl Health {
    pub(super) fn new() -> Self {
        Self {
            subscribe: Link::new(Purpose::Subscribe),
            subscribed: AtomicBool::new(false),
            differ: AtomicBool::new(false),
        }
    }

    pub(super) fn set_subscribed(&self, is: bool) {
        if is {
            *self.subscribe.fault.lock() = None;
        }
        self.subscribed.store(is, Ordering::Release);
    }

    pub(super) fn is_subscribed(&self) -> bool {
        self.subscribed.load(Ordering::Acquire)
    }

    pub(super) fn differ(&self) {
        self.differ.store(true, Ordering::Release);
    }

    pub(super) fn differs(&self) -> bool {
        self.differ.load(Ordering::Acquire)
    }

    pub(super) fn agree(&self) {
        self.differ.store(false, Ordering::Release);
    }

    /// Notes that the subscribing connection is up, but refused.
    pub(super) fn denied(&self, why: &str) {
        self.subscribed.store(false, Ordering::Release);
        *self.subscribe.fault.lock() = Some(why.to_owned());
    }

    /// Returns the trouble of the connections together.
    pub(super) fn trouble(&self) -> Option<String> {
        self.differs().then(|| Fault::Probe.to_string())
    }
}
