//! Norms of queries and keys (Qwen3, OLMo 2) as the linear maps nearest to them, for classes that have no place for norms
//! (docs/maths.md, section 4.4).
//!
//! A norm before RoPE is no linear function of the layer's input, but per token it only divides by a root mean square that
//! varies little: `W* = E[q~ x^T] E[x x^T]^-1` for the normed queries `q~`, and the same for keys.

use ndarray::{Array2, ArrayView2, Axis, s};

use crate::arch::{AttentionSource, QkNormScope};
use crate::calibrate::{PooledMoments, project};
use crate::error::MethodError;
use crate::factor::refit::refit;

/// Ridge of the fit, as a share of the inputs' mean energy.
const RIDGE: f64 = 1e-5;
/// Gains of the norms of one layer.
pub struct HeadNorms {
    pub scope: QkNormScope,
    /// `[d]` or `[H d]`.
    pub q: Vec<f32>,
    /// `[d]` or `[g d]`.
    pub k: Vec<f32>,
    pub eps: f64,
}

/// What the linear maps explain: `R^2` of each query head and each key head, about zero.
pub struct Explained {
    /// Of each query head, `[H]`.
    pub queries: Vec<f64>,
    /// Of each key head, `[g]`.
    pub keys: Vec<f64>,
}

impl Explained {
    /// Mean over the heads, the worse of queries and keys.
    pub fn worst_mean(&self) -> f64 {
        let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len().max(1) as f64;
        mean(&self.queries).min(mean(&self.keys))
    }

    /// One line for the layer's report.
    pub fn note(&self) -> String {
        let list = |v: &[f64]| v.iter().map(|r| format!("{r:.3}")).collect::<Vec<_>>().join(" ");
        format!("norms as linear maps, R2 per head: queries {}; keys {}", list(&self.queries), list(&self.keys))
    }
}

impl HeadNorms {
    /// Norm `y` `[T, heads d]` in place.
    fn apply(&self, y: &mut Array2<f32>, gain: &[f32], d: usize) {
        let width = match self.scope {
            QkNormScope::Head => d,
            QkNormScope::All => y.ncols(),
        };
        for mut row in y.rows_mut() {
            for mut block in row.axis_chunks_iter_mut(Axis(0), width) {
                let square = block.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / width as f64;
                let factor = 1.0 / (square + self.eps).sqrt();
                block.iter_mut().zip(gain).for_each(|(v, g)| *v = (f64::from(*v) * factor * f64::from(*g)) as f32);
            }
        }
    }

    /// Replace the projections of queries and keys by the linear maps nearest to projection and norm on inputs `x`
    /// `[T, D]`.
    pub fn linearise(&self, attention: &mut AttentionSource, x: ArrayView2<'_, f32>) -> Result<Explained, MethodError> {
        let d = attention.head_dim;
        let fit = |w: &mut Array2<f64>, b: &mut Option<ndarray::Array1<f64>>, gain: &[f32]| {
            let mut y = project(x, w, b.as_ref());
            self.apply(&mut y, gain, d);
            let mut moments = PooledMoments::new(x.ncols(), y.ncols());
            moments.add(x, y.view());
            let found = refit(&moments.gram(), &moments.cross(), None, RIDGE, b.is_some(), "normed heads")?;
            *w = found.weight;
            if b.is_some() {
                *b = Some(found.offset);
            }
            let error = &project(x, w, b.as_ref()) - &y;
            let energy = |m: &Array2<f32>, h: usize| {
                m.slice(s![.., h * d..(h + 1) * d]).iter().map(|v| f64::from(*v).powi(2)).sum::<f64>()
            };
            let r2 = |h: usize| 1.0 - energy(&error, h) / energy(&y, h).max(f64::MIN_POSITIVE);
            Ok::<_, crate::factor::FactorError>((0..y.ncols() / d).map(r2).collect::<Vec<f64>>())
        };
        let queries = fit(&mut attention.wq, &mut attention.bq, &self.q)?;
        let keys = fit(&mut attention.wk, &mut attention.bk, &self.k)?;
        Ok(Explained { queries, keys })
    }
}
