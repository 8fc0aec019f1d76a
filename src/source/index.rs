//! Which weight files a model folder has, and whether they agree with its index.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;
use std::path::Path;

use fs_err as fs;
use serde::de::{self, Deserializer, MapAccess, Visitor};

use super::directory::Shard;
use super::path::{plain_file_name, read_small, resolve_regular};
use super::{SourceError, TensorDirectory, check_name};

/// Name of the weight file of a checkpoint that has one.
pub(crate) const SINGLE: &str = "model.safetensors";
/// Name of the index of a checkpoint that has several.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// A tensor name takes at most 1 kB, a million of them 1 GB; no real index is above 50 MB.
const MAX_INDEX_BYTES: u64 = 128 << 20;
/// Differences listed before the rest is only counted.
const MAX_LISTED: usize = 20;

/// Opens the weights of `dir`; the second value lists what deserves a warning.
///
/// Like transformers, `model.safetensors` is preferred over an index; without either, a folder with exactly one
/// `*.safetensors` file is taken.
///
/// # Errors
/// No or ambiguous weights, or any fault of index, paths and headers. All differences between index and weight files
/// are listed at once.
pub(super) fn open_weights(dir: &Path) -> Result<(TensorDirectory, Vec<String>), SourceError> {
    let names = safetensors_files(dir)?;
    let has = |name: &str| fs::symlink_metadata(dir.join(name)).is_ok();
    let single = if has(SINGLE) {
        SINGLE.to_owned()
    } else if has(INDEX) {
        return open_sharded(dir);
    } else if let [one] = names.as_slice() {
        one.clone()
    } else if names.is_empty() {
        return Err(SourceError::NoWeights { dir: dir.to_owned(), hint: no_weights_hint(dir)? });
    } else {
        let shown: Vec<_> = names.iter().take(4).map(String::as_str).collect();
        return Err(SourceError::Ambiguous {
            dir: dir.to_owned(),
            count: names.len(),
            names: shown.join(", ") + if names.len() > 4 { ", ..." } else { "" },
        });
    };
    let mut warnings = Vec::new();
    if single == SINGLE && has(INDEX) {
        warnings.push(format!("`{SINGLE}` is used, `{INDEX}` and its shards are ignored"));
    }
    let (real, _) = resolve_regular(dir, &single)?;
    Ok((TensorDirectory::new(vec![Shard::open(dir, &single, &real)?]), warnings))
}

/// Names of `*.safetensors` in `dir` that are model weights, sorted.
fn safetensors_files(dir: &Path) -> Result<Vec<String>, SourceError> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir)? {
        if let Ok(name) = entry?.file_name().into_string()
            && name.ends_with(".safetensors")
            && !name.starts_with('.')
            && !name.starts_with("adapter_")
        {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

fn no_weights_hint(dir: &Path) -> Result<String, SourceError> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        if name == "adapter_model.safetensors" {
            return Ok("this is a LoRA adapter; merge it into its base model first".to_owned());
        }
        if let Some(ext) = Path::new(&name).extension().and_then(|e| e.to_str()) {
            found.insert(ext.to_ascii_lowercase());
        }
    }
    let pickle = ["bin", "pt", "pth"].iter().any(|e| found.contains(*e));
    Ok(if pickle {
        "only pickled weights (.bin, .pt) are present, which can run code when read; load the model with transformers \
         and `save_pretrained(..., safe_serialization=True)`, or look for a revision with safetensors"
    } else if found.contains("gguf") {
        "GGUF files are already converted for another engine; give the original checkpoint"
    } else {
        "expected `model.safetensors`, or `model.safetensors.index.json` and its shards"
    }
    .to_owned())
}

fn open_sharded(dir: &Path) -> Result<(TensorDirectory, Vec<String>), SourceError> {
    let path = dir.join(INDEX);
    let content = read_small(dir, INDEX, MAX_INDEX_BYTES)?;
    let index = parse(&content).map_err(|reason| SourceError::BadIndex { path: path.clone(), reason })?;
    let weight_map = index.weight_map.0;
    let mut files: BTreeMap<&str, usize> = BTreeMap::new();
    for file in weight_map.values() {
        *files.entry(file).or_default() += 1;
    }

    let mut problems = Problems::default();
    let mut shards = Vec::new();
    for (file, tensors) in &files {
        match resolve_regular(dir, file) {
            Ok((real, _)) => shards.push(Shard::open(dir, file, &real)?),
            Err(SourceError::Io(e)) if e.kind() == std::io::ErrorKind::NotFound => {
                problems.add(format!("shard `{file}` is missing ({tensors} tensors)"));
            }
            Err(e) => return Err(e),
        }
    }
    let opened: HashSet<&str> = shards.iter().map(|(s, _)| s.name.as_str()).collect();
    let mut holders: BTreeMap<&str, &str> = BTreeMap::new();
    for (shard, tensors) in &shards {
        for (name, _) in tensors.iter() {
            if let Some(first) = holders.insert(name, &shard.name) {
                problems.add(format!("tensor `{name}` is in both `{first}` and `{}`", shard.name));
            } else if !weight_map.contains_key(name) {
                problems.add(format!("tensor `{name}` of `{}` is not in the index", shard.name));
            }
        }
    }
    for (name, file) in weight_map.iter().filter(|(_, f)| opened.contains(f.as_str())) {
        match holders.get(name.as_str()) {
            None => problems.add(format!("tensor `{name}` is not in `{file}`")),
            Some(held) if held != file => {
                problems.add(format!("tensor `{name}` is in `{held}`, the index says `{file}`"));
            }
            Some(_) => {}
        }
    }

    let held: u64 = shards.iter().map(|(_, tensors)| tensors.data_bytes()).sum();
    let mut warnings = Vec::new();
    let gap = missing_number(&files);
    // `total_size` is informative: writers have counted tied weights twice, or parameters instead of bytes, and a
    // truncated shard is refused by its own header. Only together with a gap in `model-XXXXX-of-NNNNN` does a too
    // large figure show that part of the index is gone.
    if let Some(total) = index.total_size.filter(|t| *t != held as f64) {
        match gap {
            Some(lost) if total > held as f64 => {
                problems.add(format!("`{lost}` is not mentioned, and `total_size` is {total}, the shards hold {held}"));
            }
            _ => warnings.push(format!("`total_size` in `{INDEX}` is {total}, the shards hold {held} bytes")),
        }
    } else if let Some(lost) = gap {
        warnings.push(format!("`{INDEX}` does not mention `{lost}`"));
    }
    problems.into_result(&path)?;
    Ok((TensorDirectory::new(shards), warnings))
}

