//! What the caches of different layers have in common: alignment of their singular subspaces, and the energy that groups
//! of layers keep at a shared rank. The measurements of xKV (arXiv 2503.18893; docs/maths.md, section 13).
//!
//! Of each layer `l` and window of `T` tokens there is a matrix `X_l [T, w]`: keys before RoPE and values, or the latents
//! of an MLA model before their norm ([`crate::runtime::RawKv`]). A group of layers `l .. l + G` caches
//! `X = [X_l | ... | X_{l+G-1}]`, `[T, G w]`; xKV keeps the best `A [T, r] B [r, G w]` of it.
//!
//! Everything asked here is a function of the token Grams `X_l X_l^T`, `[T, T]`: their eigenvectors are the left singular
//! vectors, and `X X^T` is the sum of the Grams of the layers of a group, so its eigenvalues are the squared singular
//! values of all columns side by side. Layers stream by: held are one sum per group size, and of every layer the leading
//! `r` left singular vectors for the alignment.

mod spectrum;
mod subspace;

use ndarray::{Array2, s};
use rayon::prelude::*;
use serde::Serialize;

use crate::factor::FactorError;
use crate::factor::linalg::{eigh, eigvalsh, matmul};
use crate::observe::{Event, Observer};
use crate::runtime::{Backend, Model, RawKv, RuntimeError};

use spectrum::SpectrumSum;
pub use spectrum::{EnergyRank, GroupSpectrum, LEVELS, OneGroup};
pub use subspace::Alignment;
use subspace::Bases;

/// Errors of an analysis.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AnalyzeError {
    /// The model could not be run.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// A decomposition failed.
    #[error("layer {layer}: {error}")]
    Factor {
        /// The layer, or the last layer of the group.
        layer: usize,
        /// What happened.
        error: FactorError,
    },
    /// Layers that do not cache the same thing.
    #[error(
        "some layers cache a latent, others keys and values\n\nhint: give the source, or a conversion without `--mla-layers`"
    )]
    Hybrid,
    /// A group size that the model has no layers for.
    #[error("groups of {group} layers: the model has {layers}\n\nhint: give sizes from 1 to {layers} with `--groups`")]
    Group {
        /// Layers per group asked for.
        group: usize,
        /// Layers of the model.
        layers: usize,
    },
    /// A rank that no layer's matrix can have.
    #[error(
        "an alignment of rank {rank}: {tokens} tokens of width {width} have at most rank {}\n\nhint: lower `--align-rank`, or give longer windows with `--seq-len`",
        tokens.min(width)
    )]
    AlignRank {
        /// Rank asked for.
        rank: usize,
        /// Tokens of a window.
        tokens: usize,
        /// Width of a layer's matrix.
        width: usize,
    },
    /// Windows of different lengths, or none.
    #[error("the windows have {shortest} to {longest} tokens: all must have the same, and some")]
    Windows {
        /// Fewest tokens.
        shortest: usize,
        /// Most tokens.
        longest: usize,
    },
}

/// What to look at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AnalyzeSettings {
    /// Layers per group, each size by itself.
    pub groups: Vec<usize>,
    /// Leading singular vectors that are compared between layers; a quarter of the width if `None`.
    pub align_rank: Option<usize>,
}

/// Which matrix of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CacheMatrix {
    /// Keys before RoPE.
    Keys,
    /// Values.
    Values,
    /// Latents of MLA before their norm.
    Latents,
}

impl CacheMatrix {
    /// Lower case, plural.
    pub fn name(self) -> &'static str {
        match self {
            Self::Keys => "keys",
            Self::Values => "values",
            Self::Latents => "latents",
        }
    }
}

/// One matrix across all layers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MatrixAnalysis {
    /// Which.
    pub matrix: CacheMatrix,
    /// Columns per layer.
    pub width: usize,
    /// How alike the leading left subspaces of layers are.
    pub alignment: Alignment,
    /// Energy against rank, one entry per group size.
    pub groups: Vec<GroupSpectrum>,
}

/// What the caches of a model's layers have in common.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Analysis {
    /// Layers of the model.
    pub layers: usize,
    /// Tokens per window: the rows of every matrix.
    pub tokens: usize,
    /// Windows. Shares and overlaps are means over them.
    pub windows: usize,
    /// Keys and values, or latents.
    pub matrices: Vec<MatrixAnalysis>,
}

/// Sums over windows of one matrix while layers stream by.
struct Stream {
    matrix: CacheMatrix,
    width: usize,
    windows: usize,
    bases: Bases,
    spectra: Vec<SpectrumSum>,
    /// Token Grams of the open group, `[group size][window]`.
    open: Vec<Vec<Option<Array2<f64>>>>,
}

impl Stream {
    fn new(
        (matrix, width): (CacheMatrix, usize),
        settings: &AnalyzeSettings,
        (layers, tokens, windows): (usize, usize, usize),
    ) -> Result<Self, AnalyzeError> {
        let largest = tokens.min(width);
        let rank = settings.align_rank.unwrap_or((width / 4).clamp(1, largest));
        if rank == 0 || rank > largest {
            return Err(AnalyzeError::AlignRank { rank, tokens, width });
        }
        let spectra = settings.groups.iter().map(|&g| SpectrumSum::new(g, (tokens, width), (layers, windows)));
        Ok(Self {
            matrix,
            width,
            windows,
            bases: Bases::new(rank, tokens),
            spectra: spectra.collect(),
            open: vec![vec![None; windows]; settings.groups.len()],
        })
    }

