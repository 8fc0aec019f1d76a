use std::path::{Path, PathBuf};
use std::sync::Mutex;

use fs_err as fs;
use serde::Serialize;
use serde_json::{Value, json};

use super::rounding::rounded;
use super::*;
use crate::arch::{Part, StoredPart};
use crate::error::ConvertError;
use crate::observe::{Event, Observer, Silent};
use crate::source::{Dtype, ModelSource, OpenOptions, SourceError};
use crate::target::{Cut, Emit, Origin, OutTensor, encode};
use crate::write::ops::faults::{Fault, with};
use crate::write::{Leftover, PlannedTensor, ShardPlan, StagedWriter, Staging, StagingOptions, WriteError};

/// What `report.json` says.
#[derive(Serialize)]
struct Sums {
    output: PathBuf,
    tensors: usize,
}

impl Report for Sums {
    const FILE: &'static str = "report.json";
}

fn planned(name: &str, dtype: Dtype, shape: &[usize]) -> PlannedTensor {
    PlannedTensor { name: name.to_owned(), dtype, shape: shape.to_vec() }
}

fn emit(name: &str, dtype: Dtype, shape: &[usize], from: Origin) -> Emit {
    Emit { planned: planned(name, dtype, shape), from }
}

fn stored(name: &str, cut: Cut) -> Origin {
    Origin::Stored { name: name.to_owned(), cut }
}

fn source(name: &str, rows: Option<std::ops::Range<usize>>, scale: f64, offset: f64) -> Origin {
    Origin::Source { part: Part { name: name.to_owned(), rows }, scale, offset }
}

/// Values whose bits differ, with a negative zero among them.
fn values(n: usize) -> Vec<f64> {
    (0..n).map(|i| if i == 5 { -0.0 } else { (i * 37 % 64) as f64 - 31.0 }).collect()
}

/// A model folder of these tensors; `config.json` names a file of code.
fn model(dir: &Path, tensors: &[(PlannedTensor, Vec<u8>)]) -> ModelSource {
    let list: Vec<PlannedTensor> = tensors.iter().map(|t| t.0.clone()).collect();
    let staging = Staging::create(dir, &StagingOptions::default()).unwrap();
    let mut writer = StagedWriter::new(staging, ShardPlan::new(&list, u64::MAX).unwrap());
    tensors.iter().for_each(|(t, bytes)| writer.write_tensor(&t.name, bytes).unwrap());
    let config = json!({ "model_type": "x", "auto_map": { "AutoModel": "modeling_x.X" }, "quantization_config": 8 });
    writer.write_file("config.json", config.to_string().as_bytes()).unwrap();
    writer.write_file("tokenizer.json", b"{}").unwrap();
    writer.write_file("modeling_x.py", b"X").unwrap();
    writer.write_file("other.py", b"Y").unwrap();
    writer.finish().unwrap();
    open(dir)
}

fn open(dir: &Path) -> ModelSource {
    let options = OpenOptions { allow_quantised: true, ..OpenOptions::default() };
    ModelSource::open(&dir.display().to_string(), &options, &Silent).unwrap()
}

/// A matrix in bf16, a vector in f32, a matrix in FP8 with its scales, and a matrix without rows.
fn small(dir: &Path) -> ModelSource {
    let fp8: Vec<u8> = (0..2 * 130).map(|i| (i * 11 % 0x7e) as u8).collect();
    model(
        &dir.join("source"),
        &[
            (planned("vector", Dtype::F32, &[3]), encode(&[1.5, -2.0, 8.0], Dtype::F32)),
            (planned("eights_scale_inv", Dtype::F32, &[1, 2]), encode(&[0.5, 4.0], Dtype::F32)),
            (planned("empty", Dtype::F32, &[0, 4]), Vec::new()),
            (planned("matrix", Dtype::BF16, &[6, 4]), encode(&values(24), Dtype::BF16)),
            (planned("eights", Dtype::F8_E4M3, &[2, 130]), fp8),
        ],
    )
}

fn publisher<'a>(
    source: &'a ModelSource,
    to: &Path,
    list: &[Emit],
    observer: &'a dyn Observer,
) -> Result<Publisher<'a>, ConvertError> {
    let planned: Vec<PlannedTensor> = list.iter().map(|e| e.planned.clone()).collect();
    let plan = ShardPlan::new(&planned, u64::MAX)?;
    let place = Place { output: to, overwrite: false, leftover: Leftover::Refuse, bytes: plan.file_bytes() };
    Ok(Publisher::new(source, stage(source, &place)?, plan, observer))
}

