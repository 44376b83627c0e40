//! Channels and keys of the tunnel.

use crate::names::{Id, Names};

impl Names {
    /// Hash of a cluster's lanes, by the id of the cluster agent.
    #[must_use]
    pub fn tunnel_lanes(&self, cluster: &Id) -> String {
        format!("{}tunnel:{cluster}", self.prefix)
    }

    /// Key of the SHA-256, in hex, of the token with which cluster agents of a cluster connect.
    #[must_use]
    pub fn tunnel_auth(&self, cluster: &Id) -> String {
        format!("{}tunnel:{cluster}:auth", self.prefix)
    }

    /// Channel that announces connected, draining and lost lanes.
    #[must_use]
    pub fn tunnel_events(&self) -> String {
        format!("{}tunnels:events", self.prefix)
    }

    /// Hash of an instance's lanes, by [`Self::tunnel_lane`].
    #[must_use]
    pub fn server_tunnels(&self, server: &str) -> String {
        format!("{}ws:server:{server}:tunnels", self.prefix)
    }

    /// Field of [`Self::server_tunnels`] that stands for one lane.
    #[must_use]
    pub fn tunnel_lane(cluster: &Id, agent: &Id) -> String {
        format!("{cluster}/{agent}")
    }

    /// Cluster and agent of a field that [`Self::tunnel_lane`] made.
    #[must_use]
    pub fn parse_tunnel_lane(field: &[u8]) -> Option<(Id, Id)> {
        let (cluster, agent) = std::str::from_utf8(field).ok()?.split_once('/')?;
        Some((Id::parse(cluster).ok()?, Id::parse(agent).ok()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_contract() {
        let (names, id) = (Names::new("eu"), |text| Id::parse(text).unwrap());
        assert_eq!(Names::new("").tunnel_lanes(&id("c1")), "tunnel:c1");
        assert_eq!(names.tunnel_lanes(&id("c1")), "eu:tunnel:c1");
        assert_eq!(names.tunnel_auth(&id("c1")), "eu:tunnel:c1:auth");
        assert_eq!(names.tunnel_events(), "eu:tunnels:events");
        assert_eq!(names.server_tunnels("i"), "eu:ws:server:i:tunnels");
        let field = Names::tunnel_lane(&id("c1"), &id("node-1"));
        assert_eq!(field, "c1/node-1");
        assert_eq!(Names::parse_tunnel_lane(field.as_bytes()), Some((id("c1"), id("node-1"))));
        for odd in ["c1", "c1/", "/a", "a/b/c", "a/b c"] {
            assert_eq!(Names::parse_tunnel_lane(odd.as_bytes()), None, "{odd}");
        }
    }
}
