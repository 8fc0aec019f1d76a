//! Orthogonal matrices that spread a vector evenly over its coordinates.
//!
//! A Hadamard matrix of order `n` has entries `+-1` and orthogonal rows; divided by `sqrt(n)` it is orthogonal, and every
//! coordinate of `x H / sqrt(n)` mixes all of `x` with equal weight. Orders come from Sylvester's doubling, from Paley's two
//! constructions (R. E. A. C. Paley, "On orthogonal matrices", 1933) over a prime `q`,
//!
//! ```text
//! I   q = 3 mod 4   order q + 1     H = I + S,   S = [ 0 1; -1 Q ]
//! II  q = 1 mod 4   order 2(q + 1)  H = C (x) [1 1; 1 -1] + I (x) [1 -1; -1 -1],   C = [ 0 1; 1 Q ]
//! ```
//!
//! with `Q[i, j]` the Legendre symbol of `i - j` modulo `q`, and from Kronecker products of these. Where none of them gives
//! the order, the odd part gets the discrete Hartley matrix `(cos + sin)(2 pi j k / b) / sqrt(b)`, which is orthogonal with
//! entries of at most `sqrt(2 / b)`: nearly as even as a Hadamard matrix, and there for every order.

use ndarray::{Array2, ArrayViewMut2, Axis};

/// Largest order of a factor that is multiplied as a dense matrix.
const DENSE: usize = 4096;

/// An orthogonal matrix `U` `[n, n]` as a Kronecker product, applied factor by factor.
#[derive(Debug, Clone, PartialEq)]
pub struct Spread {
    order: usize,
    factors: Vec<Factor>,
}

/// One factor, orthogonal.
#[derive(Debug, Clone, PartialEq)]
struct Factor {
    kind: Kind,
    /// `[m, m]`, divided by `sqrt(m)` already.
    matrix: Array2<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// `[1 1; 1 -1]`.
    Two,
    PaleyOne(usize),
    PaleyTwo(usize),
    Hartley,
}

impl Spread {
    /// The matrix of order `n`: a Hadamard matrix where one of the constructions has that order.
    pub fn new(n: usize) -> Self {
        let kinds = hadamard(n).unwrap_or_else(|| {
            let twos = n.trailing_zeros().min(usize::BITS - 1);
            let odd = n >> twos;
            let mut kinds = vec![(Kind::Two, 2); twos as usize];
            if odd > 1 {
                kinds.push((Kind::Hartley, odd));
            }
            kinds
        });
        let factors = kinds.into_iter().map(|(kind, m)| Factor { kind, matrix: dense(kind, m) }).collect();
        Self { order: n, factors }
    }

    /// `n`.
    pub fn order(&self) -> usize {
        self.order
    }

    /// Whether every entry has the same magnitude.
    pub fn is_hadamard(&self) -> bool {
        self.factors.iter().all(|f| f.kind != Kind::Hartley)
    }

    /// How it is made, such as `Hadamard 96 = 2^3 (Sylvester) x 12 (Paley I, q = 11)`.
    pub fn describe(&self) -> String {
        let twos = self.factors.iter().filter(|f| f.kind == Kind::Two).count();
        let mut parts = Vec::new();
        if twos > 0 || self.factors.is_empty() {
            parts.push(format!("2^{twos} (Sylvester)"));
        }
        parts.extend(self.factors.iter().filter_map(|f| {
            let m = f.matrix.nrows();
            match f.kind {
                Kind::Two => None,
                Kind::PaleyOne(q) => Some(format!("{m} (Paley I, q = {q})")),
                Kind::PaleyTwo(q) => Some(format!("{m} (Paley II, q = {q})")),
                Kind::Hartley => Some(format!("{m} (Hartley, no Hadamard matrix of this order is constructed)")),
            }
        }));
        let what = if self.is_hadamard() { "Hadamard" } else { "orthogonal" };
        format!("{what} {} = {}", self.order, parts.join(" x "))
    }

