//! The kinds of values: read from text and written as TOML; knows no keys.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use secrecy::{ExposeSecret, SecretString};

/// A value before it has a type. Numbers and booleans of the file are text here, as in the environment and flags.
#[derive(Debug, Clone)]
pub(super) enum Raw {
    /// A single value.
    Text(String),
    /// An array of values.
    List(Vec<String>),
    /// An array of tables, each with the names and values of its fields.
    Tables(Vec<Vec<(String, Self)>>),
    /// A table, or an array of other values, which no key takes.
    Nested,
}

impl Raw {
    pub(super) fn text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text.trim()),
            Self::List(_) | Self::Tables(_) | Self::Nested => None,
        }
    }
}

/// A kind of value, in both directions.
pub(super) trait ValueKind<T> {
    /// Completes the sentence "must be …".
    fn allowed(&self) -> String;
    /// Reads a value; `None` if it is not allowed.
    fn read(&self, raw: &Raw) -> Option<T>;
    /// Writes a value as TOML, which [`ValueKind::read`] reads as the same value (except for secrets).
    fn write(&self, value: &T) -> String;
    /// Returns whether two values are the same.
    fn is_same(&self, one: &T, other: &T) -> bool {
        self.write(one) == self.write(other)
    }
    /// Returns the part of a value that is not allowed, and the reason; `None` if [`ValueKind::allowed`] suffices.
    fn explain(&self, _raw: &Raw) -> Option<String> {
        None
    }
    /// Returns whether values are secret, so that no problem quotes them.
    fn is_secret(&self) -> bool {
        false
    }
}

/// `true` or `false`.
pub(super) struct Switch;

impl ValueKind<bool> for Switch {
    fn allowed(&self) -> String {
        "true or false".into()
    }
    fn read(&self, raw: &Raw) -> Option<bool> {
        raw.text()?.to_ascii_lowercase().parse().ok()
    }
    fn write(&self, value: &bool) -> String {
        value.to_string()
    }
}

/// An integer between two others.
pub(super) struct Number(pub(super) u64, pub(super) u64);

impl<T: TryFrom<u64> + TryInto<u64> + Copy> ValueKind<T> for Number {
    fn allowed(&self) -> String {
        format!("an integer from {} to {}", self.0, self.1)
    }
    fn read(&self, raw: &Raw) -> Option<T> {
        let number: u64 = raw.text()?.parse().ok()?;
        T::try_from(number).ok().filter(|_| (self.0..=self.1).contains(&number))
    }
    fn write(&self, value: &T) -> String {
        (*value).try_into().unwrap_or(u64::MAX).to_string()
    }
}

/// A fraction of 1, above 0.
pub(super) struct Fraction;

impl ValueKind<f64> for Fraction {
    fn allowed(&self) -> String {
        "a number above 0, at most 1".into()
    }

    fn read(&self, raw: &Raw) -> Option<f64> {
        let share: f64 = raw.text()?.parse().ok()?;
        (share > 0.0 && share <= 1.0).then_some(share)
    }

    fn write(&self, value: &f64) -> String {
        value.to_string()
    }
}

/// A share from none to all.
pub(super) struct Ratio;

impl ValueKind<f64> for Ratio {
    fn allowed(&self) -> String {
        "a number from 0 to 1".into()
    }

    fn read(&self, raw: &Raw) -> Option<f64> {
        raw.text()?.parse().ok().filter(|share| (0.0..=1.0).contains(share))
    }

    fn write(&self, value: &f64) -> String {
        value.to_string()
    }
}

/// A size in bytes between two others.
pub(super) struct Bytes(pub(super) u64, pub(super) u64);

