//! The models of `fixtures/`, and opening any.

use std::path::{Path, PathBuf};

use gqa2mla::arch::{Architecture, check_tensors};
use gqa2mla::methods::MethodChoice;
use gqa2mla::observe::Silent;
use gqa2mla::source::{ModelSource, OpenOptions};

/// Folder of a fixture.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

/// A model and what its config says, which its tensors agree with.
pub fn open(dir: &Path) -> (ModelSource, Architecture) {
    let source = ModelSource::open(&dir.display().to_string(), &OpenOptions::default(), &Silent).expect("opens");
    let arch = Architecture::from_config(&source.config).expect("is understood");
    check_tensors(&arch, &source.tensors).expect("config and tensors agree");
    (source, arch)
}

/// A method at its defaults.
#[allow(dead_code, reason = "not every binary of tests converts")]
pub fn method(name: &str) -> MethodChoice {
    MethodChoice::named(name).expect("a method of that name")
}
