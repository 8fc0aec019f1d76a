//! Plans, staging, publishing and the manifest: what is written can be read by the reference crate and by us, and the output
//! path never holds half a model.

mod crash;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use gqa2mla::source::{Dtype, TensorView, find_non_finite, sha256_file};
use gqa2mla::write::{ShardPlan, StagedWriter, Staging, StagingOptions, WriteError, verify_manifest};
use tempfile::TempDir;

use crate::common::checkpoint::{listing, open, sample, samples, write};

#[test]
fn round_trip_through_the_reference_crate_and_our_reader() {
    for max in [1, 100, 200, 1 << 30] {
        let root = TempDir::new().unwrap();
        let out = root.path().join("out");
        let samples = samples();
        let published = write(&out, &samples, max, false).unwrap();
        assert_eq!(published.path, fs_err::canonicalize(&out).unwrap());
        assert_eq!(listing(root.path()), ["out"]);
        assert!(verify_manifest(&out).unwrap().is_clean());

        // The reference crate is the oracle for the files.
        let mut seen = BTreeMap::new();
        for name in listing(&out).iter().filter(|n| n.ends_with(".safetensors")) {
            let content = fs_err::read(out.join(name)).unwrap();
            let file = safetensors::SafeTensors::deserialize(&content).unwrap();
            for (name, view) in file.iter() {
                let stored = (view.dtype(), view.shape().to_vec(), view.data().to_vec());
                assert!(seen.insert(name.to_owned(), stored).is_none());
            }
            let (_, meta) = safetensors::SafeTensors::read_metadata(&content).unwrap();
            assert_eq!(meta.metadata().as_ref().unwrap()["format"], "pt");
        }
        assert_eq!(seen.len(), samples.len());

        let source = open(&out).unwrap();
        assert_eq!(source.tensors.len(), samples.len());
        assert_eq!(source.tensors.total_bytes(), samples.iter().map(|s| s.1.len() as u64).sum::<u64>());
        for (tensor, bytes) in &samples {
            let view = source.tensors.view(&tensor.name).unwrap();
            assert_eq!((view.dtype, view.shape, &*view.bytes), (tensor.dtype, &tensor.shape[..], &bytes[..]));
            let (dtype, shape, data) = &seen[&tensor.name];
            assert_eq!((dtype, shape, data), (&tensor.dtype, &tensor.shape, bytes), "{}", tensor.name);
            assert_eq!(find_non_finite(&view), None);
        }
        let order: Vec<_> = source.tensors.in_file_order().map(|(n, _)| n.to_owned()).collect();
        let mut sorted = order.clone();
        sorted.sort();
        assert_eq!(sorted, source.tensors.names().collect::<Vec<_>>());
        if max == 1 << 30 {
            assert_eq!(order[0], samples[0].0.name);
        }
        source.check_unchanged().unwrap();
        let files: Vec<_> = source.files.iter().map(|f| f.name.as_str()).collect();
        assert_eq!(files, ["tokenizer.json"]);
    }
}

#[test]
fn same_inputs_give_the_same_bytes() {
    let root = TempDir::new().unwrap();
    let (a, b) = (root.path().join("a"), root.path().join("b"));
    write(&a, &samples(), 150, false).unwrap();
    write(&b, &samples(), 150, false).unwrap();
    assert_eq!(listing(&a), listing(&b));
    for name in listing(&a) {
        assert_eq!(fs_err::read(a.join(&name)).unwrap(), fs_err::read(b.join(&name)).unwrap(), "{name}");
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let fresh = root.path().join("fresh");
        fs_err::write(&fresh, "").unwrap();
        let mode = |p: &Path| fs_err::metadata(p).unwrap().permissions().mode();
        assert_eq!(mode(&a.join("config.json")), mode(&fresh), "files have the mode any program gives");
    }
}

#[test]
fn large_tensors_are_hashed_as_written() {
    let root = TempDir::new().unwrap();
    let out = root.path().join("out");
    // Above the sizes from which pieces bypass the buffer and are hashed in parallel.
    let big = [sample("small", Dtype::F32, &[3]), sample("big", Dtype::F32, &[1500, 1024])];
    let published = write(&out, &big, 1 << 30, false).unwrap();
    assert_eq!(published.manifest.files["model.safetensors"], sha256_file(&out.join("model.safetensors")).unwrap());
}

