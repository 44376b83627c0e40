//! The floors of `crates/wsproxy/src`: imports between its modules point down. Knows paths only.

use crate::tree::{Finding, Source, Tree};

/// Imports point down, tests excepted.
pub(crate) fn imports(tree: &Tree) -> Vec<Finding> {
    let mut found = Vec::new();
    for source in tree.sources.iter().filter(|source| source.path.starts_with(ROOT)) {
        let module = module(source);
        if module.ends_with("/tests") {
            continue;
        }
        for (line, target) in targets(&module, source.rust.shipped()) {
            if let Some(advice) = objection(&module, &target) {
                found.push(Finding::new(&source.path, line, advice));
            }
        }
    }
    found
}

/// The table below names each module at the root of the crate, and no file that does not exist.
pub(crate) fn table(tree: &Tree) -> Vec<Finding> {
    let path = "crates/wsproxy/tests/tidy/floors.rs";
    let is_module = |name: &str| {
        let file = format!("{ROOT}{name}.rs");
        tree.sources.iter().any(|source| source.path == file)
    };
    let named = FLOORS.iter().flat_map(|floor| floor.iter());
    let gone = named.filter(|name| !is_module(name));
    let gone = gone.map(|name| Finding::new(path, 1, format!("take `{name}` out of FLOORS")));
    let roots = tree.sources.iter().filter(|source| source.path.starts_with(ROOT)).map(module);
    let new = roots.filter(|module| !module.contains('/') && module != "lib");
    let new = new.filter(|module| floor(module).is_none());
    let new = new.map(|module| Finding::new(path, 1, format!("give `{module}` a floor")));
    gone.chain(new).collect()
}

/// The crates depend on each other downwards only; what tests use is free.
pub(crate) fn crates(tree: &Tree) -> Vec<Finding> {
    let mut found = Vec::new();
    for (name, allowed) in CRATES {
        let path = format!("crates/{name}/Cargo.toml");
        let lines = tree.text(&path).lines().enumerate();
        let lines = lines.skip_while(|(_, line)| *line != "[dependencies]").skip(1);
        for (at, line) in lines.take_while(|(_, line)| !line.starts_with('[')) {
            let dependency = line.split(['.', ' ', '=']).next().unwrap_or_default();
            if dependency.starts_with("wsproxy") && !allowed.contains(&dependency) {
                let advice = format!("`{name}` must not depend on `{dependency}`");
                found.push(Finding::new(&path, at + 1, advice));
            }
        }
    }
    found
}

/// Says what is wrong with an import of `target`, such as `http::api`, into `module`.
fn objection(module: &str, target: &str) -> Option<String> {
    let (from, to) = (first(module, '/'), first(target, ':'));
    if from == to {
        return (from == "endpoint").then(|| between_families(module, target)).flatten();
    }
    // An item of the crate's root, or a new module, which the table's own check reports.
    let (above, below) = (floor(module)?, floor(&target.replace("::", "/"))?);
    let is_allowed = above < below || EXCEPTIONS.iter().any(|(a, b, _)| (*a, *b) == (from, to));
    (!is_allowed).then(|| {
        format!(
            "`{from}` imports `{to}`, which is not below it: move the item down, hand it in as an \
             argument, or name an exception with its reason beside FLOORS"
        )
    })
}

/// Families of endpoints do not know each other.
fn between_families(module: &str, target: &str) -> Option<String> {
    let of = |name: Option<&str>| FAMILIES.iter().find(|family| Some(**family) == name);
    let from = of(module.split('/').nth(1))?;
    let to = of(target.split("::").nth(1))?;
    (from != to).then(|| format!("the family `{from}` imports `{to}`: put it where both may look"))
}

/// The module of a file, such as `http/api`.
fn module(source: &Source) -> String {
    source.path[ROOT.len()..].trim_end_matches(".rs").to_owned()
}

