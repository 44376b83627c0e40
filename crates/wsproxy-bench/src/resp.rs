//! Redis' protocol, as far as a publisher and a subscriber need it: commands out, flat replies in.

/// One element of a flat array, or a reply by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Value<'a> {
    /// A bulk or simple string.
    Text(&'a [u8]),
    /// An integer.
    Integer(i64),
    /// Nothing.
    Null,
    /// A refusal.
    Error(&'a [u8]),
}

impl<'a> Value<'a> {
    /// The text of a string.
    #[must_use]
    pub fn text(self) -> &'a [u8] {
        match self {
            Value::Text(text) => text,
            _ => b"",
        }
    }
}

/// Appends a command.
pub fn push_command(parts: &[&[u8]], output: &mut Vec<u8>) {
    push_length(b'*', parts.len(), output);
    for part in parts {
        push_length(b'$', part.len(), output);
        output.extend_from_slice(part);
        output.extend_from_slice(b"\r\n");
    }
}

fn push_length(kind: u8, length: usize, output: &mut Vec<u8>) {
    let mut digits = [0u8; 20];
    let mut at = digits.len();
    let mut rest = length;
    loop {
        at -= 1;
        digits[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    output.push(kind);
    output.extend_from_slice(&digits[at..]);
    output.extend_from_slice(b"\r\n");
}

/// Bytes that are not Redis' protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed;

/// Reads one reply from the front of `input` into `values` (one for a plain reply, the elements of a flat
/// array otherwise); returns the number of bytes it took, `None` while it is incomplete.
pub fn read<'a>(input: &'a [u8], values: &mut Vec<Value<'a>>) -> Result<Option<usize>, Malformed> {
    values.clear();
    if input.first() != Some(&b'*') {
        return element(input, 0, values);
    }
    let Some((count, mut at)) = number(input, 1)? else { return Ok(None) };
    for _ in 0..count {
        match element(input, at, values)? {
            Some(next) => at = next,
            None => return Ok(None),
        }
    }
    Ok(Some(at))
}

fn element<'a>(
    input: &'a [u8],
    at: usize,
    values: &mut Vec<Value<'a>>,
) -> Result<Option<usize>, Malformed> {
    let Some(kind) = input.get(at) else { return Ok(None) };
    match kind {
        b'$' => {
            let Some((length, start)) = number(input, at + 1)? else { return Ok(None) };
            let Ok(length) = usize::try_from(length) else {
                values.push(Value::Null);
                return Ok(Some(start));
            };
            if input.len() < start + length + 2 {
                return Ok(None);
            }
            values.push(Value::Text(&input[start..start + length]));
            Ok(Some(start + length + 2))
        }
        b':' => {
            let Some((value, next)) = number(input, at + 1)? else { return Ok(None) };
            values.push(Value::Integer(value));
            Ok(Some(next))
        }
        b'+' | b'-' => {
            let Some(end) = line_end(input, at + 1) else { return Ok(None) };
            let text = &input[at + 1..end];
            values.push(if *kind == b'+' { Value::Text(text) } else { Value::Error(text) });
            Ok(Some(end + 2))
        }
        _ => Err(Malformed),
    }
}

fn number(input: &[u8], at: usize) -> Result<Option<(i64, usize)>, Malformed> {
    let Some(end) = line_end(input, at) else { return Ok(None) };
    let text = std::str::from_utf8(&input[at..end]).map_err(|_| Malformed)?;
    Ok(Some((text.parse().map_err(|_| Malformed)?, end + 2)))
}

fn line_end(input: &[u8], at: usize) -> Option<usize> {
    input.get(at..)?.windows(2).position(|pair| pair == b"\r\n").map(|end| at + end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_spelled_as_redis_reads_them() {
        let mut output = Vec::new();
        push_command(&[b"PUBLISH", b"a", b"hello world"], &mut output);
        assert_eq!(output, b"*3\r\n$7\r\nPUBLISH\r\n$1\r\na\r\n$11\r\nhello world\r\n");
    }

    #[test]
    fn replies_are_read_when_complete_and_not_before() {
        let stream =
            b"*3\r\n$7\r\nmessage\r\n$1\r\na\r\n$2\r\n{}\r\n:12\r\n+OK\r\n-ERR no\r\n$-1\r\n";
        let mut values = Vec::new();
        let mut seen = Vec::new();
        let mut at = 0;
        while at < stream.len() {
            let used = read(&stream[at..], &mut values).unwrap().unwrap();
            for end in at..at + used {
                assert_eq!(read(&stream[at..end], &mut Vec::new()), Ok(None));
            }
            seen.extend_from_slice(&values);
            at += used;
        }
        let expected = [
            Value::Text(b"message"),
            Value::Text(b"a"),
            Value::Text(b"{}"),
            Value::Integer(12),
            Value::Text(b"OK"),
            Value::Error(b"ERR no"),
            Value::Null,
        ];
        assert_eq!(seen, expected);
        assert_eq!(read(b"?x\r\n", &mut values), Err(Malformed));
    }
}
