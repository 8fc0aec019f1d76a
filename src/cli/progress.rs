//! Events of the library as a bar on stderr.

use std::io::IsTerminal;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use gqa2mla::observe::{Event, Observer};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::output::{Label, escape, message};
use super::{interrupt, resume};

/// Draws the current phase where stderr is a terminal; elsewhere only warnings and notes appear, as lines.
pub struct Progress {
    quiet: bool,
    state: Mutex<State>,
}

struct State {
    bar: ProgressBar,
    phase: &'static str,
    started: Instant,
    /// File of the download being drawn.
    file: Option<String>,
    /// How fast tokens go by.
    speed: String,
}

impl Progress {
    /// With `quiet`, nothing is shown.
    pub fn new(quiet: bool) -> Self {
        let visible = !quiet && std::io::stderr().is_terminal();
        let target = if visible { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(None, target);
        if visible {
            // Layers of a large model take minutes; the clock shows that something lives.
            bar.enable_steady_tick(Duration::from_millis(200));
        }
        Self {
            quiet,
            state: Mutex::new(State { bar, phase: "", started: Instant::now(), file: None, speed: String::new() }),
        }
    }

    /// Take the bar off the screen.
    pub fn finish(&self) {
        self.with(|s| s.bar.finish_and_clear());
    }

    fn with(&self, f: impl FnOnce(&mut State)) {
        // A poisoned bar is still a bar.
        let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        f(&mut state);
    }

    fn say(&self, label: Label, text: &str) {
        if !self.quiet {
            self.with(|s| s.bar.suspend(|| message(label, text)));
        }
    }
}

impl State {
    fn phase(&mut self, name: &'static str, steps: Option<u64>) {
        self.phase = name;
        self.started = Instant::now();
        self.file = None;
        let template = match steps {
            Some(_) => "{prefix:>10} [{bar:28}] {pos}/{len} {msg} {elapsed} (left: {eta})",
            None => "{prefix:>10} {spinner} {msg} {elapsed}",
        };
        self.style(template);
        self.bar.set_prefix(name);
        self.bar.set_message("");
        match steps {
            Some(n) => self.bar.set_length(n),
            None => self.bar.unset_length(),
        }
        self.bar.reset();
    }

    fn step(&mut self, done: u64, tokens: u64) {
        self.bar.set_position(done);
        let seconds = self.started.elapsed().as_secs_f64();
        if tokens > 0 && seconds > 0.0 {
            self.speed = format!("{:.0} tokens/s", tokens as f64 / seconds);
            self.bar.set_message(self.speed.clone());
        }
    }

    fn loss(&self, train: f64, held_out: f64) {
        self.bar.set_message(format!("{}, loss {train:.4}, held out {held_out:.4},", self.speed));
    }

    fn download(&mut self, file: &str, done: u64, total: Option<u64>) {
        if self.file.as_deref() != Some(file) {
            self.phase("download", total);
            self.style(match total {
                Some(_) => "{prefix:>10} [{bar:28}] {bytes}/{total_bytes} {bytes_per_sec} {msg} (left: {eta})",
                None => "{prefix:>10} {spinner} {bytes} {bytes_per_sec} {msg}",
            });
            self.bar.set_message(escape(file));
            self.file = Some(file.to_owned());
        }
        self.bar.set_position(done);
    }

    fn style(&self, template: &str) {
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.bar.set_style(style.progress_chars("=> "));
        }
    }
}

impl Observer for Progress {
    fn event(&self, event: Event) {
        if let Event::Checkpoint { folder, .. } = &event {
            resume::remember(folder);
        }
        interrupt::unwind_if_asked();
        match event {
            Event::Phase { name, steps } => self.with(|s| s.phase(name, steps)),
            Event::Step { done, tokens } => self.with(|s| s.step(done, tokens)),
            Event::Loss { train, held_out } => self.with(|s| s.loss(train, held_out)),
            Event::Download { file, done, total } => self.with(|s| s.download(&file, done, total)),
            Event::Warning(text) => self.say(Label::Warning, &text),
            Event::Note(text) => self.say(Label::Note, &text),
            _ => {}
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}