    /// Take in layer `layer`, `x [windows T, w]`.
    fn add(&mut self, layer: usize, last: bool, x: &Array2<f32>) -> Result<(), AnalyzeError> {
        let failed = |error| AnalyzeError::Factor { layer, error };
        let (windows, name) = (self.windows, self.matrix.name());
        let tokens = x.nrows() / windows;
        let closes: Vec<bool> = self.spectra.iter().map(|s| last || (layer + 1).is_multiple_of(s.group)).collect();
        let mut open: Vec<Vec<Option<Array2<f64>>>> = vec![Vec::new(); windows];
        for sums in &mut self.open {
            for (window, sum) in sums.drain(..).enumerate() {
                open[window].push(sum);
            }
        }
        let rank = self.bases.rank;
        let one = |(window, mut sums): (usize, Vec<Option<Array2<f64>>>)| {
            let rows = x.slice(s![window * tokens..(window + 1) * tokens, ..]).mapv(f64::from);
            let gram = matmul(&rows, &rows.t());
            let (values, vectors) = eigh(&gram, name)?;
            let basis = vectors.slice(s![.., ..rank]).mapv(|v| v as f32);
            let mut closed = Vec::new();
            for (sum, &closes) in sums.iter_mut().zip(&closes) {
                let first = sum.is_none();
                let total = match sum.take() {
                    None => gram.clone(),
                    Some(open) => open + &gram,
                };
                if !closes {
                    *sum = Some(total);
                    closed.push(None);
                } else if first {
                    closed.push(Some(values.clone()));
                } else {
                    closed.push(Some(eigvalsh(&total, name)?));
                }
            }
            Ok((basis, sums, closed))
        };
        // Windows in order, whichever thread took them.
        let done: Vec<_> =
            open.into_par_iter().enumerate().map(one).collect::<Result<_, FactorError>>().map_err(failed)?;
        let mut bases = Vec::with_capacity(windows);
        for (basis, sums, closed) in done {
            bases.push(basis);
            for (to, sum) in self.open.iter_mut().zip(sums) {
                to.push(sum);
            }
            for (spectrum, values) in self.spectra.iter_mut().zip(closed) {
                if let Some(values) = values {
                    spectrum.add(layer, &values);
                }
            }
        }
        self.bases.add(bases);
        Ok(())
    }

    fn finish(self) -> MatrixAnalysis {
        MatrixAnalysis {
            matrix: self.matrix,
            width: self.width,
            alignment: self.bases.alignment(),
            groups: self.spectra.into_iter().map(SpectrumSum::finish).collect(),
        }
    }
}

/// Run `model` on windows of equal length and look at what its layers would cache.
///
/// Phase reported: `layers`, one step per layer. Memory beyond one layer of the model, for `T` tokens in `W` windows, two
/// matrices (one of MLA) and `S` group sizes: `16 S W T^2` bytes of Grams, `8 L W T r` of bases. Time is that of
/// eigendecompositions of `T x T`.
///
/// # Errors
/// [`AnalyzeError`].
pub fn analyze<B: Backend>(
    model: &Model<'_, B>,
    windows: &[Vec<u32>],
    settings: &AnalyzeSettings,
    observer: &dyn Observer,
) -> Result<Analysis, AnalyzeError> {
    let layers = model.architecture().layers;
    if model.architecture().hybrid.is_some() {
        return Err(AnalyzeError::Hybrid);
    }
    let (mut hidden, lengths) = model.start(windows)?;
    let tokens = lengths[0];
    if lengths.iter().any(|&n| n != tokens) {
        let (shortest, longest) = (lengths.iter().min(), lengths.iter().max());
        return Err(AnalyzeError::Windows {
            shortest: shortest.copied().unwrap_or(0),
            longest: longest.copied().unwrap_or(0),
        });
    }
    if let Some(&group) = settings.groups.iter().find(|g| !(1..=layers).contains(*g)) {
        return Err(AnalyzeError::Group { group, layers });
    }
    observer.event(Event::Phase { name: "layers", steps: Some(layers as u64) });
    let mut streams: Vec<Stream> = Vec::new();
    for index in 0..layers {
        let layer = model.layer(index)?;
        let input = layer.attention_input(hidden.view())?;
        for (n, (matrix, x)) in matrices(layer.raw_kv(input.view())?).into_iter().enumerate() {
            if index == 0 {
                streams.push(Stream::new((matrix, x.ncols()), settings, (layers, tokens, windows.len()))?);
            }
            if let Some(stream) = streams.get_mut(n) {
                stream.add(index, index + 1 == layers, &x)?;
            }
        }
        layer.forward(&mut hidden, &lengths)?;
        model.check_layer(index, hidden.view())?;
        observer.event(Event::Step { done: index as u64 + 1, tokens: hidden.nrows() as u64 });
    }
    let matrices = streams.into_iter().map(Stream::finish).collect();
    Ok(Analysis { layers, tokens, windows: windows.len(), matrices })
}

fn matrices(raw: RawKv) -> Vec<(CacheMatrix, Array2<f32>)> {
    match raw.values {
        Some(values) => vec![(CacheMatrix::Keys, raw.keys), (CacheMatrix::Values, values)],
        None => vec![(CacheMatrix::Latents, raw.keys)],
    }
}
