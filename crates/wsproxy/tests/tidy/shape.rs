//! The shape of a Rust file: its length, its first line, the order of its items, and its lints.
//! Knows nothing of what a file says.

use crate::tree::{Finding, Source, Tree};

/// Files are short enough to be read as a whole.
pub(crate) fn lengths(tree: &Tree) -> Vec<Finding> {
    let mut found = Vec::new();
    for source in &tree.sources {
        let lines = source.text.lines().count();
        if lines > FILE_LINES_MAX {
            let advice = format!("{lines} lines: split it by subject, {FILE_LINES_MAX} at most");
            found.push(Finding::new(&source.path, FILE_LINES_MAX + 1, advice));
        }
    }
    found
}

/// Every file says in its first line what it is.
pub(crate) fn first_lines(tree: &Tree) -> Vec<Finding> {
    let bare = tree.sources.iter().filter(|source| !source.text.starts_with("//! "));
    let advice = "begin the file with a `//!` sentence: what it is, what it does not know";
    bare.map(|source| Finding::new(&source.path, 1, advice)).collect()
}

/// Constants stand at the end of a file, before its tests.
pub(crate) fn constants(tree: &Tree) -> Vec<Finding> {
    tree.sources.iter().filter_map(early_constant).collect()
}

/// The first constant of a file with another item behind it. Only the outermost items count.
fn early_constant(source: &Source) -> Option<Finding> {
    let mut constant = None;
    for (at, line) in source.rust.shipped().lines().enumerate() {
        let words = item(line);
        if ["const ", "static "].iter().any(|word| words.starts_with(word))
            && !words.starts_with("const fn")
        {
            constant.get_or_insert(at + 1);
        } else if constant.is_some() && ITEMS.iter().any(|word| words.starts_with(word)) {
            let advice = format!("move the constant behind the last item, such as line {}", at + 1);
            return constant.map(|line| Finding::new(&source.path, line, advice));
        }
    }
    None
}

/// An item's line without its visibility; nothing for lines that are indented.
fn item(line: &str) -> &str {
    match line.strip_prefix("pub") {
        Some(rest) if rest.starts_with('(') => rest.split_once(") ").map_or("", |(_, rest)| rest),
        Some(rest) => rest.trim_start(),
        None => line,
    }
}

/// Clippy measures functions: its lint is on in every crate, and silenced nowhere.
pub(crate) fn lints(tree: &Tree) -> Vec<Finding> {
    let mut found = Vec::new();
    let mut require = |path: &str, part: &str| {
        if !tree.text(path).lines().any(|line| line == part) {
            found.push(Finding::new(path, 1, format!("add the line `{part}`")));
        }
    };
    require("Cargo.toml", "too_many_lines = \"warn\"");
    require("clippy.toml", THRESHOLD);
    for text in &tree.texts {
        let folder = text.path.strip_suffix("/Cargo.toml");
        if let Some(folder) = folder.filter(|folder| is_crate(folder)) {
            require(&text.path, "workspace = true");
            // A crate's own file replaces the one at the root.
            let own = format!("{folder}/clippy.toml");
            if tree.paths.contains(&own) {
                require(&own, THRESHOLD);
            }
        }
    }
    for source in &tree.sources {
        let silenced = source.rust.code.find("clippy::too_many_lines");
        if let Some(at) = silenced {
            let line = source.rust.code[..at].lines().count();
            found.push(Finding::new(&source.path, line, "shorten the function instead"));
        }
    }
    found
}

fn is_crate(folder: &str) -> bool {
    folder.strip_prefix("crates/").is_some_and(|name| !name.contains('/'))
}

/// The most lines of a file.
const FILE_LINES_MAX: usize = 600;

/// The line that sets the most lines of a function.
const THRESHOLD: &str = "too-many-lines-threshold = 70";

/// Words that begin an item which stands above constants. A macro may have to stand below one.
const ITEMS: [&str; 13] = [
    "fn ",
    "async fn ",
    "const fn ",
    "unsafe ",
    "struct ",
    "enum ",
    "impl ",
    "impl<",
    "trait ",
    "mod ",
    "type ",
    "use ",
    "extern ",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn one(text: &str) -> Tree {
        Tree::of(&[("crates/a/src/b.rs", text)])
    }

    #[test]
    fn a_long_file_is_found() {
        assert_eq!(lengths(&one(&"\n".repeat(600))), []);
        assert_eq!(lengths(&one(&"\n".repeat(601))).len(), 1);
    }

    #[test]
    fn a_file_without_first_line_is_found() {
        assert_eq!(first_lines(&one("//! Says it.\n")), []);
        assert_eq!(first_lines(&one("// Says it.\n")).len(), 1);
    }

    #[test]
    fn a_constant_above_an_item_is_found() {
        let lines = |text| constants(&one(text)).iter().map(|found| found.line).collect::<Vec<_>>();
        assert!(lines("fn f() {}\nconst A: u8 = 1;\n\n#[cfg(test)]\nmod tests {}\n").is_empty());
        assert!(lines("impl A {\n    const A: u8 = 1;\n}\nfn f() {}\n").is_empty());
        assert!(lines("const fn f() {}\nfn g() {}\n").is_empty());
        assert_eq!(lines("use a;\nconst A: u8 = 1;\nfn f() {}\n"), [2]);
        assert_eq!(lines("pub(crate) static A: u8 = 1;\npub(super) async fn f() {}\n"), [1]);
    }

    #[test]
    fn a_missing_or_silenced_lint_is_found() {
        let good = [
            ("Cargo.toml", "too_many_lines = \"warn\""),
            ("clippy.toml", THRESHOLD),
            ("crates/a/Cargo.toml", "[lints]\nworkspace = true"),
            ("crates/a/clippy.toml", THRESHOLD),
            ("crates/a/src/b.rs", "// clippy::too_many_lines is obeyed."),
        ];
        assert_eq!(lints(&Tree::of(&good)), []);
        for place in 0..good.len() {
            let mut bad = good;
            bad[place].1 = "#[allow(clippy::too_many_lines)]";
            assert_eq!(lints(&Tree::of(&bad)).len(), 1, "{}", good[place].0);
        }
    }
}
