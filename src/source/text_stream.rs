//! Tokens to text as they come.

use super::{SourceError, Tokenizer};

/// Turns token after token into pieces of text that only hold whole characters. Special tokens are left out.
///
/// Tokens may end within a character, and decoders look at their neighbours: so a few tokens are decoded again with each
/// new one, from the last place where the text was settled.
#[derive(Debug)]
pub struct TextStream<'t> {
    tokenizer: &'t Tokenizer,
    ids: Vec<u32>,
    /// Tokens before this one are settled and no longer read.
    start: usize,
    /// Tokens before this one have been shown.
    shown: usize,
}

impl<'t> TextStream<'t> {
    /// A stream without context: the text begins with the first token.
    pub fn new(tokenizer: &'t Tokenizer) -> Self {
        Self { tokenizer, ids: Vec::new(), start: 0, shown: 0 }
    }

    /// The text that one more token settles, often empty.
    ///
    /// # Errors
    /// As [`Tokenizer::decode_plain`].
    pub fn push(&mut self, id: u32) -> Result<String, SourceError> {
        self.ids.push(id);
        let before = self.tokenizer.decode_plain(&self.ids[self.start..self.shown])?;
        let after = self.tokenizer.decode_plain(&self.ids[self.start..])?;
        // A replacement character at the end stands for bytes that wait for their rest.
        if after.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(String::new());
        }
        let new = after.strip_prefix(before.as_str()).unwrap_or_default().to_owned();
        if !new.is_empty() {
            self.start = self.shown;
            self.shown = self.ids.len();
        }
        Ok(new)
    }

    /// What is left when no token follows: bytes that make no character appear as U+FFFD.
    ///
    /// # Errors
    /// As [`Tokenizer::decode_plain`].
    pub fn finish(self) -> Result<String, SourceError> {
        let before = self.tokenizer.decode_plain(&self.ids[self.start..self.shown])?;
        let after = self.tokenizer.decode_plain(&self.ids[self.start..])?;
        Ok(after.strip_prefix(before.as_str()).unwrap_or_default().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn the_pieces_make_the_text() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/pico-trained");
        let tokenizer = Tokenizer::from_dir(&dir).unwrap();
        for text in ["plain words, twice.", "zażółć gęślą jaźń — 日本語 🦀!", " leading\n\n and trailing ", ""]
        {
            let ids = tokenizer.encode_with(text, false).unwrap();
            let mut stream = TextStream::new(&tokenizer);
            let pieces: Vec<String> = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
            assert!(pieces.iter().all(|p| !p.contains(char::REPLACEMENT_CHARACTER)), "{pieces:?}");
            let whole = pieces.concat() + &stream.finish().unwrap();
            assert_eq!(whole, tokenizer.decode_plain(&ids).unwrap());
        }
        // The first byte of a character and no more.
        let ids = tokenizer.encode_with("🦀", false).unwrap();
        if ids.len() > 1 {
            let mut stream = TextStream::new(&tokenizer);
            assert_eq!(stream.push(ids[0]).unwrap(), "");
            assert_eq!(stream.finish().unwrap(), "\u{fffd}");
        }
    }
}