    /// Every row `x` of `rows` `[.., n]` becomes `x U`. Costs `n` times the sum of the factors' orders per row, which for a
    /// power of two is the fast Walsh-Hadamard transform.
    ///
    /// # Panics
    /// If the rows have another length.
    pub fn apply(&self, mut rows: ArrayViewMut2<'_, f64>) {
        assert_eq!(rows.ncols(), self.order, "the matrix has another order");
        let mut buffer = vec![0.0; self.order];
        for mut row in rows.axis_iter_mut(Axis(0)) {
            buffer.iter_mut().zip(row.iter()).for_each(|(b, x)| *b = *x);
            self.apply_one(&mut buffer);
            row.iter_mut().zip(&buffer).for_each(|(x, b)| *x = *b);
        }
    }

    fn apply_one(&self, x: &mut [f64]) {
        let mut scratch = Vec::new();
        // Factor `i` acts on index `i` of `x` seen as a tensor, the last index varying fastest.
        let mut stride = self.order;
        for factor in &self.factors {
            let m = factor.matrix.nrows();
            let block = stride;
            stride /= m;
            for base in (0..self.order).step_by(block) {
                for offset in base..base + stride {
                    if factor.kind == Kind::Two {
                        let (a, b) = (x[offset], x[offset + stride]);
                        let half = std::f64::consts::FRAC_1_SQRT_2;
                        (x[offset], x[offset + stride]) = ((a + b) * half, (a - b) * half);
                        continue;
                    }
                    scratch.clear();
                    scratch.extend((0..m).map(|k| x[offset + k * stride]));
                    for (j, column) in factor.matrix.columns().into_iter().enumerate() {
                        x[offset + j * stride] = column.iter().zip(&scratch).map(|(u, v)| u * v).sum();
                    }
                }
            }
        }
    }

    /// `U`, `[n, n]`.
    pub fn matrix(&self) -> Array2<f64> {
        let mut out = Array2::eye(self.order);
        self.apply(out.view_mut());
        out
    }
}

/// Factors whose Kronecker product is a Hadamard matrix of order `n`, powers of two first; `None` where there are none.
fn hadamard(n: usize) -> Option<Vec<(Kind, usize)>> {
    if n == 0 {
        return None;
    }
    if n.is_power_of_two() {
        return Some(vec![(Kind::Two, 2); n.trailing_zeros() as usize]);
    }
    // The smallest single factor that takes the whole odd part: the rest is left to the fast transform.
    let twos = n.trailing_zeros();
    let odd = n >> twos;
    for power in 2..=twos {
        let m = odd << power;
        if let Some(kind) = paley(m) {
            let mut out = vec![(Kind::Two, 2); (twos - power) as usize];
            out.push((kind, m));
            return Some(out);
        }
    }
    // Two factors of the odd part, each with its own power of two.
    (3..odd).step_by(2).filter(|a| odd.is_multiple_of(*a)).find_map(|a| {
        (2..twos).find_map(|power| {
            let first = paley(a << power)?;
            let mut out = hadamard(n / (a << power))?;
            out.push((first, a << power));
            Some(out)
        })
    })
}

/// The construction of Paley that has order `m`.
fn paley(m: usize) -> Option<Kind> {
    if m > DENSE || !m.is_multiple_of(4) {
        return None;
    }
    if is_prime(m - 1) {
        return Some(Kind::PaleyOne(m - 1));
    }
    let q = m / 2 - 1;
    (q % 4 == 1 && is_prime(q)).then_some(Kind::PaleyTwo(q))
}

fn is_prime(n: usize) -> bool {
    n >= 2 && (2..).take_while(|d| d * d <= n).all(|d| !n.is_multiple_of(d))
}

/// `1`, `-1`, or `0` for 0: whether `a` is a square modulo the odd prime `q`.
fn legendre(squares: &[bool], a: usize) -> f64 {
    match a {
        0 => 0.0,
        a if squares[a] => 1.0,
        _ => -1.0,
    }
}

/// `[[0, 1], [corner, Q]]`, `[q + 1, q + 1]`.
fn bordered(q: usize, corner: f64) -> Array2<f64> {
    let mut squares = vec![false; q];
    (1..q).for_each(|x| squares[x * x % q] = true);
    Array2::from_shape_fn((q + 1, q + 1), |(i, j)| match (i, j) {
        (0, 0) => 0.0,
        (0, _) => 1.0,
        (_, 0) => corner,
        (i, j) => legendre(&squares, (i + q - j) % q),
    })
}

