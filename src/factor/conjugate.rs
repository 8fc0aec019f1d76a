//! Preconditioned conjugate gradients on a list of matrices.

use ndarray::{Array1, Array2, ArrayView2, s};

/// Result of [`conjugate_gradients`].
#[derive(Debug, Clone)]
pub struct Solution {
    /// The unknowns, shaped as the right-hand side.
    pub x: Vec<Array2<f64>>,
    /// How far `<x, A x> - 2 <x, b>` fell from its value 0 at `x = 0`: in a least-squares problem, the decrease of the sum of
    /// squares. Never negative.
    pub decrease: f64,
}

/// Rows of `m` that belong to each of `systems`.
fn blocks(m: &Array2<f64>, systems: usize) -> impl Iterator<Item = ArrayView2<'_, f64>> {
    let rows = m.nrows() / systems;
    (0..systems).map(move |i| m.slice(s![i * rows..(i + 1) * rows, ..]))
}

/// `<a, b>` of each system.
fn dot(a: &[Array2<f64>], b: &[Array2<f64>], systems: usize) -> Array1<f64> {
    let mut out = Array1::zeros(systems);
    for (a, b) in a.iter().zip(b) {
        for ((out, a), b) in out.iter_mut().zip(blocks(a, systems)).zip(blocks(b, systems)) {
            *out += a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        }
    }
    out
}

/// `a = scale a + factor b`, each system by its own `scale` and `factor`.
fn combine(a: &mut [Array2<f64>], scale: &Array1<f64>, factor: &Array1<f64>, b: &[Array2<f64>]) {
    let systems = scale.len();
    for (a, b) in a.iter_mut().zip(b) {
        let rows = a.nrows() / systems;
        for (i, b) in blocks(b, systems).enumerate() {
            let mut a = a.slice_mut(s![i * rows..(i + 1) * rows, ..]);
            a *= scale[i];
            a.scaled_add(factor[i], &b);
        }
    }
}

/// A linear system `A x = b` by the action of `A`.
pub trait System {
    /// Why the action cannot be computed.
    type Error;

    /// `A p`, with `A` symmetric positive semidefinite.
    ///
    /// # Errors
    /// Those of the system.
    fn apply(&mut self, p: &[Array2<f64>]) -> Result<Vec<Array2<f64>>, Self::Error>;

    /// `<p, A p>` of each independent system: all that the last step needs, which is often cheaper than [`System::apply`].
    ///
    /// # Errors
    /// Those of the system.
    fn form(&mut self, p: &[Array2<f64>]) -> Result<Array1<f64>, Self::Error>;

    /// Called when the solution has moved by `step` (one per system) along the `p` last applied or formed, so that an
    /// implementation that keeps values derived from the solution can update them.
    fn moved(&mut self, step: &Array1<f64>) {
        let _ = step;
    }

    /// `M r`, with `M ~ A^-1` symmetric positive definite.
    ///
    /// # Errors
    /// Those of the system.
    fn precondition(&mut self, r: &[Array2<f64>]) -> Result<Vec<Array2<f64>>, Self::Error>;
}

