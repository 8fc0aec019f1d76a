//! The forward pass of a layer on the host and that of the reference runtime: one is what errors are measured with before a
//! layer is written, the other runs what was written. (Gradient steps and score refits are held to the first in their rooms.)

use gqa2mla::arch::load_attention_source;
use gqa2mla::convert::{ConvertSettings, OutputDtype};
use gqa2mla::methods::partial_rope::{PartialRope, Slot};
use gqa2mla::methods::x_ecomla::{self, Ranks, XEcomla};
use gqa2mla::mla::{LatentAttention, output_projection};
use gqa2mla::runtime::{Cpu, Model};
use gqa2mla::target::TargetChoice;
use ndarray::Array2;

use super::settings;
use crate::common::judge::converted;
use crate::common::models::{fixture, open};

#[test]
fn the_written_layer_does_what_the_layer_on_the_host_does() {
    let (rope, rank, q_rank) = (8, 40, 32);
    let (source, arch) = open(&fixture("pico-trained"));
    let shape = *arch.gqa().expect("a GQA model");
    // Weights alone make this layer, so that it can be made again here.
    let pairs = PartialRope::Uniform.choose(shape.rotary_dim / 2, rope / 2, &[]);
    let slots: Vec<Slot> = pairs.into_iter().map(|pair| Slot { pair, head: None }).collect();
    let windows = [19, 12];
    let x = Array2::from_shape_fn((31, arch.hidden), |(t, i)| ((t * 131 + i * 17) as f32 * 0.37).sin());
    for target in ["deepseek_v3", "youtu", "minicpm3", "hf-remote"] {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let to = dir.path().join("out");
        let s = ConvertSettings {
            kv_lora_rank: Some(rank),
            qk_rope_head_dim: Some(rope),
            q_lora_rank: Some(q_rank),
            dtype: Some(OutputDtype::F32),
            target: TargetChoice::named(target).expect("a class"),
            ..settings(XEcomla::default())
        };
        converted(&fixture("pico-trained"), &to, &s).expect("converts");
        let (made, made_arch) = open(&to);
        // Classes that scale the residual stream scale what attention adds to it.
        let scale = if made_arch.norm_eps == arch.norm_eps { 1.0 } else { (arch.norm_eps / made_arch.norm_eps).sqrt() };
        let model = Model::new(&made, &made_arch, &Cpu);
        // Classes that norm the latent take one of its values for a constant.
        let kv = if target == "hf-remote" { rank } else { rank - 1 };
        let ranks = Ranks { kv, kv_width: kv, q: q_rank, q_width: q_rank };
        for index in [0, arch.layers - 1] {
            let attention = load_attention_source(&source, &arch, index).expect("reads");
            let layer = x_ecomla::convert(&attention, &slots, &ranks, shape.head_dim - rope).expect("converts").layer;
            let heads = LatentAttention::new(&layer, x.view(), &windows).outputs();
            let expected = output_projection(&layer, &heads);
            let runtime = model.layer(index).expect("loads");
            let found = runtime.attention_output(x.view(), &windows).expect("runs") * scale as f32;
            let size = expected.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
            let worst = (&found - &expected).iter().fold(0.0_f32, |m, v| m.max(v.abs()));
            // Products of some hundred terms in f32; a neutralised norm is off by 2^-15 for a latent as long as can be.
            assert!(worst < 3e-5 * size, "{target}, layer {index}: off by {worst} of {size}");
        }
    }
}
