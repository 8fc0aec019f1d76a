//! Which stock engines load an MLA checkpoint of a given shape, as data.
//!
//! The rules state what was read in the sources of transformers 5.23, vLLM 0.33, SGLang 0.5.23, llama.cpp and MLX-LM of
//! mid-2026; no server was started to find them. An engine whose rule
//! list has nothing to say about a checkpoint loads it as it is.

use serde::Serialize;

use crate::arch::{Architecture, Attention, RopeLayout};
use crate::convert::{PlannedGeometry, RopeGrid};

/// What an engine sees of a checkpoint in DeepSeek layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// Widths of the attention.
    pub geometry: PlannedGeometry,
    /// Whether `q_a_proj`, `kv_a_proj_with_mqa` or `o_proj` carries a bias.
    pub bias: bool,
    /// How the config names the frequencies.
    pub rope: CandidateRope,
    /// Whether rotated pairs are neighbours (`rope_interleave`).
    pub interleaved: bool,
}

/// RoPE scheme of a [`Candidate`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CandidateRope {
    /// `theta^(-2p/d_R)`, no scaling.
    Default,
    /// One factor per pair.
    LongRope,
    /// Any other scheme (llama3, yarn, linear).
    Other,
}

impl Candidate {
    /// The candidate that an MLA model is; `None` for a GQA model.
    pub fn of_model(arch: &Architecture) -> Option<Self> {
        let Attention::Mla(mla) = &arch.attention else { return None };
        Some(Self {
            geometry: PlannedGeometry {
                kv_lora_rank: mla.kv_lora_rank,
                q_lora_rank: mla.q_lora_rank,
                qk_nope_head_dim: mla.qk_nope_head_dim,
                qk_rope_head_dim: mla.qk_rope_head_dim,
                v_head_dim: mla.v_head_dim,
            },
            bias: mla.bias,
            rope: match arch.rope.kind.as_str() {
                "default" => CandidateRope::Default,
                "longrope" => CandidateRope::LongRope,
                _ => CandidateRope::Other,
            },
            interleaved: arch.rope.layout == RopeLayout::Interleaved,
        })
    }

    /// The candidate that a conversion to `geometry` on `grid` writes: the free grid carries frequencies as LongRoPE
    /// factors and constants as biases, the stock grid has neither.
    pub fn planned(geometry: PlannedGeometry, grid: RopeGrid) -> Self {
        let free = grid == RopeGrid::Free;
        Self {
            geometry,
            bias: free,
            rope: if free { CandidateRope::LongRope } else { CandidateRope::Default },
            interleaved: true,
        }
    }

    /// Values the latent cache holds per token and layer, `r + d_R`.
    pub fn cache_width(&self) -> usize {
        self.geometry.kv_lora_rank + self.geometry.qk_rope_head_dim
    }

    fn head_shape(&self) -> (usize, usize, usize) {
        (self.geometry.qk_nope_head_dim, self.geometry.qk_rope_head_dim, self.geometry.v_head_dim)
    }
}

/// Whether an engine takes a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Loads {
    /// As it is.
    Yes,
    /// With the setting, or the limit, that the reasons name.
    Conditionally,
    /// Not, or only with wrong results.
    No,
}

impl Loads {
    /// A word for tables.
    pub fn word(self) -> &'static str {
        match self {
            Loads::Yes => "yes",
            Loads::Conditionally => "if",
            Loads::No => "no",
        }
    }
}

/// Verdict on one engine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct EngineVerdict {
    /// Engine and, where it has several, the code path.
    pub engine: &'static str,
    /// Whether it takes the checkpoint.
    pub loads: Loads,
    /// What makes it so, one sentence each. What would be a condition goes unsaid where something else forbids.
    pub reasons: Vec<&'static str>,
}

/// Verdicts of every engine on `candidate`, in a fixed order.
pub fn judge(candidate: &Candidate) -> Vec<EngineVerdict> {
    ENGINES
        .iter()
        .map(|engine| {
            let hits: Vec<&Rule> = engine.rules.iter().filter(|r| r.when.holds(candidate)).collect();
            let loads = hits.iter().map(|r| r.then).max().unwrap_or(Loads::Yes);
            let reasons = hits.iter().filter(|r| r.then == loads).map(|r| r.why).collect();
            EngineVerdict { engine: engine.name, loads, reasons }
        })
        .collect()
}

struct Engine {
    name: &'static str,
    rules: &'static [Rule],
}

struct Rule {
    when: Condition,
    then: Loads,
    why: &'static str,
}

