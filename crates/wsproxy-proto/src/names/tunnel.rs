//! Channel and keys of the tunnel.

use crate::names::{Id, Names};

impl Names {
    /// Hash of a cluster's lanes, by agent id.
    #[must_use]
    pub fn tunnel_lanes(&self, cluster: &Id) -> String {
        format!("{}tunnel:{cluster}", self.prefix)
    }

    /// String with the SHA-256, in hexadecimal digits, of the token of a cluster's agents.
    #[must_use]
    pub fn tunnel_auth(&self, cluster: &Id) -> String {
        format!("{}tunnel:{cluster}:auth", self.prefix)
    }

    /// Channel on which instances announce lanes.
    #[must_use]
    pub fn tunnel_events(&self) -> String {
        format!("{}tunnels:events", self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_contract() {
        let (names, cluster) = (Names::new("eu"), Id::parse("c1").unwrap());
        assert_eq!(names.tunnel_lanes(&cluster), "eu:tunnel:c1");
        assert_eq!(names.tunnel_auth(&cluster), "eu:tunnel:c1:auth");
        assert_eq!(Names::new("").tunnel_events(), "tunnels:events");
    }
}
