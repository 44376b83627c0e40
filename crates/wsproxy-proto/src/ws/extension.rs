//! Grammar of `Sec-WebSocket-Extensions` (RFC 6455, section 9.1); knows no extension.

/// Element of the list.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Extension<'a> {
    pub(crate) name: &'a str,
    /// Names of the parameters, and their values without quotes.
    pub(crate) params: Vec<(&'a str, Option<&'a str>)>,
}

/// Returns the elements of a header value. Elements behind a mistake are left out.
pub(crate) fn parse(value: &str) -> impl Iterator<Item = Result<Extension<'_>, Malformed>> {
    let mut rest = Some(value);
    std::iter::from_fn(move || {
        let text = rest.take()?;
        match element(text) {
            Ok((extension, after)) => {
                rest = after;
                Some(Ok(extension))
            }
            Err(Malformed) => Some(Err(Malformed)),
        }
    })
}

/// Error of a header value that does not follow the grammar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Malformed;

fn element(text: &str) -> Result<(Extension<'_>, Option<&str>), Malformed> {
    let (name, mut rest) = token(text)?;
    let mut extension = Extension { name, params: Vec::new() };
    loop {
        rest = skip_space(rest);
        if rest.is_empty() {
            return Ok((extension, None));
        }
        if let Some(after) = rest.strip_prefix(',') {
            return Ok((extension, Some(after)));
        }
        let (name, after) = token(rest.strip_prefix(';').ok_or(Malformed)?)?;
        rest = skip_space(after);
        let mut value = None;
        if let Some(after) = rest.strip_prefix('=') {
            let (found, after) = token_or_quoted(after)?;
            value = Some(found);
            rest = after;
        }
        extension.params.push((name, value));
    }
}

fn token(text: &str) -> Result<(&str, &str), Malformed> {
    let text = skip_space(text);
    let end = text.bytes().position(|byte| !is_token(byte)).unwrap_or(text.len());
    if end == 0 { Err(Malformed) } else { Ok(text.split_at(end)) }
}

/// Reads a value. A quoted value must be a token without its quotes, so it needs no unescaping.
fn token_or_quoted(text: &str) -> Result<(&str, &str), Malformed> {
    let Some(quoted) = skip_space(text).strip_prefix('"') else { return token(text) };
    let (value, rest) = quoted.split_once('"').ok_or(Malformed)?;
    if value.is_empty() || !value.bytes().all(is_token) {
        Err(Malformed)
    } else {
        Ok((value, rest))
    }
}

fn skip_space(text: &str) -> &str {
    text.trim_start_matches([' ', '\t'])
}

/// Returns whether a byte may be in a token (RFC 9110, section 5.6.2).
pub(crate) fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_params_and_quotes() {
        let parsed: Vec<_> = parse("a ; b = 1;c=\"2\" , d").map(Result::unwrap).collect();
        assert_eq!(parsed[0].name, "a");
        assert_eq!(parsed[0].params, [("b", Some("1")), ("c", Some("2"))]);
        assert_eq!(parsed[1], Extension { name: "d", params: vec![] });
    }

    #[test]
    fn a_mistake_ends_the_list() {
        for bad in ["", ";", "a;", "a b", "a;b=", "a;b=\"", "a;b=\"\"", "a;b=\"x y\"", "ä", ","] {
            assert_eq!(parse(bad).collect::<Vec<_>>(), [Err(Malformed)], "{bad:?}");
        }
        let list: Vec<_> = parse("a, b;=, c").collect();
        assert!(list[0].is_ok());
        assert_eq!(list[1..], [Err(Malformed)]);
    }
}
