//! `--config` and the flags that set keys, read off the table of keys: those that a command reads.

use std::{marker::PhantomData, path::PathBuf};

use clap::{Arg, ArgMatches, Command, value_parser};

use crate::config::{
    Config,
    environment::Environment,
    keys::{Flag, KEYS, Key},
    load::{CONFIG_ENV, Loaded, Sources, load},
    problem::Problems,
};

/// What a command reads of the configuration.
pub(super) trait Reads {
    /// Whether the command does something with the key, so that it has the key's flag.
    fn reads(key: &Key) -> bool;

    /// Values of keys that nobody set.
    fn defaults() -> Config {
        Config::default()
    }
}

/// All keys: the commands that run a gateway, or are about the configuration itself.
pub(super) struct Everything;

impl Reads for Everything {
    fn reads(_key: &Key) -> bool {
        true
    }
}

/// Where the configuration of a command comes from.
pub(super) struct Settings<R> {
    file: Option<PathBuf>,
    flags: Vec<(&'static Key, String)>,
    reads: PhantomData<R>,
}

impl<R: Reads> Settings<R> {
    /// The configuration from flags, environment and file.
    pub(super) fn load(self) -> Result<Loaded, Problems> {
        let (defaults, environment) = (R::defaults(), Environment::of_process());
        load(Sources { defaults, file: self.file, environment, flags: self.flags })
    }
}

/// The keys that have a flag which the command reads.
fn keys<R: Reads>() -> impl Iterator<Item = (&'static Key, Flag)> {
    KEYS.iter().filter(|key| R::reads(key)).filter_map(|key| Some((key, key.flag?)))
}

impl<R: Reads> clap::Args for Settings<R> {
    fn augment_args(command: Command) -> Command {
        let file = Arg::new(FILE).long(FILE).short('c').value_name("FILE");
        let file = file.value_parser(value_parser!(PathBuf)).value_hint(clap::ValueHint::FilePath);
        let file = file.help(format!("TOML file; else the one that {CONFIG_ENV} names, or none"));
        let defaults = R::defaults();
        let flags = keys::<R>().map(|(key, Flag { name, value })| {
            // Values are checked together with those of the file, so that all problems show.
            let flag = Arg::new(name).long(name).value_name(value);
            let default = key.write(&defaults);
            let unset = default == "\"\"";
            let default = if unset { String::new() } else { format!(" [default: {default}]") };
            flag.help(format!("{}{default}", key.doc))
        });
        command.arg(file).args(flags)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl<R: Reads> clap::FromArgMatches for Settings<R> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut settings = Self { file: None, flags: Vec::new(), reads: PhantomData };
        settings.update_from_arg_matches(matches)?;
        Ok(settings)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.file = matches.get_one(FILE).cloned();
        let given = |(key, flag): (&'static Key, Flag)| {
            Some((key, matches.get_one::<String>(flag.name)?.clone()))
        };
        self.flags = keys::<R>().filter_map(given).collect();
        Ok(())
    }
}

const FILE: &str = "config";
