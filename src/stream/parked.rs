//! Hidden states on disk: so that a run can be resumed, and so that they need not be in memory between two uses.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use fs_err as fs;
use ndarray::Array2;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::Stream;
use crate::error::ConvertError;
use crate::source::sha256;
use crate::write::{WriteError, ops};

/// Bytes hashed on their own; the hash of a file is that of its pieces' hashes, so that all threads can take part.
const PIECE: usize = 4 << 20;

/// A file of hidden states, as the journal knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateFile {
    /// Name in the staging folder.
    pub name: String,
    /// `[T, D]`.
    pub shape: (usize, usize),
    /// Hash of the pieces' SHA-256.
    pub hash: String,
}

/// Writes `hidden` as little-endian f32, replacing what is at `name`, and waits until it is on the disk.
pub fn save(folder: &Path, name: &str, hidden: &Array2<f32>) -> Result<StateFile, WriteError> {
    let path = folder.join(name);
    match ops::remove_file(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e.into()),
        _ => {}
    }
    let mut file = ops::create_file(&path)?;
    let standard = hidden.as_standard_layout();
    let values = standard.as_slice().unwrap_or_default();
    let mut hashes = Vec::new();
    // Some pieces at a time: encoded and hashed in parallel, written in order.
    for group in values.chunks(8 * PIECE / size_of::<f32>()) {
        let pieces: Vec<(Vec<u8>, String)> = group
            .par_chunks(PIECE / size_of::<f32>())
            .map(|piece| {
                let bytes: Vec<u8> = piece.iter().flat_map(|v| v.to_le_bytes()).collect();
                let hash = sha256(&bytes);
                (bytes, hash)
            })
            .collect();
        for (bytes, hash) in pieces {
            ops::write(&mut file, &bytes)?;
            hashes.push(hash);
        }
    }
    ops::sync(&file)?;
    Ok(StateFile { name: name.to_owned(), shape: hidden.dim(), hash: sha256(hashes.concat().as_bytes()) })
}

/// Reads hidden states back. `None` where the file is not what was written.
pub fn load(folder: &Path, saved: &StateFile) -> Result<Option<Array2<f32>>, WriteError> {
    let path = folder.join(&saved.name);
    let (rows, columns) = saved.shape;
    let expected = rows.checked_mul(columns).and_then(|n| n.checked_mul(size_of::<f32>()));
    let mut file = match fs::File::open(&path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    if Some(file.metadata()?.len()) != expected.map(|n| n as u64) {
        return Ok(None);
    }
    let mut values = Vec::with_capacity(rows * columns);
    let mut hashes = Vec::new();
    let mut buffer = Vec::with_capacity(8 * PIECE);
    loop {
        buffer.clear();
        file.by_ref().take(8 * PIECE as u64).read_to_end(&mut buffer)?;
        if buffer.is_empty() {
            break;
        }
        hashes.extend(buffer.par_chunks(PIECE).map(sha256).collect::<Vec<_>>());
        values.extend(buffer.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)));
    }
    if sha256(hashes.concat().as_bytes()) != saved.hash {
        return Ok(None);
    }
    Ok(Array2::from_shape_vec(saved.shape, values).ok())
}

/// A stream of hidden states between two uses: in memory, or in the file it was saved to.
#[derive(Debug)]
pub struct Parked {
    /// `source` or `converted`.
    name: &'static str,
    folder: PathBuf,
    /// Tokens per window.
    windows: Vec<usize>,
    held: Option<Stream>,
    saved: Option<StateFile>,
}

impl Parked {
    /// A stream in memory.
    pub fn new(name: &'static str, folder: &Path, stream: Stream) -> Self {
        Self { name, folder: folder.to_owned(), windows: stream.windows.clone(), held: Some(stream), saved: None }
    }

    /// The stream that an earlier run saved.
    pub fn saved(name: &'static str, folder: &Path, windows: Vec<usize>, file: StateFile) -> Self {
        Self { name, folder: folder.to_owned(), windows, held: None, saved: Some(file) }
    }

