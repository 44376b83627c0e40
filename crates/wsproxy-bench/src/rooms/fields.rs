//! Protobuf fields, as far as a load generator needs them: written by hand, read without a schema.

/// Value of a field.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
    Float(f32),
    Other,
}

/// Returns the fields of a message in their order. They end early where the bytes are no protobuf.
pub(super) fn fields(mut rest: &[u8]) -> impl Iterator<Item = (u64, Value<'_>)> {
    std::iter::from_fn(move || {
        let tag = varint(&mut rest)?;
        let value = match tag & 7 {
            0 => Value::Number(varint(&mut rest)?),
            1 => {
                rest = rest.get(8..)?;
                Value::Other
            }
            2 => {
                let length = usize::try_from(varint(&mut rest)?).ok()?;
                let (bytes, behind) = rest.split_at_checked(length)?;
                rest = behind;
                Value::Bytes(bytes)
            }
            5 => {
                let (four, behind) = rest.split_first_chunk()?;
                rest = behind;
                Value::Float(f32::from_le_bytes(*four))
            }
            _ => return None,
        };
        Some((tag >> 3, value))
    })
}

fn varint(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (byte, behind) = rest.split_first()?;
        *rest = behind;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// Appends a field that holds a number.
pub(super) fn push_number(field: u64, value: u64, out: &mut Vec<u8>) {
    push_varint(field << 3, out);
    push_varint(value, out);
}

/// Appends a field that holds bytes.
pub(super) fn push_bytes(field: u64, bytes: &[u8], out: &mut Vec<u8>) {
    push_varint(field << 3 | 2, out);
    push_varint(bytes.len() as u64, out);
    out.extend_from_slice(bytes);
}

/// Appends a field that holds a float.
pub(super) fn push_float(field: u64, value: f32, out: &mut Vec<u8>) {
    push_varint(field << 3 | 5, out);
    out.extend_from_slice(&value.to_le_bytes());
}

fn push_varint(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_read_as_they_were_written() {
        let mut message = Vec::new();
        push_number(66, 300, &mut message);
        push_bytes(1, b"ab", &mut message);
        push_float(3, 1.5, &mut message);
        let read: Vec<_> = fields(&message).collect();
        let expected = [(66, Value::Number(300)), (1, Value::Bytes(b"ab")), (3, Value::Float(1.5))];
        assert_eq!(read, expected);
        assert_eq!(fields(&message[..message.len() - 1]).count(), 2);
    }
}
