//! Which tensor goes to which byte of which shard, decided before anything is written.
//!
//! Places and headers are values of the crate `safetensors` ([`TensorInfo`], [`Metadata`](crate::source::Metadata)), and the
//! JSON of a header is what its serialiser makes of them. Its own writer (`serialize_to_file`, version 0.8) is not used: it
//! sorts tensors by dtype and name, and wants all of them at once, where a conversion has one layer at a time and writes in
//! the order of the model; and it neither waits for the disk nor hashes. So these are ours:
//!
//! - **Alignment.** The crate reaches it by sorting wide types first. Here a shard is closed where the next tensor would not
//!   begin at a multiple of its element size.
//! - **Names.** The crate writes any: empty ones, control characters, `__metadata__` twice, the same name twice (of which its
//!   map keeps the last, behind a hole). What our reader refuses is not written ([`ShardPlan::new`]).
//! - **Sizes.** Names of more than a header may hold and shapes that overflow are refused before the first byte is written.
//! - **Order, resumption, fsync**: [`StagedWriter`](super::StagedWriter).

use std::collections::{BTreeMap, HashMap, HashSet};

use serde_json::json;

use super::WriteError;
use crate::source::{Dtype, DtypeExt, Layout, MAX_HEADER_BYTES, MAX_TENSORS, TensorInfo, check_name};

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedTensor {
    /// Name in the checkpoint.
    pub name: String,
    /// Element type to store.
    pub dtype: Dtype,
    /// Shape, outermost first.
    pub shape: Vec<usize>,
}

/// One weight file.
#[derive(Debug, Clone)]
pub struct PlannedShard {
    /// File name.
    pub file: String,
    /// Its tensors, in the order of their bytes; offsets are relative to the start of the data.
    pub tensors: Layout,
    /// Length field and JSON header, padded with spaces so that the data begins at a multiple of 8.
    pub(super) header: Vec<u8>,
}

impl PlannedShard {
    /// Bytes of the tensors.
    pub fn data_bytes(&self) -> u64 {
        self.tensors.data_bytes()
    }

    /// Size of the file.
    pub fn file_bytes(&self) -> u64 {
        self.header.len() as u64 + self.data_bytes()
    }
}

/// Every weight file of a checkpoint, laid out to the byte.
#[derive(Debug, Clone)]
pub struct ShardPlan {
    shards: Vec<PlannedShard>,
    /// Whether several files are the parts of one checkpoint.
    indexed: bool,
}

/// Name of the index of a checkpoint with several shards.
pub(super) const INDEX: &str = "model.safetensors.index.json";

impl ShardPlan {
    /// Lays out `tensors` in the order given.
    ///
    /// A shard is closed when the next tensor would take its data above `max_shard_bytes`; a tensor larger than that
    /// has a shard of its own. One shard is called `model.safetensors`, several `model-00001-of-0000N.safetensors`.
    /// A shard is also closed where a tensor would not begin at a multiple of its element size (after an odd number
    /// of FP8 values, say), since readers that view the data in place need that and the format allows no padding.
    ///
    /// # Errors
    /// No tensor; a name that repeats, is empty or reserved, or holds control characters; a dtype that is not supported
    /// ([`DtypeExt::is_supported`]); a shape that overflows.
    pub fn new(tensors: &[PlannedTensor], max_shard_bytes: u64) -> Result<Self, WriteError> {
        if tensors.is_empty() {
            return Err(WriteError::EmptyPlan);
        }
        let mut seen = HashSet::with_capacity(tensors.len());
        let mut groups: Vec<Vec<(String, TensorInfo)>> = Vec::new();
        for t in tensors {
            let bytes = check(t, &mut seen)?;
            let size = t.dtype.byte_size();
            let last = groups.last().and_then(|g| Some((g.last()?.1.data_offsets.1, g.len())));
            let begin = last
                .filter(|(end, count)| {
                    end.checked_add(bytes).is_some_and(|e| e as u64 <= max_shard_bytes)
                        && end % size == 0
                        && *count < MAX_TENSORS
                })
                .map_or(0, |(end, _)| end);
            let info = TensorInfo { dtype: t.dtype, shape: t.shape.clone(), data_offsets: (begin, begin + bytes) };
            let placed = (t.name.clone(), info);
            // Begin 0 after a shard that holds only empty tensors continues it: same offset, same file.
            match groups.last_mut() {
                Some(group) if last.is_some_and(|(end, _)| end == begin) => group.push(placed),
                _ => groups.push(vec![placed]),
            }
        }
        let count = groups.len();
        let shards = groups.into_iter().enumerate().map(|(i, tensors)| {
            let file = match count {
                1 => "model.safetensors".to_owned(),
                n => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
            };
            let tensors = layout(tensors)?;
            let header = header(&tensors)?;
            Ok(PlannedShard { file, tensors, header })
        });
        Ok(ShardPlan { shards: shards.collect::<Result<_, WriteError>>()?, indexed: true })
    }

