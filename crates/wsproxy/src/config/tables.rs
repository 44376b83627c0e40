//! Lists of tables: `[[section.name]]` in the file, JSON in the environment. Knows no fields.

use serde_json::Value;

use super::{
    kind::{Raw, ValueKind},
    problem::nearest,
};

/// Names and values of the fields of one table.
pub(super) type Table = Vec<(String, Raw)>;

/// Table of a list.
pub(super) trait Row: Sized {
    /// Noun for one table in problems.
    const NOUN: &'static str;
    /// Names of the fields.
    const FIELDS: &'static [&'static str];
    /// Completes "a list of tables, each with …".
    const ALLOWED: &'static str;

    /// Reads the fields, of which all are known.
    ///
    /// # Errors
    /// The field that is not allowed, and the allowed values; quotes no secret.
    fn read(table: &Table) -> Result<Self, String>;

    /// Writes the fields as an inline table.
    fn write(&self) -> String;
}

/// A list of tables of one kind.
pub(super) struct Tables;

impl<T: Row> ValueKind<Vec<T>> for Tables {
    fn allowed(&self) -> String {
        format!(
            "a list of tables (in the environment a JSON array of objects), each with {}",
            T::ALLOWED
        )
    }

    fn read(&self, raw: &Raw) -> Option<Vec<T>> {
        tables(raw)?.iter().map(|table| row(table).ok()).collect()
    }

    fn write(&self, value: &Vec<T>) -> String {
        let rows: Vec<_> = value.iter().map(T::write).collect();
        format!("[{}]", rows.join(", "))
    }

    fn explain(&self, raw: &Raw) -> Option<String> {
        let broken: Vec<_> = tables(raw)?
            .iter()
            .enumerate()
            .filter_map(|(at, table)| Some((at + 1, row::<T>(table).err()?)))
            .map(|(number, problem)| format!("of {} {number}, {problem}", T::NOUN))
            .collect();
        (!broken.is_empty()).then(|| broken.join("; "))
    }
}

/// Returns the value of a field.
pub(super) fn field<'t>(table: &'t Table, wanted: &str) -> Option<&'t Raw> {
    table.iter().find(|(name, _)| name == wanted).map(|(_, raw)| raw)
}

/// Returns the tables of a value; `None` if it is no list of tables.
pub(super) fn tables(raw: &Raw) -> Option<Vec<Table>> {
    match raw {
        Raw::Tables(tables) => Some(tables.clone()),
        Raw::List(values) => values.is_empty().then(Vec::new),
        Raw::Text(text) if text.trim().is_empty() => Some(Vec::new()),
        Raw::Text(text) => match serde_json::from_str(text).ok()? {
            Value::Array(values) => values.into_iter().map(object).collect(),
            _ => None,
        },
        Raw::Nested => None,
    }
}

/// Checks that all fields are known.
///
/// # Errors
/// One is not.
pub(super) fn check_fields(table: &Table, known: &[&'static str]) -> Result<(), String> {
    let Some((unknown, _)) = table.iter().find(|(name, _)| !known.contains(&name.as_str())) else {
        return Ok(());
    };
    let near = nearest(unknown, known.iter().copied());
    let near = near.map(|near| format!("; did you mean {near}?"));
    Err(format!("a field is unknown{}", near.unwrap_or_default()))
}

fn row<T: Row>(table: &Table) -> Result<T, String> {
    check_fields(table, T::FIELDS)?;
    T::read(table)
}

fn object(value: Value) -> Option<Table> {
    let Value::Object(fields) = value else { return None };
    Some(fields.into_iter().map(|(name, value)| (name, raw(value))).collect())
}

fn raw(value: Value) -> Raw {
    match value {
        Value::String(text) => Raw::Text(text),
        Value::Number(number) => Raw::Text(number.to_string()),
        Value::Array(values) => {
            let texts = values.into_iter().map(|value| value.as_str().map(str::to_owned));
            texts.collect::<Option<_>>().map_or(Raw::Nested, Raw::List)
        }
        _ => Raw::Nested,
    }
}
