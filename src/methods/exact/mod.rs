//! Method `exact`: the source's attention in an MLA container.

mod factorise;

use serde_json::{Value, json};

use super::options::not_taken;
use super::{
    Candidates, Case, Choice, ConvertSettings, Cost, Entry, LayerInput, LayerOutput, LayerReport, Made, Method,
    SourceStream, Split, Streams, Survey, SurveyResult, TextNeed, Work,
};
use crate::error::ConvertError;
use crate::stream::Visit;
use crate::target::RopeGrid;

pub use factorise::{convert, lossless_nope_dim};

/// Registry line of the method.
pub const ENTRY: Entry = Entry { name: "exact", options: &[], make: |_| Ok(Exact.into()) };

/// Nothing lost, nothing compressed: the source's attention in an MLA container.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Exact;

impl Method for Exact {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn settings(&self) -> Value {
        json!({})
    }

    fn arguments(&self) -> Vec<(&'static str, Option<String>)> {
        Vec::new()
    }

    fn validate(&self, settings: &ConvertSettings) -> Result<(), ConvertError> {
        if settings.rope_grid.is_some() {
            return Err(not_taken(self.name(), "--rope-grid", "--method attention-aware"));
        }
        if settings.q_lora_rank.is_some() {
            return Err(ConvertError::refused(
                "`--q-lora-rank` compresses queries, which `--method exact` does not",
                "use `--method transmla`",
            ));
        }
        Ok(())
    }

    fn compresses(&self) -> bool {
        false
    }

    fn off_stock_grid(&self, case: &Case<'_>) -> Option<String> {
        let heads = case.shape.kv_heads;
        (heads > 1).then(|| format!("`--method exact` keeps every frequency {heads} times, which no stock grid does"))
    }

    fn check(&self, case: &Case<'_>, _decisions: &mut Vec<String>) -> Result<Candidates, ConvertError> {
        let shape = &case.shape;
        let (g, d, rotated) = (shape.kv_heads, shape.head_dim, shape.rotary_dim);
        let (rope, unrotated) = (g * rotated, d - rotated);
        Ok(Candidates {
            // Keys without rotation go to the latent.
            splits: vec![Split { rope, rank: g * (2 * d - rotated) }],
            // Every frequency is kept as often as there are KV heads.
            grid: if g > 1 { RopeGrid::Free } else { RopeGrid::Stock },
            bias: shape.qkv_bias || shape.out_bias,
            query_bias: shape.qkv_bias,
            q_rank: None,
            kv_rank_open: false,
            q_rank_open: false,
            nope: match case.target.has_own_score_scale() {
                true => unrotated,
                false => lossless_nope_dim(rope, unrotated, d),
            },
            // An amplitude that only part of a head has is divided out of the rest.
            plain_weights: unrotated == 0 || case.arch.rope.amplitude == 1.0,
        })
    }

    fn text(&self, _: &Case<'_>, _: &Candidates) -> Result<Option<TextNeed>, ConvertError> {
        Ok(None)
    }

    fn streams(&self) -> Streams {
        Streams { source: SourceStream::None, converted: false }
    }

    fn survey(&self, survey: &Survey<'_>, _predict: bool) -> Result<Choice, ConvertError> {
        Ok(Choice {
            split: survey.candidates.splits[0],
            q_rank: None,
            result: SurveyResult::default(),
            predicted_error: None,
            decisions: Vec::new(),
        })
    }

    fn trial(&self, _: &Made<'_>, _: &Visit<'_, '_>) -> Result<f64, ConvertError> {
        Ok(0.0)
    }

    fn layer(&self, made: &Made<'_>, input: &LayerInput<'_, '_>) -> Result<LayerOutput, ConvertError> {
        Ok(LayerOutput {
            layer: convert(input.attention, made.geometry.qk_nope_head_dim),
            figures: LayerReport { layer: input.index, ..LayerReport::default() },
            next: None,
            converted: None,
        })
    }

    fn cost(&self, work: &Work<'_>) -> Cost {
        let geometry = &work.geometry;
        let wide = |n: usize| n as u64;
        let (d, heads, latent) = (work.hidden(), wide(work.case.arch.heads), work.query_latent());
        let (rank, rope) = (wide(geometry.kv_lora_rank), wide(geometry.qk_rope_head_dim));
        let (nope, value) = (wide(geometry.qk_nope_head_dim), wide(geometry.v_head_dim));
        // Queries of the output, through a latent where they have one.
        let queries = heads * (nope + rope) * latent.max(d) + latent * d;
        let made = queries + (rank + rope) * d + heads * (nope + value) * rank + work.queries() * d;
        let working = 8 * work.attention_weights() + 16 * made + 12 * queries;
        Cost { flops: 0.0, streamed_tokens: 0, working_bytes: working, overlapped_bytes: working }
    }
}