    /// Lays out files that are not parts of one checkpoint but checkpoints of their own, such as those of ranks: names may
    /// repeat from file to file, and there is no index.
    ///
    /// # Errors
    /// As [`ShardPlan::new`] for each file; a file whose tensors would not all begin at a multiple of their element size.
    pub fn of_files(files: &[(String, Vec<PlannedTensor>)]) -> Result<Self, WriteError> {
        let mut shards = Vec::with_capacity(files.len());
        for (file, tensors) in files {
            let mut own = Self::new(tensors, u64::MAX)?.shards;
            match (own.pop(), own.pop()) {
                (Some(shard), None) => shards.push(PlannedShard { file: file.clone(), ..shard }),
                (Some(shard), Some(_)) => {
                    let name = first_name(&shard.tensors);
                    let reason = format!("it does not begin at a multiple of its element size in {file}");
                    return Err(WriteError::BadTensor { name, reason });
                }
                (None, _) => return Err(WriteError::EmptyPlan),
            }
        }
        Ok(Self { shards, indexed: false })
    }

    /// The weight files, in order.
    pub fn shards(&self) -> &[PlannedShard] {
        &self.shards
    }

    /// All tensors in the order in which they must be written.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &TensorInfo)> {
        self.shards.iter().flat_map(|s| s.tensors.iter())
    }

    /// Bytes of all tensors.
    pub fn total_size(&self) -> u64 {
        self.shards.iter().map(PlannedShard::data_bytes).sum()
    }

    /// Bytes of all weight files and the index.
    pub fn file_bytes(&self) -> u64 {
        let index = self.index().map_or(0, |i| i.len() as u64);
        self.shards.iter().map(PlannedShard::file_bytes).sum::<u64>() + index
    }

    /// Content of the index, for a checkpoint of several shards: sorted, indented as `transformers` does.
    pub(super) fn index(&self) -> Option<Vec<u8>> {
        if self.shards.len() < 2 || !self.indexed {
            return None;
        }
        let map: BTreeMap<&str, &str> =
            self.shards.iter().flat_map(|s| s.tensors.iter().map(|(name, _)| (name, s.file.as_str()))).collect();
        let value = json!({"metadata": {"total_size": self.total_size()}, "weight_map": map});
        let mut text = format!("{value:#}").into_bytes();
        text.push(b'\n');
        Some(text)
    }
}

/// Bytes of a tensor that may be written; `seen` are the names before it.
fn check<'a>(t: &'a PlannedTensor, seen: &mut HashSet<&'a str>) -> Result<usize, WriteError> {
    let bad = |reason: String| WriteError::BadTensor { name: t.name.clone(), reason };
    if let Some(fault) = check_name(&t.name) {
        return Err(bad(format!("its name {fault}")));
    }
    if t.name == "__metadata__" {
        return Err(bad("its name is reserved by the format".to_owned()));
    }
    if !seen.insert(t.name.as_str()) {
        return Err(bad("its name is planned twice".to_owned()));
    }
    if !t.dtype.is_supported() {
        return Err(bad(format!("dtype {} is not written here", t.dtype)));
    }
    let bytes = t.shape.iter().try_fold(t.dtype.byte_size(), |n, &d| n.checked_mul(d));
    // The crate counts bits.
    bytes.filter(|n| n.checked_mul(8).is_some()).ok_or_else(|| bad(format!("shape {:?} overflows", t.shape)))
}

/// The tensors of a shard with the text by which transformers knows that they are PyTorch's.
fn layout(tensors: Vec<(String, TensorInfo)>) -> Result<Layout, WriteError> {
    let name = tensors.first().map_or_else(String::new, |(name, _)| name.clone());
    let text = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    Layout::new(Some(text), tensors).map_err(|e| WriteError::BadTensor { name, reason: format!("its shard: {e}") })
}

fn first_name(tensors: &Layout) -> String {
    tensors.get(0).map_or_else(String::new, |(name, _)| name.to_owned())
}

