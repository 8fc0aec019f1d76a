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
    given: Vec<(&'static MethodOption, String)>,
}

impl MethodArgs {
    /// The method of that name with these options.
    ///
    /// # Errors
    /// An option that the method does not have, a value it does not take.
    pub fn method(&self, method: &MethodChoice) -> anyhow::Result<MethodChoice> {
        let entry = method.entry();
        if let Some((option, _)) = self.given.iter().find(|(option, _)| !entry.takes(option.name)) {
            return Err(option.foreign(entry.name).into());
        }
        let given: Vec<(&str, &str)> = self.given.iter().map(|(option, value)| (option.name, value.as_str())).collect();
        Ok((entry.make)(&given)?)
    }

    /// Each of `methods` with those of these options that it has.
    ///
    /// # Errors
    /// An option that none of them has, a value that is none.
    pub fn methods(&self, methods: &[MethodChoice]) -> anyhow::Result<Vec<MethodChoice>> {
        let taken = |name: &str| methods.iter().any(|method| method.entry().takes(name));
        if let Some((option, _)) = self.given.iter().find(|(option, _)| !taken(option.name)) {
            let name = option.name;
            bail!("none of the methods takes --{name}\n\nhint: leave the option out, or add a method that has it");
        }
        let own = |method: &MethodChoice| {
            let given = self.given.iter().filter(|(option, _)| method.entry().takes(option.name)).cloned().collect();
            MethodArgs { given }.method(method)
        };
        methods.iter().map(own).collect()
    }
}

/// An option as the command line has it.
fn arg(option: &'static MethodOption) -> Arg {
    let arg = Arg::new(option.name).long(option.name).help(option.full_help()).help_heading(option.heading);
    typed_arg(arg, option.value_name, option.repeatable, option.values.to_vec(), option.check)
}

/// An option that takes one of `values`, or where there are none whatever `check` lets pass; without a `value_name`,
/// a flag.
pub(super) fn typed_arg(
    arg: Arg,
    value_name: &'static str,
    repeatable: bool,
    values: Vec<&'static str>,
    check: impl Fn(&str) -> Result<(), String> + Clone + Send + Sync + 'static,
) -> Arg {
    if value_name.is_empty() {
        return arg.action(ArgAction::SetTrue);
    }
    let arg = arg.value_name(value_name).action(if repeatable { ArgAction::Append } else { ArgAction::Set });
    if values.is_empty() {
        arg.value_parser(move |value: &str| check(value).map(|()| value.to_owned()))
    } else {
        arg.value_parser(PossibleValuesParser::new(values))
    }
}

/// What was given of an option made by [`typed_arg`]: its values in order, one that is empty for a flag.
pub(super) fn given(matches: &ArgMatches, name: &str, value_name: &str) -> Vec<String> {
    if value_name.is_empty() {
        return matches.get_flag(name).then(String::new).into_iter().collect();
    }
    matches.get_many::<String>(name).into_iter().flatten().cloned().collect()
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
        let of = |option: &'static MethodOption| {
            given(matches, option.name, option.value_name).into_iter().map(move |value| (option, value))
        };
        Ok(Self { given: options().into_iter().flat_map(of).collect() })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}
