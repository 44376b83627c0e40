//! `[[api.key]]`: keys of the worker API with a name and scopes, as tables of the file or as JSON; reads no file of a secret.

use std::path::PathBuf;

use secrecy::{ExposeSecret, SecretString};

use super::{
    kind::{Raw, ValueKind, quoted},
    rule::API_KEY,
    tables::{Table, check_fields, field, tables},
};

/// A key of the worker API.
#[derive(Debug, Clone)]
pub struct ApiKey {
    /// The name of the key in logs and metrics.
    pub name: String,
    /// The secret that a worker shows.
    pub secret: KeySecret,
    /// The calls that the key allows.
    pub scopes: Scopes,
}

/// Source of a key's secret.
#[derive(Debug, Clone)]
pub enum KeySecret {
    /// The configuration.
    Text(SecretString),
    /// A file that is read again every few seconds.
    File(PathBuf),
}

/// A part of the worker API.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// `/api/v1/sessions/…`
    Sessions,
    /// `/api/v1/events/…`
    Events,
    /// `/api/v1/rooms/…`
    Rooms,
    /// `/api/v1/agents/…`
    Agents,
    /// `/api/v1/info`, and other calls that concern the instance.
    Admin,
}

impl Scope {
    /// All scopes, in the order of their numbers.
    pub const ALL: [Self; 5] =
        [Self::Sessions, Self::Events, Self::Rooms, Self::Agents, Self::Admin];

    /// Returns the name in the configuration.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Sessions => "sessions",
            Self::Events => "events",
            Self::Rooms => "rooms",
            Self::Agents => "agents",
            Self::Admin => "admin",
        }
    }
}

/// A set of [`Scope`]s.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Scopes(u8);

impl Scopes {
    /// Every scope.
    #[must_use]
    pub fn all() -> Self {
        Scope::ALL.into_iter().collect()
    }

    /// Returns whether the set has `scope`.
    #[must_use]
    pub const fn has(self, scope: Scope) -> bool {
        self.0 & (1 << scope as u8) != 0
    }
}

impl FromIterator<Scope> for Scopes {
    fn from_iter<I: IntoIterator<Item = Scope>>(scopes: I) -> Self {
        Self(scopes.into_iter().fold(0, |set, scope| set | 1 << scope as u8))
    }
}

/// A list of tables of keys, or the same as JSON.
pub(super) struct ApiKeyTables;

impl ValueKind<Vec<ApiKey>> for ApiKeyTables {
    fn allowed(&self) -> String {
        format!(
            "a list of tables (in the environment a JSON array of objects), each with name ({NAME}), \
             secret ({}) or secret_file (the path of a file that holds it), and scopes ({})",
            API_KEY.allowed,
            scopes_allowed(),
        )
    }

    fn read(&self, raw: &Raw) -> Option<Vec<ApiKey>> {
        tables(raw)?.iter().map(|table| key(table).ok()).collect()
    }

    fn write(&self, value: &Vec<ApiKey>) -> String {
        let keys: Vec<_> = value.iter().map(written).collect();
        format!("[{}]", keys.join(", "))
    }

    fn is_same(&self, one: &Vec<ApiKey>, other: &Vec<ApiKey>) -> bool {
        let secret = |key: &ApiKey| match &key.secret {
            KeySecret::Text(secret) => Some(secret.expose_secret().to_owned()),
            KeySecret::File(_) => None,
        };
        self.write(one) == self.write(other) && one.iter().map(secret).eq(other.iter().map(secret))
    }

    fn explain(&self, raw: &Raw) -> Option<String> {
        let broken: Vec<_> = tables(raw)?
            .iter()
            .enumerate()
            .filter_map(|(at, table)| Some((at + 1, key(table).err()?)))
            .map(|(number, problem)| format!("of key {number}, {problem}"))
            .collect();
        (!broken.is_empty()).then(|| broken.join("; "))
    }
}

/// Reads the key in a table; the error never quotes a secret.
fn key(table: &Table) -> Result<ApiKey, String> {
    check_fields(table, &FIELDS)?;
    let field = |wanted: &str| field(table, wanted);
    let text = |wanted| field(wanted).and_then(Raw::text);
    let is_name = |name: &&str| {
        (1..=64).contains(&name.len())
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    };
    let name = text("name").filter(is_name).ok_or_else(|| format!("name must be {NAME}"))?;
    let secret = match (field("secret"), field("secret_file")) {
        (Some(secret), None) => {
            let secret = API_KEY.read(secret);
            let secret = secret.ok_or_else(|| format!("secret must be {}", API_KEY.allowed))?;
            KeySecret::Text(secret.into())
        }
        (None, Some(file)) => {
            let path = file.text().filter(|path| !path.is_empty());
            KeySecret::File(path.ok_or("secret_file must be the path of a file")?.into())
        }
        _ => return Err("there must be either secret or secret_file".into()),
    };
    let scopes = match field("scopes") {
        Some(Raw::List(names)) if !names.is_empty() => {
            names.iter().map(|name| scope(name)).collect()
        }
        _ => None,
    };
    let scopes = scopes.ok_or_else(|| format!("scopes must be {}", scopes_allowed()))?;
    Ok(ApiKey { name: name.into(), secret, scopes })
}

