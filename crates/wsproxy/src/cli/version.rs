//! `wsproxy version`, and the commit and day of the build.

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
        let commit = COMMIT.map(|commit| format!("commit {commit}"));
        let built: Vec<_> = commit.into_iter().chain(DATE.map(str::to_owned)).collect();
        let built = if built.is_empty() { String::new() } else { built.join(" of ") + ", " };
        return format!("wsproxy {version} ({built}{target}, {profile}, {allocator})\n");
    }
    let fields = serde_json::json!({
        "name": "wsproxy", "version": version, "commit": COMMIT, "date": DATE, "target": target,
        "profile": profile, "allocator": allocator,
    });
    format!("{fields}\n")
}

/// The commit of the build; `None` if the sources were no checkout of git.
pub(crate) const COMMIT: Option<&str> = option_env!("BUILD_COMMIT");

/// The day of the commit, or of `SOURCE_DATE_EPOCH` if the build set it.
const DATE: Option<&str> = option_env!("BUILD_DATE");
