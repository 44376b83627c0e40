//! `--config`, and flags for the keys that a command reads, made from the table of keys.

use std::{marker::PhantomData, path::PathBuf};

use clap::{Arg, ArgMatches, Command, value_parser};

use crate::config::{
    Config,
    environment::Environment,
    keys::{self, Flag, Key},
    load::{CONFIG_ENV, ConfigSources, Loaded, load},
    problem::Problems,
};

/// The part of the configuration that a command reads.
pub(super) trait Reads {
    /// Whether the command leaves files of keys and certificates closed, as [`ConfigSources::skips_files`] says.
    const SKIPS_FILES: bool = false;

    /// Returns whether the command reads the key, and so has its flag.
    fn reads(key: &Key) -> bool;

    /// Default values of keys that are not set.
    fn defaults() -> Config {
        Config::default()
    }
}

/// All keys but those of a cluster agent: the commands that run a gateway, or are about the configuration itself.
pub(super) struct Everything;

impl Reads for Everything {
    fn reads(key: &Key) -> bool {
        key.section != "tunnel_agent"
    }
}

/// The sources of a command's configuration.
pub(super) struct CliSettings<R> {
    file: Option<PathBuf>,
    flags: Vec<(&'static Key, String)>,
    reads: PhantomData<R>,
}

impl<R: Reads> CliSettings<R> {
    /// The configuration from flags, environment and file.
    pub(super) fn load(self) -> Result<Loaded, Problems> {
        load(self.sources())
    }

    /// The flags, the environment and the path of the file.
    pub(super) fn sources(self) -> ConfigSources {
        let (defaults, environment) = (R::defaults(), Environment::of_process());
        let (file, flags, skips_files) = (self.file, self.flags, R::SKIPS_FILES);
        ConfigSources { defaults, file, environment, flags, skips_files, reads_again: false }
    }
}

/// The keys with a flag that the command reads.
fn flags<R: Reads>() -> impl Iterator<Item = (&'static Key, Flag)> {
    keys::all().filter(|key| R::reads(key)).filter_map(|key| Some((key, key.flag?)))
}

impl<R: Reads> clap::Args for CliSettings<R> {
    fn augment_args(command: Command) -> Command {
        let file = Arg::new(FILE).long(FILE).short('c').value_name("FILE");
        let file = file.value_parser(value_parser!(PathBuf)).value_hint(clap::ValueHint::FilePath);
        let file =
            file.help(format!("TOML file. Default: the file that {CONFIG_ENV} names, or none"));
        let defaults = R::defaults();
        let flags = flags::<R>().map(|(key, Flag { name, value })| {
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

impl<R: Reads> clap::FromArgMatches for CliSettings<R> {
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
        self.flags = flags::<R>().filter_map(given).collect();
        Ok(())
    }
}

const FILE: &str = "config";
