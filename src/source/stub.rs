#![allow(missing_docs, unused)]
use super::*;
use std::path::PathBuf;
#[derive(Debug, thiserror::Error)]
#[error("stub")]
pub struct SourceError;
#[derive(Debug)]
pub struct TensorInfo {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}
#[derive(Debug)]
pub struct TensorDirectory;
impl TensorDirectory {
    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        None
    }
    pub fn names(&self) -> impl Iterator<Item = &str> {
        std::iter::empty()
    }
    pub fn view<'a>(&'a self, name: &str) -> Result<TensorView<'a>, SourceError> {
        Err(SourceError)
    }
}
#[derive(Debug)]
pub struct ModelSource {
    pub dir: PathBuf,
    pub config: serde_json::Value,
    pub tensors: TensorDirectory,
}
