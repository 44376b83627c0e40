//! Fields of one protobuf message in the order in which they stand, borrowed; knows no schema.

/// Bytes that no protobuf decoder reads: they end inside a field, or a field has the number 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Malformed;

/// Value of a field, as its wire type tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Value<'a> {
    Varint(u64),
    Fixed64,
    Bytes(&'a [u8]),
    Fixed32([u8; 4]),
    /// Begin or end of a group, a form of nesting that proto3 does not have. Fields of the group follow like any others.
    Group,
    /// Bytes that the schema knows as a string. The scanner itself never makes one.
    Text(&'a str),
}

/// Scanner of the fields of one message.
#[derive(Debug, Clone)]
pub(super) struct Fields<'a> {
    rest: &'a [u8],
    groups: u32,
    /// Whether a number was longer than its type, which some decoders cut and others refuse.
    pub(super) overlong: bool,
}

impl<'a> Fields<'a> {
    pub(super) fn of(message: &'a [u8]) -> Self {
        Self { rest: message, groups: 0, overlong: false }
    }

    /// Bytes behind the last field that was read.
    pub(super) const fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// Number and value of the next field; `None` at the end.
    #[inline]
    pub(super) fn next(&mut self) -> Result<Option<(u32, Value<'a>)>, Malformed> {
        if self.rest.is_empty() {
            return if self.groups == 0 { Ok(None) } else { Err(Malformed) };
        }
        let tag = self.varint32()?;
        let number = tag >> 3;
        if number == 0 {
            return Err(Malformed);
        }
        let value = match tag & 7 {
            0 => Value::Varint(self.varint()?),
            1 => {
                self.take(8)?;
                Value::Fixed64
            }
            2 => {
                let length = self.varint32()?;
                Value::Bytes(self.take(length as usize)?)
            }
            3 => {
                self.groups += 1;
                Value::Group
            }
            4 => {
                self.groups = self.groups.checked_sub(1).ok_or(Malformed)?;
                Value::Group
            }
            5 => {
                let (four, rest) = self.rest.split_first_chunk().ok_or(Malformed)?;
                self.rest = rest;
                Value::Fixed32(*four)
            }
            _ => return Err(Malformed),
        };
        Ok(Some((number, value)))
    }

    /// Next number of a packed field; `None` at the end.
    pub(super) fn next_packed(&mut self) -> Result<Option<u64>, Malformed> {
        if self.rest.is_empty() { Ok(None) } else { self.varint().map(Some) }
    }

    #[inline]
    fn varint(&mut self) -> Result<u64, Malformed> {
        match *self.rest {
            [byte, ref rest @ ..] if byte < 0x80 => {
                self.rest = rest;
                Ok(u64::from(byte))
            }
            [low, high, ref rest @ ..] if high < 0x80 => {
                self.rest = rest;
                Ok(u64::from(low & 0x7F) | u64::from(high) << 7)
            }
            _ => self.long_varint(),
        }
    }

    fn long_varint(&mut self) -> Result<u64, Malformed> {
        let mut value = 0;
        for (index, &byte) in self.rest.iter().take(10).enumerate() {
            value |= u64::from(byte & 0x7F) << (7 * index);
            if byte < 0x80 {
                self.overlong |= index == 9 && byte > 1;
                self.rest = &self.rest[index + 1..];
                return Ok(value);
            }
        }
        Err(Malformed)
    }

    #[inline]
    fn varint32(&mut self) -> Result<u32, Malformed> {
        let value = self.varint()?;
        self.overlong |= value > u64::from(u32::MAX);
        #[expect(
            clippy::cast_possible_truncation,
            reason = "as lenient decoders do; `overlong` tells"
        )]
        Ok(value as u32)
    }

    #[inline]
    fn take(&mut self, length: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.rest.split_at_checked(length).ok_or(Malformed)?;
        self.rest = rest;
        Ok(taken)
    }
}
