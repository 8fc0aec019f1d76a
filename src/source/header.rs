//! Strict parser of the safetensors header.
//!
//! Layout of a file: 8 bytes little-endian header length `n`, `n` bytes of JSON, then the data. Types are those of the crate
//! `safetensors`, whose own parser wants the whole file in memory (or mapped) and is more lenient. What is checked by whom, in
//! version 0.8 (`what_the_crate_takes_and_we_do_not` in `tests/io/read.rs` holds the crate to it):
//!
//! | check | crate | why it is ours |
//! |---|---|---|
//! | header of at most 100 MB, within the file, UTF-8 | yes | before any of it is read; the file is never read whole |
//! | first byte is `{` | no | the format says so; other readers refuse white space before it |
//! | no name twice | no: the last one counts | two readers could see two different tensors; also for keys of `__metadata__` |
//! | no unknown field | no | a misspelt or newer field must not be ignored in silence |
//! | names neither empty nor with control characters nor above [`MAX_NAME_CHARS`] | no | they reach terminals and messages |
//! | at most [`MAX_TENSORS`] tensors of at most 16 dimensions | no | a header of 100 MB must not become gigabytes |
//! | dtype is one that is read here | it knows more | see [`DtypeExt::is_supported`] |
//! | shape does not overflow | all but after a 0 | `[0, 2^40, 2^40]` is as suspect as `[2^40, 2^40]` |
//! | no hole, no overlap, size fits shape and dtype, no byte left over | yes | its errors leave out what was expected and found |

use std::collections::{HashMap, HashSet};
use std::fmt;

use serde::de::{self, Deserializer, MapAccess, SeqAccess, Visitor};

use super::format::{Dtype, DtypeExt, Layout, TensorInfo, stored_bytes};

/// Largest header accepted, in bytes; the limit of the format.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Most tensors accepted in one file.
pub const MAX_TENSORS: usize = 1_000_000;
/// Longest tensor name accepted, in characters.
pub const MAX_NAME_CHARS: usize = 1024;
/// Most dimensions accepted; torch itself stops at 64, models use at most 5.
const MAX_RANK: usize = 16;

/// How a file breaks the safetensors format.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// Shorter than the length field.
    #[error("{bytes} bytes are too few for a safetensors file{}", hint_truncated())]
    TooShort {
        /// Size of the file.
        bytes: u64,
    },
    /// Header longer than the format allows.
    #[error("header length {length} is above the limit of {MAX_HEADER_BYTES} bytes; this is not a safetensors file")]
    TooLong {
        /// Length claimed.
        length: u64,
    },
    /// Header reaches past the end.
    #[error("header of {length} bytes reaches past the end of a file of {bytes} bytes{}", hint_truncated())]
    PastEnd {
        /// Length claimed.
        length: u64,
        /// Size of the file.
        bytes: u64,
    },
    /// Not the JSON the format asks for.
    #[error("bad header: {message}")]
    Json {
        /// What the parser found, and where.
        message: String,
    },
    /// Offsets that run backwards.
    #[error("tensor `{name}` ends at byte {end}, before its begin at {begin}")]
    Reversed {
        /// Tensor.
        name: String,
        /// First byte.
        begin: u64,
        /// One past the last byte.
        end: u64,
    },
    /// A hole or an overlap in the data.
    #[error(
        "tensor `{name}` begins at byte {begin}, expected {expected}: tensors must follow each other without \
             hole or overlap"
    )]
    NotContiguous {
        /// Tensor.
        name: String,
        /// Begin found.
        begin: u64,
        /// End of the tensor before.
        expected: u64,
    },
    /// Shape too large to be real.
    #[error("shape {shape:?} of tensor `{name}` overflows")]
    Overflow {
        /// Tensor.
        name: String,
        /// Shape claimed.
        shape: Vec<usize>,
    },
    /// Byte range and shape disagree.
    #[error("tensor `{name}` of shape {shape:?} and dtype {dtype}: expected {expected} bytes, found {found}")]
    Size {
        /// Tensor.
        name: String,
        /// Shape claimed.
        shape: Vec<usize>,
        /// Dtype claimed.
        dtype: Dtype,
        /// `shape.product() * dtype.byte_size()`.
        expected: u64,
        /// `end - begin`.
        found: u64,
    },
    /// Data shorter or longer than the tensors need.
    #[error("the tensors need {expected} bytes of data, the file holds {found}{}",
            if found < expected { hint_truncated() } else { "\n\nhint: bytes after the last tensor are not allowed; \
             download the file again" })]
    DataLength {
        /// End of the last tensor.
        expected: u64,
        /// Bytes after the header.
        found: u64,
    },
}