/// Write `list` and publish it.
fn write(source: &ModelSource, to: &Path, list: &[Emit], computed: &[OutTensor]) -> Result<PathBuf, ConvertError> {
    let mut publisher = publisher(source, to, list, &Silent)?;
    publisher.write(list, &mut &*computed)?;
    publisher.side_files(Config::Kept { without: &[], with: &[] }, &[])?;
    publisher.finish()
}

fn bytes(model: &ModelSource, name: &str) -> Vec<u8> {
    model.tensors.view(name).unwrap().bytes.into_owned()
}

fn read(model: &ModelSource, name: &str) -> Vec<f64> {
    StoredPart::find(&model.tensors, &Part::whole(name)).unwrap().to_f64()
}

fn columns(all: &[f64], width: usize, columns: std::ops::Range<usize>) -> Vec<f64> {
    all.chunks(width).flat_map(|row| row[columns.clone()].to_vec()).collect()
}

#[test]
fn every_origin_writes_what_it_says() {
    let dir = tempfile::tempdir().unwrap();
    let from = small(dir.path());
    let all = values(24);
    let made = OutTensor { name: "made".into(), shape: vec![2], values: vec![0.1, 0.2] };
    let places = vec![Some(2), None, Some(0)];
    let list = [
        emit("whole", Dtype::BF16, &[6, 4], stored("matrix", Cut::Whole)),
        emit("rows", Dtype::BF16, &[3, 4], stored("matrix", Cut::Rows(vec![1..2, 4..6]))),
        emit("columns", Dtype::BF16, &[6, 2], stored("matrix", Cut::Columns(1..3))),
        emit("same", Dtype::BF16, &[2, 4], source("matrix", Some(1..3), 1.0, 0.0)),
        emit("none", Dtype::F32, &[0, 4], stored("empty", Cut::Whole)),
        emit("none of a factor", Dtype::F32, &[0, 4], source("empty", None, 2.0, 0.0)),
        emit("no zeros", Dtype::F32, &[0], Origin::Zero),
        emit("sum", Dtype::F32, &[6, 4], source("matrix", None, 1.0, 0.0)),
        emit("scaled", Dtype::F32, &[2, 4], source("matrix", Some(2..4), 2.0, 1.0)),
        emit("widened", Dtype::F32, &[6, 4], Origin::Widened(Part::whole("matrix"))),
        emit("of eights", Dtype::F32, &[2, 130], Origin::Widened(Part::whole("eights"))),
        emit("made", Dtype::F32, &[2], Origin::Computed(0)),
        emit("spread", Dtype::F32, &[3], Origin::Spread { part: Part::whole("vector"), places, offset: 0.5 }),
        emit("zeros", Dtype::F32, &[2, 2], Origin::Zero),
        emit("quantised", Dtype::F8_E4M3, &[6, 4], source("matrix", None, 1.0, 0.0)),
        emit("as stored", Dtype::F8_E4M3, &[2, 130], stored("eights", Cut::Whole)),
        emit("no eights", Dtype::F8_E4M3, &[2, 2], Origin::Zero),
    ];
    // The scales of an FP8 tensor follow it; of what is copied they are copied too.
    let mut with_scales = Vec::new();
    for e in list {
        let name = format!("{}_scale_inv", e.planned.name);
        let after = match e.planned.name.as_str() {
            "quantised" | "no eights" => Some((vec![1, 1], Origin::Scales)),
            "as stored" => Some((vec![1, 2], stored("eights_scale_inv", Cut::Whole))),
            _ => None,
        };
        with_scales.push(e);
        with_scales.extend(after.map(|(shape, from)| emit(&name, Dtype::F32, &shape, from)));
    }
    write(&from, &dir.path().join("out"), &with_scales, &[made]).unwrap();
    let to = open(&dir.path().join("out"));

    for (copy, of) in [("whole", "matrix"), ("as stored", "eights"), ("as stored_scale_inv", "eights_scale_inv")] {
        assert_eq!(bytes(&to, copy), bytes(&from, of), "{copy}");
    }
    let rows: Vec<f64> = [&all[4..8], &all[16..]].concat();
    assert_eq!(bytes(&to, "rows"), encode(&rows, Dtype::BF16));
    assert_eq!(bytes(&to, "columns"), encode(&columns(&all, 4, 1..3), Dtype::BF16));
    assert_eq!(bytes(&to, "same"), encode(&all[4..12], Dtype::BF16), "a negative zero stays where nothing changes");
    assert!(["none", "none of a factor", "no zeros"].iter().all(|name| bytes(&to, name).is_empty()));
    let sum: Vec<f64> = all.iter().map(|v| v + 0.0).collect();
    assert_eq!(bytes(&to, "sum"), encode(&sum, Dtype::F32));
    let scaled: Vec<f64> = all[8..16].iter().map(|v| v * 2.0 + 1.0).collect();
    assert_eq!(bytes(&to, "scaled"), encode(&scaled, Dtype::F32));
    assert_eq!(bytes(&to, "widened"), encode(&all, Dtype::F32), "so does a negative zero that is widened");
    assert_eq!(read(&to, "of eights"), read(&from, "eights"));
    assert_eq!(bytes(&to, "made"), encode(&[0.1, 0.2], Dtype::F32));
    assert_eq!(read(&to, "spread"), [8.5, 1.0, 2.0]);
    assert_eq!(read(&to, "zeros"), [0.0; 4]);
    assert_eq!(read(&to, "no eights"), [0.0; 4]);
    for (value, eight) in all.iter().zip(read(&to, "quantised")) {
        assert!((value - eight).abs() <= value.abs() / 16.0, "{value} {eight}");
    }
}

