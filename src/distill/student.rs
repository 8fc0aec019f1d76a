//! A student's folder as tensors to train, and back.

use std::borrow::Cow;
use std::collections::BTreeSet;

use half::{bf16, f16};
use ndarray::{Array1, Array2, ArrayView2, Axis};

use super::head::StudentHead;
use super::layer::LayerShape;
use super::network::{Frozen, Network};
use super::tensors::{ByHead, Role, Tensors};
use super::{Train, refused};
use crate::arch::{Architecture, MlaShape, Part, StoredPart, check_tensors};
use crate::error::ConvertError;
use crate::factor::norm::CONSTANT_RATIO;
use crate::gradient::Heads;
use crate::latent::{LatentWeights, need_mla};
use crate::runtime::{LayerTensors, Rotation, RuntimeError};
use crate::source::{Dtype, ModelSource};

/// A constant coordinate of a latent is one whose square is this many times what the others have on average.
const OUTWEIGHS: f64 = CONSTANT_RATIO;

/// Bytes of weights that are not trained, above which they are read again for every pass.
const HELD: usize = 4 << 30;

/// An MLA folder that can be trained.
pub(super) struct Student<'a> {
    pub source: &'a ModelSource,
    pub arch: &'a Architecture,
    pub shape: &'a MlaShape,
}

/// What a norm of latents is in one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LatentNorm {
    /// There is none.
    Absent,
    /// It has been made to do nothing; with a coordinate that is a constant, in one of the forms.
    Neutral(Option<usize>),
    /// It acts.
    Real,
}

/// Tensors of one layer to train, and which of their rows stay as they are.
pub(super) struct Chosen {
    pub tensors: Tensors<f32>,
    /// Rows of [`Role::Latent`] that stay.
    pub fixed_latent_row: Option<usize>,
}

impl<'a> Student<'a> {
    /// Check that the folder can be trained.
    ///
    /// # Errors
    /// [`ConvertError::Refused`] for GQA, hybrids, experts, FP8 and norms of heads.
    pub fn new(source: &'a ModelSource, arch: &'a Architecture) -> Result<Self, ConvertError> {
        let shape = need_mla(source, arch)?;
        check_tensors(arch, &source.tensors)?;
        let spec = &source.spec;
        if let Some((name, _)) = source.tensors.iter().find(|(_, t)| t.dtype == Dtype::F8_E4M3) {
            return Err(refused(
                format!("`{spec}` holds FP8 weights (`{name}`), which steps of training are too small for"),
                "distil the bf16 conversion, and quantise what comes out",
            ));
        }
        if (0..arch.layers).any(|layer| arch.is_sparse(layer)) {
            return Err(refused(
                format!("`{spec}` has experts, whose gradients are not implemented"),
                "distil a model with plain MLPs, or use `gqa2mla convert --refine`, which trains layer by layer",
            ));
        }
        if arch.qk_norm.is_some() {
            return Err(refused(
                format!("`{spec}` norms the heads of its queries and keys, whose gradients are not implemented"),
                "convert with `--head-norms linear`, which replaces the norms",
            ));
        }
        Ok(Self { source, arch, shape })
    }

    /// Every weight of layer `index`; after the last layer, the final norm's gain.
    ///
    /// # Errors
    /// Weights that cannot be read.
    pub fn stored(&self, index: usize) -> Result<Tensors<f32>, RuntimeError> {
        let (source, arch) = (self.source, self.arch);
        if index < arch.layers {
            return Tensors::of(LayerTensors::load(source, arch, index)?, arch.heads, self.shape);
        }
        let mut out = Tensors::none();
        let gain = StoredPart::find(&source.tensors, &Part::whole(&arch.names.final_norm))?.to_f64();
        let gain = gain.into_iter().map(|g| (g + arch.norm_offset) as f32).collect();
        out[Role::FinalGain] = Array2::from_shape_vec((1, arch.hidden), gain).map_err(|_| RuntimeError::Shape {
            role: "final_norm",
            expected: vec![arch.hidden],
            found: Vec::new(),
        })?;
        Ok(out)
    }

