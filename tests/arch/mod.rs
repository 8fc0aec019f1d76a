//! What a config and its tensors are understood as.

mod families;
mod native;
