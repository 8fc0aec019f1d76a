//! Which tensor goes to which byte of which shard, decided before anything is written.

use std::collections::{BTreeMap, HashSet};

use serde_json::{Value, json};

use super::WriteError;
use crate::source::{Dtype, MAX_HEADER_BYTES, MAX_TENSORS, check_name};

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

/// A tensor with its place. Offsets are relative to the start of the shard's data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlacedTensor {
    /// Name in the checkpoint.
    pub name: String,
    /// Stored element type.
    pub dtype: Dtype,
    /// Shape, outermost first.
    pub shape: Vec<usize>,
    /// First byte.
    pub begin: u64,
    /// One past the last byte.
    pub end: u64,
}

/// One weight file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedShard {
    /// File name.
    pub file: String,
    /// Its tensors, in the order of their bytes.
    pub tensors: Vec<PlacedTensor>,
    /// Length field and JSON header, padded with spaces so that the data begins at a multiple of 8.
    pub(super) header: Vec<u8>,
}

impl PlannedShard {
    /// Bytes of the tensors.
    pub fn data_bytes(&self) -> u64 {
        self.tensors.last().map_or(0, |t| t.end)
    }

    /// Size of the file.
    pub fn file_bytes(&self) -> u64 {
        self.header.len() as u64 + self.data_bytes()
    }
}

/// Every weight file of a checkpoint, laid out to the byte.
#[derive(Debug, Clone, PartialEq, Eq)]
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
    /// No tensor; a name that repeats, is empty or reserved, or holds control characters; a shape that overflows.
    pub fn new(tensors: &[PlannedTensor], max_shard_bytes: u64) -> Result<Self, WriteError> {
        if tensors.is_empty() {
            return Err(WriteError::EmptyPlan);
        }
        let mut seen = HashSet::with_capacity(tensors.len());
        let mut groups: Vec<Vec<PlacedTensor>> = Vec::new();
        for t in tensors {
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
            let bytes = t.shape.iter().try_fold(t.dtype.size() as u64, |n, &d| n.checked_mul(d as u64));
            let bytes = bytes.ok_or_else(|| bad(format!("shape {:?} overflows", t.shape)))?;
            let size = t.dtype.size() as u64;
            let open = groups.last().and_then(|g| g.last().map(|last| (last.end, g.len())));
            let begin = open
                .filter(|(end, count)| {
                    end.checked_add(bytes).is_some_and(|e| e <= max_shard_bytes)
                        && end % size == 0
                        && *count < MAX_TENSORS
                })
                .map_or(0, |(end, _)| end);
            let placed = PlacedTensor {
                name: t.name.clone(),
                dtype: t.dtype,
                shape: t.shape.clone(),
                begin,
                end: begin + bytes,
            };
            // Begin 0 after a shard that holds only empty tensors continues it: same offset, same file.
            match groups.last_mut() {
                Some(group) if group.last().is_some_and(|l| l.end == begin) => group.push(placed),
                _ => groups.push(vec![placed]),
            }
        }
        let count = groups.len();
        let shards = groups.into_iter().enumerate().map(|(i, tensors)| {
            let file = match count {
                1 => "model.safetensors".to_owned(),
                n => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
            };
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
                    let name = shard.tensors.first().map_or_else(String::new, |t| t.name.clone());
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
    pub fn tensors(&self) -> impl Iterator<Item = &PlacedTensor> {
        self.shards.iter().flat_map(|s| &s.tensors)
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
            self.shards.iter().flat_map(|s| s.tensors.iter().map(|t| (t.name.as_str(), s.file.as_str()))).collect();
        let value = json!({"metadata": {"total_size": self.total_size()}, "weight_map": map});
        let mut text = format!("{value:#}").into_bytes();
        text.push(b'\n');
        Some(text)
    }
}

/// Length field and JSON of a shard: metadata first, then the tensors in the order of their bytes.
fn header(tensors: &[PlacedTensor]) -> Result<Vec<u8>, WriteError> {
    use std::io::Write;
    let mut out = vec![0u8; 8];
    out.extend_from_slice(br#"{"__metadata__":{"format":"pt"}"#);
    for t in tensors {
        let name = Value::from(t.name.as_str());
        let shape = Value::from(t.shape.as_slice());
        write!(
            out,
            r#",{name}:{{"dtype":"{}","shape":{shape},"data_offsets":[{},{}]}}"#,
            t.dtype.name(),
            t.begin,
            t.end
        )?;
    }
    out.push(b'}');
    out.resize(out.len().next_multiple_of(8), b' ');
    let length = (out.len() - 8) as u64;
    if length > MAX_HEADER_BYTES {
        let name = tensors.first().map_or_else(String::new, |t| t.name.clone());
        let reason = format!("the header of its shard takes {length} bytes, the format allows {MAX_HEADER_BYTES}");
        return Err(WriteError::BadTensor { name, reason });
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

    const DTYPES: [Dtype; 4] = [Dtype::F8E4M3, Dtype::Bf16, Dtype::F32, Dtype::F64];

    proptest! {
        #[test]
        fn every_plan_is_aligned_and_in_order(
            list in prop::collection::vec((0usize..4, prop::collection::vec(0usize..6, 0..3)), 1..40),
            max in 1u64..2000,
        ) {
            let tensors: Vec<_> =
                list.iter().enumerate().map(|(i, (d, s))| tensor(&format!("t{i}"), DTYPES[*d], s)).collect();
            let plan = ShardPlan::new(&tensors, max).unwrap();
            let names: Vec<_> = plan.tensors().map(|t| t.name.clone()).collect();
            prop_assert_eq!(names, tensors.iter().map(|t| t.name.clone()).collect::<Vec<_>>());
            for shard in plan.shards() {
                prop_assert_eq!(shard.header.len() % 8, 0);
                prop_assert!(shard.data_bytes() <= max || shard.tensors.iter().filter(|t| t.end > t.begin).count() == 1);
                let mut end = 0;
                for t in &shard.tensors {
                    prop_assert_eq!(t.begin, end);
                    prop_assert_eq!(t.begin % t.dtype.size() as u64, 0);
                    end = t.end;
                }
                // Our own strict reader accepts the header, with data of the planned length.
                let mut file = shard.header.clone();
                file.resize(shard.file_bytes() as usize, 0);
                prop_assert!(crate::source::Header::parse(&file).is_ok());
            }
        }
    }
}
