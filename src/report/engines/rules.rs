//! The rules: which property of a checkpoint makes an engine refuse it, or run it wrongly.

use super::Loads::{self, Conditionally, No, NotKnown};
use super::facts::{CandidateRope, Facts, LatentRows};

/// A rule about some engines.
pub(super) struct Rule {
    /// Names in [`ENGINES`].
    pub engines: &'static [&'static str],
    pub when: fn(&Facts) -> bool,
    pub then: Loads,
    /// What is so.
    pub why: &'static str,
    /// What to do about it.
    pub change: &'static str,
}

pub(super) const TRANSFORMERS: &str = "transformers";
pub(super) const TRANSFORMERS_4: &str = "transformers 4";
pub(super) const VLLM_TF: &str = "vLLM (--model-impl transformers)";
pub(super) const VLLM: &str = "vLLM";
pub(super) const SGLANG: &str = "SGLang";
pub(super) const LLAMA: &str = "llama.cpp";
pub(super) const MLX: &str = "MLX-LM";
pub(super) const MISTRAL: &str = "mistral.rs";

/// Every engine, in the order tables show them.
pub(super) const ENGINES: [&str; 8] = [TRANSFORMERS, TRANSFORMERS_4, VLLM_TF, VLLM, SGLANG, LLAMA, MLX, MISTRAL];

const HF: &[&str] = &[TRANSFORMERS, TRANSFORMERS_4, VLLM_TF];
const OTHERS: &[&str] = &[VLLM, SGLANG, LLAMA, MLX, MISTRAL];
const ALL: &[&str] = &ENGINES;

/// `(nope, rope, v)` widths that vLLM's CUDA prefill kernels accept.
const PREFILL: &[(usize, usize, usize)] = &[(128, 64, 128), (64, 64, 128), (192, 64, 256), (256, 0, 256)];
/// Latent cache widths that vLLM's default decode kernels accept.
const DECODE: &[usize] = &[320, 512, 576];

fn deepseek(f: &Facts) -> bool {
    f.is(&["deepseek_v2", "deepseek_v3", "kimi_k2"])
}

/// Whether `rows` weights in blocks of 128 do not divide by the number of blocks.
fn uneven_blocks(rows: usize) -> bool {
    !rows.is_multiple_of(rows.div_ceil(128).max(1))
}

/// Whether the class is one that no rule is about; nothing else is said of it then.
pub(super) fn unknown(f: &Facts) -> bool {
    !f.own_code && !f.is(&["deepseek_v2", "deepseek_v3", "kimi_k2", "youtu", "minicpm3", "plm"])
}

fn scaled(f: &Facts) -> bool {
    f.rope != CandidateRope::Default
}

/// Said of folders whose latent norm is neutralised by small weights.
pub(super) const NOT_FOR_TRAINING: &str = "do not train this form, whose latent is scaled down: one optimiser step destroys it; write another by \
     `gqa2mla export DIR -o OUT --target deepseek_v3` and train that";