/// Solve `A x = b` from `x = 0` by at most `iterations` steps.
///
/// `A` is block-diagonal of `systems` independent systems, each owning an equal share of the rows of every matrix, in
/// order; each takes steps of its own length. Each step is the best in its direction, so that stopping early still
/// lowers the quadratic. A system stops where a direction has no curvature: rounding leaves such a direction once it is
/// solved.
///
/// # Errors
/// Those of the system.
///
/// # Panics
/// If `systems` is zero or does not divide the rows of every matrix.
pub fn conjugate_gradients<S: System>(
    b: Vec<Array2<f64>>,
    systems: usize,
    system: &mut S,
    iterations: usize,
) -> Result<Solution, S::Error> {
    assert!(b.iter().all(|m| m.nrows().is_multiple_of(systems)), "rows do not belong to {systems} systems");
    let mut x: Vec<Array2<f64>> = b.iter().map(|m| Array2::zeros(m.raw_dim())).collect();
    let ones = Array1::ones(systems);
    let mut decrease = 0.0;
    let mut residual = b;
    let mut direction = system.precondition(&residual)?;
    let mut energy = dot(&residual, &direction, systems);
    let first = energy.clone();
    // What is divided by must be a positive number; a system without it takes no step.
    let ratio = |a: &Array1<f64>, b: &Array1<f64>| {
        Array1::from_shape_fn(systems, |i| if a[i].is_finite() && b[i] > 0.0 { a[i] / b[i] } else { 0.0 })
    };
    for iteration in 0..iterations {
        for (e, f) in energy.iter_mut().zip(&first) {
            if !(e.is_finite() && *e > f * 1e-24) {
                *e = 0.0;
            }
        }
        if energy.iter().all(|e| *e == 0.0) {
            break;
        }
        let last = iteration + 1 == iterations;
        let image = if last { Vec::new() } else { system.apply(&direction)? };
        let form = if last { system.form(&direction)? } else { dot(&direction, &image, systems) };
        let step = ratio(&energy, &form);
        combine(&mut x, &ones, &step, &direction);
        system.moved(&step);
        decrease += step.dot(&energy);
        if last {
            break;
        }
        combine(&mut residual, &ones, &-&step, &image);
        let preconditioned = system.precondition(&residual)?;
        let next = dot(&residual, &preconditioned, systems);
        combine(&mut direction, &ratio(&next, &energy), &ones, &preconditioned);
        energy = next;
    }
    Ok(Solution { x, decrease })
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;
    use crate::factor::linalg::matmul;

    fn spd(n: usize, seed: f64) -> Array2<f64> {
        let a = Array2::from_shape_fn((2 * n, n), |(i, j)| ((i * 7 + j * 3 + i * j) as f64 * 0.37 + seed).sin());
        matmul(&a.t(), &a) + Array2::<f64>::eye(n)
    }

    fn right_hand_side() -> Vec<Array2<f64>> {
        vec![
            Array2::from_shape_fn((3, 4), |(i, j)| (i + 2 * j) as f64 - 3.0),
            Array2::from_shape_fn((2, 5), |(i, j)| (3 * i + j) as f64 - 2.0),
        ]
    }

    /// `A(X) = K X C` for each of several matrices; `K` is block-diagonal where `X` has as many times its rows.
    struct Products {
        k: Vec<Array2<f64>>,
        c: Vec<Array2<f64>>,
        systems: usize,
    }

    impl System for Products {
        type Error = Infallible;

        fn apply(&mut self, p: &[Array2<f64>]) -> Result<Vec<Array2<f64>>, Infallible> {
            Ok(p.iter().zip(&self.k).zip(&self.c).map(|((x, k), c)| matmul(&matmul(k, x), c)).collect())
        }

        fn form(&mut self, p: &[Array2<f64>]) -> Result<Array1<f64>, Infallible> {
            let image = self.apply(p)?;
            Ok(dot(p, &image, self.systems))
        }

        fn precondition(&mut self, r: &[Array2<f64>]) -> Result<Vec<Array2<f64>>, Infallible> {
            Ok(r.to_vec())
        }
    }

    fn two() -> Products {
        Products { k: vec![spd(3, 0.1), spd(2, 0.2)], c: vec![spd(4, 0.3), spd(5, 0.4)], systems: 1 }
    }

    #[test]
    fn a_system_is_solved_in_as_many_steps_as_it_has_unknowns() {
        let b = right_hand_side();
        let found = conjugate_gradients(b.clone(), 1, &mut two(), 40).unwrap();
        for (got, want) in two().apply(&found.x).unwrap().iter().zip(&b) {
            assert!((got - want).iter().all(|e| e.abs() < 1e-7), "{got} {want}");
        }
        // At the solution the quadratic is -<x, b>.
        assert!((found.decrease / dot(&found.x, &b, 1)[0] - 1.0).abs() < 1e-8);
    }

    #[test]
    fn every_step_lowers_the_quadratic_by_what_it_says() {
        let b = right_hand_side();
        let mut last = 0.0;
        for steps in 0..5 {
            let found = conjugate_gradients(b.clone(), 1, &mut two(), steps).unwrap();
            let value = two().form(&found.x).unwrap()[0] - 2.0 * dot(&found.x, &b, 1)[0];
            assert!((value + found.decrease).abs() < 1e-9 * (1.0 + value.abs()));
            assert!(steps == 0 || found.decrease > last);
            last = found.decrease;
        }
    }

    #[test]
    fn nothing_to_solve_gives_zeros() {
        let zero: Vec<Array2<f64>> = right_hand_side().iter().map(|b| Array2::zeros(b.raw_dim())).collect();
        let found = conjugate_gradients(zero.clone(), 1, &mut two(), 3).unwrap();
        assert_eq!((found.x, found.decrease), (zero, 0.0));
    }

    #[test]
    fn systems_are_solved_as_if_each_stood_alone() {
        let (k, c) = ([spd(3, 0.5), spd(3, 0.9) * 50.0], spd(4, 0.3));
        let parts: Vec<Array2<f64>> =
            (0..2).map(|i| Array2::from_shape_fn((3, 4), |(a, b)| (a * 3 + b + 5 * i) as f64 - 4.0)).collect();
        let alone: Vec<Solution> = (0..2)
            .map(|i| {
                let mut system = Products { k: vec![k[i].clone()], c: vec![c.clone()], systems: 1 };
                conjugate_gradients(vec![parts[i].clone()], 1, &mut system, 3).unwrap()
            })
            .collect();
        let stack = |a: &Array2<f64>, b: &Array2<f64>| ndarray::concatenate![ndarray::Axis(0), a.view(), b.view()];
        let mut blocks = Array2::zeros((6, 6));
        blocks.slice_mut(s![..3, ..3]).assign(&k[0]);
        blocks.slice_mut(s![3.., 3..]).assign(&k[1]);
        let mut system = Products { k: vec![blocks], c: vec![c], systems: 2 };
        let both = conjugate_gradients(vec![stack(&parts[0], &parts[1])], 2, &mut system, 3).unwrap();
        let want = stack(&alone[0].x[0], &alone[1].x[0]);
        assert!(
            (&both.x[0] - &want).iter().all(|e| e.abs() < 1e-10 * want.iter().fold(0.0, |m: f64, v| m.max(v.abs())))
        );
        assert!((both.decrease / (alone[0].decrease + alone[1].decrease) - 1.0).abs() < 1e-10);
    }
}
