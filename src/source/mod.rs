//! From a folder or hub id to a validated directory of tensors.
//!
//! Knows files and formats; knows nothing of attention. Nothing that is read here is trusted: every length, offset,
//! name and path is checked before it is used, and no code shipped with a model is ever executed.

mod chat;
pub(crate) mod config;
mod directory;
mod error;
mod finite;
mod format;
mod hash;
mod header;
#[cfg(feature = "hub")]
mod hub;
pub(crate) mod index;
mod map;
mod namespaces;
mod open;
mod path;
mod side;
mod tensor;
mod text_stream;
mod tokenizer;

pub use chat::{ChatTemplate, Message, end_tokens};
pub use directory::{StoredTensor, TensorDirectory, WeightFingerprint};
pub use error::SourceError;
pub use finite::{NonFinite, find_non_finite, scan_non_finite};
pub use format::{Dtype, DtypeExt, Layout, Metadata, TensorInfo, View};
pub use hash::{FileDigest, sha256_file};
pub use header::{Header, HeaderError, MAX_HEADER_BYTES, MAX_NAME_CHARS, MAX_TENSORS};
pub use map::MappedBytes;
pub use open::{ModelSource, OpenOptions};
pub use side::SideFile;
pub use tensor::TensorView;
pub use text_stream::TextStream;
pub use tokenizer::{Tokenizer, panics_are_contained};

pub(crate) use format::stored_bytes;
pub(crate) use hash::{Sha256Stream, sha256};
pub(crate) use header::check_name;
pub(crate) use path::plain_file_name;