fn scope(name: &str) -> Option<Scope> {
    Scope::ALL.into_iter().find(|scope| scope.label() == name)
}

fn scopes_allowed() -> String {
    let names = Scope::ALL.map(|scope| quoted(scope.label()));
    format!("a list of some of {}", names.join(", "))
}

/// Writes a key as an inline table.
fn written(key: &ApiKey) -> String {
    let secret = match &key.secret {
        KeySecret::Text(_) => "secret = \"***\"".to_owned(),
        KeySecret::File(path) => format!("secret_file = {}", quoted(&path.to_string_lossy())),
    };
    let scopes = Scope::ALL.into_iter().filter(|scope| key.scopes.has(*scope));
    let scopes: Vec<_> = scopes.map(|scope| quoted(scope.label())).collect();
    format!("{{ name = {}, {secret}, scopes = [{}] }}", quoted(&key.name), scopes.join(", "))
}

const FIELDS: [&str; 4] = ["name", "secret", "secret_file", "scopes"];
const NAME: &str = "1 to 64 letters, digits and -_.";

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Option<Vec<ApiKey>> {
        ApiKeyTables.read(&Raw::Text(json.into()))
    }

    #[test]
    fn keys_come_as_json_and_are_written_without_secrets() {
        let json = r#"[{"name":"ci.eu-1","secret":"0123456789abcdef","scopes":["events","admin"]},
                       {"name":"b","secret_file":"/run/key","scopes":["sessions"]}]"#;
        let keys = read(json).unwrap();
        assert!(keys[0].scopes.has(Scope::Events) && keys[0].scopes.has(Scope::Admin));
        assert!(!keys[0].scopes.has(Scope::Sessions));
        assert_eq!(
            ApiKeyTables.write(&keys),
            "[{ name = \"ci.eu-1\", secret = \"***\", scopes = [\"events\", \"admin\"] }, \
             { name = \"b\", secret_file = \"/run/key\", scopes = [\"sessions\"] }]"
        );
        assert!(read("").unwrap().is_empty() && read("[]").unwrap().is_empty());
        assert!(Scope::ALL.into_iter().all(|scope| Scopes::all().has(scope)));
    }

    #[test]
    fn each_mistake_in_a_key_is_named_without_its_secret() {
        let secret = r#""secret":"0123456789abcdef""#;
        for (json, problem) in [
            (r#"[{"secret":"0123456789abcdef","scopes":["events"]}]"#.to_owned(), "name must be"),
            (format!(r#"[{{"name":"a b",{secret},"scopes":["events"]}}]"#), "name must be"),
            (format!(r#"[{{"name":"a",{secret}}}]"#), "scopes must be"),
            (format!(r#"[{{"name":"a",{secret},"scopes":[]}}]"#), "scopes must be"),
            (format!(r#"[{{"name":"a",{secret},"scopes":["event"]}}]"#), "scopes must be"),
            (format!(r#"[{{"name":"a",{secret},"scopes":"events"}}]"#), "scopes must be"),
            (r#"[{"name":"a","scopes":["events"]}]"#.into(), "either secret or secret_file"),
            (
                format!(r#"[{{"name":"a",{secret},"secret_file":"/x","scopes":["events"]}}]"#),
                "either secret or secret_file",
            ),
            (r#"[{"name":"a","secret":"0123","scopes":["events"]}]"#.into(), "secret must be"),
            (r#"[{"name":"a","secret":5,"scopes":["events"]}]"#.into(), "secret must be"),
            (
                format!(r#"[{{"name":"a",{secret},"scope":["events"]}}]"#),
                "a field is unknown; did you mean scopes?",
            ),
        ] {
            assert!(read(&json).is_none(), "{json}");
            let said = ApiKeyTables.explain(&Raw::Text(json)).unwrap();
            assert!(said.contains("of key 1, ") && said.contains(problem), "{said}");
            assert!(!said.contains("0123"), "{said}");
        }
        for none in ["{}", "[1]", "nothing", r#"{"name":"a"}"#] {
            assert!(read(none).is_none(), "{none}");
            assert_eq!(ApiKeyTables.explain(&Raw::Text(none.into())), None, "{none}");
        }
    }
}
