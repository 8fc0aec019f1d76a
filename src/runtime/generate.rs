//! Going on with a text, token by token.

use std::ops::ControlFlow;
use std::time::Instant;

use serde::Serialize;

use super::{Backend, RuntimeError, Sampler, Session};

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stop {
    /// The model said that its text ends.
    EndOfText,
    /// As many tokens as were asked for.
    MaxTokens,
    /// The receiver of the tokens wanted no more.
    Receiver,
}

/// What was generated, and how fast.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// New tokens, the one that ends the text not included.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub stop: Stop,
    /// Seconds from the prompt to the first logits.
    pub prefill_seconds: f64,
    /// Decoding steps: every token that was fed back.
    pub steps: usize,
    /// Seconds of all steps.
    pub decode_seconds: f64,
}

/// One sequence that tokens are fed to.
pub trait Decode {
    /// Feed tokens; the logits `[V]` that follow the last of them.
    ///
    /// # Errors
    /// As [`Session::feed`].
    fn prefill(&mut self, tokens: &[u32]) -> Result<Vec<f32>, RuntimeError>;

    /// Feed one token; the logits `[V]` that follow it.
    ///
    /// # Errors
    /// As [`Session::feed`].
    fn step(&mut self, token: u32) -> Result<Vec<f32>, RuntimeError>;
}

impl<B: Backend> Decode for Session<'_, '_, B> {
    fn prefill(&mut self, tokens: &[u32]) -> Result<Vec<f32>, RuntimeError> {
        Session::prefill(self, tokens)
    }

    fn step(&mut self, token: u32) -> Result<Vec<f32>, RuntimeError> {
        Session::step(self, token)
    }
}

/// Feed `prompt` to a session of one sequence, then up to `max_tokens` tokens of its own choice, until one of `ends`.
/// Every new token goes to `receive`.
///
/// # Errors
/// As [`Session::feed`].
pub fn generate(
    session: &mut impl Decode,
    prompt: &[u32],
    max_tokens: usize,
    ends: &[u32],
    sampler: &mut Sampler,
    mut receive: impl FnMut(u32) -> ControlFlow<()>,
) -> Result<Generation, RuntimeError> {
    let started = Instant::now();
    let mut logits = session.prefill(prompt)?;
    let prefill_seconds = started.elapsed().as_secs_f64();
    let mut tokens = Vec::new();
    let mut steps = 0;
    let mut decode_seconds = 0.0;
    let stop = loop {
        if tokens.len() == max_tokens {
            break Stop::MaxTokens;
        }
        let token = sampler.next(&logits);
        if ends.contains(&token) {
            break Stop::EndOfText;
        }
        tokens.push(token);
        if receive(token).is_break() {
            break Stop::Receiver;
        }
        if tokens.len() < max_tokens {
            let started = Instant::now();
            logits = session.step(token)?;
            steps += 1;
            decode_seconds += started.elapsed().as_secs_f64();
        }
    };
    Ok(Generation { tokens, stop, prefill_seconds, steps, decode_seconds })
}