    /// What `train` says of layer `index`.
    ///
    /// # Errors
    /// As [`Student::stored`].
    pub fn chosen(&self, index: usize, train: Train) -> Result<Chosen, RuntimeError> {
        let stored = self.stored(index)?;
        let (queries, keys) = (self.query_norm(&stored), self.latent_norm(&stored));
        let keep = |role: Role| {
            use Role::*;
            match role {
                // In front of a norm that does nothing is what carries a bias, or a copy of the input.
                QueryDown | QueryDownBias => !matches!(queries, LatentNorm::Neutral(_)),
                QueryGain => train.norms() && queries == LatentNorm::Real,
                LatentGain => train.norms() && keys == LatentNorm::Real,
                // Without a norm that acts, a constant in the latent is one in the output.
                LatentBias => keys == LatentNorm::Real,
                role if role.is_gain() => train.norms(),
                role if role.is_mlp() => train.mlps(),
                _ => true,
            }
        };
        let fixed_latent_row = match keys {
            LatentNorm::Neutral(slot) => slot,
            _ => None,
        };
        Ok(Chosen { tensors: stored.only(keep), fixed_latent_row })
    }

    fn latent_norm(&self, of: &Tensors<f32>) -> LatentNorm {
        self.norm_of(of, [Role::Latent, Role::LatentBias, Role::LatentGain])
    }

    fn query_norm(&self, of: &Tensors<f32>) -> LatentNorm {
        self.norm_of(of, [Role::QueryDown, Role::QueryDownBias, Role::QueryGain])
    }

    fn norm_of(&self, of: &Tensors<f32>, [down, bias, gain]: [Role; 3]) -> LatentNorm {
        let input = of[Role::InputGain].as_slice().unwrap_or_default();
        let vector = |role: Role| {
            let wide = |row: ndarray::ArrayView1<'_, f32>| row.mapv(f64::from);
            of.has(role).then(|| wide(of[role].row(0)))
        };
        let weights = LatentWeights {
            kv_a: of[down].mapv(f64::from),
            bias: vector(bias),
            gain: vector(gain),
            // Only its width is read.
            kv_b: Array2::zeros((0, of[down].nrows())),
        };
        if weights.gain.is_none() {
            return LatentNorm::Absent;
        }
        if let Some(slot) = weights.bias.as_ref().and_then(|bias| constant(&weights.kv_a, bias, input)) {
            return LatentNorm::Neutral(Some(slot));
        }
        match weights.is_neutral(input, self.shape.latent_eps) {
            true => LatentNorm::Neutral(None),
            false => LatentNorm::Real,
        }
    }