fn hint_truncated() -> &'static str {
    "\n\nhint: the file is truncated; download it again"
}

/// A validated header.
#[derive(Debug, Clone)]
pub struct Header {
    /// Tensors in the order of their bytes, contiguous from 0; names are not empty, have no control character and at most
    /// [`MAX_NAME_CHARS`]. With `__metadata__`.
    pub tensors: Layout,
    /// Where the data begins in the file: 8 + header length.
    pub data_start: u64,
}

impl Header {
    /// Parses and validates the header of `file`, the whole content of a safetensors file.
    ///
    /// Allocates in proportion to the header, which is never longer than the file.
    ///
    /// # Errors
    /// Any breach of the format.
    pub fn parse(file: &[u8]) -> Result<Self, HeaderError> {
        let bytes = file.len() as u64;
        let Some((length, rest)) = file.split_first_chunk::<8>() else {
            return Err(HeaderError::TooShort { bytes });
        };
        let length = u64::from_le_bytes(*length);
        if length > MAX_HEADER_BYTES {
            return Err(HeaderError::TooLong { length });
        }
        if rest.len() < length as usize {
            return Err(HeaderError::PastEnd { length, bytes });
        }
        Self::parse_parts(&file[..8 + length as usize], bytes)
    }

    /// As [`Header::parse`], given only the length field and the JSON of a file of `bytes` bytes.
    pub(super) fn parse_parts(header: &[u8], bytes: u64) -> Result<Self, HeaderError> {
        let Some((_, json)) = header.split_first_chunk::<8>() else {
            return Err(HeaderError::TooShort { bytes });
        };
        let data_start = header.len() as u64;
        let raw = parse_json(json)?;
        let mut tensors = raw.tensors;
        tensors.sort_by(|(a, x), (b, y)| (x.data_offsets, a).cmp(&(y.data_offsets, b)));
        let mut expected = 0;
        for (name, info) in &tensors {
            check_range(name, info, expected)?;
            expected = info.data_offsets.1 as u64;
        }
        let found = bytes.saturating_sub(data_start);
        if expected != found {
            return Err(HeaderError::DataLength { expected, found });
        }
        let tensors = Layout::new(raw.metadata, tensors).map_err(|e| HeaderError::Json { message: e.to_string() })?;
        Ok(Header { tensors, data_start })
    }
}

/// Whether a tensor begins at byte `expected` and has as many bytes as its shape and dtype say. The crate asks the same
/// ([`Layout::new`]), and answers without naming the tensor or the figures.
fn check_range(name: &str, info: &TensorInfo, expected: u64) -> Result<(), HeaderError> {
    let TensorInfo { dtype, shape, data_offsets } = info;
    let (begin, end) = (data_offsets.0 as u64, data_offsets.1 as u64);
    let name = || name.to_owned();
    if end < begin {
        return Err(HeaderError::Reversed { name: name(), begin, end });
    }
    if begin != expected {
        return Err(HeaderError::NotContiguous { name: name(), begin, expected });
    }
    let Some(expected) = byte_size(shape, *dtype) else {
        return Err(HeaderError::Overflow { name: name(), shape: shape.clone() });
    };
    let found = stored_bytes(info);
    if expected != found {
        return Err(HeaderError::Size { name: name(), shape: shape.clone(), dtype: *dtype, expected, found });
    }
    Ok(())
}

/// `shape.product() * dtype.byte_size()`, or `None` when any partial product leaves `usize`: `[2^32, 2^32, 0]` is as
/// suspect as `[2^32, 2^32]`.
pub(crate) fn byte_size(shape: &[usize], dtype: Dtype) -> Option<u64> {
    let n = shape.iter().filter(|&&d| d != 0).try_fold(dtype.byte_size(), |n, &d| n.checked_mul(d))?;
    Some(if shape.contains(&0) { 0 } else { n as u64 })
}

