//! Which experts a token goes to, and with what weights. Pure functions of router logits.

use ndarray::Array2;

use crate::arch::{ExpertGroups, GroupScore, Moe, Scoring};

/// For every expert the tokens that go to it, in order, with their weights. `logits [T, E]`, `bias [E]` is added to the
/// scores for the choice alone. Of equal scores the expert with the lower index wins.
///
/// DeepSeek-V2 (arXiv 2405.04434, equations 20 to 22) takes scores over all experts; DeepSeek-V3 (arXiv 2412.19437,
/// equations 12 to 16) takes each by itself, chooses by score and bias, and makes the chosen scores sum to one.
pub(super) fn choose(moe: &Moe, bias: &[f32], logits: &Array2<f32>) -> Vec<Vec<(usize, f32)>> {
    let mut chosen = vec![Vec::new(); moe.experts];
    for (token, row) in logits.rows().into_iter().enumerate() {
        let scores: Vec<f64> = match moe.scoring {
            Scoring::Sigmoid => row.iter().map(|x| f64::from(sigmoid(*x))).collect(),
            Scoring::Softmax => {
                let max = row.iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x));
                let e: Vec<f64> = row.iter().map(|x| f64::from(x - max).exp()).collect();
                let sum: f64 = e.iter().sum();
                e.into_iter().map(|x| x / sum).collect()
            }
        };
        let ranks: Vec<f64> = scores.iter().zip(bias).map(|(s, b)| s + f64::from(*b)).collect();
        let mut order: Vec<usize> = match &moe.groups {
            None => (0..moe.experts).collect(),
            Some(groups) => in_best_groups(groups, &ranks),
        };
        best(&mut order, &ranks, moe.per_token);
        let total: f64 = order.iter().map(|e| scores[*e]).sum();
        for e in order {
            let weight = if moe.renormalise { scores[e] / total } else { scores[e] };
            chosen[e].push((token, (weight * moe.scale) as f32));
        }
    }
    chosen
}

/// The experts of the best groups, in order.
fn in_best_groups(groups: &ExpertGroups, ranks: &[f64]) -> Vec<usize> {
    let size = ranks.len() / groups.count;
    let score = |group: &[f64]| {
        let mut order: Vec<usize> = (0..group.len()).collect();
        best(&mut order, group, if groups.score == GroupScore::Best { 1 } else { 2 });
        order.into_iter().map(|e| group[e]).sum()
    };
    let scores: Vec<f64> = ranks.chunks(size.max(1)).map(score).collect();
    let mut kept: Vec<usize> = (0..scores.len()).collect();
    best(&mut kept, &scores, groups.kept);
    kept.sort_unstable();
    kept.into_iter().flat_map(|g| g * size..(g + 1) * size).collect()
}

/// Keep the `n` of `order` that rank highest, the highest first.
fn best(order: &mut Vec<usize>, ranks: &[f64], n: usize) {
    order.sort_by(|a, b| ranks[*b].total_cmp(&ranks[*a]).then(a.cmp(b)));
    order.truncate(n);
}

pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    fn moe(scoring: Scoring, groups: Option<ExpertGroups>) -> Moe {
        Moe {
            experts: 6,
            per_token: 2,
            width: 1,
            scoring,
            groups,
            renormalise: true,
            scale: 2.0,
            choice_bias: true,
            shared_width: None,
            shared_gated: false,
            sparse: vec![true],
        }
    }

    /// The experts of the only token.
    fn experts(moe: &Moe, bias: &[f32], logits: [f32; 6]) -> Vec<usize> {
        let chosen = choose(moe, bias, &array![logits]);
        (0..6).filter(|e| !chosen[*e].is_empty()).collect()
    }

    #[test]
    fn groups_bound_the_choice() {
        let logits = [3.0, -9.0, 2.0, 1.9, 1.8, -9.0];
        let groups = |score| Some(ExpertGroups { count: 3, kept: 1, score });
        let none = [0.0; 6];
        assert_eq!(experts(&moe(Scoring::Sigmoid, None), &none, logits), [0, 2]);
        // The best expert is in the first group, the best two are in the second.
        assert_eq!(experts(&moe(Scoring::Sigmoid, groups(GroupScore::Best)), &none, logits), [0, 1]);
        assert_eq!(experts(&moe(Scoring::Sigmoid, groups(GroupScore::BestTwo)), &none, logits), [2, 3]);
        // A bias moves the choice of the group, and the choice in it.
        let bias = [0.0, 0.0, 0.0, 0.0, 0.3, 0.9];
        assert_eq!(experts(&moe(Scoring::Sigmoid, groups(GroupScore::BestTwo)), &bias, logits), [4, 5]);
        // Scores below zero with the bias are still scores: another group's never come before them.
        let bias = [-5.0; 6];
        assert_eq!(experts(&moe(Scoring::Sigmoid, groups(GroupScore::BestTwo)), &bias, logits), [2, 3]);
    }

    #[test]
    fn weights_come_from_scores_without_the_bias() {
        let m = moe(Scoring::Sigmoid, None);
        let logits = [0.5, -0.5, 0.0, 1.0, -1.0, 0.2];
        let plain = choose(&m, &[0.0; 6], &array![logits]);
        let biased = choose(&m, &[0.0, 0.0, 0.0, 0.7, 0.0, 0.0], &array![logits]);
        assert_eq!(plain, biased);
        let total: f32 = plain.iter().flatten().map(|(_, w)| w).sum();
        assert!((total - 2.0).abs() < 1e-6, "{total}");
        let (a, b) = (sigmoid(1.0), sigmoid(0.5));
        assert!((plain[3][0].1 - 2.0 * a / (a + b)).abs() < 1e-6);
    }

    #[test]
    fn every_token_goes_to_as_many_experts_as_the_config_says() {
        for groups in [None, Some(ExpertGroups { count: 3, kept: 2, score: GroupScore::BestTwo })] {
            for scoring in [Scoring::Softmax, Scoring::Sigmoid] {
                let logits = Array2::from_shape_fn((40, 6), |(t, e)| ((t * 7 + e * 13) % 17) as f32 * 0.3 - 2.0);
                let chosen = choose(&moe(scoring, groups), &[0.0; 6], &logits);
                let mut counts = [0; 40];
                chosen.iter().flatten().for_each(|(t, _)| counts[*t] += 1);
                assert_eq!(counts, [2; 40]);
            }
        }
    }
}
