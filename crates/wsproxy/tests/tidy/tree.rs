//! The files that the checks read, and where a check found something. Knows no rule.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use crate::rust::Rust;

/// Text files of the repository, by their paths from its root.
#[derive(Default)]
pub(crate) struct Tree {
    /// Rust files below `crates/*/{src,tests,examples}`.
    pub(crate) sources: Vec<Source>,
    /// Markdown files, manifests, and files in other languages.
    pub(crate) texts: Vec<Text>,
    /// Paths of all files, and of all folders with a `/` at the end.
    pub(crate) paths: Vec<String>,
}

/// A Rust file.
pub(crate) struct Source {
    pub(crate) path: String,
    pub(crate) text: String,
    pub(crate) rust: Rust,
}

/// A file in another language.
pub(crate) struct Text {
    pub(crate) path: String,
    pub(crate) text: String,
}

/// A place that breaks a rule, and what to do about it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Finding {
    pub(crate) path: String,
    pub(crate) line: usize,
    pub(crate) advice: String,
}

impl Tree {
    /// The repository that these tests belong to, read once.
    pub(crate) fn of_repository() -> &'static Self {
        static TREE: OnceLock<Tree> = OnceLock::new();
        TREE.get_or_init(|| {
            let mut tree = Self::default();
            tree.read(&root(), "");
            tree
        })
    }

    /// A tree of invented files, for the checks' own tests.
    pub(crate) fn of(files: &[(&str, &str)]) -> Self {
        let mut tree = Self::default();
        for (path, text) in files {
            tree.add((*path).to_owned(), (*text).to_owned());
        }
        tree
    }

    /// The Rust files of the crates without their tests and examples.
    pub(crate) fn shipped(&self) -> impl Iterator<Item = &Source> {
        self.sources.iter().filter(|source| source.path.contains("/src/"))
    }

    /// The text of a file; empty where there is none.
    pub(crate) fn text(&self, path: &str) -> &str {
        self.texts.iter().find(|text| text.path == path).map_or("", |text| &text.text)
    }

    pub(crate) fn pages(&self) -> impl Iterator<Item = &Text> {
        self.texts.iter().filter(|text| text.path.ends_with(".md"))
    }

    fn read(&mut self, folder: &Path, prefix: &str) {
        let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
        let mut entries: Vec<_> = entries.collect();
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let name = entry.file_name().into_string().unwrap();
            let path = format!("{prefix}{name}");
            if entry.file_type().unwrap().is_dir() {
                if !name.starts_with('.') && !FOREIGN_FOLDERS.contains(&name.as_str()) {
                    self.paths.push(format!("{path}/"));
                    self.read(&entry.path(), &format!("{path}/"));
                }
            } else if let Some(text) = wanted(&path).then(|| fs::read_to_string(entry.path())) {
                self.add(path, text.unwrap());
            } else {
                self.paths.push(path);
            }
        }
    }

    fn add(&mut self, path: String, text: String) {
        self.paths.push(path.clone());
        if path.ends_with(".rs") {
            let rust = Rust::read(&text);
            self.sources.push(Source { path, text, rust });
        } else {
            self.texts.push(Text { path, text });
        }
    }
}

impl Finding {
    pub(crate) fn new(path: &str, line: usize, advice: impl Into<String>) -> Self {
        Self { path: path.to_owned(), line, advice: advice.into() }
    }
}

/// The root of the repository.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Whether the checks read a file; the others only have a path.
fn wanted(path: &str) -> bool {
    let Some((_, ending)) = path.rsplit_once('.') else { return false };
    match ending {
        "rs" => path.starts_with("crates/") && !path.contains("/fuzz/") && path != GENERATED,
        "toml" => !path.starts_with("bench/results/"),
        _ => ENDINGS.contains(&ending),
    }
}

/// Code that a program writes: crates/wsproxy-proto/codegen.
const GENERATED: &str = "crates/wsproxy-proto/src/rooms/v1.rs";

/// Folders that tools fill.
const FOREIGN_FOLDERS: [&str; 5] = ["target", "node_modules", "__pycache__", "env", "dist"];

/// Endings of the files of other languages that have words to check.
const ENDINGS: [&str; 8] = ["md", "py", "ts", "js", "lua", "yml", "html", "cfg"];
