//! Crates that the agent is linked with.

use std::process::Command;

#[test]
fn the_agent_links_no_redis_sql_or_jwt() {
    let tree = Command::new(env!("CARGO"))
        .args(["tree", "--package", "wsproxy-agent", "--edges", "normal", "--prefix", "none"])
        .args(["--locked", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    let tree = String::from_utf8(tree.stdout).unwrap();
    let names: Vec<_> = tree.lines().filter_map(|line| line.split(' ').next()).collect();
    assert!(names.contains(&"wsproxy-conn"), "{tree}");
    for name in ["redis", "sqlx", "sqlx-core", "jsonwebtoken", "axum", "wsproxy"] {
        assert!(!names.contains(&name), "{name}");
    }
}
