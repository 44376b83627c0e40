//! Members of one JSON object, borrowed from its text in one pass; knows no schema.

use std::borrow::Cow;

use super::{DEPTH_MAX, JsonError, JsonErrorKind, JsonScanner, check_utf8, text};

/// Reader of the members of one object, in the order in which they stand.
///
/// Values are borrowed as they were written. Halves of surrogate pairs are taken: other parsers take them too, and
/// nothing is decoded here. After an error, or behind the last member, the reader is at its end.
///
/// ```
/// use wsproxy_proto::json::members::Members;
///
/// let mut members = Members::of(br#"{"a": [1, 2.50], "b": "\n"}"#, 64)?;
/// let first = members.next().unwrap()?;
/// assert_eq!((&*first.name, first.value), ("a", &b"[1, 2.50]"[..]));
/// # Ok::<(), wsproxy_proto::json::JsonError>(())
/// ```
pub struct Members<'t> {
    scanner: JsonScanner<'t, true>,
    depth_max: usize,
    state: State,
}

/// Member of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member<'t> {
    /// Name, with U+FFFD for each escaped half of a surrogate pair.
    pub name: Cow<'t, str>,
    /// Value as it was written.
    pub value: &'t [u8],
}

enum State {
    First,
    Next,
    End,
}

impl<'t> Members<'t> {
    /// Begins with the object that is all of `text`, of at most `depth_max` levels of arrays and objects (at most
    /// [`DEPTH_MAX`]; the object itself is one).
    ///
    /// # Errors
    /// The text is not UTF-8, or begins with something else than an object.
    pub fn of(text: &'t [u8], depth_max: usize) -> Result<Self, JsonError> {
        check_utf8(text)?;
        let mut scanner = JsonScanner { text, at: 0 };
        if scanner.token()? != b'{' {
            return Err(scanner.previous(JsonErrorKind::Unexpected));
        }
        let Some(depth_max) = depth_max.min(DEPTH_MAX).checked_sub(1) else {
            return Err(scanner.previous(JsonErrorKind::TooDeep));
        };
        Ok(Self { scanner, depth_max, state: State::First })
    }

    fn member(&mut self) -> Result<Option<Member<'t>>, JsonError> {
        let first = match self.state {
            State::End => return Ok(None),
            State::First => self.scanner.token()?,
            State::Next => match self.scanner.token()? {
                b',' => self.scanner.token()?,
                b'}' => return self.scanner.end().map(|()| None),
                _ => return Err(self.scanner.previous(JsonErrorKind::Unexpected)),
            },
        };
        match first {
            b'"' => {}
            b'}' if matches!(self.state, State::First) => return self.scanner.end().map(|()| None),
            _ => return Err(self.scanner.previous(JsonErrorKind::Unexpected)),
        }
        let from = self.scanner.at - 1;
        self.scanner.string()?;
        let name = text::decode_lossy(&self.scanner.text[from..self.scanner.at]);
        if self.scanner.token()? != b':' {
            return Err(self.scanner.previous(JsonErrorKind::Unexpected));
        }
        self.scanner.peek_token();
        let from = self.scanner.at;
        self.scanner.value(self.depth_max)?;
        self.state = State::Next;
        Ok(Some(Member { name, value: &self.scanner.text[from..self.scanner.at] }))
    }
}

impl<'t> Iterator for Members<'t> {
    type Item = Result<Member<'t>, JsonError>;

    fn next(&mut self) -> Option<Self::Item> {
        let member = self.member();
        if !matches!(member, Ok(Some(_))) {
            self.state = State::End;
        }
        member.transpose()
    }
}
#[cfg(test)]
mod tests {
    use super::super::JsonErrorKind::{self, *};
    use super::*;

    #[track_caller]
    fn fails(json: &[u8], offset: usize, kind: JsonErrorKind) {
        let error = Members::of(json, 8).map(|mut members| members.find_map(Result::err));
        let error = error.unwrap_or_else(Some);
        assert_eq!(error, Some(JsonError { offset, kind }), "{json:?}");
    }

    #[test]
    fn what_is_wrong_and_where() {
        fails(b"", 0, End);
        fails(b"[]", 0, Unexpected);
        fails(b"\"a\"", 0, Unexpected);
        fails(b"{", 1, End);
        fails(b"{,", 1, Unexpected);
        fails(b"{1:2}", 1, Unexpected);
        fails(b"{\"a\"}", 4, Unexpected);
        fails(b"{\"a\":}", 5, Unexpected);
        fails(b"{\"a\":1", 6, End);
        fails(b"{\"a\":1,}", 7, Unexpected);
        fails(b"{\"a\":1]", 6, Unexpected);
        fails(b"{\"a\":1}}", 7, Trailing);
        fails(b"{} x", 3, Trailing);
        fails(b"{\"a\":\"\xff\"}", 6, NotUtf8);
        fails(b"{\"a\":[[[[[[[[]]]]]]]]}", 12, TooDeep);
        fails(br#"{"a":"\x"}"#, 7, Escape);
        fails(br#"{"a":"\ud8"}"#, 10, Escape);
        assert!(Members::of(b"{}", 0).is_err());
    }

    #[test]
    fn reader_ends_after_an_error_and_behind_the_last_member() {
        let mut members = Members::of(b"{\"a\":1,!", 8).unwrap();
        assert!(members.next().unwrap().is_ok() && members.next().unwrap().is_err());
        assert!(members.next().is_none());
        let mut members = Members::of(b" { } ", 8).unwrap();
        assert!(members.next().is_none() && members.next().is_none());
    }

    #[test]
    fn halves_of_surrogate_pairs_are_taken() {
        let mut members = Members::of(br#"{"\udc00a":"\ud800\u0000"}"#, 8).unwrap();
        let Member { name, value } = members.next().unwrap().unwrap();
        assert_eq!((&*name, value), ("\u{fffd}a", &br#""\ud800\u0000""#[..]));
        assert_eq!(members.next(), None);
    }
}
