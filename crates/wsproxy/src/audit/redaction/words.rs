//! Names of members whose values are secret. Knows names, and neither values nor JSON.

/// The names whose values are replaced: those that are built in, and an operator's.
#[derive(Debug, Default)]
pub(super) struct SecretNames {
    /// The operator's names as [`Words::letters`] has them, without their separators.
    more: Vec<Box<[u8]>>,
}

impl SecretNames {
    /// Creates the set; `more` are an operator's names, in any spelling.
    pub(super) fn new(more: &[String]) -> Self {
        let letters = |name: &String| {
            let words = Words::of(name.as_bytes());
            (words.len > 0).then(|| words.letters().into())
        };
        Self { more: more.iter().filter_map(letters).collect() }
    }

    /// Returns whether the value of a member of this name is secret. The name has no escapes.
    pub(super) fn have(&self, name: &[u8]) -> bool {
        if self.more.is_empty() && !may_be_secret(name) {
            return false;
        }
        let words = Words::of(name);
        ENDINGS.iter().any(|ending| words.letters().ends_with(ending))
            || words.is_token()
            || self.more.iter().any(|more| words.end_with(more))
    }
}

/// The last words of a name in small letters, without what stands between them.
struct Words {
    letters: [u8; LETTERS_MAX],
    len: usize,
    /// A bit for each letter that begins a word.
    starts: u64,
    /// Set if the name has letters before these.
    is_cut: bool,
}

impl Words {
    /// Splits a name at everything that is no letter or digit, and where a capital begins a word.
    fn of(name: &[u8]) -> Self {
        let mut words = Self { letters: [0; LETTERS_MAX], len: 0, starts: 0, is_cut: false };
        let from = tail(name);
        words.is_cut = from > 0;
        let mut before = if from > 0 { Kind::of(name[from - 1]) } else { Kind::Other };
        for (index, &byte) in name.iter().enumerate().skip(from) {
            let kind = Kind::of(byte);
            if kind != Kind::Other {
                let next_is_small =
                    name.get(index + 1).is_some_and(|b| Kind::of(*b) == Kind::Small);
                let begins = match before {
                    Kind::Other => true,
                    Kind::Small => kind == Kind::Capital,
                    // The last capital of several begins the next word: API and Key in APIKey.
                    Kind::Capital => kind == Kind::Capital && next_is_small,
                };
                words.starts |= u64::from(begins) << words.len;
                words.letters[words.len] = byte.to_ascii_lowercase();
                words.len += 1;
            }
            before = kind;
        }
        words
    }

    fn letters(&self) -> &[u8] {
        &self.letters[..self.len]
    }

    /// Returns whether whole words at the end are `name`.
    fn end_with(&self, name: &[u8]) -> bool {
        self.letters().ends_with(name) && self.begins_at(self.len - name.len())
    }

    fn begins_at(&self, index: usize) -> bool {
        self.starts >> index & 1 == 1
    }

