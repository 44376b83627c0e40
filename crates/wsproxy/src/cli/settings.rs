//! `--config` and the flags that set keys, read off the table of keys.

use std::path::PathBuf;

use clap::{Arg, ArgMatches, Command, value_parser};

use crate::config::{
    Config,
    environment::Environment,
    keys::{KEYS, Key},
    load::{CONFIG_ENV, Loaded, Sources, load},
    problem::Problems,
};

/// Where the configuration comes from.
#[derive(Default)]
pub(super) struct Settings {
    file: Option<PathBuf>,
    flags: Vec<(&'static Key, String)>,
}

impl Settings {
    /// The configuration from flags, environment and file.
    pub(super) fn load(self) -> Result<Loaded, Problems> {
        self.load_over(Config::default())
    }

    /// The same, with other defaults.
    pub(super) fn load_over(self, defaults: Config) -> Result<Loaded, Problems> {
        let environment = Environment::of_process();
        load(Sources { defaults, file: self.file, environment, flags: self.flags })
    }
}

impl clap::Args for Settings {
    fn augment_args(command: Command) -> Command {
        let file = Arg::new(FILE).long(FILE).short('c').value_name("FILE");
        let file = file.value_parser(value_parser!(PathBuf)).value_hint(clap::ValueHint::FilePath);
        let file = file.help(format!("TOML file; else the one that {CONFIG_ENV} names, or none"));
        let flags = KEYS.iter().filter_map(|key| {
            // Values are checked together with those of the file, so that all problems show.
            let flag = Arg::new(key.flag?).long(key.flag?).value_name("VALUE");
            let default = key.write(&Config::default());
            let unset = default == "\"\"";
            let default = if unset { String::new() } else { format!(" [default: {default}]") };
            Some(flag.help(format!("{}{default}", key.doc)))
        });
        command.arg(file).args(flags)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl clap::FromArgMatches for Settings {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut settings = Self::default();
        settings.update_from_arg_matches(matches)?;
        Ok(settings)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.file = matches.get_one(FILE).cloned();
        let given = |key: &'static Key| Some((key, matches.get_one::<String>(key.flag?)?.clone()));
        self.flags = KEYS.iter().filter_map(given).collect();
        Ok(())
    }
}

const FILE: &str = "config";
