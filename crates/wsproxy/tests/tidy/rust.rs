//! A Rust file cut into code and comments, exactly enough for the checks. Knows no grammar beyond
//! comments and literals.

/// A Rust file.
#[derive(Default)]
pub(crate) struct Rust {
    /// The text with every byte of comments and literals replaced by a space. Lines stay lines.
    pub(crate) code: String,
    /// Its line comments.
    pub(crate) comments: Vec<Comment>,
}

/// One line of a comment.
pub(crate) struct Comment {
    pub(crate) line: usize,
    /// The words behind the marker.
    pub(crate) text: String,
    /// Set for `///` and `//!`.
    pub(crate) is_doc: bool,
    /// Set for the first line of a comment.
    pub(crate) begins: bool,
}

impl Rust {
    pub(crate) fn read(text: &str) -> Self {
        let mut reader = Reader { text, at: 0, line: 1, code: Vec::new(), comments: Vec::new() };
        while reader.at < text.len() {
            reader.step();
        }
        let code = String::from_utf8(reader.code).unwrap();
        Self { code, comments: reader.comments }
    }

    /// The code up to the tests at the file's end. A declaration of tests above other items ends nothing.
    pub(crate) fn shipped(&self) -> &str {
        let mark = "#[cfg(test)]\nmod ";
        let is_end = |at: &usize| {
            let (line, behind) = self.code[*at + mark.len()..].split_once('\n').unwrap_or_default();
            !line.ends_with(';') || behind.trim().is_empty()
        };
        let tests = self.code.match_indices(mark).map(|(at, _)| at).find(is_end);
        &self.code[..tests.unwrap_or(self.code.len())]
    }
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
    line: usize,
    code: Vec<u8>,
    comments: Vec<Comment>,
}

impl Reader<'_> {
    fn step(&mut self) {
        let rest = &self.text[self.at..];
        let byte = rest.as_bytes()[0];
        if rest.starts_with("//") {
            let length = rest.find('\n').unwrap_or(rest.len());
            self.comment(&rest[..length]);
            self.blank(length);
        } else if rest.starts_with("/*") {
            self.blank(block_comment(rest));
        } else if byte == b'"' {
            self.blank(string(rest));
        } else if byte == b'\'' {
            match character(rest) {
                Some(length) => self.blank(length),
                None => self.keep(),
            }
        } else if let Some(length) = raw_string(rest).filter(|_| !self.is_in_word()) {
            self.blank(length);
        } else {
            self.keep();
        }
    }

    fn comment(&mut self, text: &str) {
        let is_doc =
            text.starts_with("//!") || (text.starts_with("///") && !text.starts_with("////"));
        let begins = self
            .comments
            .last()
            .is_none_or(|last| last.line + 1 != self.line || last.is_doc != is_doc);
        let text = text.trim_start_matches(['/', '!']).trim().to_owned();
        self.comments.push(Comment { line: self.line, text, is_doc, begins });
    }

    fn blank(&mut self, length: usize) {
        for byte in self.text.as_bytes()[self.at..self.at + length].iter().copied() {
            self.line += usize::from(byte == b'\n');
            self.code.push(if byte == b'\n' { b'\n' } else { b' ' });
        }
        self.at += length;
    }

    /// Code outside of literals is ASCII, but need not be.
    fn keep(&mut self) {
        let byte = self.text.as_bytes()[self.at];
        if byte.is_ascii() {
            self.line += usize::from(byte == b'\n');
            self.code.push(byte);
            self.at += 1;
        } else {
            self.blank(self.text[self.at..].chars().next().map_or(1, char::len_utf8));
        }
    }

    fn is_in_word(&self) -> bool {
        self.code.last().is_some_and(|byte| byte.is_ascii_alphanumeric() || *byte == b'_')
    }
}

/// The length of a block comment, which may hold others.
fn block_comment(text: &str) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < text.len() {
        let rest = &text.as_bytes()[at..];
        let step = match rest {
            [b'/', b'*', ..] => {
                depth += 1;
                2
            }
            [b'*', b'/', ..] => {
                depth -= 1;
                2
            }
            _ => 1,
        };
        at += step;
        if depth == 0 {
            return at;
        }
    }
    text.len()
}

/// The length of a literal in double quotes.
fn string(text: &str) -> usize {
    let mut is_escaped = false;
    for (at, byte) in text.bytes().enumerate().skip(1) {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' => is_escaped = true,
            b'"' => return at + 1,
            _ => (),
        }
    }
    text.len()
}

/// The length of `r"…"`, `r#"…"#`, and their kinds of bytes.
fn raw_string(text: &str) -> Option<usize> {
    let start = text.strip_prefix('b').unwrap_or(text).strip_prefix('r')?;
    let inner = start.trim_start_matches('#');
    let hashes = &start[..start.len() - inner.len()];
    let inner = inner.strip_prefix('"')?;
    let end = format!("\"{hashes}");
    let length = inner.find(&end).map_or(inner.len(), |at| at + end.len());
    Some(text.len() - inner.len() + length)
}

/// The length of a literal in single quotes; `None` where a lifetime begins.
fn character(text: &str) -> Option<usize> {
    let inner = &text[1..];
    if inner.starts_with('\\') {
        let end = inner.bytes().skip(2).position(|byte| byte == b'\'')?;
        return Some(1 + 2 + end + 1);
    }
    let length = inner.chars().next()?.len_utf8();
    inner[length..].starts_with('\'').then_some(1 + length + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_keeps_no_comment_and_no_literal() {
        let text = "let a = \"x // \\\" y\"; // why\nlet 'b = r#\"\"crate::c\"\"#; /* /* */ d */ '\\'' 'é' b'\"' e";
        let rust = Rust::read(text);
        assert_eq!(rust.code.len(), text.len());
        let words: Vec<_> = rust.code.split_whitespace().collect();
        assert_eq!(words, ["let", "a", "=", ";", "let", "'b", "=", ";", "b", "e"]);
        assert_eq!(rust.comments.len(), 1);
        assert_eq!((rust.comments[0].line, rust.comments[0].text.as_str()), (1, "why"));
    }

    #[test]
    fn comments_know_where_they_begin() {
        let rust = Rust::read("//! One.\n//! Two.\n\n/// Three.\nfn f() {}\n// Four.\n");
        let begins: Vec<_> = rust.comments.iter().map(|c| (c.line, c.is_doc, c.begins)).collect();
        let expected = [(1, true, true), (2, true, false), (4, true, true), (6, false, true)];
        assert_eq!(begins, expected);
    }

    #[test]
    fn lines_are_counted_through_literals() {
        let rust = Rust::read("let a = \"x\ny\";\n/* z\n*/\n// here");
        assert_eq!(rust.comments[0].line, 5);
    }
}
