//! Path of a proxied request: checked, and passed on byte for byte. Knows no upstream and no rule of an agent.

use std::borrow::Cow;

/// Splits the target of a request for `/clusters/{cluster_id}/proxy…` into the cluster's id, still percent-encoded, and
/// the bytes behind `/proxy`, with the query. `None`: the target is another path.
#[must_use]
pub fn split(path_and_query: &str) -> Option<(&str, &str)> {
    let (cluster, rest) = path_and_query.strip_prefix("/clusters/")?.split_once('/')?;
    let behind = rest.strip_prefix("proxy")?;
    let is_whole = behind.is_empty() || behind.starts_with(['/', '?']);
    (is_whole && !cluster.contains('?')).then_some((cluster, behind))
}

/// Returns the target for the upstream: the bytes behind `/proxy`, with the query, and `/` where the path is empty.
///
/// A path passes only where every reader finds the same segments in it. So a segment counts as `.` or `..` behind `%2F`,
/// `\` and `%5C` too, and before parameters (`..;a=b`), which some servers cut off. A query may hold any text.
///
/// # Errors
/// [`BadPath`]
pub fn target(behind: &str) -> Result<Cow<'_, str>, BadPath> {
    let (path, query) = match behind.split_once('?') {
        Some((path, query)) => (path, Some(query)),
        None => (behind, None),
    };
    check(path.as_bytes())?;
    query.map_or(Ok(()), |query| check_text(query.as_bytes()))?;
    if !path.is_empty() {
        return Ok(Cow::Borrowed(behind));
    }
    Ok(query.map_or(Cow::Borrowed("/"), |query| format!("/?{query}").into()))
}

/// Returns the path of a target, without the query.
#[must_use]
pub fn without_query(target: &str) -> &str {
    target.split_once('?').map_or(target, |(path, _)| path)
}

/// Reason why a path does not go to an upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadPath {
    /// A byte up to 0x20, or 0x7f.
    #[error("The path or the query has a control byte or a space.")]
    Control,
    /// `#`
    #[error("The path or the query has a #.")]
    Fragment,
    /// `\`
    #[error("The path has a backslash.")]
    Backslash,
    /// `%` without two hexadecimal digits behind it.
    #[error("The path has a % without two hexadecimal digits behind it.")]
    Percent,
    /// `%00`
    #[error("The path has a %00.")]
    Zero,
    /// `.` or `..` as a segment.
    #[error("The path has a segment that is . or .. when it is decoded.")]
    Dots,
}

/// Checks a path, of which an empty one stands for `/`.
fn check(path: &[u8]) -> Result<(), BadPath> {
    check_text(path)?;
    let mut segment = Segment::default();
    let mut rest = path;
    while let [first, behind @ ..] = rest {
        let byte = match (first, behind) {
            (b'\\', _) => return Err(BadPath::Backslash),
            (b'%', [high, low, behind @ ..]) => {
                rest = behind;
                digit(*high)? << 4 | digit(*low)?
            }
            (b'%', _) => return Err(BadPath::Percent),
            _ => {
                rest = behind;
                *first
            }
        };
        if byte == 0 {
            return Err(BadPath::Zero);
        }
        segment.push(byte)?;
    }
    segment.end()
}

fn check_text(text: &[u8]) -> Result<(), BadPath> {
    let bad = text.iter().find(|byte| matches!(byte, 0..=b' ' | 0x7f | b'#'));
    match bad {
        None => Ok(()),
        Some(b'#') => Err(BadPath::Fragment),
        Some(_) => Err(BadPath::Control),
    }
}

/// Value of a hexadecimal digit.
fn digit(byte: u8) -> Result<u8, BadPath> {
    char::from(byte).to_digit(16).map(|digit| digit as u8).ok_or(BadPath::Percent)
}

/// Part of a segment that was read so far, decoded.
#[derive(Debug, Clone, Copy, Default)]
struct Segment {
    /// Bytes of the segment's name, up to 3.
    bytes: u8,
    /// Whether one of them is no dot.
    has_other: bool,
    /// Whether parameters are read, behind the name.
    is_behind_name: bool,
}

impl Segment {
    fn push(&mut self, byte: u8) -> Result<(), BadPath> {
        match byte {
            b'/' | b'\\' => {
                self.end()?;
                *self = Self::default();
            }
            b';' => self.is_behind_name = true,
            _ if self.is_behind_name => {}
            _ => {
                self.has_other |= byte != b'.';
                self.bytes = (self.bytes + 1).min(3);
            }
        }
        Ok(())
    }

