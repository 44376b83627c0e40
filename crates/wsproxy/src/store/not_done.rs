//! Reasons why a store or a bus did not do a request. Knows no backend.

/// The reason why a request was certainly not done. It can be sent again without being done twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotDone {
    /// The store is full: `OOM`.
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
    /// A key has a value of another type: `WRONGTYPE`.
    WrongType,
    /// Another error.
    Other,
}

impl NotDone {
    /// All reasons, in the order of their numbers.
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

    /// Returns the label in metrics.
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

    /// Returns the reason for workers and operators, as the end of a sentence that begins with "Not done: ".
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

    /// Returns whether waiting can help, without a change of the request or a permission.
    #[must_use]
    pub const fn is_passing(self) -> bool {
        match self {
            Self::Memory | Self::Replicas | Self::Disk | Self::ReadOnly => true,
            Self::Busy | Self::Script => true,
            Self::Permission | Self::WrongType | Self::Other => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_places_in_the_list() {
        for (place, refusal) in NotDone::ALL.into_iter().enumerate() {
            assert_eq!(refusal as usize, place);
        }
    }
}
