//! Types of the safetensors format, which are those of its own crate, and what we add to them.
//!
//! [`Dtype`], [`TensorInfo`], [`Metadata`] and [`View`] come from the crate `safetensors`, so that a tensor of ours can be given
//! to any code written for it, and a type or rule that the format gains is gained there. Two things are ours:
//!
//! - **Which element types are read and written.** The crate knows 22, among them types narrower than a byte (`F4`, `F6_E2M3`,
//!   `F6_E3M2`), of which a row need not begin at a byte, and types of which no checkpoint of weights was ever seen here (`C64`,
//!   `F8_E8M0`, FP8 without infinities and negative zero). Reading rows, aligning shards and scanning for NaN all need whole
//!   bytes, so [`DtypeExt::is_supported`] draws the line and both reader and writer refuse what is beyond it. The enum may
//!   grow (`non_exhaustive`): a type that we do not know falls on that side too.
//! - **An owned tensor.** The crate's `TensorView` borrows from one slice that holds the whole file. Ours owns what was read of
//!   one tensor, or borrows it ([`TensorView`]), and implements [`View`].
//!
//! What the crate checks and what it does not is said where we check: in [`Header`](super::Header) and in
//! [`ShardPlan`](crate::write::ShardPlan).

use std::borrow::Cow;
use std::collections::HashMap;

use serde::Deserialize;
use serde::de::value::{Error as NoSuchName, StrDeserializer};

pub use safetensors::tensor::{Dtype, Metadata, TensorInfo, View};

use super::TensorView;

/// What this program needs to know of a [`Dtype`] besides what the crate says.
pub trait DtypeExt: Copy {
    /// Bytes per element, rounded up; exact for every supported type. (The crate's own `size` rounds down, to 0 for `F4`.)
    fn byte_size(self) -> usize;

    /// Whether tensors of this type are read and written: those of whole bytes that checkpoints are made of.
    fn is_supported(self) -> bool;

    /// Whether weights in this type can be read as numbers as they are: bf16, f16, f32 and f64. FP8 also needs scales.
    fn is_float(self) -> bool;

    /// The supported type of this name in a header, such as `BF16`; `None` for a name that is not defined or not supported.
    fn from_name(name: &str) -> Option<Self>;
}

impl DtypeExt for Dtype {
    fn byte_size(self) -> usize {
        self.bitsize().div_ceil(8)
    }

    fn is_supported(self) -> bool {
        use Dtype::{BOOL, I8, I16, I32, I64, U8, U16, U32, U64};
        matches!(self, BOOL | I8 | I16 | I32 | I64 | U8 | U16 | U32 | U64 | Dtype::F8_E4M3 | Dtype::F8_E5M2)
            || self.is_float()
    }

    fn is_float(self) -> bool {
        matches!(self, Dtype::F16 | Dtype::BF16 | Dtype::F32 | Dtype::F64)
    }

    fn from_name(name: &str) -> Option<Self> {
        Dtype::deserialize(StrDeserializer::<NoSuchName>::new(name)).ok().filter(|d| d.is_supported())
    }
}

/// The tensors of one safetensors file in the order of their bytes, without hole or overlap: what a header says.
#[derive(Debug, Clone)]
pub struct Layout {
    /// The crate finds a tensor by its name; we go through them in order.
    names: Vec<String>,
    metadata: Metadata,
}

impl Layout {
    /// Tensors with their places relative to the start of the data, in the order of their bytes; `text` is `__metadata__`.
    ///
    /// Callers check their input beforehand and say what is wrong with it; this is the crate's own, second look.
    ///
    /// # Errors
    /// What the crate refuses: a hole or an overlap, or a place that does not fit shape and dtype.
    pub(crate) fn new(
        text: Option<HashMap<String, String>>,
        tensors: Vec<(String, TensorInfo)>,
    ) -> Result<Self, safetensors::SafeTensorError> {
        let names = tensors.iter().map(|(name, _)| name.clone()).collect();
        Ok(Layout { names, metadata: Metadata::new(text, tensors)? })
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether there is no tensor.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Name and description of tensor `index` in the order of the bytes, if there are that many.
    pub fn get(&self, index: usize) -> Option<(&str, &TensorInfo)> {
        let name = self.names.get(index)?;
        Some((name, self.metadata.info(name)?))
    }

    /// All names and descriptions, in the order of the bytes.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &TensorInfo)> {
        self.names.iter().filter_map(|name| Some((name.as_str(), self.metadata.info(name)?)))
    }

    /// Bytes of all tensors.
    pub fn data_bytes(&self) -> u64 {
        self.metadata.data_len() as u64
    }

    /// The same as the crate's type: what its serialiser writes into a header.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }
}

/// Bytes that a tensor takes.
pub(crate) fn stored_bytes(info: &TensorInfo) -> u64 {
    let (begin, end) = info.data_offsets;
    (end - begin) as u64
}

impl View for TensorView<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every type of the crate by name; `None` for those that are not supported.
    const NAMES: [(&str, Option<usize>); 23] = [
        ("BOOL", Some(1)),
        ("U8", Some(1)),
        ("I8", Some(1)),
        ("I16", Some(2)),
        ("U16", Some(2)),
        ("I32", Some(4)),
        ("U32", Some(4)),
        ("I64", Some(8)),
        ("U64", Some(8)),
        ("F8_E4M3", Some(1)),
        ("F8_E5M2", Some(1)),
        ("F16", Some(2)),
        ("BF16", Some(2)),
        ("F32", Some(4)),
        ("F64", Some(8)),
        ("F4", None),
        ("F6_E2M3", None),
        ("F6_E3M2", None),
        ("F8_E8M0", None),
        ("F8_E4M3FNUZ", None),
        ("F8_E5M2FNUZ", None),
        ("C64", None),
        ("bf16", None),
    ];

    #[test]
    fn names_and_sizes_are_those_of_the_format() {
        for (name, bytes) in NAMES {
            let found = Dtype::from_name(name);
            assert_eq!(found.map(DtypeExt::byte_size), bytes, "{name}");
            if let Some(dtype) = found {
                assert_eq!((dtype.to_string(), dtype.bitsize()), (name.to_owned(), 8 * dtype.byte_size()));
            }
        }
        assert_eq!((Dtype::F4.byte_size(), Dtype::F6_E2M3.byte_size(), Dtype::C64.byte_size()), (1, 1, 8));
    }

    #[test]
    fn a_tensor_of_ours_is_one_of_the_crate() {
        let shape = [2, 3];
        let view =
            TensorView { name: "t", dtype: Dtype::I16, shape: &shape, bytes: (0..12).collect::<Vec<u8>>().into() };
        let file = safetensors::serialize([("t", view)], None).unwrap();
        let header = crate::source::Header::parse(&file).unwrap();
        let (name, info) = header.tensors.get(0).unwrap();
        assert_eq!((name, info.dtype, &info.shape[..], info.data_offsets), ("t", Dtype::I16, &shape[..], (0, 12)));
        assert_eq!(&file[header.data_start as usize..], (0..12).collect::<Vec<u8>>());
    }
}