impl ValueKind<usize> for Bytes {
    fn allowed(&self) -> String {
        let [min, max] = [self.0, self.1].map(written_size);
        format!("a size from {min} to {max}, such as 65536 (bytes) or \"64KiB\"")
    }
    fn read(&self, raw: &Raw) -> Option<usize> {
        let text = raw.text()?;
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let number: u64 = text[..digits].parse().ok()?;
        let unit = match text[digits..].trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "kib" => 1 << 10,
            "mib" => 1 << 20,
            "gib" => 1 << 30,
            "kb" => 1_000,
            "mb" => 1_000_000,
            "gb" => 1_000_000_000,
            _ => return None,
        };
        let bytes = number.checked_mul(unit).filter(|bytes| (self.0..=self.1).contains(bytes))?;
        usize::try_from(bytes).ok()
    }
    fn write(&self, value: &usize) -> String {
        let written = written_size(*value as u64);
        if written.ends_with('B') { quoted(&written) } else { written }
    }
}

/// A time between two others, given in milliseconds.
pub(super) struct Time(pub(super) u64, pub(super) u64);

impl ValueKind<Duration> for Time {
    fn allowed(&self) -> String {
        let [min, max] = [self.0, self.1].map(Duration::from_millis).map(written_duration);
        format!("a time from {min} to {max}, such as 30 (seconds) or \"500ms\"")
    }
    fn read(&self, raw: &Raw) -> Option<Duration> {
        let text = raw.text()?;
        let time = match text.parse() {
            Ok(seconds) => Duration::from_secs(seconds),
            Err(_) => humantime::parse_duration(text).ok()?,
        };
        let range = Duration::from_millis(self.0)..=Duration::from_millis(self.1);
        Some(time).filter(|time| range.contains(time))
    }
    fn write(&self, value: &Duration) -> String {
        quoted(&written_duration(*value))
    }
}

/// Whole seconds, for keys that have the unit in their name.
pub(super) struct Seconds(pub(super) u64, pub(super) u64);

impl ValueKind<Duration> for Seconds {
    fn allowed(&self) -> String {
        format!("an integer from {} to {}", self.0, self.1)
    }
    fn read(&self, raw: &Raw) -> Option<Duration> {
        Number(self.0, self.1).read(raw).map(Duration::from_secs)
    }
    fn write(&self, value: &Duration) -> String {
        value.as_secs().to_string()
    }
}

/// An IP address.
pub(super) struct IpAddress;

impl ValueKind<IpAddr> for IpAddress {
    fn allowed(&self) -> String {
        "an IP address, such as \"0.0.0.0\" or \"::\"".into()
    }
    fn read(&self, raw: &Raw) -> Option<IpAddr> {
        raw.text()?.parse().ok()
    }
    fn write(&self, value: &IpAddr) -> String {
        quoted(&value.to_string())
    }
}

/// The permissions of a file. A number without quotes would be read as a decimal one.
pub(super) struct FileMode;

impl ValueKind<u32> for FileMode {
    fn allowed(&self) -> String {
        "four octal digits in quotes, the first a 0, such as \"0660\"".into()
    }
    fn read(&self, raw: &Raw) -> Option<u32> {
        let text = raw.text().filter(|text| text.len() == 4 && text.starts_with('0'))?;
        u32::from_str_radix(text, 8).ok()
    }
    fn write(&self, value: &u32) -> String {
        quoted(&format!("{value:04o}"))
    }
}

/// The path of a unix socket.
pub(super) struct SocketPath;

impl ValueKind<PathBuf> for SocketPath {
    fn allowed(&self) -> String {
        format!("an absolute path of at most {SOCKET_PATH_BYTES_MAX} bytes")
    }
    fn read(&self, raw: &Raw) -> Option<PathBuf> {
        let text = raw.text().filter(|text| text.len() <= SOCKET_PATH_BYTES_MAX)?;
        let is_file = text.starts_with('/') && !text.ends_with('/') && !text.contains('\0');
        is_file.then(|| PathBuf::from(text))
    }
    fn write(&self, value: &PathBuf) -> String {
        FilePath.write(value)
    }
}

