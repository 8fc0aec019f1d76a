//! What stands in the place of a file: nothing, a folder, a pipe, a device, a link in circles or out of the folder.

use std::os::unix::fs::{PermissionsExt, symlink};

use super::{Case, Clean, Refused, Verdict, case};

const FILES: [&str; 7] = [
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
];

pub fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for name in FILES {
        let needed = matches!(name, "config.json" | "model.safetensors");
        let verdict: Verdict = if needed { Refused } else { Clean };
        let put = |what: &str, make: fn(&std::path::Path)| {
            case(format!("{name}: {what}"), verdict, move |dir| {
                let path = dir.join(name);
                let _ = fs_err::remove_file(&path);
                make(&path);
            })
        };
        all.push(put("a folder", |p| fs_err::create_dir(p).expect("made")));
        all.push(put("a pipe", |p| {
            let made = std::process::Command::new("mkfifo").arg(p).status().expect("mkfifo");
            assert!(made.success());
        }));
        all.push(put("a link to itself", |p| symlink(p.file_name().expect("a name"), p).expect("linked")));
        all.push(put("a link in circles", |p| {
            let other = p.with_extension("other");
            symlink(&other, p).expect("linked");
            symlink(p, &other).expect("linked");
        }));
        all.push(put("a link to nothing", |p| symlink("nothing", p).expect("linked")));
        all.push(put("a link to zeros without end", |p| symlink("/dev/zero", p).expect("linked")));
        all.push(put("a link to a file of the system", |p| symlink("/proc/self/environ", p).expect("linked")));
        all.push(put("a link to a folder", |p| symlink("/", p).expect("linked")));
        all.push(put("a socket", |p| drop(std::os::unix::net::UnixListener::bind(p).expect("bound"))));
        all.push(put("gone", |_| {}));
        // Whoever runs as root reads it all the same.
        all.push(case(format!("{name}: closed"), Clean, move |dir| {
            if let Ok(meta) = fs_err::metadata(dir.join(name)) {
                let mut rights = meta.permissions();
                rights.set_mode(0o0);
                fs_err::set_permissions(dir.join(name), rights).expect("set");
            }
        }));
    }
    all.push(case("many files", Clean, |dir| {
        for n in 0..5000 {
            fs_err::write(dir.join(format!("{n} \u{202e}\u{1b}[2J.txt")), "").expect("written");
        }
    }));
    all.push(case("a name that is no text", Clean, |dir| {
        use std::os::unix::ffi::OsStrExt;
        let name = std::ffi::OsStr::from_bytes(b"\xff\xfe.json");
        // Some file systems refuse such names.
        let _ = fs_err::write(dir.join(name), "{}");
    }));
    all
}