fn first(path: &str, separator: char) -> &str {
    path.split(separator).next().unwrap_or_default()
}

/// The floor of a path such as `bus/publish`, or of the module that it is in.
fn floor(path: &str) -> Option<usize> {
    let mut ends = path.match_indices('/').map(|(at, _)| at).collect::<Vec<_>>();
    ends.push(path.len());
    let mut paths = ends.into_iter().rev().map(|end| &path[..end]);
    paths.find_map(|path| FLOORS.iter().position(|floor| floor.contains(&path)))
}

/// The paths from the crate's root that code of `module` names, such as `http::api`, with lines.
fn targets(module: &str, code: &str) -> Vec<(usize, String)> {
    let mut targets = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        if !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_') {
            heads(code, at + "crate::".len(), &mut targets);
        }
    }
    // As many `super`s as the module is deep lead to the root of the crate too.
    let up = "super::".repeat(module.split('/').count());
    for (at, _) in code.match_indices(&up) {
        if !code[..at].ends_with("super::") {
            heads(code, at + up.len(), &mut targets);
        }
    }
    targets
}

/// Adds the first two names of each path that begins at `at`, where a group may stand.
fn heads(code: &str, at: usize, targets: &mut Vec<(usize, String)>) {
    let line = |at: usize| code[..at].lines().count().max(1);
    for (first_at, first) in names(code, at) {
        let inside = first_at + first.len();
        let seconds = match code[inside..].strip_prefix("::") {
            Some(_) => names(code, inside + "::".len()),
            None => Vec::new(),
        };
        if seconds.is_empty() {
            targets.push((line(first_at), first.to_owned()));
        }
        for (second_at, second) in seconds {
            targets.push((line(second_at), format!("{first}::{second}")));
        }
    }
}

/// The names at `at`: one, or those with which the parts of a group begin.
fn names(code: &str, at: usize) -> Vec<(usize, &str)> {
    let name = |at: usize| {
        let rest = &code[at..];
        let is_name = |c: char| c.is_alphanumeric() || c == '_';
        &rest[..rest.find(|c| !is_name(c)).unwrap_or(rest.len())]
    };
    if !code[at..].starts_with('{') {
        return vec![(at, name(at))].into_iter().filter(|(_, name)| !name.is_empty()).collect();
    }
    let (mut names, mut depth, mut is_start) = (Vec::new(), 0, false);
    for (offset, byte) in code[at..].bytes().enumerate() {
        if depth == 1 && is_start && (byte.is_ascii_alphanumeric() || byte == b'_') {
            names.push((at + offset, name(at + offset)));
        }
        depth += i32::from(byte == b'{') - i32::from(byte == b'}');
        is_start = byte == b',' || byte == b'{' || (is_start && byte.is_ascii_whitespace());
        if depth == 0 {
            break;
        }
    }
    names
}

/// Folder of the modules.
const ROOT: &str = "crates/wsproxy/src/";

/// The crates, each with those of the others that it may depend on.
const CRATES: [(&str, &[&str]); 5] = [
    ("wsproxy", &["wsproxy-agent", "wsproxy-conn", "wsproxy-proto"]),
    ("wsproxy-agent", &["wsproxy-conn", "wsproxy-proto"]),
    ("wsproxy-bench", &["wsproxy-proto"]),
    ("wsproxy-conn", &["wsproxy-proto"]),
    ("wsproxy-proto", &[]),
];

/// The modules from the top to the bottom. Those of one floor do not know each other. A file within
/// a module may have a floor of its own: the plain types of `bus` are below the backends, say.
const FLOORS: &[&[&str]] = &[
    &["main"],
    &["cli"],
    &["dev"],
    &["server"],
    &["shutdown", "reload"],
    &["endpoint"],
    &["http"],
    &["logic"],
    &["core"],
    &["registry"],
    &["hub"],
    &["client"],
    &["auth"],
    &["bus"],
    &["store"],
    &["audit"],
    &["database"],
    &["redis", "embedded"],
    &["bus/publish", "bus/deliver", "bus/status"],
    &["store/command", "store/token_streams"],
    &["store/not_done"],
    &["traces"],
    &["telemetry"],
    &["config"],
    &["outbound"],
    &["redis/address", "database/url", "queue", "tls", "descriptors"],
];

