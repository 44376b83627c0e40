//! HELLO: the first frame each way, which says what its sender takes. Knows no lane.

use crate::tunnel::{
    HEAD_BYTES_MAX, STREAMS_MAX, VERSION, WINDOW, WINDOW_MAX,
    fields::{self, Fields},
};

/// Sender of a lane's frames, as HELLO describes it (§3). Members whose tag is absent have their defaults.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello<'a> {
    /// Lowest and highest version of the frames.
    pub versions: (u8, u8),
    /// Id of the gateway's instance; empty for an agent. At most [`TEXT_BYTES_MAX`] bytes.
    pub instance: &'a str,
    /// Bits of optional parts of the protocol; none is defined yet.
    pub capabilities: u64,
    /// Streams that may be open at once.
    pub streams_max: u32,
    /// Credit of each stream towards the sender at the stream's start, in bytes; 1 to 2^31 - 1.
    pub window: u32,
    /// Upper bound of the payload of OPEN, HEAD and TRAILERS that the sender takes, in bytes.
    pub head_bytes_max: u32,
    /// Interval of pings, in milliseconds; 0: not said.
    pub ping_ms: u32,
    /// Time that a drain takes, in milliseconds; 0: not said.
    pub drain_ms: u32,
    /// Version of the program. At most [`TEXT_BYTES_MAX`] bytes.
    pub build: &'a str,
}

impl Default for Hello<'_> {
    fn default() -> Self {
        Self {
            versions: (VERSION, VERSION),
            instance: "",
            capabilities: 0,
            streams_max: STREAMS_MAX,
            window: WINDOW,
            head_bytes_max: HEAD_BYTES_MAX,
            ping_ms: 0,
            drain_ms: 0,
            build: "",
        }
    }
}

impl<'a> Hello<'a> {
    /// Reads the payload of HELLO. Unknown tags are skipped; of a tag that stands twice, the last one counts. `None`:
    /// the payload is cut, a value has another size, or one is out of its bounds.
    pub(crate) fn parse(payload: &'a [u8]) -> Option<Self> {
        let mut hello = Self { versions: (0, 0), ..Self::default() };
        let mut fields = Fields(payload);
        while !fields.0.is_empty() {
            let (tag, value) = (fields.u8()?, fields.long()?);
            let value_fields = Fields(value);
            match tag {
                1 => {
                    let versions = |fields: &mut Fields<'_>| Some((fields.u8()?, fields.u8()?));
                    hello.versions = value_fields.last(versions)?;
                }
                2 => hello.instance = text(value)?,
                3 => hello.capabilities = value_fields.last(Fields::u64)?,
                4 => hello.streams_max = value_fields.last(Fields::u32)?,
                5 => hello.window = value_fields.last(Fields::u32)?,
                6 => hello.head_bytes_max = value_fields.last(Fields::u32)?,
                7 => hello.ping_ms = value_fields.last(Fields::u32)?,
                8 => hello.drain_ms = value_fields.last(Fields::u32)?,
                9 => hello.build = text(value)?,
                _ => {}
            }
        }
        hello.is_valid().then_some(hello)
    }

    pub(crate) fn is_valid(&self) -> bool {
        let (lowest, highest) = self.versions;
        (1..=highest).contains(&lowest) && (1..=WINDOW_MAX).contains(&self.window)
    }

    /// Appends the payload of HELLO.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        let mut put = |tag: u8, value: &[u8]| {
            out.push(tag);
            fields::put_long(value, out);
        };
        put(1, &[self.versions.0, self.versions.1]);
        if !self.instance.is_empty() {
            put(2, fields::start(self.instance, TEXT_BYTES_MAX).as_bytes());
        }
        put(3, &self.capabilities.to_be_bytes());
        put(4, &self.streams_max.to_be_bytes());
        put(5, &self.window.to_be_bytes());
        put(6, &self.head_bytes_max.to_be_bytes());
        put(7, &self.ping_ms.to_be_bytes());
        put(8, &self.drain_ms.to_be_bytes());
        if !self.build.is_empty() {
            put(9, fields::start(self.build, TEXT_BYTES_MAX).as_bytes());
        }
    }

    /// Returns the highest version that both sides speak.
    #[must_use]
    pub fn agreed_version(&self, other: &Self) -> Option<u8> {
        let lowest = self.versions.0.max(other.versions.0);
        let highest = self.versions.1.min(other.versions.1);
        (lowest <= highest).then_some(highest)
    }
}

fn text(value: &[u8]) -> Option<&str> {
    str::from_utf8(value).ok().filter(|text| text.len() <= TEXT_BYTES_MAX)
}

/// Upper bound of the texts in HELLO, in bytes.
pub const TEXT_BYTES_MAX: usize = 128;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_tags_are_skipped_and_absent_ones_have_defaults() {
        let read = Hello::parse(b"\x01\0\x02\x01\x02\xee\0\x03abc").unwrap();
        assert_eq!(read, Hello { versions: (1, 2), ..Hello::default() });
        assert_eq!(read.agreed_version(&Hello::default()), Some(1));
        let newer = Hello { versions: (2, 3), ..read };
        assert_eq!(newer.agreed_version(&Hello::default()), None);
    }

    #[test]
    fn bad_hellos_are_refused() {
        for bad in [
            &b""[..],
            b"\x01\0\x02\0\x01",
            b"\x01\0\x02\x02\x01",
            b"\x01\0\x01\x01",
            b"\x01\0\x03\x01\x01\x01",
            b"\x01\0\x02\x01",
            b"\x01\0\x02\x01\x01\x05\0\x04\0\0\0\0",
            b"\x01\0\x02\x01\x01\x05\0\x04\x80\0\0\0",
            b"\x01\0\x02\x01\x01\x09\0\x01\xff",
        ] {
            assert_eq!(Hello::parse(bad), None, "{bad:?}");
        }
    }
}
