//! How to go on with a run that was stopped: the command to type, told when it stops and left beside its work.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use super::command_line::quoted;

/// Staging folder of the conversion at work, once there is something in it to go on with.
static FOLDER: Mutex<Option<PathBuf>> = Mutex::new(None);

/// File in the staging folder that says how to go on.
const NOTE: &str = "HOW-TO-RESUME.txt";

/// The library put something on the disk that can be gone on with, in `folder`.
pub fn remember(folder: &Path) {
    let mut known = lock();
    if known.as_deref() == Some(folder) {
        return;
    }
    let note = format!(
        "This folder holds the finished layers of a conversion that was not completed.\n\nTo go on with it:\n\n    {}\n\n\
         To begin anew, say --restart instead of --resume. If it is no longer wanted, remove the folder.\n",
        command()
    );
    // A convenience: the run itself does not need it.
    let _ = fs_err::write(folder.join(NOTE), note);
    *known = Some(folder.to_owned());
}

/// The command that goes on, if something was left to go on with.
pub fn pending() -> Option<String> {
    lock().as_deref().is_some_and(Path::exists).then(command)
}

/// The conversion is complete.
pub fn forget() {
    *lock() = None;
}

fn lock() -> std::sync::MutexGuard<'static, Option<PathBuf>> {
    FOLDER.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// This process's own command line, with --resume.
fn command() -> String {
    let mut words: Vec<String> = vec!["gqa2mla".to_owned()];
    let kept = |word: &String| word != "--resume" && word != "--restart";
    words.extend(std::env::args_os().skip(1).map(|w| w.to_string_lossy().into_owned()).filter(kept));
    words.push("--resume".to_owned());
    words.iter().map(|w| quoted(w)).collect::<Vec<_>>().join(" ")
}