#[test]
fn a_tensor_of_several_pieces_is_the_tensor() {
    let dir = tempfile::tempdir().unwrap();
    // More than a piece of 16 MiB, of which no whole number of rows makes one.
    let (rows, width) = (4200, 1001);
    let all: Vec<f64> = (0..rows * width).map(|i| (i % 65_521) as f64).collect();
    let from =
        model(&dir.path().join("source"), &[(planned("t", Dtype::F32, &[rows, width]), encode(&all, Dtype::F32))]);
    let list = [
        emit("columns", Dtype::F32, &[rows, 3], stored("t", Cut::Columns(998..1001))),
        emit("rows", Dtype::F32, &[rows - 1, width], stored("t", Cut::Rows(vec![0..4100, 4101..rows]))),
        emit("halved", Dtype::F32, &[rows, width], source("t", None, 0.5, 0.0)),
        emit("zeros", Dtype::F32, &[rows, width], Origin::Zero),
    ];
    write(&from, &dir.path().join("out"), &list, &[]).unwrap();
    let to = open(&dir.path().join("out"));
    assert!(read(&to, "columns") == columns(&all, width, 998..1001));
    assert!(read(&to, "rows") == [&all[..4100 * width], &all[4101 * width..]].concat());
    assert!(read(&to, "halved") == all.iter().map(|v| v / 2.0).collect::<Vec<_>>());
    assert!(read(&to, "zeros").iter().all(|v| *v == 0.0));
}

