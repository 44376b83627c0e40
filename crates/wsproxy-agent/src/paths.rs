//! Paths that an agent serves: prefixes that are allowed or denied, compared by whole segments.

use percent_encoding::percent_decode_str;

/// Rules for paths. A path that is denied is not served, even if it is allowed.
#[derive(Debug, Clone, Default)]
pub struct Paths {
    /// Prefixes of which a path must have one; empty: any path.
    allowed: Vec<Vec<Vec<u8>>>,
    denied: Vec<Vec<Vec<u8>>>,
}

impl Paths {
    /// Reads prefixes such as `/api/v1`.
    ///
    /// # Errors
    /// The name of the list, and its prefix that does not begin with `/`.
    pub fn new(allowed: &[String], denied: &[String]) -> Result<Self, (&'static str, String)> {
        let allowed = prefixes(allowed).map_err(|prefix| ("allow_paths", prefix))?;
        let denied = prefixes(denied).map_err(|prefix| ("deny_paths", prefix))?;
        Ok(Self { allowed, denied })
    }

    /// Returns whether a path is served. A segment that an upstream may take for a way up is never served.
    pub(crate) fn allows(&self, path: &str) -> bool {
        let segments = segments(path);
        if segments.iter().any(|segment| matches!(&segment[..], b"." | b"..")) {
            return false;
        }
        // An upstream may take several slashes for one.
        let merged: Vec<_> =
            segments.iter().filter(|segment| !segment.is_empty()).cloned().collect();
        let is_denied = self.denied.iter().any(|prefix| merged.starts_with(prefix));
        let is_allowed = self.allowed.is_empty()
            || self.allowed.iter().any(|prefix| segments.starts_with(prefix));
        is_allowed && !is_denied
    }
}

fn prefixes(texts: &[String]) -> Result<Vec<Vec<Vec<u8>>>, String> {
    let read = |text: &String| match text.starts_with('/') {
        true => Ok(segments(text).into_iter().filter(|segment| !segment.is_empty()).collect()),
        false => Err(text.clone()),
    };
    texts.iter().map(read).collect()
}

/// Returns the segments of the decoded path: an encoded slash separates too.
fn segments(path: &str) -> Vec<Vec<u8>> {
    let decoded: Vec<u8> = percent_decode_str(path).collect();
    decoded.split(|byte| *byte == b'/').skip(1).map(<[u8]>::to_vec).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(allowed: &[&str], denied: &[&str]) -> Paths {
        let own = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
        Paths::new(&own(allowed), &own(denied)).unwrap()
    }

    #[test]
    fn prefixes_are_whole_segments_of_the_decoded_path() {
        let paths = paths(&["/api/v1", "/healthz/"], &["/api/v1/secrets"]);
        for good in ["/api/v1", "/api/v1/", "/api/v1/pods", "/%61pi/v1/pods", "/healthz"] {
            assert!(paths.allows(good), "{good}");
        }
        for bad in [
            "/",
            "/api",
            "/api/v10",
            "//api/v1",
            "/api/v1/secrets",
            "/api/v1//secrets/a",
            "/api/v1/%73ecrets",
            "/api%2fv1%2Fsecrets",
            "/api/v1/../secrets",
            "/api/v1/%2e%2E/x",
            "/api/v1/a%2f..%2fsecrets",
        ] {
            assert!(!paths.allows(bad), "{bad}");
        }
    }

    #[test]
    fn without_rules_all_paths_are_served_but_ways_up() {
        let paths = Paths::default();
        assert!(paths.allows("/") && paths.allows("//a%2Fb") && paths.allows("/a..b/..."));
        assert!(!paths.allows("/a/.."));
        assert!(Paths::new(&["api".into()], &[]).is_err());
    }
}
