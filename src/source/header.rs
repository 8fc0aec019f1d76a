//! Strict parser of the safetensors header.
//!
//! Layout of a file: 8 bytes little-endian header length `n`, `n` bytes of JSON, then the data. Stricter than the
//! reference crate: duplicate keys, unknown fields, and names with control characters are refused.

use std::collections::HashSet;
use std::fmt;

use serde::de::{self, Deserializer, MapAccess, SeqAccess, Visitor};

use super::Dtype;

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
        /// `shape.product() * dtype.size()`.
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

/// One tensor of a header. Offsets are relative to the start of the data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderEntry {
    /// Name; not empty, no control character, at most [`MAX_NAME_CHARS`].
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape, outermost first; empty for a scalar.
    pub shape: Vec<usize>,
    /// First byte.
    pub begin: u64,
    /// One past the last byte.
    pub end: u64,
}

/// A validated header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Tensors in the order of their bytes; contiguous from 0.
    pub tensors: Vec<HeaderEntry>,
    /// `__metadata__`, in the order of the file.
    pub metadata: Vec<(String, String)>,
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
        tensors.sort_by(|a, b| (a.begin, a.end, &a.name).cmp(&(b.begin, b.end, &b.name)));
        let mut expected = 0;
        for t in &tensors {
            check_range(t, expected)?;
            expected = t.end;
        }
        let found = bytes.saturating_sub(data_start);
        if expected != found {
            return Err(HeaderError::DataLength { expected, found });
        }
        Ok(Header { tensors, metadata: raw.metadata, data_start })
    }
}

fn check_range(t: &HeaderEntry, expected: u64) -> Result<(), HeaderError> {
    let HeaderEntry { name, dtype, shape, begin, end } = t;
    if end < begin {
        return Err(HeaderError::Reversed { name: name.clone(), begin: *begin, end: *end });
    }
    if *begin != expected {
        return Err(HeaderError::NotContiguous { name: name.clone(), begin: *begin, expected });
    }
    let Some(size) = byte_size(shape, *dtype) else {
        return Err(HeaderError::Overflow { name: name.clone(), shape: shape.clone() });
    };
    if size != end - begin {
        return Err(HeaderError::Size {
            name: name.clone(),
            shape: shape.clone(),
            dtype: *dtype,
            expected: size,
            found: end - begin,
        });
    }
    Ok(())
}

/// `shape.product() * dtype.size()`, or `None` when any partial product leaves `usize`: `[2^32, 2^32, 0]` is as
/// suspect as `[2^32, 2^32]`.
pub(crate) fn byte_size(shape: &[usize], dtype: Dtype) -> Option<u64> {
    let n = shape.iter().filter(|&&d| d != 0).try_fold(dtype.size(), |n, &d| n.checked_mul(d))?;
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
    tensors: Vec<HeaderEntry>,
    metadata: Vec<(String, String)>,
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
        let mut raw = Raw { tensors: Vec::new(), metadata: Vec::new() };
        while let Some(name) = map.next_key::<String>()? {
            if let Some(fault) = check_name(&name) {
                let shown: String = name.chars().take(80).collect();
                return Err(de::Error::custom(format_args!("tensor name {shown:?} {fault}")));
            }
            if !seen.insert(name.clone()) {
                return Err(de::Error::custom(format_args!("duplicate key `{name}`")));
            }
            if name == "__metadata__" {
                raw.metadata = map.next_value::<Metadata>()?.0;
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
            raw.tensors.push(HeaderEntry { name, dtype, shape: fields.shape.0, begin, end });
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
struct Metadata(Vec<(String, String)>);

impl<'de> de::Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = Metadata;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of strings")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Metadata, A::Error> {
                let mut seen = HashSet::new();
                let mut list = Vec::new();
                while let Some((key, value)) = map.next_entry::<String, String>()? {
                    if !seen.insert(key.clone()) {
                        return Err(de::Error::custom(format_args!("duplicate metadata key {key:?}")));
                    }
                    list.push((key, value));
                }
                Ok(Metadata(list))
            }
        }
        d.deserialize_map(V)
    }
}
