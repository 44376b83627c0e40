//! Why a server did not do what it was asked, read from its error. Knows no connection.

/// Why something was certainly not done. The same request may be sent again without being done twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotDone {
    /// The store holds as much as it may: `OOM`.
    Memory,
    /// Too few replicas are connected to the master: `NOREPLICAS`.
    Replicas,
    /// The server cannot write to its disk: `MISCONF`.
    Disk,
    /// The server is no master: `READONLY`.
    ReadOnly,
    /// The server loads its data, runs a long script or moves slots: `LOADING`, `BUSY` and their like.
    Busy,
    /// The script was forgotten: `NOSCRIPT`. The bus sends it again itself.
    Script,
    /// The user lacks a permission: `NOPERM`.
    Permission,
    /// A key holds another kind of value: `WRONGTYPE`.
    WrongType,
    /// Another error.
    Other,
}

impl NotDone {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 9] = [
        Self::Memory,
        Self::Replicas,
        Self::Disk,
        Self::ReadOnly,
        Self::Busy,
        Self::Script,
        Self::Permission,
        Self::WrongType,
        Self::Other,
    ];

    /// In metrics.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Memory => "out_of_memory",
            Self::Replicas => "too_few_replicas",
            Self::Disk => "disk",
            Self::ReadOnly => "read_only",
            Self::Busy => "busy",
            Self::Script => "no_script",
            Self::Permission => "no_permission",
            Self::WrongType => "wrong_type",
            Self::Other => "other",
        }
    }

    /// For workers and operators: the end of a sentence that begins with "Not done: ".
    #[must_use]
    pub const fn reason(self) -> &'static str {
        match self {
            Self::Memory => "the store is out of memory",
            Self::Replicas => "the store has too few replicas",
            Self::Disk => "the store cannot write to its disk",
            Self::ReadOnly => "the store is no master and takes no writes",
            Self::Busy => "the store is busy or still loading",
            Self::Script => "the store has forgotten a script",
            Self::Permission => "the gateway lacks a permission of the store",
            Self::WrongType => "a key holds another kind of value",
            Self::Other => "the store refused",
        }
    }

    /// Whether waiting can help, without anybody changing the request or a permission.
    #[must_use]
    pub const fn is_passing(self) -> bool {
        match self {
            Self::Memory | Self::Replicas | Self::Disk | Self::ReadOnly => true,
            Self::Busy | Self::Script => true,
            Self::Permission | Self::WrongType | Self::Other => false,
        }
    }

    /// Reads an error of the server; `None` where the request may have been done in part.
    pub(crate) fn of(error: &[u8]) -> Option<Self> {
        let (error, is_from_script) = unwrapped(error);
        let code = error.split(|byte| *byte == b' ').next().unwrap_or_default();
        Some(match code {
            // A server refuses a script's first write for these, and none of its later ones.
            b"OOM" => Self::Memory,
            b"NOREPLICAS" => Self::Replicas,
            b"MISCONF" => Self::Disk,
            b"READONLY" => Self::ReadOnly,
            b"LOADING" | b"BUSY" | b"MASTERDOWN" | b"TRYAGAIN" | b"CLUSTERDOWN" | b"MOVED"
            | b"ASK" => Self::Busy,
            b"NOSCRIPT" => Self::Script,
            // The scripts read a key before they write anything.
            b"WRONGTYPE" => Self::WrongType,
            // An ACL may allow the first command of a script and deny the next one.
            _ if is_from_script => return None,
            b"NOPERM" | b"NOAUTH" => Self::Permission,
            _ => Self::Other,
        })
    }
}

/// The error without what a server before Redis 7 puts in front of it where it stopped a script, and
/// whether it stopped one.
fn unwrapped(error: &[u8]) -> (&[u8], bool) {
    const SOURCE: &[u8] = b"@user_script:";
    let starts_with = |at: usize, what: &[u8]| error[at..].starts_with(what);
    // `ERR Error running script (call to f_…): @user_script:12: -OOM command not allowed …`
    if starts_with(0, b"ERR Error running script") {
        let source = (0..error.len()).rev().find(|at| starts_with(*at, SOURCE));
        let rest = source.map_or(error, |at| &error[at + SOURCE.len()..]);
        let line = |byte: &u8| byte.is_ascii_digit() || matches!(byte, b':' | b' ' | b'-');
        let from = rest.iter().position(|byte| !line(byte)).unwrap_or(rest.len());
        return (&rest[from..], true);
    }
    // `OOM command not allowed … script: <sha>, on @user_script:12.`
    (error, error.windows(SOURCE.len()).any(|part| part == SOURCE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_say_why_nothing_was_done() {
        for (error, refusal) in [
            ("OOM command not allowed when used memory > 'maxmemory'.", NotDone::Memory),
            ("NOREPLICAS Not enough good replicas to write.", NotDone::Replicas),
            ("MISCONF Redis is configured to save RDB snapshots", NotDone::Disk),
            ("READONLY You can't write against a read only replica.", NotDone::ReadOnly),
            ("LOADING Redis is loading the dataset in memory", NotDone::Busy),
            ("BUSY Redis is busy running a script.", NotDone::Busy),
            ("NOSCRIPT No matching script. Please use EVAL.", NotDone::Script),
            ("NOPERM this user has no permissions", NotDone::Permission),
            ("WRONGTYPE Operation against a key", NotDone::WrongType),
            ("ERR something new", NotDone::Other),
            ("", NotDone::Other),
        ] {
            assert_eq!(NotDone::of(error.as_bytes()), Some(refusal), "{error}");
        }
    }

    #[test]
    fn errors_in_the_middle_of_a_script_are_recognised() {
        let old = "ERR Error running script (call to f_ab12): @user_script:42: ";
        let new = " script: ab12, on @user_script:42.";
        for (code, refusal) in [
            ("OOM command not allowed", Some(NotDone::Memory)),
            ("READONLY You can't write", Some(NotDone::ReadOnly)),
            ("MISCONF Errors writing to the AOF file", Some(NotDone::Disk)),
            ("WRONGTYPE Operation against a key", Some(NotDone::WrongType)),
            // Something may have been written before these.
            ("NOPERM ACL failure in script", None),
            ("ERR attempt to compare number with nil", None),
        ] {
            for error in
                [format!("{old}{code}"), format!("{old}-{code}\r\n"), format!("{code}{new}")]
            {
                assert_eq!(NotDone::of(error.as_bytes()), refusal, "{error}");
            }
        }
    }

    #[test]
    fn numbers_are_places_in_the_list() {
        for (place, refusal) in NotDone::ALL.into_iter().enumerate() {
            assert_eq!(refusal as usize, place);
        }
    }
}
