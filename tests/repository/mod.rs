//! The repository itself: what it is built upon, and rules that its sources keep.

mod imports;
mod layout;
mod names;
mod source_text;
mod supply_chain;
