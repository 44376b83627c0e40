//! The start by `cargo run`, which gives the program variables of its own.
#![expect(clippy::disallowed_methods, reason = "cargo gives a test the variables of a program")]

use super::serve;

#[test]
fn the_gateway_starts_with_the_variables_of_cargo() {
    let of_build = BUILD.split("rustc-env=").skip(1).filter_map(|rest| {
        let name = rest.split('=').next()?;
        Some((name.to_owned(), "1".to_owned()))
    });
    let mut env: Vec<_> = of_build.collect();
    assert!(!env.is_empty(), "the script gives the program a variable");
    env.extend(std::env::vars().filter(|(name, _)| name.starts_with("CARGO")));
    assert!(env.iter().any(|(name, _)| name == "CARGO_PKG_NAME"), "{env:?}");
    env.push(("PORT".into(), "0".into()));
    let env: Vec<_> = env.iter().map(|(name, value)| (&**name, &**value)).collect();
    let started = serve(&env);
    assert!(started.is_ok(), "{started:?}");
}

/// Script of the build, whose variables `cargo run` gives to the program.
const BUILD: &str = include_str!("../../build.rs");