    /// Returns whether this is a token that opens something: `next_page_token` is none.
    fn is_token(&self) -> bool {
        if !self.letters().ends_with(TOKEN) {
            return false;
        }
        let before = &self.letters[..self.len - TOKEN.len()];
        let is_alone = before.is_empty() && !self.is_cut;
        is_alone
            || TOKENS_OF
                .iter()
                .any(|of| before.ends_with(of) && self.begins_at(before.len() - of.len()))
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Small,
    Capital,
    /// Between words.
    Other,
}

impl Kind {
    const fn of(byte: u8) -> Self {
        match byte {
            b'A'..=b'Z' => Self::Capital,
            byte if is_letter(byte) => Self::Small,
            _ => Self::Other,
        }
    }
}

/// Returns `false` for most names, at little cost: of the last two bytes no secret name ends with.
fn may_be_secret(name: &[u8]) -> bool {
    match name {
        [.., before, last] if is_letter(*before) && is_letter(*last) => {
            LAST_LETTERS.contains(&[before.to_ascii_lowercase(), last.to_ascii_lowercase()])
        }
        _ => true,
    }
}

/// Letters of other alphabets count as letters: they are no separators.
const fn is_letter(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || !byte.is_ascii()
}

/// Returns the start of the last [`LETTERS_MAX`] bytes.
const fn tail(name: &[u8]) -> usize {
    name.len().saturating_sub(LETTERS_MAX)
}

/// Bytes of a name that are looked at, from its end; the length of an operator's names.
const LETTERS_MAX: usize = 64;

/// Ends of names whose values are secret.
const ENDINGS: [&[u8]; 12] = [
    b"password",
    b"passwd",
    b"pwd",
    b"secret",
    b"authorization",
    b"cookie",
    b"credential",
    b"credentials",
    b"signature",
    b"apikey",
    b"privatekey",
    b"accesskey",
];

/// The letters with which [`ENDINGS`] and [`TOKEN`] end.
const LAST_LETTERS: [[u8; 2]; 10] =
    [*b"rd", *b"wd", *b"et", *b"on", *b"ie", *b"al", *b"ls", *b"re", *b"ey", *b"en"];

const TOKEN: &[u8] = b"token";

/// Words before `token` that make it secret.
const TOKENS_OF: [&[u8]; 7] =
    [b"access", b"refresh", b"id", b"auth", b"bearer", b"session", b"csrf"];

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &[&str] = &[
        "password",
        "PASSWORD",
        "Password",
        "db_password",
        "dbPassword",
        "userpassword",
        "passwd",
        "pwd",
        "DB_PWD",
        "secret",
        "client_secret",
        "clientSecret",
        "shared-secret",
        "Authorization",
        "Proxy-Authorization",
        "cookie",
        "Set-Cookie",
        "credential",
        "credentials",
        "awsCredentials",
        "signature",
        "x-hub-signature",
        "api_key",
        "apiKey",
        "APIKey",
        "X-API-Key",
        "apikey",
        "OPENAI_API_KEY",
        "private_key",
        "privateKey",
        "access_key",
        "accessKey",
        "AWSAccessKey",
        "token",
        "Token",
        "TOKEN",
        "_token",
        "access_token",
        "accessToken",
        "accesstoken",
        "refresh_token",
        "id_token",
        "idToken",
        "user_id_token",
        "auth_token",
        "X-Auth-Token",
        "bearer_token",
        "session_token",
        "csrf_token",
        "X-CSRF-Token",
        "password_",
        "my.password",
        "mot de secret",
    ];

    const PLAIN: &[&str] = &[
        "",
        "_",
        "max_tokens",
        "maxTokens",
        "tokens",
        "next_page_token",
        "nextPageToken",
        "page_token",
        "tokenizer",
        "password_hint",
        "passwordless",
        "secretary",
        "secret_id",
        "cookies_enabled",
        "signature_version",
        "key",
        "keys",
        "api",
        "monkey",
        "public_key",
        "primary_key",
        "access_key_id",
        "accessKeyId",
        "valid_token",
        "grid_token",
        "author",
        "path",
        "url",
        "id",
        "name",
        "session",
        "token_type",
        "pwd_file",
        "hasPasswords",
    ];

    #[test]
    fn secret_names_are_those_of_the_list() {
        let names = SecretNames::default();
        for name in SECRET {
            assert!(names.have(name.as_bytes()), "{name} is secret");
        }
        for name in PLAIN {
            assert!(!names.have(name.as_bytes()), "{name} is not secret");
        }
    }

    #[test]
    fn operators_names_match_whole_words_in_any_spelling() {
        let names = SecretNames::new(&["pin_code".into(), "Ssn".into(), "--".into()]);
        for name in
            ["pin_code", "pinCode", "PIN-CODE", "card.pinCode", "ssn", "userSSN", "user_ssn"]
        {
            assert!(names.have(name.as_bytes()), "{name} is secret");
        }
        for name in ["code", "pin", "spincode", "lessn", "ssn_hint", "-"] {
            assert!(!names.have(name.as_bytes()), "{name} is not secret");
        }
        assert!(names.have(b"password"));
    }

    #[test]
    fn long_names_are_judged_by_their_end() {
        let names = SecretNames::default();
        let long = |end: &str| format!("{}{end}", "x".repeat(300));
        assert!(names.have(long("_password").as_bytes()));
        assert!(names.have(long("_access_token").as_bytes()));
        assert!(!names.have(long("_token").as_bytes()));
        let separators = format!("x{}token", "_".repeat(59));
        assert!(!names.have(separators.as_bytes()), "something stands before it");
        assert!(!names.have(long("token").as_bytes()));
    }
}
