//! Small checkpoints of every kind of tensor, for tests of reading and writing.

use std::path::Path;
use std::sync::Mutex;

use gqa2mla::observe::{Event, Observer, Silent};
use gqa2mla::source::{Dtype, DtypeExt, ModelSource, OpenOptions, SourceError};
use gqa2mla::write::{PlannedTensor, Published, ShardPlan, StagedWriter, Staging, StagingOptions, WriteError};

/// A tensor with its bytes.
pub type Sample = (PlannedTensor, Vec<u8>);

/// A tensor of finite values.
pub fn sample(name: &str, dtype: Dtype, shape: &[usize]) -> Sample {
    let bytes = shape.iter().product::<usize>() * dtype.byte_size();
    // Values below 0x40 in the high byte: finite in every float type.
    let data = (0..bytes).map(|i| (i * 7 + name.len()) as u8 & 0x3f).collect();
    (PlannedTensor { name: name.to_owned(), dtype, shape: shape.to_vec() }, data)
}

/// Every kind of tensor.
pub fn samples() -> Vec<Sample> {
    vec![
        sample("model.embed_tokens.weight", Dtype::BF16, &[10, 8]),
        sample("model.layers.0.self_attn.q_proj.weight", Dtype::BF16, &[8, 8]),
        sample("model.layers.0.self_attn.k_proj.weight", Dtype::F32, &[4, 8]),
        sample("odd", Dtype::F8_E4M3, &[3]),
        sample("after_odd", Dtype::F32, &[2]),
        sample("scalar", Dtype::F64, &[]),
        sample("empty", Dtype::F16, &[0, 4]),
        sample("name with \"quotes\" and ü", Dtype::I64, &[2]),
    ]
}

/// Publishes a model of these tensors, in files of at most `max` bytes.
pub fn write(output: &Path, samples: &[Sample], max: u64, overwrite: bool) -> Result<Published, WriteError> {
    let planned: Vec<_> = samples.iter().map(|s| s.0.clone()).collect();
    let plan = ShardPlan::new(&planned, max)?;
    let options = StagingOptions { overwrite, needed_bytes: plan.file_bytes(), ..StagingOptions::default() };
    let mut writer = StagedWriter::new(Staging::create(output, &options)?, plan);
    for (tensor, bytes) in samples {
        writer.write_tensor(&tensor.name, bytes)?;
    }
    writer.write_file("config.json", br#"{"model_type": "llama"}"#)?;
    writer.write_file("tokenizer.json", b"{}")?;
    writer.finish()
}

/// Opens a model, or says why not.
pub fn open(dir: &Path) -> Result<ModelSource, SourceError> {
    ModelSource::open(dir.to_str().unwrap(), &OpenOptions::default(), &Silent)
}

/// Everything below `dir`, hidden files included.
pub fn listing(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs_err::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Keeps what it is told.
#[derive(Default)]
pub struct Recorder(pub Mutex<Vec<Event>>);

impl Observer for Recorder {
    fn event(&self, event: Event) {
        self.0.lock().unwrap().push(event);
    }
}
