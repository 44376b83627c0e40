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
        let allowed = prefixes(allowed, written).map_err(|prefix| ("allow_paths", prefix))?;
        let denied = prefixes(denied, names).map_err(|prefix| ("deny_paths", prefix))?;
        Ok(Self { allowed, denied })
    }

    /// Returns whether a path is served. A path that upstreams may read differently is never served: with `.` or `..` as
    /// a segment, or with `%00`.
    pub(crate) fn allows(&self, path: &str) -> bool {
        let (written, names) = (written(path), names(path));
        let leads_up = |name: &Vec<u8>| matches!(&name[..], b"." | b"..") || name.contains(&0);
        if names.iter().any(leads_up) {
            return false;
        }
        // An upstream may take several slashes for one.
        let merged: Vec<_> = names.into_iter().filter(|name| !name.is_empty()).collect();
        let is_denied = self.denied.iter().any(|prefix| merged.starts_with(prefix))
            || (!self.denied.is_empty() && has_separator_in_parameters(path));
        // An upstream that keeps parameters finds another path than one that cuts them, and so they are no match.
        let is_allowed = self.allowed.is_empty()
            || self.allowed.iter().any(|prefix| written.starts_with(prefix));
        is_allowed && !is_denied
    }
}

fn prefixes(
    texts: &[String],
    segments: fn(&str) -> Vec<Vec<u8>>,
) -> Result<Vec<Vec<Vec<u8>>>, String> {
    let read = |text: &String| match text.starts_with('/') {
        true => Ok(segments(text).into_iter().filter(|segment| !segment.is_empty()).collect()),
        false => Err(text.clone()),
    };
    texts.iter().map(read).collect()
}

/// Returns the segments of the decoded path: an encoded slash separates too.
fn written(path: &str) -> Vec<Vec<u8>> {
    let decoded: Vec<u8> = percent_decode_str(path).collect();
    decoded.split(|byte| *byte == b'/').skip(1).map(<[u8]>::to_vec).collect()
}

/// Returns the names of the segments as the most generous server reads them: a backslash separates too, and parameters
/// (`;a=b`) are cut off.
fn names(path: &str) -> Vec<Vec<u8>> {
    let decoded: Vec<u8> = percent_decode_str(path).collect();
    let segments = decoded.split(|byte| matches!(byte, b'/' | b'\\')).skip(1);
    segments.map(|segment| until_parameters(segment).to_vec()).collect()
}

fn until_parameters(segment: &[u8]) -> &[u8] {
    segment.split(|byte| *byte == b';').next().unwrap_or_default()
}

/// Returns whether parameters hold an encoded slash or a backslash. A server that cuts parameters before it decodes finds
/// fewer segments in such a path than another one.
fn has_separator_in_parameters(path: &str) -> bool {
    path.split('/').any(|segment| {
        let decoded: Vec<u8> = percent_decode_str(segment).collect();
        let name = until_parameters(&decoded).len();
        decoded[name..].iter().any(|byte| matches!(byte, b'/' | b'\\'))
    })
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
    fn denied_paths_are_found_behind_parameters_and_backslashes() {
        let denying = paths(&[], &["/api/admin"]);
        for bad in [
            "/api/admin;x=1/s",
            "/api;v=1/admin",
            "/api/admin;",
            "/api/admin%3Bx/s",
            "/api/%61dmin%3bx",
            "/api/admin%5Cs",
            "/api%5cadmin",
            "/;x/api/;/admin",
            "/api;x%2Fy/admin",
            "/api%3Bx%5Cy/admin",
            "/api/admin%00s",
        ] {
            assert!(!denying.allows(bad), "{bad}");
        }
        for good in ["/api/admins;x", "/api/x;a=/admin", "/x/api/admin", "/api/%253Badmin"] {
            assert!(denying.allows(good), "{good}");
        }
        // An upstream that keeps parameters would serve what is not allowed.
        let allowing = paths(&["/api/v1"], &[]);
        assert!(allowing.allows("/api/v1/pods;x=1%2F2"));
        assert!(!allowing.allows("/api;x/v1") && !allowing.allows("/api%5Cv1"));
    }

    #[test]
    fn ways_up_are_found_behind_parameters_and_backslashes() {
        for bad in
            ["/..;x/a", "/a/..;", "/%2e%2e%3Bx/c", "/..%5Ca", "/a%5c..", "/a%5C.;x/b", "/a;x%2F.."]
        {
            assert!(!Paths::default().allows(bad), "{bad}");
        }
        assert!(Paths::default().allows("/a;b=..") && Paths::default().allows("/a%5Cb;c%2Fd"));
    }

    #[test]
    fn without_rules_all_paths_are_served_but_ways_up() {
        let paths = Paths::default();
        assert!(paths.allows("/") && paths.allows("//a%2Fb") && paths.allows("/a..b/..."));
        assert!(!paths.allows("/a/.."));
        assert!(Paths::new(&["api".into()], &[]).is_err());
    }
}
