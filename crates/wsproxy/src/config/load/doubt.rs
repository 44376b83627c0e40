//! Variables that are allowed but probably not meant: empty secrets, numbers in another unit, slips of short names.

use crate::config::{
    environment::{Environment, PREFIX},
    keys::{Alias, KEYS, Key},
};

/// A sentence for each of them. `is_set` says whether anything set a key.
pub(super) fn doubtful(environment: &Environment, is_set: impl Fn(&Key) -> bool) -> Vec<String> {
    let mut doubts = Vec::new();
    for key in KEYS {
        if let Some(alias) = key.alias {
            doubts.extend(few_milliseconds(alias, environment));
        }
        // Without a secret the gateway runs, and refuses everybody.
        if !key.secret || is_set(key) {
            continue;
        }
        let short = key.alias.map(|alias| alias.name.to_owned());
        for name in [Some(key.env()), short].into_iter().flatten() {
            for name in [format!("{name}_FILE"), name] {
                if environment.is_empty(&name) {
                    doubts.push(format!("{name} is empty, so it does not set {}.", key.path()));
                }
                doubts.extend(slip(&name, environment));
            }
        }
    }
    doubts
}

/// Deployments that think in seconds write 30 where 30000 is meant.
fn few_milliseconds(alias: Alias, environment: &Environment) -> Option<String> {
    let text = environment.value(alias.name)?.ok().filter(|_| !alias.unit.is_empty())?;
    let number = text.trim().parse::<u64>().ok().filter(|number| *number < FEW_MILLISECONDS)?;
    Some(format!(
        "{} = {number} is {number} milliseconds; write {number}s for seconds.",
        alias.name
    ))
}

/// A variable that is one slip away from `name`, which nobody set.
fn slip(name: &str, environment: &Environment) -> Option<String> {
    // Slips behind the prefix are problems already.
    let others = environment.names().filter(|given| !given.starts_with(PREFIX));
    let is_slip = |given: &&str| {
        *given != name && strsim::osa_distance(&given.to_ascii_uppercase(), name) <= 1
    };
    let given = others.into_iter().find(is_slip)?;
    Some(format!("{given} is not read by wsproxy; did you mean {name}?"))
}

/// Below this a number of milliseconds was probably meant as one of seconds.
const FEW_MILLISECONDS: u64 = 1000;
