//! Every backend against what a decomposition is by definition; with several, against each other.
//!
//! A backward stable algorithm decomposes `A + E` exactly, with `|E| <= p eps |A|` and `p` of the order of the matrix (LAPACK
//! Users' Guide, 4.1). [`slack`] is that bound in the Frobenius norm; what it means for a result is said where it is used.

use ndarray::array;

use super::*;
use crate::factor::FactorError;
use crate::factor::linalg::{self, matmul};
use crate::factor::svd::{singular_values, svd};
use crate::random::uniform;

fn random(rows: usize, columns: usize, seed: u64) -> Array2<f64> {
    let mut state = seed;
    Array2::from_shape_simple_fn((rows, columns), || 2.0 * uniform(&mut state) - 1.0)
}

fn symmetric(n: usize, seed: u64) -> Array2<f64> {
    linalg::symmetrise(&random(n, n, seed))
}

fn random_complex(rows: usize, columns: usize, seed: u64) -> Array2<c64> {
    let mut state = seed;
    Array2::from_shape_simple_fn((rows, columns), || c64::new(uniform(&mut state) - 0.5, uniform(&mut state) - 0.5))
}

/// `Z^H Z`.
fn gram(z: &Array2<c64>) -> Array2<c64> {
    let mut out = z.t().mapv(|x| x.conj()).dot(z);
    out.diag_mut().mapv_inplace(|x| c64::new(x.re, 0.0));
    out
}