/// Length field and JSON of a shard: metadata first, then the tensors in the order of their bytes, as the crate writes them.
fn header(tensors: &Layout) -> Result<Vec<u8>, WriteError> {
    let mut out = vec![0u8; 8];
    serde_json::to_writer(&mut out, tensors.metadata()).map_err(std::io::Error::from)?;
    out.resize(out.len().next_multiple_of(8), b' ');
    let length = (out.len() - 8) as u64;
    if length > MAX_HEADER_BYTES {
        let reason = format!("the header of its shard takes {length} bytes, the format allows {MAX_HEADER_BYTES}");
        return Err(WriteError::BadTensor { name: first_name(tensors), reason });
    }
    out[..8].copy_from_slice(&length.to_le_bytes());
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tensor(name: &str, dtype: Dtype, shape: &[usize]) -> PlannedTensor {
        PlannedTensor { name: name.to_owned(), dtype, shape: shape.to_vec() }
    }

    #[test]
    fn refuses_what_no_reader_takes() {
        let plan = |t: &[PlannedTensor]| ShardPlan::new(t, 100);
        assert!(matches!(plan(&[]), Err(WriteError::EmptyPlan)));
        for name in ["", "__metadata__", "a\nb", "\u{1b}[1m", &"x".repeat(1025)] {
            assert!(matches!(plan(&[tensor(name, Dtype::F32, &[1])]), Err(WriteError::BadTensor { .. })), "{name:?}");
        }
        let twice = [tensor("a", Dtype::F32, &[1]), tensor("a", Dtype::F32, &[1])];
        assert!(matches!(plan(&twice), Err(WriteError::BadTensor { .. })));
        let huge = [tensor("a", Dtype::F32, &[1 << 40, 1 << 40])];
        assert!(matches!(plan(&huge), Err(WriteError::BadTensor { .. })));
        for dtype in [Dtype::F4, Dtype::F6_E2M3, Dtype::C64] {
            assert!(matches!(plan(&[tensor("a", dtype, &[8])]), Err(WriteError::BadTensor { .. })), "{dtype}");
        }
    }

    /// To the byte: a hash of the header is in every journal, and two releases write the same files.
    #[test]
    fn the_header_is_compact_json_in_the_order_of_the_bytes() {
        let tensors =
            [tensor("b\"\u{fc}", Dtype::BF16, &[2, 3]), tensor("a", Dtype::F8_E4M3, &[]), tensor("c", Dtype::U8, &[0])];
        let plan = ShardPlan::new(&tensors, 100).unwrap();
        let json = r#"{"__metadata__":{"format":"pt"},"b\"ü":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},"a":{"dtype":"F8_E4M3","shape":[],"data_offsets":[12,13]},"c":{"dtype":"U8","shape":[0],"data_offsets":[13,13]}}"#;
        let header = &plan.shards()[0].header;
        let (length, text) = header.split_at(8);
        assert_eq!(length, (json.len().next_multiple_of(8) as u64).to_le_bytes());
        assert_eq!(text.len() % 8, 0);
        assert_eq!(std::str::from_utf8(text).unwrap().trim_end_matches(' '), json);
    }

    #[test]
    fn splits_like_the_hub_tools() {
        let t: Vec<_> = ["a", "b", "c", "d"].iter().map(|n| tensor(n, Dtype::F32, &[10])).collect();
        let files = |max| {
            let plan = ShardPlan::new(&t, max).unwrap();
            plan.shards().iter().map(|s| (s.file.clone(), s.tensors.len())).collect::<Vec<_>>()
        };
        assert_eq!(files(160), [("model.safetensors".to_owned(), 4)]);
        assert_eq!(files(159).iter().map(|f| f.1).collect::<Vec<_>>(), [3, 1]);
        assert_eq!(files(80)[1], ("model-00002-of-00002.safetensors".to_owned(), 2));
        // Each is larger than the limit: one shard per tensor.
        assert_eq!(files(1).len(), 4);
    }

    const DTYPES: [Dtype; 4] = [Dtype::F8_E4M3, Dtype::BF16, Dtype::F32, Dtype::F64];

    proptest! {
        #[test]
        fn every_plan_is_aligned_and_in_order(
            list in prop::collection::vec((0usize..4, prop::collection::vec(0usize..6, 0..3)), 1..40),
            max in 1u64..2000,
        ) {
            let tensors: Vec<_> =
                list.iter().enumerate().map(|(i, (d, s))| tensor(&format!("t{i}"), DTYPES[*d], s)).collect();
            let plan = ShardPlan::new(&tensors, max).unwrap();
            let names: Vec<_> = plan.tensors().map(|(name, _)| name.to_owned()).collect();
            prop_assert_eq!(names, tensors.iter().map(|t| t.name.clone()).collect::<Vec<_>>());
            for shard in plan.shards() {
                prop_assert_eq!(shard.header.len() % 8, 0);
                let full = shard.tensors.iter().filter(|(_, t)| t.data_offsets.1 > t.data_offsets.0).count();
                prop_assert!(shard.data_bytes() <= max || full == 1);
                let mut end = 0;
                for (_, t) in shard.tensors.iter() {
                    prop_assert_eq!(t.data_offsets.0, end);
                    prop_assert_eq!(t.data_offsets.0 % t.dtype.byte_size(), 0);
                    end = t.data_offsets.1;
                }
                // Our own strict reader accepts the header, with data of the planned length.
                let mut file = shard.header.clone();
                file.resize(shard.file_bytes() as usize, 0);
                prop_assert!(crate::source::Header::parse(&file).is_ok());
            }
        }
    }
}
