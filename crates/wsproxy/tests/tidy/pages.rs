//! The targets of pages exist: files, headings, and names. Knows Markdown's links and headings.

use std::collections::{HashMap, HashSet};

use wsproxy::config::keys::{self, SECTIONS};

use crate::tree::{Finding, Text, Tree};

/// Every relative link leads to a file, and to a heading of it.
pub(crate) fn links(tree: &Tree) -> Vec<Finding> {
    let headings: HashMap<_, _> =
        tree.pages().map(|page| (&page.path[..], anchors(page))).collect();
    let paths: HashSet<_> = tree.paths.iter().map(|path| path.trim_end_matches('/')).collect();
    let mut found = Vec::new();
    for page in tree.pages() {
        let folder = page.path.rsplit_once('/').map_or("", |(folder, _)| folder);
        for (line, link) in destinations(page) {
            if link.contains("://") || link.starts_with("mailto:") {
                continue;
            }
            let (file, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let target = if file.is_empty() { page.path.clone() } else { join(folder, file) };
            if !target.is_empty() && !paths.contains(target.as_str()) {
                let advice = format!("there is no `{target}`: mend the link `{link}`");
                found.push(Finding::new(&page.path, line, advice));
            } else if !anchor.is_empty()
                && headings.get(&target[..]).is_some_and(|anchors| !anchors.contains(anchor))
            {
                let advice = format!("`{target}` has no heading `#{anchor}`: mend the link");
                found.push(Finding::new(&page.path, line, advice));
            }
        }
    }
    found
}

/// The page on the architecture names every source file of the crates.
pub(crate) fn map(tree: &Tree) -> Vec<Finding> {
    let spans = spans(tree.text(ARCHITECTURE));
    let words = spans.iter().flat_map(|(_, span)| span.split(|c: char| !is_name(c)));
    let named: HashSet<_> = words.collect();
    let mut found = Vec::new();
    for source in tree.shipped() {
        let stem = source.path.rsplit('/').next().unwrap_or_default().trim_end_matches(".rs");
        if !named.contains(stem) && !UNNAMED.contains(&stem) {
            let advice = format!("say in {ARCHITECTURE} what `{stem}` is for");
            found.push(Finding::new(&source.path, 1, advice));
        }
    }
    found
}

/// Settings and metrics of which pages speak exist. (That each of them has its line is checked
/// where the reference is generated, and with an instance that serves metrics.)
pub(crate) fn names(tree: &Tree) -> Vec<Finding> {
    let keys: HashSet<_> = keys::all().map(|key| key.path()).collect();
    let variables: HashSet<_> = keys::all().map(|key| key.env()).collect();
    let metrics = METRICS.iter().flat_map(|page| spans(tree.text(page)));
    let metrics: HashSet<_> = metrics.map(|(_, span)| span.to_owned()).collect();
    let mut found = Vec::new();
    // The list of changes names what is gone, and the clients' pages have names of their own.
    let is_read = |page: &&Text| page.path != "CHANGELOG.md" && !page.path.starts_with("clients/");
    for page in tree.pages().filter(is_read) {
        for (line, span) in spans(&page.text) {
            let mut words = span.split(|c: char| !is_name(c) && c != '.');
            let is_unknown = |word: &&str| {
                is_unknown_key(word, &keys)
                    || is_unknown_variable(word, &variables)
                    || is_unknown_metric(word, &metrics)
            };
            if let Some(word) = words.find(is_unknown) {
                let advice = format!("there is no `{word}`: see the generated reference");
                found.push(Finding::new(&page.path, line, advice));
            }
        }
    }
    found
}

fn is_unknown_key(word: &str, keys: &HashSet<String>) -> bool {
    let Some((section, name)) = word.split_once('.') else { return false };
    let is_section = SECTIONS.iter().any(|(known, _)| *known == section);
    let is_file = ["rs", "md", "py", "ts", "js", "toml", "lua", "html", "proto"].contains(&name);
    let is_key = name.chars().all(|c| c.is_ascii_lowercase() || c == '_');
    let is_whole = !name.is_empty() && !name.ends_with('_');
    is_section && is_key && is_whole && !is_file && !keys.contains(word)
}

fn is_unknown_variable(word: &str, variables: &HashSet<String>) -> bool {
    let Some((section, _)) = word.strip_prefix("WSPROXY_").and_then(|rest| rest.split_once("__"))
    else {
        return false;
    };
    let is_example = ["", "SECTION"].contains(&section);
    !is_example
        && !variables.contains(word.strip_suffix("_FILE").unwrap_or(word))
        && !variables.contains(word)
}

fn is_unknown_metric(word: &str, metrics: &HashSet<String>) -> bool {
    let base = ["_bucket", "_sum", "_count"].iter().find_map(|end| word.strip_suffix(end));
    word.starts_with("wsproxy_")
        && !word.ends_with('_')
        && ![word, base.unwrap_or(word)].iter().any(|name| metrics.contains(*name))
}

/// The lines and destinations of a page's links, those in code excepted.
fn destinations(page: &Text) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (line, text) in prose(&page.text) {
        let text = without_code(text);
        for (at, _) in text.match_indices("](") {
            let rest = &text[at + 2..];
            let destination = rest.split([')', ' ']).next().unwrap_or_default();
            found.push((line, destination.to_owned()));
        }
    }
    found
}

