//! `wsproxy version`.

/// The version, for people or as JSON.
pub(super) fn text(json: bool) -> String {
    let version = env!("CARGO_PKG_VERSION");
    let target = format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS);
    let profile = if cfg!(debug_assertions) { "debug" } else { "release" };
    let allocator = match (cfg!(feature = "jemalloc"), cfg!(feature = "mimalloc")) {
        (true, _) => "jemalloc",
        (false, true) => "mimalloc",
        (false, false) => "system",
    };
    if !json {
        return format!("wsproxy {version} ({target}, {profile}, {allocator})\n");
    }
    let fields = serde_json::json!({
        "name": "wsproxy", "version": version, "target": target, "profile": profile,
        "allocator": allocator,
    });
    format!("{fields}\n")
}