    /// Name of the stream.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Tokens per window.
    pub fn windows(&self) -> &[usize] {
        &self.windows
    }

    /// Tokens.
    pub fn tokens(&self) -> usize {
        self.windows.iter().sum()
    }

    /// Name of this stream's file at the input of layer `layer`: of the last two, one is always whole.
    fn file(&self, layer: usize) -> String {
        format!("hidden-{}-{}", self.name, layer % 2)
    }

    /// Saves the stream as the input of layer `layer`.
    pub fn save(&mut self, layer: usize) -> Result<StateFile, ConvertError> {
        let name = self.file(layer);
        let stream = self.stream()?;
        let hidden = std::mem::take(&mut stream.hidden);
        let saved = save(&self.folder, &name, &hidden);
        if let Some(stream) = &mut self.held {
            stream.hidden = hidden;
        }
        let saved = saved?;
        self.saved = Some(saved.clone());
        Ok(saved)
    }

    /// The stream, read back if it was let go.
    pub fn stream(&mut self) -> Result<&mut Stream, ConvertError> {
        if self.held.is_none() {
            let hidden = match &self.saved {
                Some(saved) => load(&self.folder, saved)?,
                None => None,
            };
            self.held = hidden.map(|hidden| Stream { hidden, windows: self.windows.clone() });
        }
        let name = self.saved.as_ref().map_or(self.name, |s| &s.name);
        self.held.as_mut().ok_or_else(|| WriteError::LostState { path: self.folder.join(name) }.into())
    }

    /// Lets go of the memory where `spill` says so and the stream is on the disk as it is.
    pub fn release(&mut self, spill: bool) {
        if spill && self.saved.is_some() {
            self.held = None;
        }
    }

    /// The stream is about to change: what is on the disk is not it any more.
    pub fn change(&mut self) -> Result<&mut Stream, ConvertError> {
        self.stream()?;
        self.saved = None;
        self.stream()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_come_back_bit_for_bit_and_damage_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let hidden = Array2::from_shape_fn((1500, 1024), |(i, j)| (i as f32 - 0.1) / (j as f32 + 0.7));
        let saved = save(dir.path(), "s", &hidden).unwrap();
        assert_eq!(load(dir.path(), &saved).unwrap().unwrap(), hidden);
        let path = dir.path().join("s");
        let good = fs::read(&path).unwrap();
        for at in [0, good.len() / 2, good.len() - 1] {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(&path, bad).unwrap();
            assert_eq!(load(dir.path(), &saved).unwrap(), None);
        }
        fs::write(&path, &good[..good.len() - 4]).unwrap();
        assert_eq!(load(dir.path(), &saved).unwrap(), None);
        fs::remove_file(&path).unwrap();
        assert_eq!(load(dir.path(), &saved).unwrap(), None);
        let absurd = StateFile { shape: (usize::MAX, 8), ..saved };
        fs::write(&path, &good).unwrap();
        assert_eq!(load(dir.path(), &absurd).unwrap(), None);
    }

    #[test]
    fn a_released_stream_is_the_same_stream() {
        let dir = tempfile::tempdir().unwrap();
        let hidden = Array2::from_shape_fn((6, 4), |(i, j)| i as f32 / (j + 3) as f32);
        let mut parked = Parked::new("source", dir.path(), Stream { hidden: hidden.clone(), windows: vec![2, 4] });
        parked.release(true);
        assert!(parked.held.is_some(), "it is nowhere else");
        parked.save(0).unwrap();
        parked.release(true);
        assert!(parked.held.is_none());
        assert_eq!(parked.stream().unwrap().hidden, hidden);
        parked.change().unwrap().hidden += 1.0;
        parked.release(true);
        assert_eq!(parked.stream().unwrap().hidden, &hidden + 1.0);
        parked.save(1).unwrap();
        parked.release(true);
        assert_eq!(parked.stream().unwrap().hidden, hidden + 1.0);
    }
}