/// Imports that do not point down, with the reason.
const EXCEPTIONS: &[(&str, &str, &str)] = &[
    ("server", "cli", "marks the failures of a start with the kinds of `cli/exit.rs`"),
    ("config", "auth", "`config check` reads keys with the functions that `serve` reads them with"),
];

/// The families below `endpoint`.
const FAMILIES: [&str; 4] = ["session", "sessions", "events", "echo"];

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(path: &str, text: &str) -> Vec<usize> {
        let path = format!("{ROOT}{path}");
        let tree = Tree::of(&[(&path, text)]);
        imports(&tree).iter().map(|found| found.line).collect()
    }

    #[test]
    fn an_import_that_points_up_is_found() {
        assert_eq!(lines("hub.rs", "use crate::http::api;"), [1]);
        assert_eq!(lines("hub/a.rs", "\nfn f() { crate::http::g() }"), [2]);
        assert_eq!(lines("hub/a.rs", "use crate::{\n    bus::{A, B},\n    http::C,\n};"), [3]);
        assert_eq!(lines("hub/a.rs", "use super::super::http;"), [1]);
        assert_eq!(lines("store.rs", "use crate::bus::Bus;"), [1]);
    }

    #[test]
    fn a_file_may_have_a_floor_of_its_own() {
        assert_eq!(lines("redis/bus.rs", "use crate::bus::Bus;"), [1]);
        assert!(lines("redis/bus.rs", "use crate::bus::publish::Publish;").is_empty());
        assert_eq!(lines("bus/publish.rs", "use crate::redis::bus::RedisBus;"), [1]);
        let both =
            "use crate::{\n    bus::{\n        deliver::Deliver,\n        watch::A,\n    },\n};";
        assert_eq!(lines("redis/bus.rs", both), [4]);
        assert!(lines("config/check.rs", "use crate::redis::address::RedisAddress;").is_empty());
    }

    #[test]
    fn imports_down_and_inside_are_free() {
        for text in [
            "use crate::bus::Bus;",
            "use crate::hub::{a::{http, B}, c};",
            "use super::http;",
            "// use crate::http::api;",
            "use othercrate::http;",
            "#[cfg(test)]\nmod tests { use crate::http; }",
        ] {
            assert!(lines("hub/a.rs", text).is_empty(), "{text}");
        }
        assert!(lines("hub/tests.rs", "use crate::http;").is_empty());
        assert!(lines("server.rs", "use crate::cli::exit;").is_empty());
    }

    #[test]
    fn families_do_not_import_each_other() {
        assert_eq!(lines("endpoint/events/logic.rs", "use crate::endpoint::echo::Echo;"), [1]);
        assert!(lines("endpoint/events/logic.rs", "use crate::endpoint::events::acks;").is_empty());
    }

    #[test]
    fn a_dependency_that_points_up_is_found() {
        let manifest = "[dependencies]\nwsproxy-proto.workspace = true\nwsproxy.workspace = true\n\
                        [dev-dependencies]\nwsproxy-conn = { path = \"\" }\n";
        let found = crates(&Tree::of(&[("crates/wsproxy-bench/Cargo.toml", manifest)]));
        assert_eq!(found.iter().map(|found| found.line).collect::<Vec<_>>(), [3]);
    }

    #[test]
    fn the_table_knows_every_module_and_no_other() {
        let path = format!("{ROOT}new.rs");
        let names = FLOORS.iter().flat_map(|floor| floor.iter()).count();
        assert_eq!(table(&Tree::of(&[(&path, "")])).len(), names + 1);
    }
}