/// Frobenius norm.
fn norm(a: &Array2<f64>) -> f64 {
    a.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// `p eps`.
fn precision(order: usize) -> f64 {
    (order + 10) as f64 * f64::EPSILON
}

/// Norm of the error that a backward stable decomposition of `a` may make.
fn slack(a: &Array2<f64>) -> f64 {
    precision(a.nrows().max(a.ncols())) * norm(a)
}

fn orthonormal_columns(u: &Array2<f64>, what: &str) {
    let error = norm(&(matmul(&u.t(), u) - Array2::<f64>::eye(u.ncols())));
    // Each column to p eps.
    assert!(error <= precision(u.nrows()) * (u.ncols() as f64).sqrt(), "{what}: {error:e}");
}

fn descending(values: &[f64], what: &str) {
    assert!(values.windows(2).all(|w| w[0] >= w[1]), "{what}: {values:?}");
}

/// Name and matrix: every shape, and every way to be singular.
fn matrices() -> Vec<(String, Array2<f64>)> {
    let shapes = [(1, 1), (1, 7), (7, 1), (2, 2), (3, 5), (5, 3), (64, 64), (31, 200), (200, 31), (192, 130)];
    let mut out: Vec<_> = shapes.iter().map(|&(m, n)| (format!("{m} x {n}"), random(m, n, (m * n) as u64))).collect();
    let mut more = |name: &str, a: Array2<f64>| out.push((name.to_owned(), a));
    more("rank 5 of 40 x 33", random(40, 5, 1).dot(&random(5, 33, 2)));
    more("rank 1 of 9 x 20", random(9, 1, 3).dot(&random(1, 20, 4)));
    more("zero", Array2::zeros((6, 4)));
    more("1 x 1 of zero", Array2::zeros((1, 1)));
    more("negative 1 x 1", array![[-3.0]]);
    more("all singular values alike", Array2::eye(12));
    more("a zero row and column", {
        let mut a = random(8, 8, 5);
        a.row_mut(3).fill(0.0);
        a.column_mut(0).fill(0.0);
        a
    });
    more("sixteen orders of magnitude", Array2::from_diag(&Array1::from_shape_fn(17, |i| 10_f64.powi(-(i as i32)))));
    // Weights and activations are f32. Beyond them, at 1e-200, faer's SVD is wrong: squares underflow.
    more("smallest of f32", random(20, 12, 6) * f64::from(f32::from_bits(1)));
    more("largest of f32", random(12, 20, 7) * f64::from(f32::MAX));
    more("rows are not contiguous", random(20, 30, 8).reversed_axes());
    out
}

/// The same for symmetric matrices.
fn symmetric_matrices() -> Vec<(String, Array2<f64>)> {
    let mut out: Vec<_> = [1, 2, 3, 17, 64, 130].map(|n| (format!("order {n}"), symmetric(n, n as u64))).into();
    for (name, a) in matrices() {
        if a.nrows() == a.ncols() {
            out.push((name.clone(), linalg::symmetrise(&a)));
        }
        out.push((format!("Gram matrix of {name}"), matmul(&a.t(), &a)));
    }
    out
}

#[test]
fn singular_vectors_are_orthonormal_and_make_the_matrix() {
    for backend in BACKENDS {
        for (name, a) in matrices() {
            let what = format!("{}, {name}", backend.name());
            let (m, n) = a.dim();
            let found = backend.thin_svd(&a).expect(&what);
            assert_eq!(
                (found.u.dim(), found.s.len(), found.vt.dim()),
                ((m, m.min(n)), m.min(n), (m.min(n), n)),
                "{what}"
            );
            orthonormal_columns(&found.u, &what);
            orthonormal_columns(&found.vt.t().to_owned(), &what);
            descending(&found.s, &what);
            assert!(found.s.iter().all(|s| *s >= 0.0), "{what}");
            let back = matmul(&(&found.u * &Array1::from(found.s.clone())), &found.vt);
            assert!(norm(&(back - &a)) <= slack(&a), "{what}");
            // Each is off by |E| at most (Weyl).
            let alone = backend.singular_values(&a).expect(&what);
            assert_eq!(alone.len(), found.s.len(), "{what}");
            assert!(alone.iter().zip(&found.s).all(|(x, y)| (x - y).abs() <= 2.0 * slack(&a)), "{what}");
        }
    }
}

#[test]
fn eigenvectors_are_orthonormal_and_make_the_matrix() {
    for backend in BACKENDS {
        for (name, a) in symmetric_matrices() {
            let what = format!("{}, {name}", backend.name());
            let (values, u) = backend.eigh(&a).expect(&what);
            assert_eq!((values.len(), u.dim()), (a.nrows(), a.dim()), "{what}");
            orthonormal_columns(&u, &what);
            descending(&values.to_vec(), &what);
            assert!(norm(&(matmul(&(&u * &values), &u.t()) - &a)) <= slack(&a), "{what}");
            let alone = backend.eigvalsh(&a).expect(&what);
            descending(&alone.to_vec(), &what);
            assert!((&alone - &values).iter().all(|x| x.abs() <= 2.0 * slack(&a)), "{what}");
        }
    }
}

#[test]
fn hermitian_eigenvectors_are_orthonormal_and_make_the_matrix() {
    for backend in BACKENDS {
        for (n, a) in [1, 2, 5, 16, 64].map(|n| (n, gram(&random_complex(n + 3, n, n as u64)))) {
            let what = format!("{}, order {n}", backend.name());
            let (values, u) = backend.eigh_complex(&a).expect(&what);
            descending(&values.to_vec(), &what);
            let length = |a: Array2<c64>| norm(&a.mapv(|x| x.norm()));
            let back = (&u * &values.mapv(|x| c64::new(x, 0.0))).dot(&u.t().mapv(|x| x.conj()));
            assert!(length(back - &a) <= precision(n) * length(a), "{what}");
            let unit = u.t().mapv(|x| x.conj()).dot(&u) - Array2::<c64>::eye(n);
            assert!(length(unit) <= precision(n) * (n as f64).sqrt(), "{what}");
        }
    }
}

/// Callers make symmetric matrices to the last bit, or not quite.
#[test]
fn the_upper_triangle_is_not_read() {
    for backend in BACKENDS {
        let (a, h) = (symmetric(9, 1), gram(&random_complex(12, 9, 2)));
        let spd = matmul(&a, &a) + Array2::<f64>::eye(9);
        let poisoned = |a: &Array2<f64>| Array2::from_shape_fn((9, 9), |(i, j)| if j > i { 1e3 } else { a[[i, j]] });
        let other = Array2::from_shape_fn((9, 9), |(i, j)| if j > i { c64::new(7.0, -5.0) } else { h[[i, j]] });
        assert_eq!(backend.eigh(&poisoned(&a)), backend.eigh(&a), "{}", backend.name());
        assert_eq!(backend.eigvalsh(&poisoned(&a)), backend.eigvalsh(&a), "{}", backend.name());
        assert_eq!(backend.eigh_complex(&other), backend.eigh_complex(&h), "{}", backend.name());
        let b = random(4, 9, 3);
        assert_eq!(
            backend.solve_right(&poisoned(&spd), 0.5, &b),
            backend.solve_right(&spd, 0.5, &b),
            "{}",
            backend.name()
        );
    }
}

#[test]
fn solutions_solve() {
    for backend in BACKENDS {
        for (n, rows) in [(1, 1), (1, 70), (2, 1), (17, 63), (64, 64), (65, 65), (130, 200)] {
            let what = format!("{}, {rows} rows of {n}", backend.name());
            let a = matmul(&random(n, n, 1), &random(n, n, 1).t());
            let shifted = &a + &(Array2::<f64>::eye(n) * 0.25);
            let b = random(rows, n, 2);
            let x = backend.solve_right(&a, 0.25, &b).expect(&what);
            assert_eq!(x.dim(), b.dim(), "{what}");
            // Cholesky's decomposition and both triangular solutions are stable each: three times the slack (Higham, Accuracy
            // and Stability of Numerical Algorithms, theorem 10.4).
            let error = norm(&(matmul(&x, &shifted) - &b));
            assert!(error <= 3.0 * precision(n) * norm(&x) * norm(&shifted), "{what}: {error:e}");
        }
    }
}

#[test]
fn what_is_not_positive_definite_has_no_solution() {
    for backend in BACKENDS {
        let b = random(3, 5, 1);
        let mut indefinite = Array2::eye(5);
        indefinite[[4, 4]] = -1.0;
        for a in
            [Array2::zeros((5, 5)), -Array2::<f64>::eye(5), indefinite, Array2::ones((5, 5)) - Array2::<f64>::eye(5)]
        {
            assert_eq!(backend.solve_right(&a, 0.0, &b), None, "{}, {a}", backend.name());
            assert!(backend.solve_right(&a, 1.5, &b).is_some(), "{}, {a}", backend.name());
        }
    }
}

#[test]
fn poisoned_matrices_are_errors_at_once() {
    for poison in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        for at in [[0, 0], [3, 5], [5, 3], [5, 5]] {
            let mut a = symmetric(6, 1);
            a[at] = poison;
            let no = FactorError::NotFinite { what: "poisoned" };
            assert_eq!(svd(&a, "poisoned").unwrap_err(), no);
            assert_eq!(singular_values(&a, "poisoned").unwrap_err(), no);
            assert_eq!(linalg::eigh(&a, "poisoned").unwrap_err(), no);
            assert_eq!(linalg::eigvalsh(&a, "poisoned").unwrap_err(), no);
            for x in [c64::new(poison, 0.0), c64::new(0.0, poison)] {
                let mut z = symmetric(6, 2).mapv(|x| c64::new(x, 0.0));
                z[at] = x;
                assert_eq!(linalg::eigh_complex(&z, "poisoned").unwrap_err(), no);
            }
            let eye = Array2::eye(6);
            assert_eq!(linalg::solve_right_spd(&a, &eye, 0.0, "poisoned").unwrap_err(), no);
            assert_eq!(linalg::solve_right_spd(&eye, &a, 0.0, "poisoned").unwrap_err(), no);
        }
    }
}

