//! W3C Trace Context: the place of a request in a trace, as the headers `traceparent` and `tracestate` carry it. Makes
//! no ids and knows no sampler.

use std::fmt;

use crate::hex::Digits;

/// A span that others name as the parent of theirs.
///
/// ```
/// use wsproxy_proto::trace_context::TraceContext;
///
/// let header = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
/// let context = TraceContext::parse(header.as_bytes()).unwrap();
/// assert!(context.is_sampled);
/// assert_eq!(context.to_string(), header);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceContext {
    /// Id of the trace; not zero.
    pub trace: u128,
    /// Id of the span; not zero.
    pub span: u64,
    /// Whether the span is recorded.
    pub is_sampled: bool,
}

impl TraceContext {
    /// Reads a `traceparent` (section 3.2) of this or a later version; `None` if it is malformed.
    #[must_use]
    pub fn parse(text: &[u8]) -> Option<Self> {
        let (text, rest) = text.split_at_checked(TRACEPARENT_BYTES)?;
        let (version, trace, span, flags) = (&text[..2], &text[3..35], &text[36..52], &text[53..]);
        let has_lengths = [text[2], text[35], text[52]] == [b'-'; 3];
        let has_end = rest.is_empty() || (version != b"00" && rest[0] == b'-');
        let is_good = has_lengths
            && has_end
            && version != b"ff"
            && rest.len() <= LATER_BYTES_MAX
            && rest.iter().all(|byte| byte.is_ascii_graphic());
        if !is_good {
            return None;
        }
        hex(version)?;
        let (trace, span, flags) = (hex(trace)?, hex(span)?, hex(flags)?);
        let span = u64::try_from(span).ok().filter(|span| *span > 0)?;
        (trace > 0).then_some(Self { trace, span, is_sampled: flags & SAMPLED > 0 })
    }
}

/// Writes a `traceparent`.
impl fmt::Display for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { trace, span, is_sampled } = self;
        let (trace, span) = (Digits::<32>::of(*trace), Digits::<16>::of((*span).into()));
        f.write_str("00-")?;
        f.write_str(trace.as_str())?;
        f.write_str("-")?;
        f.write_str(span.as_str())?;
        f.write_str(if *is_sampled { "-01" } else { "-00" })
    }
}

/// Joins the values of `tracestate` headers (section 3.3); `None` if there is nothing that may be passed on.
pub fn read_state<'a>(values: impl Iterator<Item = &'a [u8]>) -> Option<String> {
    let mut state = String::new();
    for value in values {
        let text = std::str::from_utf8(value).ok()?.trim_matches([' ', '\t']);
        let is_good = text.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ');
        if !is_good || state.len() + text.len() >= STATE_BYTES_MAX {
            return None;
        }
        if !state.is_empty() && !text.is_empty() {
            state.push(',');
        }
        state += text;
    }
    let members = state.split(',').filter(|member| !member.trim().is_empty());
    let mut count = 0;
    for member in members {
        count += 1;
        if !member.contains('=') || count > STATE_MEMBERS_MAX {
            return None;
        }
    }
    (count > 0).then_some(state)
}

/// Reads lower-case hexadecimal digits.
fn hex(text: &[u8]) -> Option<u128> {
    text.iter().try_fold(0, |number: u128, byte| {
        let digit = match byte {
            b'0'..=b'9' => byte - b'0',
            b'a'..=b'f' => byte - b'a' + 10,
            _ => return None,
        };
        Some(number << 4 | u128::from(digit))
    })
}

/// Length of a `traceparent` of this version, and of the known part of later ones.
const TRACEPARENT_BYTES: usize = 55;

/// Upper bound of the part that only a later version knows.
const LATER_BYTES_MAX: usize = 200;

/// Bit of the flags.
const SAMPLED: u128 = 1;

/// Upper bound of a state: the length that every implementation has to pass on.
const STATE_BYTES_MAX: usize = 512;

/// Upper bound of the members of a state.
const STATE_MEMBERS_MAX: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
    const SPAN: &str = "b7ad6b7169203331";

    fn parse(text: impl AsRef<str>) -> Option<TraceContext> {
        TraceContext::parse(text.as_ref().as_bytes())
    }

    #[test]
    fn well_formed_contexts_are_read_and_written() {
        let good = format!("00-{TRACE}-{SPAN}-01");
        assert_eq!(parse(&good).unwrap().to_string(), good);
        let unsampled = parse(format!("00-{TRACE}-{SPAN}-00")).unwrap();
        assert!(!unsampled.is_sampled && unsampled.to_string().ends_with("-00"));
        // Other flags of a later version are not passed on.
        assert_eq!(parse(format!("cc-{TRACE}-{SPAN}-03")).unwrap().to_string(), good);
        assert_eq!(parse(format!("cc-{TRACE}-{SPAN}-01-x")), parse(&good));
    }

    #[test]
    fn malformed_contexts_are_no_contexts() {
        let good = format!("00-{TRACE}-{SPAN}-01");
        for text in [
            String::new(),
            good[..54].into(),
            format!("{good}-x"),
            format!("{good} "),
            format!("cc-{TRACE}-{SPAN}-01x"),
            format!("cc-{TRACE}-{SPAN}-01- "),
            format!("cc-{TRACE}-{SPAN}-01-{}", "x".repeat(200)),
            format!("ff-{TRACE}-{SPAN}-01"),
            format!("gg-{TRACE}-{SPAN}-01"),
            format!("00-{}-{SPAN}-01", "0".repeat(32)),
            format!("00-{TRACE}-{}-01", "0".repeat(16)),
            format!("00-{}-{SPAN}-01", TRACE.to_uppercase()),
            format!("00-{SPAN}-{TRACE}-01"),
            format!("000{TRACE}-{SPAN}-01"),
            format!("00-{TRACE}-{SPAN}-g1"),
        ] {
            assert_eq!(parse(&text), None, "{text}");
        }
    }

    #[test]
    fn states_are_joined_and_bounded() {
        let read = |values: &[&str]| read_state(values.iter().map(|value| value.as_bytes()));
        assert_eq!(read(&["a=1,b=2"]).as_deref(), Some("a=1,b=2"));
        assert_eq!(read(&["a=1", " b=2 "]).as_deref(), Some("a=1,b=2"));
        let many = vec!["a=1"; 33].join(",");
        let long = format!("a={}", "x".repeat(512));
        for bad in [&[][..], &[""], &["a"], &["a=\u{e4}"], &["a=\r\n"], &[&many], &[&long]] {
            assert_eq!(read(bad), None, "{bad:?}");
        }
    }
}