#[test]
fn the_manifest_finds_every_change() {
    let root = TempDir::new().unwrap();
    let out = root.path().join("out");
    write(&out, &samples(), 150, false).unwrap();
    let shard = out.join("model-00002-of-00004.safetensors");
    let shard = if shard.exists() { shard } else { panic!("{:?}", listing(&out)) };
    let mut content = fs_err::read(&shard).unwrap();
    *content.last_mut().unwrap() ^= 1;
    fs_err::write(&shard, content).unwrap();
    fs_err::remove_file(out.join("tokenizer.json")).unwrap();
    fs_err::write(out.join("stranger"), "").unwrap();
    let report = verify_manifest(&out).unwrap();
    assert_eq!(report.differing, ["model-00002-of-00004.safetensors"]);
    assert_eq!(report.missing, ["tokenizer.json"]);
    assert_eq!(report.extra, ["stranger"]);
    fs_err::remove_file(out.join("manifest.json")).unwrap();
    assert!(verify_manifest(&out).is_err());
}

#[test]
fn dropping_or_misusing_a_writer_leaves_nothing() {
    let root = TempDir::new().unwrap();
    let out = root.path().join("out");
    let planned: Vec<_> = samples().iter().map(|s| s.0.clone()).collect();
    let start = || {
        let plan = ShardPlan::new(&planned, 100).unwrap();
        StagedWriter::new(Staging::create(&out, &StagingOptions::default()).unwrap(), plan)
    };
    let first = &samples()[0];

    let mut writer = start();
    writer.write_tensor(&first.0.name, &first.1).unwrap();
    assert_eq!(listing(root.path()).len(), 2, "staging folder and lock");
    assert!(matches!(
        Staging::create(&out, &StagingOptions::default()),
        Err(WriteError::Locked { pid, .. }) if pid == std::process::id()
    ));
    drop(writer);
    assert!(listing(root.path()).is_empty());

    let mut writer = start();
    assert!(matches!(writer.write_tensor("odd", &[0; 3]), Err(WriteError::OutOfOrder { .. })));
    assert!(matches!(writer.write_tensor(&first.0.name, &[0; 3]), Err(WriteError::WrongSize { .. })));
    // As many bytes, and still not what was planned.
    for (dtype, shape) in [(Dtype::F16, &first.0.shape[..]), (first.0.dtype, &[8, 10])] {
        let view = TensorView { name: "", dtype, shape, bytes: first.1.as_slice().into() };
        let error = writer.write_view(&first.0.name, &view).unwrap_err();
        assert!(matches!(error, WriteError::NotAsPlanned { .. }), "{error}");
    }
    for name in ["../x", "manifest.json", "model-00001-of-00004.safetensors", "model.safetensors.index.json", ""] {
        let result = writer.write_file(name, b"");
        let known = writer.plan().shards().iter().any(|s| s.file == name);
        assert!(matches!(result, Err(WriteError::BadFile { .. })) || !known && name.starts_with("model-"), "{name}");
    }
    writer.write_file("a", b"").unwrap();
    assert!(matches!(writer.write_file("a", b""), Err(WriteError::BadFile { .. })));
    match writer.finish() {
        Err(WriteError::Incomplete { missing, first: name }) => assert_eq!((missing, name), (8, first.0.name.clone())),
        other => panic!("{other:?}"),
    }
    assert!(listing(root.path()).is_empty());
}

#[test]
fn an_io_error_poisons_the_writer() {
    let root = TempDir::new().unwrap();
    let out = root.path().join("out");
    let plan = ShardPlan::new(&[samples()[0].0.clone()], 100).unwrap();
    let mut writer = StagedWriter::new(Staging::create(&out, &StagingOptions::default()).unwrap(), plan);
    // Something takes the name of the shard: creating it must fail rather than follow or replace it.
    fs_err::create_dir(writer.staging().dir().join("model.safetensors")).unwrap();
    assert!(matches!(writer.write_tensor(&samples()[0].0.name, &samples()[0].1), Err(WriteError::Io(_))));
    assert!(matches!(writer.write_file("x", b""), Err(WriteError::Poisoned)));
    assert!(matches!(writer.finish(), Err(WriteError::Poisoned)));
    assert!(listing(root.path()).is_empty());
}