#[test]
fn nothing_decomposes_to_nothing() {
    let none = Array2::zeros((0, 0));
    for shape in [(0, 0), (0, 3), (3, 0)] {
        let found = svd(&Array2::zeros(shape), "empty").unwrap();
        assert_eq!((found.u.dim(), found.s.len(), found.vt.dim()), ((shape.0, 0), 0, (0, shape.1)));
        assert!(singular_values(&Array2::zeros(shape), "empty").unwrap().is_empty());
    }
    assert_eq!(linalg::eigh(&none, "empty").unwrap().1, none);
    assert_eq!(linalg::eigvalsh(&none, "empty").unwrap().len(), 0);
    assert_eq!(linalg::eigh_complex(&Array2::zeros((0, 0)), "empty").unwrap().0.len(), 0);
    assert_eq!(linalg::solve_right_spd(&none, &Array2::zeros((2, 0)), 0.0, "empty").unwrap().0.dim(), (2, 0));
}

/// The bits of one of everything, at sizes that a library would share out over threads.
fn bits(backend: &dyn Decompose) -> Vec<u64> {
    let (a, g) = (random(260, 200, 1), symmetric(240, 2));
    let spd = matmul(&a.t(), &a);
    let found = backend.thin_svd(&a).expect("converges");
    let (values, vectors) = backend.eigh(&g).expect("converges");
    let (_, complex) = backend.eigh_complex(&gram(&random_complex(130, 120, 3))).expect("converges");
    let mut out: Vec<f64> =
        found.u.iter().chain(&found.s).chain(&found.vt).chain(&values).chain(&vectors).copied().collect();
    out.extend(backend.singular_values(&a).expect("converges"));
    out.extend(backend.eigvalsh(&g).expect("converges"));
    out.extend(complex.iter().flat_map(|z| [z.re, z.im]));
    out.extend(backend.solve_right(&spd, 1.0, &random(300, 200, 4)).expect("positive definite"));
    out.into_iter().map(f64::to_bits).collect()
}