#[test]
fn what_cannot_be_written_is_an_error_and_nothing_appears() {
    let dir = tempfile::tempdir().unwrap();
    let from = small(dir.path());
    let made =
        |values: &[f64]| vec![OutTensor { name: "x".into(), shape: vec![values.len()], values: values.to_vec() }];
    let computed = |dtype, n: usize| emit("x", dtype, &[n], Origin::Computed(0));
    let bf16 = Dtype::BF16;
    let spread = Origin::Spread { part: Part::whole("vector"), places: vec![Some(3)], offset: 0.0 };
    let cases: Vec<(Emit, Vec<OutTensor>, &str)> = vec![
        (computed(Dtype::F32, 1), made(&[f64::NAN]), "output tensor `x`: not finite after conversion"),
        (computed(Dtype::F32, 2), made(&[1.0, 1e39]), "output tensor `x`: not finite after conversion"),
        (computed(Dtype::F8_E4M3, 1), made(&[f64::INFINITY]), "output tensor `x`: not finite after conversion"),
        (computed(Dtype::F16, 2), made(&[1.0, -7e4]), "its largest value, 7e4, is beyond what F16 holds\n\nhint: "),
        (computed(Dtype::F32, 3), made(&[1.0]), "expected 12 bytes, found 4"),
        (computed(Dtype::F32, 1), Vec::new(), "its values were not computed"),
        (emit("x", Dtype::F32, &[6, 4], stored("matrix", Cut::Whole)), Vec::new(), "its bytes are BF16"),
        (emit("x", bf16, &[6, 1], stored("matrix", Cut::Columns(4..5))), Vec::new(), "`matrix` has 4 columns, not 5"),
        (emit("x", Dtype::F32, &[1], stored("vector", Cut::Columns(0..1))), Vec::new(), "has no columns"),
        (emit("x", bf16, &[6, 4], stored("matrik", Cut::Whole)), Vec::new(), "matrix"),
        (emit("x", bf16, &[6, 4], source("matrik", None, 2.0, 0.0)), Vec::new(), "matrix"),
        (emit("x", Dtype::F32, &[1], spread), Vec::new(), "`vector` has 3 values only"),
        // Five rows where six were planned, and the reverse.
        (
            emit("x", bf16, &[6, 4], stored("matrix", Cut::Rows(vec![0..3, 3..5]))),
            Vec::new(),
            "1 planned tensors were not written",
        ),
        (emit("x", bf16, &[5, 4], stored("matrix", Cut::Whole)), Vec::new(), "expected 40 bytes, found 48"),
    ];
    for (emit, computed, part) in cases {
        let to = dir.path().join("out");
        let error = write(&from, &to, &[emit], &computed).expect_err(part).to_string();
        assert!(error.contains(part), "{error:?} has no {part:?}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "{part}: only the source is there");
    }
    let list = [emit("a", Dtype::F32, &[1], Origin::Zero), emit("b", Dtype::F32, &[1], Origin::Zero)];
    let mut publisher = publisher(&from, &dir.path().join("out"), &list, &Silent).unwrap();
    let error = publisher.write(&list[1..], &mut Nothing).unwrap_err();
    assert!(matches!(error, ConvertError::Write(WriteError::OutOfOrder { .. })), "{error}");
}

#[test]
fn what_is_largest_in_a_dtype_is_stored_and_what_rounds_beyond_it_is_not() {
    // Halfway to the next power of two rounds up to it, in every binary format.
    for (dtype, largest, beyond) in [
        (Dtype::F16, 65_519.99, 65_520.0),
        (Dtype::BF16, 3.394_8e38, 3.4e38),
        (Dtype::F32, f64::from(f32::MAX), f64::from(f32::MAX) * (1.0 + 1e-7)),
    ] {
        for sign in [1.0, -1.0] {
            assert_eq!(rounded("x", &[0.0, sign * largest], dtype).unwrap(), encode(&[0.0, sign * largest], dtype));
            assert!(rounded("x", &[sign * beyond, 0.0], dtype).is_err(), "{dtype}: {beyond}");
        }
    }
}

#[test]
fn side_files_follow_the_config() {
    let dir = tempfile::tempdir().unwrap();
    let from = small(dir.path());
    let list = [emit("a", Dtype::F32, &[1], Origin::Zero)];
    let folder = |name: &str, config: Config<'_>, own: &[(&str, &[u8])]| {
        let mut publisher = publisher(&from, &dir.path().join(name), &list, &Silent)?;
        publisher.write(&list, &mut Nothing)?;
        publisher.side_files(config, own)?;
        publisher.report(&Sums { output: "/tmp/x".into(), tensors: 1 }, &|r| {
            vec![("README.md".to_owned(), r.tensors.to_string().into_bytes())]
        })?;
        publisher.finish()
    };
    let names = |folder: &Path| {
        let mut names: Vec<String> =
            fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    let json =
        |folder: &Path, name: &str| -> Value { serde_json::from_slice(&fs::read(folder.join(name)).unwrap()).unwrap() };
    let common = ["README.md", "config.json", "manifest.json", "model.safetensors", "report.json", "tokenizer.json"];

    let kept = folder("kept", Config::Kept { without: &["quantization_config"], with: &[] }, &[]).unwrap();
    let mut expected: Vec<&str> = common.into_iter().chain(["modeling_x.py"]).collect();
    expected.sort_unstable();
    assert_eq!(names(&kept), expected, "the code that the config names, and no other");
    assert_eq!(json(&kept, "config.json"), json!({ "model_type": "x", "auto_map": { "AutoModel": "modeling_x.X" } }));
    assert_eq!(json(&kept, "report.json"), json!({ "tensors": 1 }), "a report does not depend on the path");
    assert_eq!(fs::read_to_string(kept.join("README.md")).unwrap(), "1");
    assert!(crate::write::verify_manifest(&kept).unwrap().is_clean());

    let readable = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/pico-llama/config.json");
    let readable: Value = serde_json::from_slice(&fs::read(readable).unwrap()).unwrap();
    let made = folder("made", Config::Made(&readable), &[("own.py", b"Z")]).unwrap();
    let mut expected: Vec<&str> = common.into_iter().chain(["own.py"]).collect();
    expected.sort_unstable();
    assert_eq!(names(&made), expected, "the code of the source is not that of another class");
    assert_eq!(json(&made, "config.json"), readable);

    let unreadable = folder("unreadable", Config::Made(&json!({ "model_type": "x" })), &[]).unwrap_err();
    assert!(matches!(unreadable, ConvertError::Arch(_)), "{unreadable}");
    let taken = folder("taken", Config::Kept { without: &[], with: &[] }, &[("config.json", b"")]).unwrap_err();
    assert!(matches!(taken, ConvertError::Write(WriteError::BadFile { .. })), "{taken}");
    fs::OpenOptions::new().append(true).open(from.dir.join("model.safetensors")).unwrap().set_len(9).unwrap();
    let changed = folder("changed", Config::Kept { without: &[], with: &[] }, &[]).unwrap_err();
    assert!(matches!(changed, ConvertError::Source(SourceError::Changed { .. })), "{changed}");
    assert_eq!(names(dir.path()), ["kept", "made", "source"]);
}

/// Keeps what it is told.
#[derive(Default)]
struct Log(Mutex<Vec<Event>>);

impl Observer for Log {
    fn event(&self, event: Event) {
        self.0.lock().unwrap().push(event);
    }
}

#[test]
fn a_run_that_dies_publishes_all_or_nothing_and_what_could_not_be_removed_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let from = small(dir.path());
    let list = [emit("a", Dtype::F32, &[1], Origin::Zero), emit("b", Dtype::F32, &[1], Origin::Zero)];
    let run = |to: &Path, log: &Log| {
        let mut publisher = publisher(&from, to, &list, log)?;
        publisher.write(&list, &mut Nothing)?;
        publisher.side_files(Config::Kept { without: &[], with: &[] }, &[])?;
        publisher.finish()
    };
    let log = Log::default();
    let (result, points) = with(None, || run(&dir.path().join("whole"), &log));
    result.unwrap();
    let told = log.0.into_inner().unwrap();
    let written = |event: &Event| matches!(event, Event::Written { .. });
    assert!(told.len() == 2 && told.iter().all(written), "{told:?}");

    // Dead before any call that changes the disk: all of the model is there, or nothing is.
    let mut warned = 0;
    for at in 0..points {
        let parent = dir.path().join(at.to_string());
        fs::create_dir(&parent).unwrap();
        let log = Log::default();
        let (result, _) = with(Some((at, Fault::Death)), || run(&parent.join("out"), &log));
        let out = parent.join("out");
        assert!(out.exists() || result.is_err(), "dead at {at}");
        assert!(!out.exists() || crate::write::verify_manifest(&out).unwrap().is_clean(), "dead at {at}: half a model");
        let left = fs::read_dir(&parent).unwrap().map(|e| e.unwrap().path());
        let left: Vec<PathBuf> = left.filter(|p| p.display().to_string().contains(".partial-")).collect();
        if result.is_ok() {
            let told = log.0.into_inner().unwrap();
            let warnings: Vec<&Event> = told.iter().filter(|e| !written(e)).collect();
            let expected: Vec<String> = left.iter().map(|p| format!("could not be removed: {}", p.display())).collect();
            assert_eq!(warnings.len(), expected.len(), "dead at {at}: {warnings:?}");
            for (event, text) in warnings.into_iter().zip(expected) {
                assert!(matches!(event, Event::Warning(said) if *said == text), "{event:?}");
                warned += 1;
            }
        }
    }
    assert!(warned > 0, "some death leaves the staging folder");
}
