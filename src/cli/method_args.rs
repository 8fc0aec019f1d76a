//! The options of methods on the command line, made from the registry.

use anyhow::bail;
use clap::builder::PossibleValuesParser;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};
use gqa2mla::methods::options::MethodOption;
use gqa2mla::methods::{METHODS, MethodChoice};

/// Every option that belongs to a method, once, in the order of the registry.
fn options() -> Vec<&'static MethodOption> {
    let mut out: Vec<&'static MethodOption> = Vec::new();
    for option in METHODS.iter().flat_map(|entry| entry.options) {
        if !out.iter().any(|other| other.name == option.name) {
            out.push(option);
        }
    }
    out
}

/// The options that were given: name and value, empty for a flag.
#[derive(Debug, Clone, Default)]
pub struct MethodArgs {
    given: Vec<(&'static str, String)>,
}

impl MethodArgs {
    /// The method of that name with these options.
    ///
    /// # Errors
    /// An option that the method does not have, a value it does not take.
    pub fn method(&self, method: &MethodChoice) -> anyhow::Result<MethodChoice> {
        let entry = method.entry();
        for (name, _) in &self.given {
            if !entry.options.iter().any(|option| option.name == *name) {
                match options().into_iter().find(|option| option.name == *name) {
                    Some(option) => return Err(option.foreign(entry.name).into()),
                    None => bail!("--{name} is an option of no method"),
                }
            }
        }
        let given: Vec<(&str, &str)> = self.given.iter().map(|(name, value)| (*name, value.as_str())).collect();
        Ok((entry.make)(&given)?)
    }
}

impl MethodArgs {
    /// Each of `methods` with those of these options that it has.
    ///
    /// # Errors
    /// An option that none of them has, a value that is none.
    pub fn methods(&self, methods: &[MethodChoice]) -> anyhow::Result<Vec<MethodChoice>> {
        let takes = |method: &MethodChoice, name: &str| method.entry().options.iter().any(|o| o.name == name);
        if let Some((name, _)) = self.given.iter().find(|(name, _)| !methods.iter().any(|m| takes(m, name))) {
            bail!("none of the methods takes --{name}\n\nhint: leave the option out, or add a method that has it");
        }
        let own = |method: &MethodChoice| {
            let given = self.given.iter().filter(|(name, _)| takes(method, name)).cloned().collect();
            MethodArgs { given }.method(method)
        };
        methods.iter().map(own).collect()
    }
}

/// An option as the command line has it.
fn arg(option: &'static MethodOption) -> Arg {
    let arg = Arg::new(option.name).long(option.name).help(option.full_help()).help_heading(option.heading);
    if option.value_name.is_empty() {
        return arg.action(ArgAction::SetTrue);
    }
    let action = if option.repeatable { ArgAction::Append } else { ArgAction::Set };
    let arg = arg.value_name(option.value_name).action(action);
    if option.values.is_empty() {
        let check = option.check;
        arg.value_parser(move |value: &str| check(value).map(|()| value.to_owned()))
    } else {
        arg.value_parser(PossibleValuesParser::new(option.values))
    }
}

impl Args for MethodArgs {
    fn augment_args(command: Command) -> Command {
        options().into_iter().fold(command, |command, option| command.arg(arg(option)))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for MethodArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut out = Self::default();
        out.update_from_arg_matches(matches)?;
        Ok(out)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        for option in options() {
            if option.value_name.is_empty() {
                self.given.extend(matches.get_flag(option.name).then(|| (option.name, String::new())));
            } else {
                let values = matches.get_many::<String>(option.name).into_iter().flatten();
                self.given.extend(values.map(|value| (option.name, value.clone())));
            }
        }
        Ok(())
    }
}