    const fn end(self) -> Result<(), BadPath> {
        match self.bytes {
            1 | 2 if !self.has_other => Err(BadPath::Dots),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_target_is_split_behind_proxy() {
        for (target, expected) in [
            ("/clusters/c1/proxy", Some(("c1", ""))),
            ("/clusters/c1/proxy/", Some(("c1", "/"))),
            ("/clusters/c1/proxy?a=/b", Some(("c1", "?a=/b"))),
            ("/clusters/c1/proxy/a//b?c", Some(("c1", "/a//b?c"))),
            ("/clusters/c%31/proxy/proxy/x", Some(("c%31", "/proxy/x"))),
            ("/clusters//proxy/x", Some(("", "/x"))),
            ("/clusters/c1/proxyx", None),
            ("/clusters/c1/proxy%2Fx", None),
            ("/clusters/c1/connect", None),
            ("/clusters/c1?/proxy", None),
            ("/clusters/c1", None),
            ("/clusters?c1/proxy", None),
            ("//clusters/c1/proxy", None),
            ("/Clusters/c1/proxy", None),
        ] {
            assert_eq!(split(target), expected, "{target}");
        }
    }

    #[test]
    fn good_paths_pass_byte_for_byte() {
        for path in [
            "/",
            "//",
            "/a//b/",
            "/a%2Fb%2f",
            "/a%5Cb",
            "/...",
            "/.../....",
            "/.a/..b/a./b../.a.",
            "/a.b/%2ea",
            "/%2e%2e%2e",
            "/a;b=../c",
            "/;/a",
            "/%252e%252e/",
            "/..%252f",
            "/api/v1/namespaces/a/pods?watch=true&labelSelector=a%3Db",
            "/a?b=/../c",
            "/a?..",
            "/a?b=100%&c=\\%00",
            "/a?b?c",
            "/%C3%A4%ff",
            "/ä?ö",
            "/a:b@c+d,e=f!$&'()*~",
            "/%0a%20%7f",
        ] {
            assert_eq!(target(path).as_deref(), Ok(path));
        }
        for (behind, expected) in [("", "/"), ("?", "/?"), ("?a=b", "/?a=b")] {
            assert_eq!(target(behind).as_deref(), Ok(expected));
        }
    }

    #[test]
    fn bad_paths_are_refused() {
        use BadPath::{Backslash, Control, Dots, Fragment, Percent, Zero};
        for (behind, expected) in [
            ("/.", Dots),
            ("/..", Dots),
            ("/./", Dots),
            ("/a/../b", Dots),
            ("/a/..", Dots),
            ("/a/..?b", Dots),
            ("/%2e", Dots),
            ("/%2E%2e/a", Dots),
            ("/.%2e", Dots),
            ("/%2E./a", Dots),
            ("/a%2F..%2Fb", Dots),
            ("/a%2f%2e%2e", Dots),
            ("/..%2fa", Dots),
            ("/..%5Ca", Dots),
            ("/a%5c..", Dots),
            ("/..;/a", Dots),
            ("/..;a=b/c", Dots),
            ("/%2e%2e%3Bx/c", Dots),
            ("/.;", Dots),
            ("//..//", Dots),
            ("/a\\..\\b", Backslash),
            ("/\\", Backslash),
            ("/%", Percent),
            ("/%2", Percent),
            ("/%2g", Percent),
            ("/%g2", Percent),
            ("/%%30", Percent),
            ("/%+1", Percent),
            ("/%ä", Percent),
            ("/a%00", Zero),
            ("/%00/..", Zero),
            ("/a#b", Fragment),
            ("/a?b#c", Fragment),
            ("/a\r\nb", Control),
            ("/a b", Control),
            ("/a\tb", Control),
            ("/\x7f", Control),
            ("/\0", Control),
            ("/a?b c", Control),
            ("/a?\x01", Control),
        ] {
            assert_eq!(target(behind), Err(expected), "{behind:?}");
        }
    }

    #[test]
    fn the_path_of_a_target_has_no_query() {
        for (target, path) in [("/", "/"), ("/a?b", "/a"), ("/a?b?c", "/a"), ("/?", "/")] {
            assert_eq!(without_query(target), path);
        }
    }

    /// Decodes a path as a server may: `None` where it is malformed.
    fn decoded(path: &str) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut rest = path.as_bytes();
        while let [first, behind @ ..] = rest {
            rest = behind;
            if *first == b'%' {
                let digits = std::str::from_utf8(behind.get(..2)?).ok()?;
                bytes.push(u8::from_str_radix(digits, 16).ok()?);
                rest = &behind[2..];
            } else {
                bytes.push(*first);
            }
        }
        Some(bytes)
    }

    proptest! {
        #[test]
        fn no_segment_of_a_passed_path_leads_upwards(
            path in r"/([./\\;%a]|%2e|%2F|%5c|%00|%3b|\.\.|%25){0,12}(\?[.%/]{0,3})?",
        ) {
            let checked = target(&path);
            let path = without_query(&path);
            let segments = |bytes: &[u8]| {
                bytes.split(|byte| matches!(byte, b'/' | b'\\')).any(|segment| {
                    let name = segment.split(|byte| *byte == b';').next();
                    matches!(name, Some(b"." | b".."))
                })
            };
            match decoded(path) {
                None => prop_assert!(checked.is_err()),
                Some(bytes) => {
                    let is_bad = segments(&bytes) || bytes.contains(&0) || path.contains('\\');
                    prop_assert_eq!(checked.is_err(), is_bad, "{}", path);
                }
            }
        }

        #[test]
        fn any_text_is_passed_whole_or_refused(behind in "/\\PC{0,20}") {
            if let Ok(target) = target(&behind) {
                prop_assert_eq!(&*target, &*behind);
            }
        }
    }
}
