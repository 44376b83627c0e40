//! The database of agents: whether it answers, and whether its tables can be used. Changes nothing.

use super::Finding;
use crate::{
    config::Config,
    database::{Database, migrate::NotReady},
};

pub(super) async fn examine(config: &Config) -> Vec<Finding> {
    let part = "database";
    if !config.endpoints.agents {
        return Vec::new();
    }
    let file = config.database.file();
    if config.database.url.is_none() && !file.exists() {
        let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty());
        let is_there = folder.is_none_or(std::path::Path::is_dir);
        let what = format!("{} does not exist yet", file.display());
        return vec![match is_there {
            true => Finding::ok(part, format!("{what}: the first start makes it")),
            false => Finding::error(part, what, "make its folder, or set database.path"),
        }];
    }
    let database = match Database::open_unprepared(config) {
        Ok(database) => database,
        Err(error) => {
            let advice = "correct database.url or database.path";
            return vec![Finding::error(part, error.to_string(), advice)];
        }
    };
    let kind = database.status().kind;
    let plan = database.plan(!config.audit.keep.is_zero()).await;
    database.close().await;
    vec![match plan {
        Ok(steps) if steps.is_empty() => {
            Finding::ok(part, format!("{kind} answers, and has all tables"))
        }
        Ok(steps) if config.database.migrate => {
            let names: Vec<_> = steps.iter().map(|step| step.name).collect();
            let what = format!("{kind} answers, and lacks: {}", names.join(", "));
            Finding::warning(part, what, "wsproxy migrate; a start creates absent tables itself")
        }
        Ok(steps) => {
            let names: Vec<_> = steps.iter().map(|step| step.name).collect();
            let what = format!("{kind} answers, and lacks: {}", names.join(", "));
            Finding::warning(part, what, "wsproxy migrate --dry-run shows the SQL")
        }
        Err(error @ NotReady::Unavailable(_)) => {
            let advice = "see whether the server runs, and correct database.url (DATABASE_URL)";
            Finding::error(part, error.to_string(), advice)
        }
        Err(error @ NotReady::Unusable(_)) => {
            Finding::error(part, error.to_string(), "wsproxy migrate --dry-run shows what it needs")
        }
    }]
}
