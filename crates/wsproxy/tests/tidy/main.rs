//! The rules that no compiler and no lint checks: each test reads the repository and says what to do.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod floors;
mod pages;
mod rust;
mod shape;
mod tree;
mod words;

use std::fmt::Write;

use crate::tree::{Finding, Tree};

#[test]
fn files_are_short() {
    judge(&shape::lengths(Tree::of_repository()));
}

#[test]
fn files_begin_with_a_sentence() {
    judge(&shape::first_lines(Tree::of_repository()));
}

#[test]
fn constants_come_last() {
    judge(&shape::constants(Tree::of_repository()));
}

#[test]
fn functions_are_measured_by_clippy() {
    judge(&shape::lints(Tree::of_repository()));
}

#[test]
fn imports_point_down() {
    judge(&floors::imports(Tree::of_repository()));
}

#[test]
fn crates_depend_downwards() {
    judge(&floors::crates(Tree::of_repository()));
}

#[test]
fn every_module_has_a_floor() {
    judge(&floors::table(Tree::of_repository()));
}

#[test]
fn doc_comments_begin_with_their_thing() {
    judge(&words::openings(Tree::of_repository()));
}

#[test]
fn comments_name_the_actor() {
    judge(&words::comments(Tree::of_repository()));
}

#[test]
fn texts_name_the_actor() {
    judge(&words::texts(Tree::of_repository()));
}

#[test]
fn links_lead_somewhere() {
    judge(&pages::links(Tree::of_repository()));
}

#[test]
fn the_map_names_every_file() {
    judge(&pages::map(Tree::of_repository()));
}

#[test]
fn names_on_pages_exist() {
    judge(&pages::names(Tree::of_repository()));
}

/// Fails with a line for each finding.
fn judge(findings: &[Finding]) {
    let mut text = String::new();
    for Finding { path, line, advice } in findings {
        let _ = writeln!(text, "{path}:{line}: {advice}");
    }
    assert!(text.is_empty(), "\n{text}");
}
