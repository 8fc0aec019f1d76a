//! The target classes there are: a file each with one implementation of [`Class`](super::Class), and one line in [`CLASSES`].
//! Nothing outside this folder knows one by name.

pub mod deepseek_v2;
pub mod deepseek_v3;
pub mod minicpm3;
pub mod remote;
mod stock;
pub mod youtu;

use super::Target;

/// Every class, in order of preference: `auto` takes the first that holds the source, and the last where none does.
pub const CLASSES: &[Target] =
    &[deepseek_v3::TARGET, deepseek_v2::TARGET, youtu::TARGET, minicpm3::TARGET, remote::TARGET];
