//! The words of comments and pages. Knows the words that readers stumble over, and no grammar.

use crate::tree::{Finding, Tree};

/// A doc comment begins with the noun or the verb of the thing it describes.
pub(crate) fn openings(tree: &Tree) -> Vec<Finding> {
    let mut found = Vec::new();
    for source in &tree.sources {
        let docs = source.rust.comments.iter().filter(|comment| comment.is_doc && comment.begins);
        for comment in docs {
            let opening = OPENINGS.iter().find(|opening| begins_with(&comment.text, opening));
            if let Some(opening) = opening {
                let advice = format!(
                    "begin with the noun or the verb of the thing, not with `{opening}`: \
                     \"Upper bound of …\", \"Sends …\""
                );
                found.push(Finding::new(&source.path, comment.line, advice));
            }
        }
    }
    found
}

/// Comments name the actor.
pub(crate) fn comments(tree: &Tree) -> Vec<Finding> {
    let mut found = Vec::new();
    for source in &tree.sources {
        for comment in &source.rust.comments {
            found.extend(unnamed_actor(&source.path, comment.line, &comment.text));
        }
    }
    found
}

/// So do pages, and the files in other languages as a whole.
pub(crate) fn texts(tree: &Tree) -> Vec<Finding> {
    let mut found = Vec::new();
    for text in &tree.texts {
        let mut is_code = false;
        for (at, line) in text.text.lines().enumerate() {
            // Versions that are out are described in the words of their time.
            if text.path == "CHANGELOG.md" && line.starts_with("## ") && line != "## Unreleased" {
                break;
            }
            is_code ^= line.trim_start().starts_with("```");
            if !is_code {
                found.extend(unnamed_actor(&text.path, at + 1, line));
            }
        }
    }
    found
}

fn unnamed_actor(path: &str, line: usize, text: &str) -> Option<Finding> {
    let mut words = text.split(|c: char| !c.is_alphanumeric() && c != '_');
    let word = words.find(|word| WORDS.contains(&word.to_lowercase().as_str()))?;
    let advice = format!(
        "name the actor instead of `{word}`: client, worker, gateway, instance, Redis, operator"
    );
    Some(Finding::new(path, line, advice))
}

fn begins_with(text: &str, opening: &str) -> bool {
    text.strip_prefix(opening).is_some_and(|rest| !rest.starts_with(char::is_alphanumeric))
}

/// First words that pose a riddle.
const OPENINGS: [&str; 5] = ["What", "Whoever", "How", "Who", "So many"];

/// Words that leave the actor unnamed.
const WORDS: [&str; 4] = ["whoever", "nobody", "somebody", "everybody"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_riddle_at_the_start_is_found() {
        let tree = Tree::of(&[(
            "crates/a/src/b.rs",
            "//! What this is.\n\n/// Whoever reads.\nfn f() {}\n\n/// Sends.\n/// What it got.\n\
             fn g() {}\n// How so.\n/// However.\nfn h() {}\n/// So many at most.\nfn i() {}\n",
        )]);
        let lines: Vec<_> = openings(&tree).iter().map(|found| found.line).collect();
        assert_eq!(lines, [1, 3, 12]);
    }

    #[test]
    fn an_unnamed_actor_is_found() {
        let text = "//! Tells nobody.\n/// Nobody's.\nfn nobody() {} // somebody\n// nobodyhood\n";
        let tree = Tree::of(&[("crates/a/src/b.rs", text)]);
        let lines: Vec<_> = comments(&tree).iter().map(|found| found.line).collect();
        assert_eq!(lines, [1, 2, 3]);
    }

    #[test]
    fn pages_and_other_languages_are_read_too() {
        let page = "Whoever.\n```\nnobody\n```\nIs everybody here?\n";
        let log = "## Unreleased\nsomebody\n## 0.1.0\nsomebody\n";
        let tree = Tree::of(&[("docs/a.md", page), ("CHANGELOG.md", log), ("a.py", "# nobody")]);
        let places = texts(&tree).into_iter().map(|found| (found.path, found.line));
        let places: Vec<_> = places.collect();
        let expected = [("docs/a.md", 1), ("docs/a.md", 5), ("CHANGELOG.md", 2), ("a.py", 1)];
        assert_eq!(places, expected.map(|(path, line)| (path.to_owned(), line)));
    }
}
