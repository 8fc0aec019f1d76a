//! MHA2MLA: its definition, and what is left at full rank.

use gqa2mla::factor::svd::svd;
use gqa2mla::methods::mha2mla::{self, SvdKind};
use gqa2mla::methods::partial_rope::Slot;
use ndarray::{Array2, Axis, concatenate, s};

use super::source_layer::{assert_close, attention, by_definition, inputs, output, project, source_output};

fn own(heads: usize, pairs: &[usize]) -> Vec<Slot> {
    (0..heads).flat_map(|a| pairs.iter().map(move |&pair| Slot { pair, head: Some(a) })).collect()
}

#[test]
fn mha2mla_is_its_definition() {
    // Other pairs in each KV head, as 2-norm chooses them; the published layer with a rotated key per KV head.
    let source = attention(4, 2, 0);
    let x = inputs().mapv(f64::from);
    let kept = [[0, 2], [2, 3]];
    let slots: Vec<Slot> = (0..2).flat_map(|a| kept[a].map(|pair| Slot { pair, head: Some(a) })).collect();
    let still: Vec<usize> = (0..16).filter(|i| !kept[i / 8].contains(&(i % 4))).collect();
    let keys = source.wk.select(Axis(0), &still);
    let cut = |w: &Array2<f64>, rank: usize| {
        let f = svd(w, "test").expect("converges");
        f.scaled_left(rank, rank).dot(&f.right(rank, rank))
    };
    for kind in SvdKind::ALL {
        let made = mha2mla::convert(&source, &slots, 7, 4, kind).expect("converts");
        assert_eq!((made.layer.rank(), made.layer.rope_dim(), made.layer.nope_dim()), (7, 8, 4));
        let (low_k, low_v) = match kind {
            SvdKind::Joint => {
                let joint = cut(&concatenate![Axis(0), keys, source.wv], 7);
                (joint.slice(s![..8, ..]).to_owned(), joint.slice(s![8.., ..]).to_owned())
            }
            SvdKind::Split => (cut(&keys, 3), cut(&source.wv, 4)),
        };
        let mut wk = source.wk.clone();
        for (row, i) in low_k.rows().into_iter().zip(&still) {
            wk.row_mut(*i).assign(&row);
        }
        let q = project(&x, &source.wq, source.bq.as_ref());
        let k = project(&x, &wk, source.bk.as_ref());
        let v = project(&x, &low_v, source.bv.as_ref());
        let want =
            by_definition(&source, (&q, &k, &v), |a, j| if kept[a].contains(&j) { source.inv_freq[j] } else { 0.0 });
        assert_close(&output(&made.layer), &want);
    }
}

#[test]
fn at_full_rank_mha2mla_loses_only_what_turned() {
    let source = attention(6, 3, 2);
    for (kind, rank) in [(SvdKind::Joint, 24), (SvdKind::Split, 48)] {
        // Twelve rows of keys without rotation, 24 of values, hidden size 24.
        let made = mha2mla::convert(&source, &own(3, &[0, 1]), rank, 4, kind).expect("converts");
        assert!(made.rank_loss < 1e-12);
        assert_close(&output(&made.layer), &source_output(&source));
    }
}
