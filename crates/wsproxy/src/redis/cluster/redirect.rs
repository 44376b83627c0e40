//! Reads the errors with which the node of a Cluster sends a request elsewhere. With each of them nothing was done.

use crate::redis::address::RedisEndpoint;

/// The next step for a request that a node did not do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::redis) enum Redirect {
    /// Another node has the slot: `MOVED`.
    Moved {
        /// The slot.
        slot: u16,
        /// The node.
        to: RedisEndpoint,
    },
    /// Another node has the key already, while the slot is on the move: `ASK`.
    Ask(RedisEndpoint),
    /// The keys are on the move, or the node does not serve them for the moment: try again soon.
    Wait,
}

impl Redirect {
    /// Reads an error of the node at `asked`; `None` if it is another one.
    pub(in crate::redis) fn read(error: &str, asked: &RedisEndpoint) -> Option<Self> {
        let mut words = error.split(' ');
        let code = words.next()?;
        match code {
            "MOVED" | "ASK" => {
                let slot = words.next()?.parse::<u16>().ok();
                let slot = slot.filter(|slot| usize::from(*slot) < super::SLOTS)?;
                let (host, port) = words.next()?.rsplit_once(':')?;
                let to = super::line::named(host, port, asked)?;
                Some(if code == "ASK" { Self::Ask(to) } else { Self::Moved { slot, to } })
            }
            "TRYAGAIN" | "CLUSTERDOWN" | "LOADING" | "MASTERDOWN" | "READONLY" => Some(Self::Wait),
            // The scripts read every key before they write, so that a key on the move stops them before that.
            _ if is_on_the_move(error) => Some(Self::Wait),
            _ => None,
        }
    }
}

/// Returns whether a script was stopped at its first key that the node does not serve for the moment.
pub(super) fn is_on_the_move(error: &str) -> bool {
    error.contains(NOT_HERE) || error.contains(DOWN)
}

const NOT_HERE: &str = "Script attempted to access a non local key";

const DOWN: &str = "while the cluster is down";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirections_are_read() {
        let at = |host: &str, port| RedisEndpoint::Tcp { host: host.into(), port, tls: true };
        let read = |error| Redirect::read(error, &at("n1", 7000));
        let moved = |to| Some(Redirect::Moved { slot: 3999, to });
        assert_eq!(read("MOVED 3999 10.0.0.2:6381"), moved(at("10.0.0.2", 6381)));
        assert_eq!(read("MOVED 3999 :6381"), moved(at("n1", 6381)));
        assert_eq!(read("MOVED 3999 ?:6381"), moved(at("n1", 6381)));
        assert_eq!(read("ASK 3999 ::1:6381"), Some(Redirect::Ask(at("::1", 6381))));
        for wait in [
            "TRYAGAIN Multiple keys request during rehashing of slot",
            "CLUSTERDOWN Hash slot not served",
            "LOADING Redis is loading the dataset in memory",
            "ERR Script attempted to access a non local key in a cluster node script: ab, on @user_script:1.",
        ] {
            assert_eq!(read(wait), Some(Redirect::Wait), "{wait}");
        }
        for other in
            ["MOVED", "MOVED x y:1", "MOVED 99999 h:1", "MOVED 1 h:0", "OOM", "NOSCRIPT", ""]
        {
            assert_eq!(read(other), None, "{other}");
        }
    }
}