/// The path of a file.
pub(super) struct FilePath;

impl ValueKind<PathBuf> for FilePath {
    fn allowed(&self) -> String {
        "the path of a file".into()
    }
    fn read(&self, raw: &Raw) -> Option<PathBuf> {
        raw.text().filter(|text| !text.is_empty()).map(PathBuf::from)
    }
    fn write(&self, value: &PathBuf) -> String {
        quoted(&Path::to_string_lossy(value))
    }
}

/// One of a few words.
pub(super) struct OneOf<T: 'static>(pub(super) &'static [(&'static str, T)]);

impl<T: Copy + PartialEq> ValueKind<T> for OneOf<T> {
    fn allowed(&self) -> String {
        let words: Vec<_> = self.0.iter().map(|(word, _)| quoted(word)).collect();
        format!("one of {}", words.join(", "))
    }
    fn read(&self, raw: &Raw) -> Option<T> {
        let text = raw.text()?;
        self.0.iter().find(|(word, _)| word.eq_ignore_ascii_case(text)).map(|(_, value)| *value)
    }
    fn write(&self, value: &T) -> String {
        quoted(self.0.iter().find(|(_, known)| known == value).map_or("", |(word, _)| word))
    }
}

/// Text with a rule.
pub(super) struct Text {
    /// Completes "must be …".
    pub(super) allowed: &'static str,
    /// Reads the text in the form that the code needs; `None` if it breaks the rule.
    pub(super) read: fn(&str) -> Option<String>,
    /// Returns the part of a text that breaks the rule, and the reason; `None` if `allowed` suffices. Quotes no part
    /// of a text that may hold a secret.
    pub(super) explain: fn(&str) -> Option<String>,
}

impl Text {
    /// Creates a rule whose `allowed` explains every mistake.
    pub(super) const fn new(allowed: &'static str, read: fn(&str) -> Option<String>) -> Self {
        Self { allowed, read, explain: |_| None }
    }
}

impl ValueKind<String> for Text {
    fn allowed(&self) -> String {
        self.allowed.into()
    }
    fn read(&self, raw: &Raw) -> Option<String> {
        (self.read)(raw.text()?)
    }
    fn write(&self, value: &String) -> String {
        quoted(value)
    }
    fn explain(&self, raw: &Raw) -> Option<String> {
        (self.explain)(raw.text()?)
    }
}

/// Text that is never shown.
pub(super) struct Secret(pub(super) Text);

impl ValueKind<SecretString> for Secret {
    fn allowed(&self) -> String {
        self.0.allowed()
    }
    fn read(&self, raw: &Raw) -> Option<SecretString> {
        self.0.read(raw).map(SecretString::from)
    }
    fn write(&self, value: &SecretString) -> String {
        quoted(if value.expose_secret().is_empty() { "" } else { "***" })
    }
    fn is_same(&self, one: &SecretString, other: &SecretString) -> bool {
        one.expose_secret() == other.expose_secret()
    }
    fn explain(&self, raw: &Raw) -> Option<String> {
        self.0.explain(raw)
    }
    fn is_secret(&self) -> bool {
        true
    }
}

/// A value that may be absent, spelled as empty text.
pub(super) struct Optional<K>(pub(super) K);

impl<T, K: ValueKind<T>> ValueKind<Option<T>> for Optional<K> {
    fn allowed(&self) -> String {
        format!("{}; empty: not set", self.0.allowed())
    }
    fn read(&self, raw: &Raw) -> Option<Option<T>> {
        if raw.text() == Some("") { Some(None) } else { self.0.read(raw).map(Some) }
    }
    fn write(&self, value: &Option<T>) -> String {
        value.as_ref().map_or_else(|| quoted(""), |value| self.0.write(value))
    }
    fn is_same(&self, one: &Option<T>, other: &Option<T>) -> bool {
        match (one, other) {
            (Some(one), Some(other)) => self.0.is_same(one, other),
            (one, other) => one.is_none() == other.is_none(),
        }
    }
    fn explain(&self, raw: &Raw) -> Option<String> {
        self.0.explain(raw)
    }
    fn is_secret(&self) -> bool {
        self.0.is_secret()
    }
}

/// An array, or text with commas between the values.
pub(super) struct List<K>(pub(super) K);

impl<T, K: ValueKind<T>> ValueKind<Vec<T>> for List<K> {
    fn allowed(&self) -> String {
        format!("a list, each {}", self.0.allowed())
    }
    fn read(&self, raw: &Raw) -> Option<Vec<T>> {
        elements(raw)?.into_iter().map(|value| self.0.read(&Raw::Text(value))).collect()
    }
    fn write(&self, value: &Vec<T>) -> String {
        let values: Vec<_> = value.iter().map(|value| self.0.write(value)).collect();
        format!("[{}]", values.join(", "))
    }
    fn is_same(&self, one: &Vec<T>, other: &Vec<T>) -> bool {
        let are_same = |(one, other)| self.0.is_same(one, other);
        one.len() == other.len() && one.iter().zip(other).all(are_same)
    }
    fn explain(&self, raw: &Raw) -> Option<String> {
        let elements = elements(raw)?.into_iter().map(Raw::Text).enumerate();
        let broken: Vec<_> = elements
            .filter(|(_, element)| self.0.read(element).is_none())
            .map(|(at, element)| {
                let why = self.0.explain(&element);
                let why = why.unwrap_or_else(|| format!("must be {}", self.0.allowed()));
                let shown = element.text().filter(|_| !self.0.is_secret()).map(shortened);
                let shown = shown.map(|text| format!(" ({})", quoted(&text)));
                format!("element {}{} {why}", at + 1, shown.unwrap_or_default())
            })
            .collect();
        (!broken.is_empty()).then(|| broken.join("; "))
    }
    fn is_secret(&self) -> bool {
        self.0.is_secret()
    }
}

/// Returns the elements of a list as they were given; `None` if there is no list.
fn elements(raw: &Raw) -> Option<Vec<String>> {
    match raw {
        Raw::List(values) => Some(values.clone()),
        // Lines separate values too, for secrets that are mounted as files.
        Raw::Text(text) => {
            let values = text.split([',', '\n']).map(str::trim);
            Some(values.filter(|value| !value.is_empty()).map(str::to_owned).collect())
        }
        Raw::Tables(_) | Raw::Nested => None,
    }
}

/// Returns the beginning of a text, long enough to find it.
fn shortened(text: &str) -> String {
    let mut short: String = text.chars().take(SHOWN_CHARS_MAX).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

/// Returns `text` as a TOML string.
pub(super) fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

fn written_size(bytes: u64) -> String {
    let units = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units.iter().find(|(unit, _)| bytes > 0 && bytes.is_multiple_of(*unit)) {
        Some((unit, name)) => format!("{}{name}", bytes / unit),
        None => bytes.to_string(),
    }
}

fn written_duration(value: Duration) -> String {
    humantime::format_duration(value).to_string()
}

/// Longest path of a unix socket: Linux takes 107 bytes, of which a process that takes a path over needs eight more.
const SOCKET_PATH_BYTES_MAX: usize = 99;

const SHOWN_CHARS_MAX: usize = 60;

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Raw {
        Raw::Text(text.into())
    }

    #[test]
    fn sizes_are_bytes_or_have_a_unit() {
        let kind = Bytes(0, 1 << 31);
        for (given, bytes) in
            [("4096", 4096), ("64KiB", 65536), ("1MB", 1_000_000), ("10 mib", 10 << 20)]
        {
            assert_eq!(kind.read(&text(given)), Some(bytes), "{given}");
        }
        for bad in ["", "-1", "1.5MB", "1TB", "MB", "99GiB", "99999999999999999999"] {
            assert_eq!(kind.read(&text(bad)), None, "{bad}");
        }
        assert_eq!(kind.write(&(10 << 20)), "\"10MiB\"");
        assert_eq!(kind.write(&1500), "1500");
        assert_eq!(kind.write(&0), "0");
    }

    #[test]
    fn times_are_seconds_or_have_a_unit() {
        let kind = Time(0, 86_400_000);
        for (given, ms) in [("30", 30_000), ("500ms", 500), ("1m 30s", 90_000), ("0", 0)] {
            assert_eq!(kind.read(&text(given)), Some(Duration::from_millis(ms)), "{given}");
        }
        for bad in ["", "-1", "soon", "2days", "99999999999999999999999"] {
            assert_eq!(kind.read(&text(bad)), None, "{bad}");
        }
        assert_eq!(kind.write(&Duration::from_millis(1500)), "\"1s 500ms\"");
        assert_eq!(kind.write(&Duration::ZERO), "\"0s\"");
    }

    #[test]
    fn lists_come_as_arrays_or_with_commas() {
        let kind = List(Number(0, 9));
        let one_two = Some(vec![1_u32, 2]);
        assert_eq!(kind.read(&text("1, 2,")), one_two);
        assert_eq!(kind.read(&text("1\n2\n")), one_two);
        assert_eq!(kind.read(&Raw::List(vec!["1".into(), "2".into()])), one_two);
        assert_eq!(kind.read(&text("")), Some(Vec::<u32>::new()));
        assert_eq!(ValueKind::<Vec<u32>>::read(&kind, &text("1,x")), None);
    }

    #[test]
    fn modes_are_octal_and_paths_of_sockets_absolute() {
        assert_eq!(FileMode.read(&text("0660")), Some(0o660));
        assert_eq!(FileMode.write(&0o606), "\"0606\"");
        for bad in ["", "660", "432", "0o660", "1660", "0668", "00660", "0+66"] {
            assert_eq!(FileMode.read(&text(bad)), None, "{bad}");
        }
        assert!(SocketPath.read(&text("/run/wsproxy/wsproxy.sock")).is_some());
        for bad in ["", "run/a.sock", "@a", "/run/", "/a\0b", &format!("/{}", "a".repeat(99))] {
            assert_eq!(SocketPath.read(&text(bad)), None, "{bad}");
        }
    }

    #[test]
    fn a_broken_element_is_named_unless_it_is_secret() {
        let text = Text::new("short", |text| (text.len() < 4).then(|| text.into()));
        let given = Raw::List(vec!["a".into(), "long one".into(), "b".into(), "longer".into()]);
        assert_eq!(
            List(text).explain(&given).unwrap(),
            "element 2 (\"long one\") must be short; element 4 (\"longer\") must be short"
        );
        let text = Text::new("short", |text| (text.len() < 4).then(|| text.into()));
        let secrets = List(Secret(text));
        assert_eq!(
            secrets.explain(&given).unwrap(),
            "element 2 must be short; element 4 must be short"
        );
        assert_eq!(secrets.explain(&Raw::Nested), None);
    }

    #[test]
    fn a_secret_is_never_written() {
        let kind = Secret(Text::new("", |text| Some(text.into())));
        let secret = kind.read(&text("hunter2")).unwrap();
        assert_eq!(kind.write(&secret), "\"***\"");
    }

    #[test]
    fn secrets_that_are_written_alike_are_compared() {
        let kind = || List(Optional(Secret(Text::new("", |text| Some(text.into())))));
        let list =
            |words: [&str; 2]| kind().read(&Raw::List(words.map(str::to_owned).into())).unwrap();
        let same = |one: [&str; 2], other: [&str; 2]| kind().is_same(&list(one), &list(other));
        assert!(same(["a", ""], ["a", ""]));
        assert!(!same(["a", "b"], ["a", "c"]) && !same(["a", ""], ["a", "b"]));
    }
}