    /// The student on windows of up to `longest` tokens.
    ///
    /// # Errors
    /// Weights that cannot be read.
    pub fn network<'n>(&self, longest: usize, frozen: &'n dyn Frozen<f32>) -> Result<Network<'n, f32>, RuntimeError> {
        let arch = self.arch;
        let name = if arch.tied_head { &arch.names.embed } else { &arch.names.head };
        let stored = StoredPart::find(&self.source.tensors, &Part::whole(name))?.to_f32();
        let weight = Array2::from_shape_vec((arch.vocab, arch.hidden), stored).map_err(|_| RuntimeError::Shape {
            role: "head",
            expected: vec![arch.vocab, arch.hidden],
            found: Vec::new(),
        })?;
        let heads = |layer: usize| Heads {
            heads: arch.heads,
            scale: self.shape.score_scale,
            window: arch.windows.get(layer).copied().flatten(),
            cap: arch.score_softcap,
        };
        let layer = |layer: usize| LayerShape {
            heads: heads(layer),
            norm_eps: arch.norm_eps,
            latent_eps: self.shape.latent_eps,
            activation: arch.activation,
        };
        Ok(Network {
            layers: (0..arch.layers).map(layer).collect(),
            rotation: Rotation::new(&arch.rope, 0..longest),
            head: StudentHead {
                weight,
                factor: arch.multipliers.logits,
                cap: arch.logit_softcap,
                norm_eps: arch.norm_eps,
            },
            frozen,
        })
    }

    /// The tensors of layer `index` that the folder stores and `trained` has a part of: name, and values as they are stored.
    ///
    /// # Errors
    /// As [`Student::stored`].
    pub fn written(&self, index: usize, trained: &Tensors<f32>) -> Result<Vec<(String, Vec<f64>)>, RuntimeError> {
        let stored = self.stored(index)?;
        let arch = self.arch;
        let whole = |role: Role| if trained.has(role) { &trained[role] } else { &stored[role] };
        let mut out = Vec::new();
        for name in self.names(index) {
            if !name.roles.iter().any(|role| trained.has(*role)) {
                continue;
            }
            let values: Array2<f32> = match name.roles {
                [one] => whole(*one).clone(),
                [first, second] => match name.join {
                    Join::Below => {
                        let parts = [whole(*first).view(), whole(*second).view()];
                        ndarray::concatenate(Axis(usize::from(name.is_vector)), &parts).unwrap_or_default()
                    }
                    Join::ByHead(heads) if name.is_vector => {
                        heads.join(&column(whole(*first)), &column(whole(*second)))
                    }
                    Join::ByHead(heads) => heads.join(whole(*first), whole(*second)),
                },
                _ => continue,
            };
            let values = values.iter().map(|v| name.scaling(arch).stored(f64::from(*v))).collect();
            out.push((name.name, values));
        }
        Ok(out)
    }

    /// Names of the tensors of layer `index` that can be trained.
    pub fn trained_names(&self, index: usize, trained: &Tensors<f32>) -> BTreeSet<String> {
        let has = |name: &StoredName| name.roles.iter().any(|role| trained.has(*role));
        self.names(index).into_iter().filter(has).map(|name| name.name).collect()
    }

    /// `trained` as the folder would hold it: rounded to the dtype that each tensor is stored in.
    pub fn round(&self, index: usize, trained: &mut Tensors<f32>) {
        for name in self.names(index) {
            let dtype = self.source.tensors.get(&name.name).map(|t| t.dtype);
            let scaling = name.scaling(self.arch);
            for role in name.roles {
                let round = |v: &mut f32| *v = scaling.rounded(*v, dtype);
                trained[*role].iter_mut().for_each(round);
            }
        }
    }

    /// What the folder calls the tensors of layer `index`, and what is in each of them.
    fn names(&self, index: usize) -> Vec<StoredName> {
        use Role::*;
        let (arch, shape) = (self.arch, self.shape);
        let one = |name: String, roles: &'static [Role], is_vector: bool| StoredName {
            name,
            roles,
            join: Join::Below,
            is_vector,
        };
        if index >= arch.layers {
            return vec![one(arch.names.final_norm.clone(), &[FinalGain], true)];
        }
        let by_head = |name: String, roles: &'static [Role], heads: ByHead, is_vector: bool| StoredName {
            name,
            roles,
            join: Join::ByHead(heads),
            is_vector,
        };
        let names = arch.names.layer(index);
        let (weight, bias) = (|role: &str| arch.weight(index, role).name, |role: &str| arch.bias(index, role).name);
        let queries = ByHead::queries(arch.heads, shape);
        let query = if shape.q_lora_rank.is_some() { "q_b" } else { "q" };
        let mut out = vec![
            by_head(weight(query), &[QueryNope, QueryRope], queries, false),
            by_head(bias(query), &[QueryNopeBias, QueryRopeBias], queries, true),
            one(weight("kv_a"), &[Latent, KeyRope], false),
            one(bias("kv_a"), &[LatentBias, KeyRopeBias], true),
            by_head(weight("kv_b"), &[KeyUp, ValueUp], ByHead::keys_and_values(arch.heads, shape), false),
            one(weight("o"), &[Output], false),
            one(bias("o"), &[OutputBias], true),
            one(weight("up"), &[Up], false),
            one(bias("up"), &[UpBias], true),
            one(weight("down"), &[Down], false),
            one(bias("down"), &[DownBias], true),
        ];
        if shape.q_lora_rank.is_some() {
            out.push(one(weight("q_a"), &[QueryDown], false));
            out.push(one(bias("q_a"), &[QueryDownBias], true));
        }
        if arch.mlp == crate::arch::MlpKind::Gated {
            out.push(one(weight("gate"), &[Gate], false));
            out.push(one(bias("gate"), &[GateBias], true));
        }
        let gains: [(&str, &'static [Role]); 6] = [
            ("q_a_norm", &[QueryGain]),
            ("kv_a_norm", &[LatentGain]),
            ("input_norm", &[InputGain]),
            ("attention_out_norm", &[AttentionOutGain]),
            ("post_norm", &[PostGain]),
            ("mlp_out_norm", &[MlpOutGain]),
        ];
        out.extend(
            gains.into_iter().filter(|(role, _)| names.has(role)).map(|(r, roles)| one(names.role(r), roles, true)),
        );
        out
    }
}