/// Reads an index; every shard it names is a file name within the model folder.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn parse(content: &[u8]) -> Result<Index, String> {
    let index: Index = serde_json::from_slice(content).map_err(|e| e.to_string())?;
    if index.weight_map.0.is_empty() {
        return Err("`weight_map` is empty".to_owned());
    }
    for file in index.weight_map.0.values() {
        if !plain_file_name(file) || !file.ends_with(".safetensors") {
            let shown: String = file.chars().take(120).collect();
            return Err(format!("shard {shown:?} is not the name of a .safetensors file in the model folder"));
        }
    }
    Ok(index)
}

/// The first shard that a numbering `PREFIX-XXXXX-of-NNNNN.safetensors` shared by all files should have and has not.
fn missing_number(files: &BTreeMap<&str, usize>) -> Option<String> {
    let mut numbers = BTreeSet::new();
    let mut series: Option<(&str, usize)> = None;
    for file in files.keys() {
        let (head, of) = file.strip_suffix(".safetensors")?.rsplit_once("-of-")?;
        let (prefix, number) = head.rsplit_once('-')?;
        let this = (prefix, of.parse().ok()?);
        if *series.get_or_insert(this) != this {
            return None;
        }
        numbers.insert(number.parse::<usize>().ok()?);
    }
    let (prefix, of) = series?;
    let lost = (1..=of.min(100_000)).find(|n| !numbers.contains(n))?;
    Some(format!("{prefix}-{lost:05}-of-{of:05}.safetensors"))
}

#[derive(Default)]
struct Problems {
    listed: Vec<String>,
    more: usize,
}

impl Problems {
    fn add(&mut self, line: String) {
        if self.listed.len() < MAX_LISTED { self.listed.push(line) } else { self.more += 1 }
    }

    fn into_result(self, path: &Path) -> Result<(), SourceError> {
        if self.listed.is_empty() {
            return Ok(());
        }
        Err(SourceError::Index { path: path.to_owned(), problems: self.listed, more: self.more })
    }
}

/// Content of an index.
pub(crate) struct Index {
    weight_map: WeightMap,
    total_size: Option<f64>,
}

impl Index {
    /// Every shard named.
    pub(crate) fn shards(&self) -> impl Iterator<Item = &str> {
        self.weight_map.0.values().map(String::as_str)
    }
}

impl<'de> de::Deserialize<'de> for Index {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        #[derive(serde::Deserialize)]
        struct Raw {
            weight_map: WeightMap,
            #[serde(default)]
            metadata: Option<serde_json::Map<String, serde_json::Value>>,
        }
        let raw = Raw::deserialize(d)?;
        let total_size = raw.metadata.as_ref().and_then(|m| m.get("total_size")).and_then(serde_json::Value::as_f64);
        Ok(Index { weight_map: raw.weight_map, total_size })
    }
}

/// Tensor name to shard; no name twice.
struct WeightMap(BTreeMap<String, String>);

impl<'de> de::Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = WeightMap;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map from tensor names to shard names")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WeightMap, A::Error> {
                let mut all = BTreeMap::new();
                while let Some((name, file)) = map.next_entry::<String, String>()? {
                    if let Some(fault) = check_name(&name) {
                        let shown: String = name.chars().take(80).collect();
                        return Err(de::Error::custom(format_args!("tensor name {shown:?} {fault}")));
                    }
                    if all.insert(name.clone(), file).is_some() {
                        return Err(de::Error::custom(format_args!("duplicate key `{name}` in `weight_map`")));
                    }
                }
                Ok(WeightMap(all))
            }
        }
        d.deserialize_map(V)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_in_a_series() {
        let gap = |names: &[&str]| missing_number(&names.iter().map(|n| (*n, 1)).collect());
        assert_eq!(gap(&["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"]), None);
        assert_eq!(
            gap(&["m-00001-of-00003.safetensors", "m-00003-of-00003.safetensors"]).as_deref(),
            Some("m-00002-of-00003.safetensors")
        );
        assert_eq!(gap(&["a.safetensors", "m-00003-of-00003.safetensors"]), None);
    }
}
