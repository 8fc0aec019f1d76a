//! `gqa2mla verify-files`

use std::path::PathBuf;

use clap::Args;
use gqa2mla::report::SCHEMA_VERSION;
use gqa2mla::write::{MANIFEST, ManifestReport, verify_manifest};
use serde::Serialize;

use super::Context;
use super::exit::ExitStatus;

/// Compare the files of a converted model with its manifest.json: size and sha256 of every file.
///
/// Exits with 1 and names every file that differs, is missing, or is not in the manifest.
#[derive(Debug, Args)]
pub struct VerifyFilesArgs {
    /// Folder that convert wrote
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

#[derive(Debug, Serialize)]
struct Checked {
    schema_version: u32,
    folder: PathBuf,
    passed: bool,
    #[serde(flatten)]
    files: ManifestReport,
}

impl VerifyFilesArgs {
    /// Run the command.
    ///
    /// # Errors
    /// No manifest, one that cannot be understood, files that cannot be read.
    pub fn execute(self, context: &Context) -> anyhow::Result<ExitStatus> {
        if !self.dir.is_dir() {
            anyhow::bail!("`{}` is not a folder\n\nhint: give the folder that convert wrote", self.dir.display());
        }
        if !self.dir.join(MANIFEST).exists() {
            anyhow::bail!(
                "`{}` holds no {MANIFEST}\n\nhint: folders that convert wrote have one; other models cannot be checked \
                 this way",
                self.dir.display()
            );
        }
        let files = verify_manifest(&self.dir)?;
        let passed = files.is_clean();
        let document = Checked { schema_version: SCHEMA_VERSION, folder: self.dir, passed, files };
        context.show(&document, text)?;
        Ok(if passed { ExitStatus::Done } else { ExitStatus::CheckFailed })
    }
}

fn text(c: &Checked) -> String {
    let mut out = String::new();
    let groups =
        [("differs", &c.files.differing), ("missing", &c.files.missing), ("not in the manifest", &c.files.extra)];
    for (what, names) in groups {
        for name in names {
            out += &format!("{name}: {what}\n");
        }
    }
    let (bad, intact) = (groups.iter().map(|g| g.1.len()).sum::<usize>(), c.files.intact.len());
    out += &match bad {
        0 => format!("{}: all {intact} files are as the manifest says\n", c.folder.display()),
        n => format!("{}: {n} of {} files are not as the manifest says\n", c.folder.display(), n + intact),
    };
    out
}