/// Weights that are not trained: in memory, or in their files until a layer's turn comes.
pub(super) struct StoredLayers<'a> {
    student: &'a Student<'a>,
    held: Option<Vec<Tensors<f32>>>,
}

impl<'a> StoredLayers<'a> {
    /// Of `student`; those are held that fit into [`HELD`] bytes, without the ones that are in `trained`.
    ///
    /// # Errors
    /// Weights that cannot be read.
    pub fn new(student: &'a Student<'a>, trained: &[Tensors<f32>]) -> Result<Self, RuntimeError> {
        let (mut held, mut bytes) = (Vec::with_capacity(trained.len()), 0);
        for (index, trained) in trained.iter().enumerate() {
            let frozen = student.stored(index)?.only(|role| !trained.has(role));
            bytes += frozen.parts().map(size_of_val).sum::<usize>();
            if bytes > HELD {
                return Ok(Self { student, held: None });
            }
            held.push(frozen);
        }
        Ok(Self { student, held: Some(held) })
    }
}

impl Frozen<f32> for StoredLayers<'_> {
    fn layer(&self, index: usize) -> Result<Cow<'_, Tensors<f32>>, RuntimeError> {
        match &self.held {
            Some(held) => Ok(Cow::Borrowed(&held[index])),
            None => self.student.stored(index).map(Cow::Owned),
        }
    }
}

/// A tensor of the folder.
struct StoredName {
    name: String,
    /// What is in it.
    roles: &'static [Role],
    /// How, where there are two.
    join: Join,
    is_vector: bool,
}

#[derive(Clone, Copy)]
enum Join {
    Below,
    ByHead(ByHead),
}

/// What lies between a value as it is stored and as the network has it: `network = stored * factor + offset`.
#[derive(Clone, Copy)]
struct Scaling {
    factor: f64,
    offset: f64,
}

impl StoredName {
    fn scaling(&self, arch: &Architecture) -> Scaling {
        let role = self.roles.first();
        let added = matches!(role, Some(Role::Output | Role::OutputBias | Role::Down | Role::DownBias));
        let factor = if added { f64::from(arch.multipliers.residual as f32) } else { 1.0 };
        let gain = role.is_some_and(|role| role.is_gain());
        Scaling { factor, offset: if gain { arch.norm_offset } else { 0.0 } }
    }
}

impl Scaling {
    fn stored(self, value: f64) -> f64 {
        (value - self.offset) / self.factor
    }

    fn rounded(self, value: f32, dtype: Option<Dtype>) -> f32 {
        let stored = self.stored(f64::from(value));
        let stored = match dtype {
            Some(Dtype::BF16) => bf16::from_f64(stored).to_f64(),
            Some(Dtype::F16) => f16::from_f64(stored).to_f64(),
            _ => f64::from(stored as f32),
        };
        (stored * self.factor + self.offset) as f32
    }
}

fn column(row: &Array2<f32>) -> Array2<f32> {
    row.t().as_standard_layout().into_owned()
}

/// The coordinate of a latent that is a constant and outweighs what the others have of inputs behind a norm with gain `input`.
fn constant(down: &Array2<f64>, bias: &Array1<f64>, input: &[f32]) -> Option<usize> {
    let slot = (0..bias.len()).max_by(|a, b| bias[*a].abs().total_cmp(&bias[*b].abs()))?;
    if bias[slot] == 0.0 || down.row(slot).iter().any(|v| *v != 0.0) || input.len() != down.ncols() {
        return None;
    }
    let square = |row: ArrayView2<'_, f64>| {
        row.iter().zip(input.iter().cycle()).map(|(w, g)| (w * f64::from(*g)).powi(2)).sum::<f64>()
    };
    let others = square(down.view()) + bias.iter().map(|b| b * b).sum::<f64>() - bias[slot].powi(2);
    (bias[slot].powi(2) >= OUTWEIGHS * others).then_some(slot)
}