#[test]
fn which_outputs_are_accepted() {
    let root = TempDir::new().unwrap();
    let at = |name: &str| root.path().join(name);
    let create = |path: &Path, overwrite: bool, source: Option<PathBuf>| {
        Staging::create(path, &StagingOptions { overwrite, source, ..StagingOptions::default() }).map(|_| ())
    };
    assert!(matches!(create(&at("no/such"), false, None), Err(WriteError::NoParent { .. })));
    assert!(matches!(create(Path::new("/"), false, None), Err(WriteError::BadOutput { .. })));
    fs_err::write(at("file"), "x").unwrap();
    assert!(matches!(create(&at("file"), true, None), Err(WriteError::NotAFolder { .. })));
    fs_err::create_dir(at("empty")).unwrap();
    create(&at("empty"), false, None).unwrap();
    write(&at("empty"), &samples(), 1 << 30, false).unwrap();
    assert!(matches!(create(&at("empty"), false, None), Err(WriteError::Exists { .. })));
    fs_err::create_dir(at("photos")).unwrap();
    fs_err::write(at("photos/cat.jpg"), "x").unwrap();
    assert!(matches!(create(&at("photos"), true, None), Err(WriteError::NotAModel { .. })));
    assert_eq!(listing(&at("photos")), ["cat.jpg"]);

    fs_err::create_dir(at("src")).unwrap();
    for output in ["src", "src/out", "src/../src"] {
        assert!(matches!(create(&at(output), true, Some(at("src"))), Err(WriteError::Overlap { .. })), "{output}");
    }
    assert!(matches!(create(root.path(), true, Some(at("src"))), Err(WriteError::Overlap { .. })));
    create(&at("src2"), true, Some(at("src"))).unwrap();
    let options = StagingOptions { needed_bytes: u64::MAX, ..StagingOptions::default() };
    assert!(matches!(Staging::create(&at("big"), &options), Err(WriteError::NoSpace { .. })));
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("empty", at("link")).unwrap();
        assert!(matches!(create(&at("link"), true, None), Err(WriteError::NotAFolder { .. })));
        std::os::unix::fs::symlink("nowhere", at("dangling")).unwrap();
        assert!(matches!(create(&at("dangling"), true, None), Err(WriteError::NotAFolder { .. })));
        // The source reached through a link is still the source.
        std::os::unix::fs::symlink("src", at("alias")).unwrap();
        assert!(matches!(create(&at("alias/out"), true, Some(at("src"))), Err(WriteError::Overlap { .. })));
    }
    assert!(listing(root.path()).iter().all(|n| !n.starts_with('.')), "{:?}", listing(root.path()));
}

#[test]
fn overwriting_swaps_whole_folders() {
    let root = TempDir::new().unwrap();
    let out = root.path().join("out");
    write(&out, &samples(), 100, false).unwrap();
    fs_err::write(out.join("stray"), "from before").unwrap();
    let before: Vec<_> = listing(&out).iter().map(|n| fs_err::read(out.join(n)).unwrap()).collect();

    // A run that fails leaves the old model as it is.
    let plan = ShardPlan::new(&[samples()[0].0.clone()], 100).unwrap();
    let options = StagingOptions { overwrite: true, ..StagingOptions::default() };
    let writer = StagedWriter::new(Staging::create(&out, &options).unwrap(), plan);
    assert!(writer.finish().is_err());
    assert_eq!(before, listing(&out).iter().map(|n| fs_err::read(out.join(n)).unwrap()).collect::<Vec<_>>());

    let published = write(&out, &samples()[..2], 1 << 30, true).unwrap();
    assert_eq!(published.left_behind, None);
    assert_eq!(listing(&out), ["config.json", "manifest.json", "model.safetensors", "tokenizer.json"]);
    assert_eq!(listing(root.path()), ["out"]);
}
