//! The environment as a value, so that tests can make one. The only file of the gateway that reads variables.

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    path::PathBuf,
};

/// Environment variables. Not `Debug`, since they hold secrets.
#[derive(Clone, Default)]
pub struct Environment(BTreeMap<OsString, OsString>);

impl Environment {
    /// Returns the variables of this process.
    #[must_use]
    #[expect(clippy::disallowed_methods, reason = "this is the one place that reads it")]
    pub fn of_process() -> Self {
        Self(std::env::vars_os().collect())
    }

    /// Returns the value of a variable; `Err` if it is not UTF-8.
    pub(super) fn value(&self, name: &str) -> Option<Result<&str, NotUtf8>> {
        self.0.get(OsStr::new(name)).map(|value| value.to_str().ok_or(NotUtf8))
    }

    /// Returns the path in a variable; `None` if it is empty.
    pub(super) fn path(&self, name: &str) -> Option<PathBuf> {
        self.0.get(OsStr::new(name)).filter(|path| !path.is_empty()).map(PathBuf::from)
    }

    /// Returns whether a variable is set to empty text.
    pub(super) fn is_empty(&self, name: &str) -> bool {
        self.0.get(OsStr::new(name)).is_some_and(|value| value.is_empty())
    }

    /// Returns the names of all variables that are not empty.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        let set = self.0.iter().filter(|(_, value)| !value.is_empty());
        set.filter_map(|(name, _)| name.to_str())
    }

    /// Returns the names that start with [`PREFIX`], in any case, except for those that Kubernetes sets.
    pub(super) fn ours(&self) -> impl Iterator<Item = &str> {
        let named = self.0.iter().filter_map(|(name, value)| Some((name.to_str()?, value)));
        let is_ours = |name: &str| {
            name.get(..PREFIX.len()).is_some_and(|start| start.eq_ignore_ascii_case(PREFIX))
        };
        named
            .filter(move |(name, value)| {
                is_ours(name) && !is_service_link(name, &value.to_string_lossy())
            })
            .map(|(name, _)| name)
    }
}

impl<const N: usize> From<[(&str, &str); N]> for Environment {
    fn from(pairs: [(&str, &str); N]) -> Self {
        Self(pairs.into_iter().map(|(name, value)| (name.into(), value.into())).collect())
    }
}

/// A value that is not UTF-8.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NotUtf8;

/// Returns whether Kubernetes set the variable. It sets the addresses of all services in every container of a
/// namespace; those of a service named `wsproxy` or `wsproxy-…` look like ours.
fn is_service_link(name: &str, value: &str) -> bool {
    let rest = &name[PREFIX.len() - 1..];
    let link = ["tcp://", "udp://", "sctp://"].iter().any(|scheme| value.starts_with(scheme));
    let port = rest.split_once("_PORT_").is_some_and(|(_, after)| {
        let digits = after.trim_start_matches(|c: char| c.is_ascii_digit());
        let protocol = ["_TCP", "_UDP", "_SCTP"].iter().any(|p| digits.starts_with(p));
        protocol && digits.len() < after.len()
    });
    let service = rest.ends_with("_SERVICE_HOST")
        || rest.ends_with("_SERVICE_PORT")
        || rest.contains("_SERVICE_PORT_");
    !rest.contains("__") && (service || port || (link && rest.ends_with("_PORT")))
}

/// Prefix of the gateway's own variables.
pub const PREFIX: &str = "WSPROXY_";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_of_kubernetes_are_not_ours() {
        let environment = Environment::from([
            ("WSPROXY_PORT", "tcp://10.0.0.1:80"),
            ("WSPROXY_SERVICE_HOST", "10.0.0.1"),
            ("WSPROXY_SERVICE_PORT", "80"),
            ("WSPROXY_SERVICE_PORT_HTTP", "80"),
            ("WSPROXY_PORT_80_TCP", "tcp://10.0.0.1:80"),
            ("WSPROXY_PORT_80_TCP_ADDR", "10.0.0.1"),
            ("WSPROXY_ADMIN_PORT_9090_TCP_PROTO", "tcp"),
            ("WSPROXY_ADMIN_SERVICE_HOST", "10.0.0.2"),
            ("PATH", "/bin"),
        ]);
        assert_eq!(environment.ours().count(), 0);
    }

    #[test]
    fn a_slip_of_ours_is_not_taken_for_one_of_kubernetes() {
        let environment = Environment::from([
            ("WSPROXY_PORT", "8080"),
            ("WSPROXY_SERVER_PORT", "8080"),
            ("WSPROXY_SERVER__PORT", "8080"),
        ]);
        assert_eq!(environment.ours().count(), 3);
    }
}
