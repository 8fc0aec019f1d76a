//! One function per thing that is read from outside: what it holds for any bytes, a fuzzer can look for the bytes for which
//! it does not. Used by `fuzz/` and by `tests/fuzz.rs`; no part of the library's interface.

use std::path::PathBuf;

use crate::arch::{Architecture, Family};
use crate::convert::journal::Saved;
use crate::source::{
    ChatTemplate, DtypeExt, Header, Message, Sha256Stream, TensorDirectory, Tokenizer, config as config_file,
    index as index_file,
};
use crate::source::{MAX_NAME_CHARS, plain_file_name};
use crate::write::{JournalRecord, manifest as manifest_file};

/// Most layers for which names are spelled out here; a config may claim a million.
const MAX_LAYERS: usize = 256;

/// The header of a weight file. The bytes are tried as a whole file, and as the JSON of one whose length fields are right.
pub fn header(data: &[u8]) {
    check_header(data);
    let mut file = (data.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(data);
    // The size that would make it whole, as far as the text tells: the largest number in it.
    let numbers = data.split(|b| !b.is_ascii_digit()).filter(|d| !d.is_empty() && d.len() < 6);
    let most = numbers.filter_map(|d| std::str::from_utf8(d).ok()?.parse::<usize>().ok()).max().unwrap_or(0);
    file.resize(file.len() + most, 0);
    check_header(&file);
}

fn check_header(file: &[u8]) {
    let Ok(header) = Header::parse(file) else { return };
    let mut end = 0;
    for (name, t) in header.tensors.iter() {
        let place = t.data_offsets;
        assert!(place.0 == end && place.1 >= place.0, "{t:?}");
        assert_eq!(t.shape.iter().product::<usize>() * t.dtype.byte_size(), place.1 - place.0, "{t:?}");
        assert!(!name.is_empty() && name.chars().count() <= MAX_NAME_CHARS);
        assert!(!name.chars().any(char::is_control), "{name:?}");
        end = place.1;
    }
    assert_eq!(header.data_start as usize + end, file.len());
    // What passes here passes there.
    assert!(safetensors::SafeTensors::read_metadata(file).is_ok());
}

/// `model.safetensors.index.json`.
pub fn index(data: &[u8]) {
    if let Ok(index) = index_file::parse(data) {
        for shard in index.shards() {
            assert!(plain_file_name(shard), "{shard:?}");
        }
    }
}

/// `config.json`.
pub fn config(data: &[u8]) {
    let Ok(config) = config_file::parse(data) else { return };
    let _ = config_file::refuse_quantised(&config, &TensorDirectory::default());
    let Ok(arch) = Architecture::from_config(&config) else { return };
    assert!(arch.heads > 0 && arch.hidden > 0 && arch.layers > 0 && arch.vocab > 0, "{arch:?}");
    assert!(arch.rope.inv_freq.iter().all(|f| f.is_finite()), "{:?}", arch.rope);
    assert!(arch.norm_eps.is_finite() && arch.cache_values() > 0);
    if arch.layers <= MAX_LAYERS {
        assert!(arch.expected_tensors().len() > arch.layers);
    }
}

/// A family description.
pub fn family(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = Family::parse("fuzz", text);
    }
}

/// A journal. The bytes are tried as they are, and as lines whose hashes are right.
pub fn journal(data: &[u8]) {
    let mut lines = Vec::new();
    for json in data.split(|b| *b == b'\n') {
        let mut hash = Sha256Stream::default();
        hash.update(json);
        lines.extend_from_slice(hash.finish().sha256.as_bytes());
        lines.push(b' ');
        lines.extend_from_slice(json);
        lines.push(b'\n');
    }
    for bytes in [data, &lines] {
        let Some(record) = JournalRecord::parse(bytes) else { continue };
        assert!(record.finished() <= record.entries.len());
        assert_eq!(record.difference(&record.identity), None);
        assert!(Saved::read(&record).layers() <= record.entries.len());
    }
}

/// `manifest.json`.
pub fn manifest(data: &[u8]) {
    if let Ok(manifest) = manifest_file::parse(data) {
        assert!(manifest.files.keys().all(|n| plain_file_name(n)));
    }
}

/// `tokenizer.json`.
pub fn tokenizer(data: &[u8]) {
    let Ok(tokenizer) = Tokenizer::from_bytes(data, PathBuf::from("tokenizer.json")) else { return };
    let Ok(ids) = tokenizer.encode("One two, 3.\n\tZażółć 日本 <|x|>") else { return };
    let _ = tokenizer.decode(&ids);
}

/// `tokenizer_config.json`: the chat template in it, and what it makes of a conversation.
pub fn tokenizer_config(data: &[u8]) {
    let Ok(Some(template)) = ChatTemplate::from_bytes(data, PathBuf::from("tokenizer_config.json")) else { return };
    let turn = |role: &str, content: &str| Message { role: role.to_owned(), content: content.to_owned() };
    if let Ok(text) = template.render(&[turn("system", " be <brief> "), turn("user", "hi")]) {
        // 64 bytes for each unit of fuel.
        assert!(text.len() <= 64_000_000, "{} bytes", text.len());
    }
}