fn dense(kind: Kind, m: usize) -> Array2<f64> {
    let signs = match kind {
        Kind::Two => Array2::from_shape_fn((2, 2), |(i, j)| if i + j == 2 { -1.0 } else { 1.0 }),
        Kind::PaleyOne(q) => bordered(q, -1.0) + Array2::<f64>::eye(q + 1),
        Kind::PaleyTwo(q) => {
            let c = bordered(q, 1.0);
            let (a, b) = ([[1.0, 1.0], [1.0, -1.0]], [[1.0, -1.0], [-1.0, -1.0]]);
            Array2::from_shape_fn((m, m), |(i, j)| {
                let (u, v) = (i % 2, j % 2);
                c[[i / 2, j / 2]] * a[u][v] + if i / 2 == j / 2 { b[u][v] } else { 0.0 }
            })
        }
        Kind::Hartley => Array2::from_shape_fn((m, m), |(i, j)| {
            let angle = std::f64::consts::TAU * ((i * j) % m) as f64 / m as f64;
            angle.cos() + angle.sin()
        }),
    };
    signs / (m as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::factor::linalg::matmul;

    /// Largest entry of `|U^T U - I|`.
    fn defect(u: &Array2<f64>) -> f64 {
        let gram = matmul(&u.t(), u) - Array2::<f64>::eye(u.nrows());
        gram.iter().fold(0.0, |m, x| m.max(x.abs()))
    }

    #[test]
    fn every_order_is_orthogonal_and_hadamard_orders_have_even_entries() {
        for n in (1..=64).chain([96, 120, 128, 136, 144, 160, 192, 240, 256, 320, 384, 512, 576]) {
            let spread = Spread::new(n);
            let u = spread.matrix();
            // Sums of n products of entries that carry a few roundings each.
            assert!(defect(&u) <= 16.0 * n as f64 * f64::EPSILON, "{n}: {}", defect(&u));
            let even = (n as f64).sqrt().recip();
            let flat = u.iter().all(|x| (x.abs() - even).abs() <= 64.0 * f64::EPSILON);
            assert_eq!(flat, spread.is_hadamard(), "{n}: {}", spread.describe());
            let most = u.iter().fold(0.0_f64, |m, x| m.max(x.abs()));
            assert!(most <= even * 2.0_f64.sqrt() + 1e-12, "{n}: {most}");
        }
    }

    #[test]
    fn the_widths_of_latents_are_hadamard_orders() {
        for n in
            [1, 2, 4, 12, 20, 28, 36, 64, 96, 128, 136, 144, 160, 192, 224, 256, 320, 384, 448, 512, 576, 768, 1024]
        {
            assert!(Spread::new(n).is_hadamard(), "{n}: {}", Spread::new(n).describe());
        }
        // 92 is the smallest multiple of 4 that neither construction reaches; orders that are no multiple of 4 have none.
        for n in [3, 6, 18, 50, 92] {
            assert!(!Spread::new(n).is_hadamard(), "{n}");
        }
    }

    #[test]
    fn a_power_of_two_is_the_walsh_matrix() {
        let u = Spread::new(16).matrix();
        for ((i, j), x) in u.indexed_iter() {
            let sign = if ((i & j).count_ones()).is_multiple_of(2) { 0.25 } else { -0.25 };
            assert!((x - sign).abs() < 1e-15);
        }
    }

    #[test]
    fn the_description_names_the_construction() {
        assert_eq!(Spread::new(128).describe(), "Hadamard 128 = 2^7 (Sylvester)");
        assert_eq!(Spread::new(96).describe(), "Hadamard 96 = 2^3 (Sylvester) x 12 (Paley I, q = 11)");
        assert_eq!(Spread::new(576).describe(), "Hadamard 576 = 2^4 (Sylvester) x 36 (Paley II, q = 17)");
        assert!(Spread::new(50).describe().starts_with("orthogonal 50 = 2^1 (Sylvester) x 25 (Hartley"));
    }
}
