//! What can be wrong with a checkpoint.

use std::path::PathBuf;

use super::HeaderError;

/// Why a model could not be opened or read.
///
/// Messages name the file or tensor and what was found; where there is a next step it follows as `hint: ...`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// Reading failed; the message carries the path.
    #[error(transparent)]
    Io(#[from] std::io::Error),

    /// Neither a folder nor a hub id.
    #[error(
        "`{spec}` is neither an existing folder nor a hub id\n\nhint: give a model folder, or `org/name[@revision]` to \
         fetch from the hub"
    )]
    NotFound {
        /// What the user typed.
        spec: String,
    },

    /// The path exists and is not a folder.
    #[error("`{}` is not a folder\n\nhint: give the folder that holds `config.json` and the weights", path.display())]
    NotAFolder {
        /// The path.
        path: PathBuf,
    },

    /// A hub id was given to a build without the `hub` feature.
    #[error(
        "`{spec}` is not a folder, and this build cannot download\n\nhint: rebuild with `--features hub`, or download \
         the model first and give its folder"
    )]
    HubDisabled {
        /// What the user typed.
        spec: String,
    },

    /// What names the hub is not an address.
    #[error(
        "{name} is `{value}`, which is not the address of a hub: {reason}\n\nhint: give an address such as \
         `https://huggingface.co`, or leave it unset for the public hub"
    )]
    Endpoint {
        /// Variable or option that says so.
        name: &'static str,
        /// What it holds, without credentials.
        value: String,
        /// What is wrong with it.
        reason: String,
    },

    /// The hub refused or could not be reached.
    #[error("cannot fetch {} of `{repo}` at revision `{revision}`: {reason}\n\nhint: {hint}",
            file.as_deref().map_or_else(|| "the file list".to_owned(), |f| format!("`{f}`")))]
    Hub {
        /// `org/name`.
        repo: String,
        /// Branch, tag or commit asked for.
        revision: String,
        /// File asked for; `None` for the listing.
        file: Option<String>,
        /// What the client reported, without query strings or credentials.
        reason: String,
        /// Next step.
        hint: String,
    },

    /// Offline, and the local cache does not hold the model.
    #[error(
        "`{repo}` at revision `{revision}` is not in the local cache `{}`, and the hub is off line\n\nhint: unset \
         HF_HUB_OFFLINE, or point HF_HUB_CACHE to the cache that holds it", cache.display()
    )]
    NotCached {
        /// `org/name`.
        repo: String,
        /// Branch, tag or commit asked for.
        revision: String,
        /// Cache folder looked into.
        cache: PathBuf,
    },

    /// A downloaded file is not what the hub announced. It has been removed from the cache.
    #[error(
        "downloaded file `{file}` of `{repo}` is damaged: expected {expected}, found {found}\n\nhint: try again; the \
         damaged copy is not used"
    )]
    Download {
        /// `org/name`.
        repo: String,
        /// File name within the repository.
        file: String,
        /// Announced size or hash.
        expected: String,
        /// Received size or hash.
        found: String,
    },

    /// A file is not a plain regular file.
    #[error("`{}` is {kind}, expected a regular file", path.display())]
    NotRegular {
        /// The path.
        path: PathBuf,
        /// What it is instead.
        kind: &'static str,
    },

    /// A symbolic link leads out of the model folder.
    #[error(
        "`{}` links to `{}`, outside the model folder\n\nhint: copy the file into the folder; only the hub cache may \
         link to its `blobs` folder", path.display(), target.display()
    )]
    Escapes {
        /// The link.
        path: PathBuf,
        /// Where it leads.
        target: PathBuf,
    },

    /// A text file is larger than this program reads.
    #[error("`{}` holds {bytes} bytes, more than the {limit} allowed for this kind of file", path.display())]
    TooLarge {
        /// The path.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The limit.
        limit: u64,
    },

    /// A git-lfs pointer in place of the file.
    #[error(
        "`{}` is a git-lfs pointer, not the file itself\n\nhint: run `git lfs pull` in the model folder, or download \
         the model again", path.display()
    )]
    LfsPointer {
        /// The path.
        path: PathBuf,
    },

    /// A web page in place of the file.
    #[error("`{}` is an HTML page, not the file itself\n\nhint: download the model again", path.display())]
    HtmlPage {
        /// The path.
        path: PathBuf,
    },

    /// No `config.json`.
    #[error("no `config.json` in `{}`\n\nhint: give the folder of a checkpoint in the transformers layout",
            dir.display())]
    NoConfig {
        /// The model folder.
        dir: PathBuf,
    },

    /// `config.json` cannot be used.
    #[error("`{}`: {reason}", path.display())]
    Config {
        /// Path of the file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },

    /// The weights are quantised.
    #[error(
        "the weights are quantised ({method}), and only bf16, f16, f32 and f64 weights can be converted\n\nhint: {hint}"
    )]
    Quantised {
        /// Name of the method, such as `gptq`.
        method: String,
        /// Next step.
        hint: String,
    },

    /// No safetensors weights.
    #[error("no safetensors weights in `{}`\n\nhint: {hint}", dir.display())]
    NoWeights {
        /// The model folder.
        dir: PathBuf,
        /// Next step, which depends on what was found instead.
        hint: String,
    },

    /// Several weight files and nothing that says how they belong together.
    #[error(
        "`{}` holds {count} safetensors files ({names}) and no `model.safetensors.index.json`\n\nhint: fetch the \
         index, or keep one weight file only", dir.display()
    )]
    Ambiguous {
        /// The model folder.
        dir: PathBuf,
        /// How many files.
        count: usize,
        /// The first few names.
        names: String,
    },

    /// A weight file breaks the safetensors format.
    #[error("weight file `{}`: {source}", path.display())]
    Header {
        /// Path of the file.
        path: PathBuf,
        /// What is wrong with it.
        source: HeaderError,
    },

    /// Index and shards disagree. At most 20 differences are listed.
    #[error("`{}` and the weight files disagree:\n  - {}{}", path.display(), problems.join("\n  - "),
            if *more > 0 { format!("\n  ... and {more} more") } else { String::new() }.to_owned()
            + "\n\nhint: download the files named here and the index again, all of the same revision")]
    Index {
        /// Path of the index.
        path: PathBuf,
        /// One line per difference.
        problems: Vec<String>,
        /// How many were left out.
        more: usize,
    },

    /// The index itself cannot be used.
    #[error("`{}`: {reason}", path.display())]
    BadIndex {
        /// Path of the index.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },

    /// A tensor that is needed is not there.
    #[error("tensor `{name}` is not in the checkpoint{}",
            if near.is_empty() { String::new() } else { format!("\n\nhint: near names are `{}`", near.join("`, `")) })]
    MissingTensor {
        /// Name asked for.
        name: String,
        /// Names that differ least.
        near: Vec<String>,
    },

    /// A weight file changed after it was opened.
    #[error("weight file `{}` changed while it was in use ({what})\n\nhint: start again; nothing was published",
            path.display())]
    Changed {
        /// Path of the file.
        path: PathBuf,
        /// Which property differs.
        what: &'static str,
    },

    /// No usable tokenizer.
    #[error("`{}`: {reason}\n\nhint: {hint}", path.display())]
    Tokenizer {
        /// Path of the file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
        /// Next step.
        hint: &'static str,
    },
}