#[test]
fn bits_depend_neither_on_the_thread_nor_on_their_number() {
    use rayon::prelude::*;
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
    for backend in BACKENDS {
        let alone = pool(1).install(|| bits(*backend));
        for threads in [2, 5] {
            let many = pool(threads);
            assert!(many.install(|| bits(*backend)) == alone, "{}, {threads} threads", backend.name());
            let beside: Vec<_> = many.install(|| (0..6).into_par_iter().map(|_| bits(*backend)).collect());
            assert!(beside.iter().all(|b| *b == alone), "{}, beside each other on {threads} threads", backend.name());
        }
    }
}

#[test]
fn reports_name_a_backend_whose_version_is_not_the_tools() {
    assert_eq!(BACKENDS[0].name(), "faer");
    match backend().name() {
        "faer" => assert_eq!(reported(), None),
        "lapack" => assert!(reported().is_some_and(|r| r.starts_with("lapack (OpenBLAS 0.")), "{:?}", reported()),
        other => panic!("{other}"),
    }
}

#[cfg(feature = "lapack")]
mod each_other {
    use ndarray::s;

    use super::*;

    fn pairs() -> [(&'static dyn Decompose, &'static dyn Decompose); 1] {
        assert_eq!(backend().name(), "lapack");
        [(BACKENDS[0], backend())]
    }

    /// A matrix `[m, n]` with the given singular values, to rounding.
    fn with_spectrum(m: usize, n: usize, spectrum: &[f64]) -> Array2<f64> {
        let k = spectrum.len();
        let basis = |rows, seed| BACKENDS[0].thin_svd(&random(rows, k, seed)).expect("converges").u;
        matmul(&(basis(m, 1) * Array1::from(spectrum.to_vec())), &basis(n, 2).t())
    }

    #[test]
    fn singular_values_and_eigenvalues_agree() {
        for (faer, lapack) in pairs() {
            for (name, a) in matrices() {
                // Both are off by |E| at most (Weyl).
                let (x, y) = (faer.singular_values(&a).expect(&name), lapack.singular_values(&a).expect(&name));
                assert!(x.iter().zip(&y).all(|(x, y)| (x - y).abs() <= 2.0 * slack(&a)), "{name}: {x:?} {y:?}");
            }
            for (name, a) in symmetric_matrices() {
                let (x, y) = (faer.eigvalsh(&a).expect(&name), lapack.eigvalsh(&a).expect(&name));
                assert!((&x - &y).iter().all(|d| d.abs() <= 2.0 * slack(&a)), "{name}: {x} {y}");
            }
        }
    }