/// A property of a candidate that some engine cares about.
enum Condition {
    Bias,
    ScaledRope,
    SplitPairs,
    InterleavedLongRope,
    HeadShapeOutside(&'static [(usize, usize, usize)]),
    CacheWidthOutside(&'static [usize]),
    DirectQuery,
}

impl Condition {
    fn holds(&self, c: &Candidate) -> bool {
        match self {
            Condition::Bias => c.bias,
            Condition::ScaledRope => c.rope != CandidateRope::Default,
            Condition::SplitPairs => !c.interleaved,
            Condition::InterleavedLongRope => c.interleaved && c.rope == CandidateRope::LongRope,
            Condition::HeadShapeOutside(shapes) => !shapes.contains(&c.head_shape()),
            Condition::CacheWidthOutside(widths) => !widths.contains(&c.cache_width()),
            Condition::DirectQuery => c.geometry.q_lora_rank.is_none(),
        }
    }
}

/// `(nope, rope, v)` widths that vLLM's CUDA prefill kernels accept.
const VLLM_PREFILL: &[(usize, usize, usize)] = &[(128, 64, 128), (64, 64, 128), (192, 64, 256), (256, 0, 256)];
/// Latent cache widths that vLLM's default decode kernels accept.
const VLLM_DECODE: &[usize] = &[320, 512, 576];

const VLLM_PREFILL_WHY: &str = "CUDA prefill kernels take head shapes (nope, rope, v) of (128,64,128), (64,64,128), \
                                (192,64,256) only; other shapes run on CPU, or with VLLM_MLA_DISABLE=1 and an expanded cache";
const VLLM_DECODE_WHY: &str =
    "default decode kernels take caches of 320, 512 or 576 values; others need VLLM_ATTENTION_BACKEND=TRITON_MLA";

const ENGINES: &[Engine] = &[
    Engine { name: "transformers", rules: &[] },
    Engine {
        name: "vLLM (--model-impl transformers)",
        rules: &[
            Rule { when: Condition::HeadShapeOutside(VLLM_PREFILL), then: Loads::Conditionally, why: VLLM_PREFILL_WHY },
            Rule { when: Condition::CacheWidthOutside(VLLM_DECODE), then: Loads::Conditionally, why: VLLM_DECODE_WHY },
        ],
    },
    Engine {
        name: "vLLM",
        rules: &[
            Rule { when: Condition::Bias, then: Loads::No, why: "skips attention biases without a word" },
            Rule {
                when: Condition::ScaledRope,
                then: Loads::No,
                why: "treats every RoPE scaling as YaRN: wrong frequencies",
            },
            Rule { when: Condition::SplitPairs, then: Loads::No, why: "ignores rope_interleave: rotates other pairs" },
            Rule { when: Condition::HeadShapeOutside(VLLM_PREFILL), then: Loads::Conditionally, why: VLLM_PREFILL_WHY },
            Rule { when: Condition::CacheWidthOutside(VLLM_DECODE), then: Loads::Conditionally, why: VLLM_DECODE_WHY },
        ],
    },
    Engine {
        name: "SGLang",
        rules: &[
            Rule { when: Condition::Bias, then: Loads::No, why: "its DeepSeek class has no attention biases" },
            Rule {
                when: Condition::ScaledRope,
                then: Loads::No,
                why: "treats every RoPE scaling as YaRN: wrong frequencies",
            },
            Rule {
                when: Condition::CacheWidthOutside(&[576]),
                then: Loads::Conditionally,
                why: "caches other than 512 + 64 need --attention-backend triton",
            },
        ],
    },
    Engine {
        name: "llama.cpp",
        rules: &[
            Rule { when: Condition::Bias, then: Loads::No, why: "deepseek2 graphs have no attention biases" },
            Rule { when: Condition::ScaledRope, then: Loads::No, why: "deepseek2 takes no per-pair frequencies" },
            Rule { when: Condition::SplitPairs, then: Loads::No, why: "ignores rope_interleave: rotates other pairs" },
            Rule {
                when: Condition::DirectQuery,
                then: Loads::Conditionally,
                why: "convert to GGUF from a copy of config.json with \"q_lora_rank\": 0, and keep attn_kv_a_mqa in F32 or BF16 when quantising",
            },
            Rule {
                when: Condition::CacheWidthOutside(&[320, 576]),
                then: Loads::Conditionally,
                why: "flash attention on CUDA is off for caches other than 256 + 64 and 512 + 64",
            },
        ],
    },
    Engine {
        name: "MLX-LM",
        rules: &[Rule {
            when: Condition::InterleavedLongRope,
            then: Loads::No,
            why: "rotates LongRoPE pairs in half layout whatever rope_interleave says",
        }],
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(r: usize, nope: usize, rope: usize, v: usize) -> PlannedGeometry {
        PlannedGeometry {
            kv_lora_rank: r,
            q_lora_rank: None,
            qk_nope_head_dim: nope,
            qk_rope_head_dim: rope,
            v_head_dim: v,
        }
    }

    fn verdict(c: &Candidate, engine: &str) -> Loads {
        judge(c).into_iter().find(|v| v.engine == engine).map(|v| v.loads).expect("a known engine")
    }

    #[test]
    fn deepseeks_own_shape_loads_everywhere() {
        let c = Candidate::planned(shape(512, 128, 64, 128), RopeGrid::Stock);
        for engine in ["transformers", "vLLM", "vLLM (--model-impl transformers)", "SGLang", "MLX-LM"] {
            assert_eq!(verdict(&c, engine), Loads::Yes, "{engine}");
        }
        // Only because the query has no latent.
        assert_eq!(verdict(&c, "llama.cpp"), Loads::Conditionally);
    }

    #[test]
    fn free_frequencies_and_biases_load_where_transformers_code_runs() {
        let c = Candidate::planned(shape(512, 128, 64, 128), RopeGrid::Free);
        assert_eq!(verdict(&c, "transformers"), Loads::Yes);
        assert_eq!(verdict(&c, "vLLM (--model-impl transformers)"), Loads::Yes);
        for engine in ["vLLM", "SGLang", "llama.cpp", "MLX-LM"] {
            assert_eq!(verdict(&c, engine), Loads::No, "{engine}");
        }
    }

    #[test]
    fn a_no_comes_with_everything_that_forbids() {
        let c = Candidate::planned(shape(128, 64, 64, 64), RopeGrid::Free);
        let vllm = judge(&c).into_iter().find(|v| v.engine == "vLLM").expect("vLLM");
        assert_eq!((vllm.loads, vllm.reasons.len()), (Loads::No, 2));
    }
}