/// What is wrong with a tensor name, if anything.
pub(crate) fn check_name(name: &str) -> Option<&'static str> {
    if name.is_empty() {
        Some("is empty")
    } else if name.chars().any(char::is_control) {
        Some("holds a control character")
    } else if name.chars().nth(MAX_NAME_CHARS).is_some() {
        Some("is longer than 1024 characters")
    } else {
        None
    }
}

struct Raw {
    tensors: Vec<(String, TensorInfo)>,
    metadata: Option<HashMap<String, String>>,
}

fn parse_json(json: &[u8]) -> Result<Raw, HeaderError> {
    let bad = |message: String| HeaderError::Json { message };
    // Checked first: the position of the error means more than that of the string it spoils.
    let text = std::str::from_utf8(json).map_err(|e| bad(format!("not UTF-8: {e}")))?;
    if !text.starts_with('{') {
        return Err(bad("expected a JSON object".to_owned()));
    }
    let mut de = serde_json::Deserializer::from_str(text);
    let raw = de.deserialize_map(HeaderVisitor).map_err(|e| bad(e.to_string()))?;
    de.end().map_err(|e| bad(e.to_string()))?;
    Ok(raw)
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Raw;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map from tensor names to their description")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Raw, A::Error> {
        let mut seen = HashSet::new();
        let mut raw = Raw { tensors: Vec::new(), metadata: None };
        while let Some(name) = map.next_key::<String>()? {
            if let Some(fault) = check_name(&name) {
                let shown: String = name.chars().take(80).collect();
                return Err(de::Error::custom(format_args!("tensor name {shown:?} {fault}")));
            }
            if !seen.insert(name.clone()) {
                return Err(de::Error::custom(format_args!("duplicate key `{name}`")));
            }
            if name == "__metadata__" {
                raw.metadata = Some(map.next_value::<Text>()?.0);
                continue;
            }
            if raw.tensors.len() == MAX_TENSORS {
                return Err(de::Error::custom(format_args!("more than {MAX_TENSORS} tensors")));
            }
            let fields: Fields = map.next_value()?;
            let Some(dtype) = Dtype::from_name(&fields.dtype) else {
                let shown: String = fields.dtype.chars().take(40).collect();
                return Err(de::Error::custom(format_args!("tensor `{name}` has unknown dtype {shown:?}")));
            };
            let (begin, end) = fields.data_offsets;
            let (Ok(begin), Ok(end)) = (usize::try_from(begin), usize::try_from(end)) else {
                return Err(de::Error::custom(format_args!(
                    "tensor `{name}` lies beyond what this machine can address"
                )));
            };
            raw.tensors.push((name, TensorInfo { dtype, shape: fields.shape.0, data_offsets: (begin, end) }));
        }
        Ok(raw)
    }
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Fields {
    dtype: String,
    shape: Shape,
    data_offsets: (u64, u64),
}

/// A shape; stops at [`MAX_RANK`] so that a header of 100 MB cannot become 400 MB of dimensions.
struct Shape(Vec<usize>);

impl<'de> de::Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = Shape;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of dimensions")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Shape, A::Error> {
                let mut shape = Vec::new();
                while let Some(dim) = seq.next_element::<usize>()? {
                    if shape.len() == MAX_RANK {
                        return Err(de::Error::custom(format_args!("a shape of more than {MAX_RANK} dimensions")));
                    }
                    shape.push(dim);
                }
                Ok(Shape(shape))
            }
        }
        d.deserialize_seq(V)
    }
}

/// `__metadata__`: strings to strings, no key twice.
struct Text(HashMap<String, String>);

impl<'de> de::Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = Text;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of strings")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Text, A::Error> {
                let mut text = HashMap::new();
                while let Some((key, value)) = map.next_entry::<String, String>()? {
                    if text.contains_key(&key) {
                        return Err(de::Error::custom(format_args!("duplicate metadata key {key:?}")));
                    }
                    text.insert(key, value);
                }
                Ok(Text(text))
            }
        }
        d.deserialize_map(V)
    }
}