pub(super) const RULES: &[Rule] = &[
    // Classes.
    Rule {
        engines: ALL,
        when: unknown,
        then: NotKnown,
        why: "this model type is none of the MLA classes whose rules are known here",
        change: "try it in the engine: nothing is said against it either",
    },
    Rule {
        engines: ALL,
        when: |f| f.wrapped,
        then: Conditionally,
        why: "a model of several kinds of input: what is judged is the language model in it",
        change: "whether the engine has the class of the whole is not known here",
    },
    Rule {
        engines: &[TRANSFORMERS, TRANSFORMERS_4, VLLM_TF, MLX, MISTRAL],
        when: |f| f.is(&["kimi_k2"]),
        then: Conditionally,
        why: "knows this layout as deepseek_v3 only",
        change: "set model_type to deepseek_v3 in config.json: tensors and keys are the same",
    },
    Rule {
        engines: &[TRANSFORMERS, TRANSFORMERS_4],
        when: |f| f.is(&["plm"]) && !f.own_code,
        then: No,
        why: "has no class for PLM",
        change: "load it with the code it is published with",
    },
    Rule {
        engines: &[VLLM_TF, VLLM, SGLANG, MLX, MISTRAL],
        when: |f| f.is(&["plm"]),
        then: No,
        why: "has no class for PLM",
        change: "load it with transformers and the code it is published with, or with llama.cpp",
    },
    Rule {
        engines: &[LLAMA],
        when: |f| f.is(&["plm"]),
        then: Conditionally,
        why: "runs PLM with expanded keys and values: the small cache is lost",
        change: "nothing has to be done",
    },
    Rule {
        engines: &[TRANSFORMERS, TRANSFORMERS_4],
        when: |f| f.own_code,
        then: Conditionally,
        why: "the class is code in the folder",
        change: "load it with trust_remote_code=True",
    },
    Rule {
        engines: &[VLLM_TF, VLLM, SGLANG, LLAMA, MLX, MISTRAL],
        when: |f| f.own_code && !f.is(&["plm"]),
        then: No,
        why: "the class is code in the folder, which the engine does not run",
        change: "only transformers runs it; a stock target serves elsewhere, where one holds the model",
    },
    Rule {
        engines: &[VLLM, SGLANG],
        when: |f| f.is(&["youtu"]),
        then: No,
        why: "has no class of its own for it",
        change: "vLLM takes transformers' code by itself; for SGLang write the target deepseek_v3 or minicpm3",
    },
    Rule {
        engines: &[MLX],
        when: |f| f.is(&["youtu"]),
        then: No,
        why: "knows this class as youtu_llm only",
        change: "write the target deepseek_v3",
    },
    Rule {
        engines: &[VLLM],
        when: |f| f.is(&["minicpm3"]) && !f.bias,
        then: Conditionally,
        why: "runs it with expanded keys and values: the small cache is lost",
        change: "serve with --model-impl transformers, or with SGLang, which keeps the latent",
    },
    Rule {
        engines: &[LLAMA],
        when: |f| f.is(&["minicpm3"]),
        then: No,
        why: "fixes MiniCPM3's multipliers and head sizes at those of the published model",
        change: "write the target deepseek_v3",
    },
    Rule {
        engines: &[MLX],
        when: |f| f.is(&["minicpm3"]),
        then: No,
        why: "norms MiniCPM3's latents with an epsilon of 1e-5, transformers with 1e-6",
        change: "write the target deepseek_v3",
    },
    Rule {
        engines: &[TRANSFORMERS_4],
        when: |f| f.is(&["youtu", "minicpm3"]),
        then: No,
        why: "has no class for it before release 5",
        change: "use transformers 5, or write the target deepseek_v3",
    },
    Rule {
        engines: &[TRANSFORMERS_4],
        when: |f| deepseek(f),
        then: Conditionally,
        why: "caches expanded keys and values before release 5: the small cache is lost",
        change: "use transformers 5",
    },
    Rule {
        engines: &[MISTRAL],
        when: |f| f.is(&["youtu", "minicpm3"]),
        then: No,
        why: "has no class for it",
        change: "write the target deepseek_v3",
    },
    // Shapes and config keys.
    Rule {
        engines: ALL,
        when: |f| f.kv_heads != f.heads,
        then: No,
        why: "num_key_value_heads differs from num_attention_heads",
        change: "set num_key_value_heads to num_attention_heads: keys are expanded to every head",
    },
    Rule {
        engines: ALL,
        when: |f| f.geometry.qk_rope_head_dim == 0,
        then: No,
        why: "qk_rope_head_dim is 0: rotary tables of no width cannot be built",
        change: "keep at least one rotated pair",
    },
    Rule {
        engines: ALL,
        when: |f| f.null_experts,
        then: No,
        why: "n_routed_experts or n_shared_experts is missing or null: loaders want integers, of dense models too",
        change: "set integers, and first_k_dense_replace to the number of layers if the model is dense",
    },
    Rule {
        engines: HF,
        when: |f| f.is(&["deepseek_v2"]) && !f.hidden.is_multiple_of(f.heads.max(1)),
        then: No,
        why: "this class wants hidden_size to be a multiple of num_attention_heads",
        change: "write the target deepseek_v3",
    },
    Rule {
        engines: &[SGLANG],
        when: |f| deepseek(f) && !f.sglang_keys,
        then: No,
        why: "reads moe_layer_freq, scoring_func and topk_method of dense models too, and they are missing",
        change: "add \"moe_layer_freq\": 1, \"scoring_func\": \"softmax\", \"topk_method\": \"greedy\"",
    },
    Rule {
        engines: &[VLLM],
        when: |f| f.sparse_index,
        then: No,
        why: "takes a config with index_topk for sparse attention",
        change: "remove index_topk",
    },
    // Biases and norms.
    Rule {
        engines: HF,
        when: |f| !f.own_code && f.stray_biases,
        then: No,
        why: "biases of q_proj, q_b_proj or kv_b_proj are stored, which no stock class has: they are left out",
        change: "convert again with this tool, which carries them in q_a_proj, kv_a_proj_with_mqa and o_proj",
    },
    Rule {
        engines: HF,
        when: |f| !f.own_code && !f.biases_match,
        then: No,
        why: "attention_bias and the stored biases disagree: biases are left out, or zeros are made up",
        change: "set attention_bias to whether kv_a_proj_with_mqa, o_proj (and q_a_proj) have biases",
    },
    Rule {
        engines: &[VLLM],
        when: |f| f.bias || f.stray_biases || !f.biases_match,
        then: No,
        why: "skips attention biases without a word",
        change: "serve with --model-impl transformers, or convert with --profile portable where the source has no biases",
    },
    Rule {
        engines: &[SGLANG],
        when: |f| f.bias || f.stray_biases || !f.biases_match,
        then: No,
        why: "its MLA classes have no attention biases",
        change: "convert with --profile portable, where the source has no biases",
    },
    Rule {
        engines: &[LLAMA],
        when: |f| f.bias || f.stray_biases || !f.biases_match,
        then: No,
        why: "deepseek2 graphs have no attention biases",
        change: "convert with --profile portable, where the source has no biases",
    },
    Rule {
        engines: &[MLX],
        when: |f| f.stray_biases || !f.biases_match,
        then: No,
        why: "has no place for the stored biases",
        change: "convert again with this tool",
    },
    Rule {
        engines: ALL,
        when: |f| !f.own_code && f.head_norms,
        then: No,
        why: "norms of query and key heads are stored, which no stock MLA class has: they are left out",
        change: "convert again with this tool, which fits linear maps to them, or use --target hf-remote",
    },
    Rule {
        engines: ALL,
        when: |f| !f.own_code && !f.latent_norms,
        then: No,
        why: "the latent norm has no weights, and the stock class applies it all the same",
        change: "convert again with this tool, which makes the norm the identity",
    },
    Rule {
        engines: &[VLLM, SGLANG, LLAMA],
        when: |f| f.eps != 1e-6 && f.neutral_norms,
        then: No,
        why: "norms latents with rms_norm_eps, where transformers takes 1e-6: the neutralised norm is off by the root of the ratio",
        change: "rms_norm_eps has to be 1e-6: convert again with this tool, which scales the residual stream for it",
    },
    Rule {
        engines: &[VLLM, SGLANG, LLAMA],
        when: |f| f.eps != 1e-6 && !f.neutral_norms && !f.constant_latent,
        then: Conditionally,
        why: "norms latents with rms_norm_eps, where transformers takes 1e-6",
        change: "compare a few logits: small latents feel the difference",
    },
    Rule {
        engines: ALL,
        when: |f| f.rows == LatentRows::Lost,
        then: No,
        why: "rows of the latent are zero in the file: it was saved in a dtype that does not hold weights this small",
        change: "convert again, or save the conversion in bfloat16 or float32; nothing brings these rows back",
    },
    Rule {
        engines: ALL,
        when: |f| f.f16 && f.rows == LatentRows::Tiny,
        then: No,
        why: "in f16 the latent's rows, which are tiny where its norm is neutralised by their scale, become zero",
        change: "run it in bfloat16 or float32: set torch_dtype, or give the engine's dtype option",
    },
    // Rotation.
    Rule {
        engines: ALL,
        when: |f| f.rope == CandidateRope::Unknown,
        then: No,
        why: "the RoPE scheme has no name that is known",
        change: "use default, linear, llama3, yarn or longrope",
    },
    Rule {
        engines: &[VLLM],
        when: |f| deepseek(f) && scaled(f) && f.rope != CandidateRope::Yarn && !f.fitted,
        then: No,
        why: "treats every RoPE scaling as YaRN: wrong frequencies",
        change: "serve with --model-impl transformers, or convert with --profile portable",
    },
    Rule {
        engines: &[VLLM],
        when: |f| deepseek(f) && f.fitted,
        then: Conditionally,
        why: "runs llama3 RoPE as YaRN, with the betas that the config has fitted: slow pairs are off by up to a third",
        change: "compare outputs on long texts, or serve with --model-impl transformers",
    },
    Rule {
        engines: &[SGLANG],
        when: |f| deepseek(f) && scaled(f) && f.rope != CandidateRope::Yarn,
        then: No,
        why: "treats every RoPE scaling as YaRN: wrong frequencies",
        change: "write the target minicpm3, whose class takes any frequencies, or convert with --profile portable",
    },
    Rule {
        engines: &[LLAMA],
        when: |f| scaled(f) && f.rope != CandidateRope::Yarn,
        then: No,
        why: "deepseek2 takes no per-pair frequencies",
        change: "convert with --profile portable",
    },
    Rule {
        engines: &[VLLM],
        when: |f| deepseek(f) && !f.interleaved,
        then: No,
        why: "ignores rope_interleave: rotates other pairs",
        change: "permute rotated rows to neighbours and set rope_interleave to true",
    },
    Rule {
        engines: &[LLAMA],
        when: |f| !f.interleaved,
        then: No,
        why: "ignores rope_interleave: rotates other pairs",
        change: "permute rotated rows to neighbours and set rope_interleave to true",
    },
    Rule {
        engines: HF,
        when: |f| f.is(&["deepseek_v2"]) && !f.interleaved,
        then: No,
        why: "this class always rotates neighbours, whatever rope_interleave says",
        change: "permute rotated rows to neighbours, or use deepseek_v3",
    },
    Rule {
        engines: &[MLX],
        when: |f| f.interleaved && f.rope == CandidateRope::LongRope,
        then: No,
        why: "rotates LongRoPE pairs in half layout whatever rope_interleave says",
        change: "convert with --profile portable",
    },
    Rule {
        engines: &[MLX],
        when: |f| f.is(&["deepseek_v2"]) && f.no_scaling,
        then: No,
        why: "reads rope_scaling of DeepSeek-V2 as if it were always there, and it is null",
        change: "write the target deepseek_v3",
    },
    Rule {
        engines: &[MISTRAL],
        when: |f| scaled(f) && f.rope != CandidateRope::Yarn,
        then: No,
        why: "takes no RoPE scaling but YaRN",
        change: "convert with --profile portable",
    },
    Rule {
        engines: &[MISTRAL],
        when: |f| !f.interleaved,
        then: No,
        why: "ignores rope_interleave: rotates other pairs",
        change: "permute rotated rows to neighbours and set rope_interleave to true",
    },
    Rule {
        engines: &[MLX],
        when: |f| !f.top_level_theta && !f.own_code,
        then: No,
        why: "reads rope_theta and rope_scaling beside each other, not rope_parameters: it takes its default base",
        change: "write rope_theta and rope_scaling at the top level; transformers reads that too",
    },
    Rule {
        engines: &[MLX],
        // Of DeepSeek-V3 itself it leaves layer 61 out.
        when: |f| f.further_layers && f.layers != 61,
        then: No,
        why: "refuses weights of layers that predict further tokens",
        change: "remove the tensors of the layers after the last one",
    },
    // Head, activation, experts.
    Rule {
        engines: HF,
        when: |f| !f.tied && !f.head,
        then: No,
        why: "no lm_head.weight is stored and tie_word_embeddings is false: the head is made up",
        change: "write lm_head.weight, or set tie_word_embeddings to true if the head is the embedding",
    },
    Rule {
        engines: &[VLLM, MLX],
        when: |f| deepseek(f) && !f.head,
        then: No,
        why: "does not tie the head to the embedding, and no lm_head.weight is stored",
        change: "write lm_head.weight and set tie_word_embeddings to false",
    },
    Rule {
        engines: OTHERS,
        when: |f| f.activation != "silu" && !f.is(&["plm"]),
        then: No,
        why: "its MLA classes know SiLU only",
        change: "transformers takes any activation",
    },
    Rule {
        engines: HF,
        when: |f| f.is(&["deepseek_v3"]) && f.routing.as_ref().is_some_and(|r| r.scoring.as_deref() == Some("softmax")),
        then: No,
        why: "its DeepSeek-V3 class routes by sigmoid whatever scoring_func says",
        change: "write the target deepseek_v2 (weights as the softmax has them) or hf-remote (made to sum to one)",
    },
    Rule {
        engines: HF,
        when: |f| f.is(&["deepseek_v2"]) && f.routing.as_ref().is_some_and(|r| r.renormalised),
        then: No,
        why: "its DeepSeek-V2 class ignores norm_topk_prob: expert weights do not sum to one",
        change: "write the target hf-remote; vLLM and SGLang honour it",
    },
    Rule {
        engines: &[VLLM, LLAMA],
        when: |f| f.routing.is_some() && !f.shared_expert,
        then: No,
        why: "wants a shared expert in every layer of experts",
        change: "write one of zeros (this tool does)",
    },
    Rule {
        engines: &[MLX],
        when: |f| f.is(&["deepseek_v3"]) && f.routing.as_ref().is_some_and(|r| r.scoring.as_deref() == Some("softmax")),
        then: No,
        why: "routes DeepSeek-V3 by sigmoid whatever scoring_func says",
        change: "write the target deepseek_v2",
    },
    // Quantisation.
    Rule {
        engines: &[TRANSFORMERS, TRANSFORMERS_4],
        when: |f| f.quantised.as_deref() == Some("fp8") && uneven_blocks(f.cache_width()),
        then: No,
        why: "its FP8 weights want as many rows in every block: those of kv_a_proj_with_mqa do not divide by its rows of scales",
        change: "write bf16, or quantise with widths where kv_lora_rank + qk_rope_head_dim is a multiple of 128",
    },
    Rule {
        engines: &[VLLM, SGLANG],
        when: |f| {
            f.quantised.is_some()
                && !(f.geometry.q_lora_rank.is_none_or(|r| r.is_multiple_of(128)) && f.intermediate.is_multiple_of(128))
        },
        then: No,
        why: "merges FP8 layers whose widths are multiples of 128: q_lora_rank or intermediate_size is none",
        change: "write bf16",
    },
    // Kernels.
    Rule {
        engines: &[VLLM_TF, VLLM],
        when: |f| !f.own_code && !f.is(&["minicpm3"]) && !PREFILL.contains(&f.head_shape()),
        then: Conditionally,
        why: "CUDA prefill kernels take head shapes (nope, rope, v) of (128,64,128), (64,64,128), (192,64,256) only; other \
              shapes run with VLLM_MLA_DISABLE=1 and an expanded cache",
        change: "convert with --pad kernels",
    },
    Rule {
        engines: &[VLLM_TF, VLLM],
        when: |f| !f.own_code && !f.is(&["minicpm3"]) && !DECODE.contains(&f.cache_width()),
        then: Conditionally,
        why: "default decode kernels take caches of 320, 512 or 576 values, those of CPUs 576 only; others need \
              VLLM_ATTENTION_BACKEND=TRITON_MLA on a GPU, VLLM_MLA_DISABLE=1 (expanded cache) on a CPU",
        change: "convert with --pad kernels, or set that variable",
    },
    Rule {
        engines: &[SGLANG],
        when: |f| f.cache_width() != 576,
        then: Conditionally,
        why: "caches other than 512 + 64 need --attention-backend triton",
        change: "give that option, or convert with --pad kernels and a latent of more than 256 values",
    },
    Rule {
        engines: &[LLAMA, MLX],
        when: |f| f.geometry.qk_nope_head_dim == 0,
        then: No,
        why: "wants at least one value per head without rotation",
        change: "convert with --pad kernels",
    },
    Rule {
        engines: &[MISTRAL],
        when: |f| f.geometry.v_head_dim != f.geometry.qk_nope_head_dim + f.geometry.qk_rope_head_dim,
        then: No,
        why: "takes values as wide as queries on a CPU: v_head_dim is not qk_nope_head_dim + qk_rope_head_dim",
        change: "convert with --pad kernels, whose widths are 64 + 64 and 128",
    },
    Rule {
        engines: &[LLAMA],
        when: |f| f.geometry.q_lora_rank.is_some() && [26, 27].contains(&f.layers),
        then: No,
        why: "takes a model of 26 or 27 layers for DeepSeek-V2-Lite, which has no query latent",
        change: "convert without a query latent",
    },
    Rule {
        engines: &[LLAMA],
        when: |f| f.geometry.q_lora_rank.is_none() && !f.is(&["plm"]),
        then: Conditionally,
        why: "convert to GGUF from a copy of config.json with \"q_lora_rank\": 0",
        change: "change that copy; the folder itself stays as it is",
    },
    Rule {
        engines: &[LLAMA],
        when: |f| f.rows == LatentRows::Tiny,
        then: Conditionally,
        why: "F16 and quantised types lose rows of the latent, which are tiny where its norm is neutralised by their scale",
        change: "convert to GGUF with --outtype f32 or bf16, and quantise with --tensor-type attn_kv_a_mqa=f32 (and attn_q_a=f32)",
    },
    Rule {
        engines: &[LLAMA],
        when: |f| f.sentencepiece,
        then: No,
        why: "its converter knows only byte-level BPE tokenizers for this architecture",
        change: "write the GGUF with another tool",
    },
    Rule {
        engines: &[LLAMA],
        when: |f| ![320, 576].contains(&f.cache_width()) && !f.is(&["plm"]),
        then: Conditionally,
        why: "flash attention on CUDA is off for caches other than 256 + 64 and 512 + 64",
        change: "nothing has to be done; --pad kernels makes it faster",
    },
];
