//! Reading checkpoints: what is malformed is refused, what a hub sends is checked, and the tokenizer is that of transformers.

#[cfg(feature = "hub")]
mod hub;
mod read;
mod tokenizer;