/// The anchors of a page's headings.
fn anchors(page: &Text) -> HashSet<String> {
    let mut anchors = HashSet::new();
    for (_, text) in prose(&page.text) {
        let title = text.trim_start_matches('#');
        let Some(title) = title.strip_prefix(' ').filter(|_| text.starts_with('#')) else {
            continue;
        };
        let anchor = slug(title);
        let again = (1..).map(|count| format!("{anchor}-{count}"));
        let mut names = std::iter::once(anchor.clone()).chain(again);
        anchors.extend(names.find(|name| !anchors.contains(name)));
    }
    anchors
}

/// A heading's anchor, as GitHub makes it.
fn slug(title: &str) -> String {
    let kept = title.trim().chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
    kept.flat_map(char::to_lowercase).map(|c| if c == ' ' { '-' } else { c }).collect()
}

/// The lines of a page that are no code block.
fn prose(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut is_code = false;
    text.lines().enumerate().filter_map(move |(at, line)| {
        let is_fence = line.trim_start().starts_with("```");
        is_code ^= is_fence;
        (!is_code && !is_fence).then_some((at + 1, line))
    })
}

/// The spans between single backticks, with their lines.
fn spans(text: &str) -> Vec<(usize, &str)> {
    let mut spans = Vec::new();
    for (line, text) in prose(text) {
        spans.extend(text.split('`').skip(1).step_by(2).map(|span| (line, span)));
    }
    spans
}

fn without_code(line: &str) -> String {
    line.split('`').step_by(2).collect::<Vec<_>>().join("`")
}

/// A relative path from a folder, with its dots resolved.
fn join(folder: &str, path: &str) -> String {
    let mut parts: Vec<_> = folder.split('/').filter(|part| !part.is_empty()).collect();
    for part in path.split('/') {
        match part {
            ".." => drop(parts.pop()),
            "." | "" => (),
            name => parts.push(name),
        }
    }
    parts.join("/")
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

const ARCHITECTURE: &str = "docs/architecture.md";
/// Pages with the metrics of the gateway, and of the cluster agent.
const METRICS: [&str; 2] = ["docs/reference/metrics.md", "docs/reference/tunnel-agent.md"];

/// Files that the page need not name: a crate's root, and tests beside the code.
const UNNAMED: [&str; 3] = ["lib", "main", "tests"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_link_is_found() {
        let page = "# A `b` c!\n# A b c\n[x](b.md#d) [x](../README.md) [x](#a-b-c-1) [x](../docs)\n\
                    [x](none.md) [x](b.md#none)\n[x](#none) `[x](none.md)` [x](https://none)\n\
                    ```\n[x](none.md)\n```\n";
        let files = [("docs/a.md", page), ("docs/b.md", "## D"), ("README.md", "")];
        let mut tree = Tree::of(&files);
        tree.paths.push("docs/".to_owned());
        let lines: Vec<_> = links(&tree).iter().map(|found| found.line).collect();
        assert_eq!(lines, [4, 4, 5]);
    }

    #[test]
    fn a_file_that_the_map_forgets_is_found() {
        let page = "`driver` and `cli/exit.rs`, but not link.";
        let tree = Tree::of(&[
            (ARCHITECTURE, page),
            ("crates/a/src/driver.rs", ""),
            ("crates/a/src/cli/exit.rs", ""),
            ("crates/a/src/lib.rs", ""),
            ("crates/a/tests/it/support.rs", ""),
            ("crates/a/src/link.rs", ""),
        ]);
        let paths: Vec<_> = map(&tree).into_iter().map(|found| found.path).collect();
        assert_eq!(paths, ["crates/a/src/link.rs"]);
    }

    #[test]
    fn a_name_that_does_not_exist_is_found() {
        let good = "`limits.max_connections` `WSPROXY_SERVER__PORT` `WSPROXY_API__KEYS_FILE` \
                    `wsproxy_a_total` `wsproxy_a_total{b=\"c\"}` `config.rs` `wsproxy_a_total_sum`\n";
        let bad = "`limits.none`\n`WSPROXY_SERVER__NONE`\n`rate(wsproxy_none_total)`\n";
        let metrics = "| `wsproxy_a_total` | counter |\n";
        let tree = Tree::of(&[(METRICS[0], metrics), ("README.md", good), ("docs/a.md", bad)]);
        let lines = names(&tree).into_iter().map(|found| (found.path, found.line));
        let lines: Vec<_> = lines.collect();
        assert_eq!(lines, [1, 2, 3].map(|line| ("docs/a.md".to_owned(), line)));
    }
}