    #[test]
    fn separated_subspaces_agree() {
        let spectrum: Vec<f64> = (0..40).map(|i| if i < 7 { 8.0 - 0.1 * i as f64 } else { 1.0 / i as f64 }).collect();
        let gap = spectrum[6] - spectrum[7];
        for (faer, lapack) in pairs() {
            for (m, n) in [(40, 40), (90, 40), (40, 150)] {
                let a = with_spectrum(m, n, &spectrum);
                // Each subspace turns by sin(angle) <= |(E, E^T)| / (gap - |E|) (Wedin), and projectors differ by sqrt(2) times that;
                // twice, and the vectors themselves are orthonormal to p eps only.
                let allowed = 4.0 * slack(&a) / (gap - slack(&a)) + 2.0 * precision(m.max(n)) * 7.0;
                let project = |b: &dyn Decompose| {
                    let found = b.thin_svd(&a).expect("converges");
                    let (u, vt) = (found.u.slice_move(s![.., ..7]), found.vt.slice_move(s![..7, ..]));
                    (matmul(&u, &u.t()), matmul(&vt.t(), &vt))
                };
                let ((u, v), (u_other, v_other)) = (project(faer), project(lapack));
                assert!(norm(&(u - u_other)) <= allowed && norm(&(v - v_other)) <= allowed, "{m} x {n}");

                let g = matmul(&a.t(), &a);
                let gap = spectrum[6].powi(2) - spectrum[7].powi(2);
                let allowed = 4.0 * slack(&g) / (gap - slack(&g)) + 2.0 * precision(n) * 7.0;
                let project = |b: &dyn Decompose| {
                    let u = b.eigh(&g).expect("converges").1.slice_move(s![.., ..7]);
                    matmul(&u, &u.t())
                };
                assert!(norm(&(project(faer) - project(lapack))) <= allowed, "Gram matrix of {m} x {n}");
            }
        }
    }

    #[test]
    fn solutions_and_hermitian_eigenvalues_agree() {
        for (faer, lapack) in pairs() {
            for (n, rows) in [(1, 1), (3, 1), (64, 65), (120, 30)] {
                let spectrum: Vec<f64> = (0..n).map(|i| 1.0 + i as f64).collect();
                let a = with_spectrum(n, n, &spectrum);
                let (a, b) = (matmul(&a.t(), &a), random(rows, n, 5));
                let (x, y) =
                    (faer.solve_right(&a, 0.0, &b).expect("solved"), lapack.solve_right(&a, 0.0, &b).expect("solved"));
                // Residuals of both (`solutions_solve`) through the inverse, whose norm is 1.
                assert!(norm(&(&x - &y)) <= 2.0 * 3.0 * precision(n) * norm(&x) * norm(&a), "{rows} rows of {n}");

                let h = gram(&random_complex(n + 1, n, 6));
                let allowed = 2.0 * precision(n) * norm(&h.mapv(|z| z.norm()));
                let (x, y) =
                    (faer.eigh_complex(&h).expect("converges").0, lapack.eigh_complex(&h).expect("converges").0);
                assert!((&x - &y).iter().all(|d| d.abs() <= allowed), "order {n}: {x} {y}");
            }
        }
    }

    const CHILD: &str = "GQA2MLA_TEST_BITS";

    /// OpenBLAS reads its number of threads when it is loaded, so each number needs a process.
    #[test]
    fn bits_do_not_depend_on_the_threads_that_openblas_is_given() {
        if std::env::var_os(CHILD).is_some() {
            let sum = bits(backend()).into_iter().fold(0_u64, |sum, b| sum.rotate_left(7) ^ b);
            assert_eq!(std::env::var(CHILD).as_deref(), Ok(&*sum.to_string()), "bits: {sum}");
            return;
        }
        let sum = bits(backend()).into_iter().fold(0_u64, |sum, b| sum.rotate_left(7) ^ b);
        for threads in ["1", "2", "4"] {
            let name = "factor::decompose::tests::each_other::bits_do_not_depend_on_the_threads_that_openblas_is_given";
            let out = std::process::Command::new(std::env::current_exe().expect("a path"))
                .args([name, "--exact", "--nocapture"])
                .env("OPENBLAS_NUM_THREADS", threads)
                .env(CHILD, sum.to_string())
                .output()
                .expect("the tests start");
            let said = String::from_utf8_lossy(&out.stdout);
            assert!(out.status.success() && said.contains("1 passed"), "{threads} threads: {said}");
        }
    }
}
