//! Tells the program which commit it is built from, and of which day: a release build, since others would be built
//! anew after every commit. Without git, or outside of a checkout, it is built without that.
#![expect(clippy::disallowed_methods, reason = "cargo tells build scripts everything in variables")]

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed={EPOCH}");
    if env::var("PROFILE").as_deref() != Ok("release") {
        return;
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let commit = commit(&root);
    let epoch = env::var(EPOCH).ok().and_then(|seconds| seconds.trim().parse::<i64>().ok());
    let seconds = epoch.or_else(|| commit.as_ref().map(|commit| commit.seconds));
    if let Some(Commit { id, .. }) = &commit {
        println!("cargo::rustc-env=BUILD_COMMIT={id}");
    }
    if let Some(seconds) = seconds {
        println!("cargo::rustc-env=BUILD_DATE={}", date(seconds));
    }
}

/// The commit that is checked out.
pub(crate) struct Commit {
    pub(crate) id: String,
    /// Time of the commit, in seconds since 1970.
    pub(crate) seconds: i64,
}

/// The commit of the checkout at `root`; `None` where `root` is none, such as a package inside another project's.
pub(crate) fn commit(root: &Path) -> Option<Commit> {
    let top = PathBuf::from(git(root, &["rev-parse", "--show-toplevel"])?);
    if top.canonicalize().ok()? != root.canonicalize().ok()? {
        return None;
    }
    // The log of HEAD changes with every commit and checkout. Without a log HEAD has to do.
    let watched = ["logs/HEAD", "HEAD"].iter().find_map(|name| {
        let path = git(root, &["rev-parse", "--git-path", name])?;
        Some(root.join(path)).filter(|path| path.exists())
    })?;
    println!("cargo::rerun-if-changed={}", watched.display());
    let text = git(root, &["log", "-1", "--format=%h %ct", "--abbrev=12"])?;
    let (id, seconds) = text.split_once(' ')?;
    Some(Commit { id: id.to_owned(), seconds: seconds.parse().ok()? })
}

fn git(root: &Path, words: &[&str]) -> Option<String> {
    let output = Command::new("git").arg("-C").arg(root).args(words).output().ok()?;
    let text = String::from_utf8(output.stdout).ok().filter(|_| output.status.success())?;
    Some(text.trim().to_owned()).filter(|text| !text.is_empty())
}

/// The day in the form year-month-day, in the time zone of Greenwich.
pub(crate) fn date(seconds: i64) -> String {
    // Howard Hinnant's civil_from_days: the year begins in March, so that a leap day is its last.
    let days = seconds.div_euclid(86_400) + 719_468;
    let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

/// Variable of reproducible builds: <https://reproducible-builds.org/specs/source-date-epoch/>.
const EPOCH: &str = "SOURCE_DATE_EPOCH";
