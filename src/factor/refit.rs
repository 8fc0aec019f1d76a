//! Linear refits: least squares of a target on features of the converted layer (`docs/maths.md`, "Refits").

use ndarray::{Array1, Array2, Axis, s};

use super::FactorError;
use super::linalg::{matmul, solve_right_spd};

/// A fitted linear map with offset, `y ~ weight f + offset`, and the ridge it took.
#[derive(Debug, Clone)]
pub struct Refit {
    /// `[Y, F]`.
    pub weight: Array2<f64>,
    /// `[Y]`; zero where no bias was allowed.
    pub offset: Array1<f64>,
    /// Ridge that was used, as a share of the mean diagonal: larger than asked for where the moment matrix was singular.
    pub ridge: f64,
}

/// Least squares of `y` on `f` from `gram = E[[f; 1] [f; 1]^T]` `[F + 1, F + 1]` and `cross = E[y [f; 1]^T]` `[Y, F + 1]`,
/// with a ridge towards `prior` `[Y, F]` (zero where `None`):
///
/// ```text
/// min E |y - W f - b|^2 + ridge mean(diag G) |W - prior|^2
/// ```
///
/// With `bias` the offset is free and not regularised (moments are centred first); without, it is zero.
///
/// # Errors
/// [`FactorError::NotFinite`] or [`FactorError::Singular`].
pub fn refit(
    gram: &Array2<f64>,
    cross: &Array2<f64>,
    prior: Option<&Array2<f64>>,
    ridge: f64,
    bias: bool,
    what: &'static str,
) -> Result<Refit, FactorError> {
    let n = gram.nrows() - 1;
    let mut g = gram.slice(s![..n, ..n]).to_owned();
    let mut c = cross.slice(s![.., ..n]).to_owned();
    let (mean_f, mean_y) = (gram.slice(s![..n, n]).to_owned(), cross.column(n).to_owned());
    // Where the features hardly vary, centring leaves rounding noise: keep the diagonal above it.
    let noise = 1e-12 * g.diag().mean().unwrap_or(0.0);
    if bias {
        let f = mean_f.view().insert_axis(Axis(1));
        g = g - matmul(&f, &f.t());
        c = c - matmul(&mean_y.view().insert_axis(Axis(1)), &f.t());
    }
    g.diag_mut().mapv_inplace(|x| x + noise);
    let residual = match prior {
        Some(p) => &c - &matmul(p, &g),
        None => c,
    };
    // With W = prior + X the problem is X (G + lam I) = C - prior G.
    let (mut weight, ridge) = solve_right_spd(&g, &residual, ridge, what)?;
    if let Some(p) = prior {
        weight += p;
    }
    let offset = if bias { mean_y - weight.dot(&mean_f) } else { Array1::zeros(weight.nrows()) };
    Ok(Refit { weight, offset, ridge })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_linear_target_is_recovered_with_its_offset() {
        let f = Array2::from_shape_fn((120, 5), |(i, j)| ((i * i * 3 + i * j * j * 7 + j) as f64 * 0.37).sin());
        let w = Array2::from_shape_fn((3, 5), |(i, j)| i as f64 - 0.4 * j as f64);
        let b = Array1::from_vec(vec![0.5, -2.0, 1.0]);
        let y = matmul(&f, &w.t()) + &b;
        let ones = Array2::ones((120, 1));
        let f1 = ndarray::concatenate![Axis(1), f, ones];
        let (gram, cross) = (matmul(&f1.t(), &f1) / 120.0, matmul(&y.t(), &f1) / 120.0);
        let fit = refit(&gram, &cross, None, 0.0, true, "t").unwrap();
        assert!((&fit.weight - &w).iter().chain((&fit.offset - &b).iter()).all(|x| x.abs() < 1e-10));
        // A heavy ridge leaves the prior where it is.
        let prior = Array2::from_elem((3, 5), 0.25);
        let held = refit(&gram, &cross, Some(&prior), 1e9, true, "t").unwrap();
        assert!((&held.weight - &prior).iter().all(|x| x.abs() < 1e-6));
    }
}
