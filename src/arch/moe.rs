//! Mixtures of experts: which layers have them, and how a router chooses.

use serde_json::Value;

use super::config::Config;
use super::family::{MoeKeys, Rule};
use super::scale::evaluate;
use super::{ArchError, Family};

/// Mixture of experts.
#[derive(Debug, Clone, PartialEq)]
pub struct Moe {
    /// Experts to choose from.
    pub experts: usize,
    /// Experts a token goes to.
    pub per_token: usize,
    /// Width `I` of an expert.
    pub width: usize,
    /// How router logits become weights.
    pub scoring: Scoring,
    /// Groups of experts of which only the best are looked into, where that limits anything.
    pub groups: Option<ExpertGroups>,
    /// Whether the chosen weights are made to sum to one.
    pub renormalise: bool,
    /// Factor on the chosen weights.
    pub scale: f64,
    /// Whether a bias is added to the scores for the choice (not for the weights).
    pub choice_bias: bool,
    /// Width of the expert that sees every token.
    pub shared_width: Option<usize>,
    /// Whether a sigmoid gate multiplies the shared expert's output.
    pub shared_gated: bool,
    /// Which layers have experts, `[layers]`.
    pub sparse: Vec<bool>,
}

/// How router logits become weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scoring {
    /// Over all experts.
    Softmax,
    /// Each by itself.
    Sigmoid,
}

impl Scoring {
    /// Name in a config (`scoring_func`).
    pub fn name(self) -> &'static str {
        match self {
            Scoring::Softmax => "softmax",
            Scoring::Sigmoid => "sigmoid",
        }
    }
}

/// Groups of neighbouring experts: a token goes to experts of its best groups only, so that it crosses few machines
/// (DeepSeek-V2, arXiv 2405.04434, section 2.2.2; DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertGroups {
    /// Groups; each holds `experts / count` neighbours.
    pub count: usize,
    /// Groups a token may go to.
    pub kept: usize,
    /// What ranks a group.
    pub score: GroupScore,
}

/// What ranks a group of experts, the bias of the choice included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupScore {
    /// Its best expert (DeepSeek-V2).
    Best,
    /// The sum of its two best experts (DeepSeek-V3).
    BestTwo,
}

/// How a router picks experts, by the names that DeepSeek's configs have for it (`topk_method`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Selection {
    /// The best of all.
    Greedy,
    /// The best within the groups that have the best expert.
    GroupLimitedGreedy,
    /// A bias is added to the scores; the best within the groups whose two best experts score most.
    NoauxTc,
}

const SCORINGS: [(&str, Scoring); 2] = [("softmax", Scoring::Softmax), ("sigmoid", Scoring::Sigmoid)];
const SELECTIONS: [(&str, Selection); 3] = [
    ("greedy", Selection::Greedy),
    ("group_limited_greedy", Selection::GroupLimitedGreedy),
    ("noaux_tc", Selection::NoauxTc),
];

/// Most experts of all layers together: a hundred times those of any model, so that a list of them fits memory.
const MOST_EXPERTS: usize = 1 << 20;

/// The experts, or `None` where every layer is dense after all.
pub(super) fn read(
    config: &Config<'_>,
    family: &Family,
    keys: &MoeKeys,
    layers: usize,
) -> Result<Option<Moe>, ArchError> {
    let sparse = sparse_layers(config, keys, layers)?;
    if !sparse.contains(&true) {
        return Ok(None);
    }
    // Classes that can be dense too leave the number out.
    let Some(experts) = config.count(&keys.experts)? else { return Ok(None) };
    let layers_with = sparse.iter().filter(|s| **s).count();
    if experts > MOST_EXPERTS / layers_with {
        let most = MOST_EXPERTS / layers_with;
        return Err(config.bad(&keys.experts, &format!("at most {most} in each of {layers_with} layers")));
    }
    config.must_be_neutral(&keys.neutral)?;
    let per_token = config.need_count(&keys.per_token)?;
    if per_token > experts {
        return Err(config.bad(&keys.per_token, &format!("at most {} ({experts})", keys.experts)));
    }
    let shared_width = match &keys.shared_width {
        None => None,
        Some(e) => evaluate(config, e)?.map(|w| w as usize).filter(|w| *w > 0),
    };
    let scoring = one_of(config, &keys.scoring, &SCORINGS)?;
    let selection = match &keys.selection {
        None => Selection::Greedy,
        Some(rule) => one_of(config, rule, &SELECTIONS)?,
    };
    let choice_bias = match keys.selection {
        None => family.layer.contains_key("router_bias"),
        Some(_) => selection == Selection::NoauxTc,
    };
    if choice_bias && !family.layer.contains_key("router_bias") {
        return Err(ArchError::BadFamily {
            name: family.name.clone(),
            message: "`noaux_tc` adds a bias to the scores, and `[layer]` has no `router_bias`".to_owned(),
        });
    }
    Ok(Some(Moe {
        experts,
        per_token,
        width: config.need_count(&keys.width)?,
        scoring,
        groups: read_groups(config, keys, selection, experts, per_token)?,
        renormalise: config.switch(&keys.renormalise)?,
        scale: config.positive(keys.scale.as_ref())?.unwrap_or(1.0),
        choice_bias,
        shared_width,
        shared_gated: match family.optional.get("shared_router") {
            Some(key) => config.flag(key)?.unwrap_or(false),
            None => family.layer.contains_key("shared_router"),
        },
        sparse,
    }))
}

fn sparse_layers(config: &Config<'_>, keys: &MoeKeys, layers: usize) -> Result<Vec<bool>, ArchError> {
    let whole = |key: &Option<String>| key.as_ref().map_or(Ok(None), |key| config.whole(key));
    let dense: Vec<usize> = match &keys.dense_layers {
        None => Vec::new(),
        Some(key) => config.list(key)?.into_iter().flatten().filter_map(Value::as_u64).map(|n| n as usize).collect(),
    };
    let step = whole(&keys.sparse_step)?.unwrap_or(1);
    let every = whole(&keys.sparse_every)?.unwrap_or(1);
    let first = whole(&keys.first_dense)?.unwrap_or(0);
    if let (Some(key), 0) = (&keys.sparse_every, every) {
        return Err(config.bad(key, "a whole number of at least 1"));
    }
    let sparse = |i: usize| {
        let regular = step > 0 && (i + 1).is_multiple_of(step) && i.is_multiple_of(every);
        i >= first && !dense.contains(&i) && regular
    };
    Ok((0..layers).map(sparse).collect())
}

/// The groups, or `None` where every group is kept: then they change nothing.
fn read_groups(
    config: &Config<'_>,
    keys: &MoeKeys,
    selection: Selection,
    experts: usize,
    per_token: usize,
) -> Result<Option<ExpertGroups>, ArchError> {
    let (score, least) = match selection {
        Selection::Greedy => return Ok(None),
        Selection::GroupLimitedGreedy => (GroupScore::Best, 1),
        Selection::NoauxTc => (GroupScore::BestTwo, 2),
    };
    let (Some(groups), Some(kept_key)) = (&keys.groups, &keys.groups_kept) else { return Ok(None) };
    let (count, kept) = (config.need_count(groups)?, config.need_count(kept_key)?);
    if !experts.is_multiple_of(count) {
        return Err(config.bad(groups, &format!("a divisor of {} ({experts})", keys.experts)));
    }
    if kept > count {
        return Err(config.bad(kept_key, &format!("at most {groups} ({count})")));
    }
    let size = experts / count;
    if count > 1 && size < least {
        let expected = format!("at most {}, so that each group has {least} experts", experts / least);
        return Err(config.bad(groups, &expected));
    }
    if per_token > kept * size {
        let expected = format!("at most {}, the experts of {kept} groups of {size}", kept * size);
        return Err(config.bad(&keys.per_token, &expected));
    }
    Ok((kept < count).then_some(ExpertGroups { count, kept, score }))
}

/// What a rule says, by name. A key that is absent and has no default is missing.
fn one_of<T: Copy>(config: &Config<'_>, rule: &Rule<T>, names: &[(&str, T)]) -> Result<T, ArchError> {
    let key = match rule {
        Rule::Fixed(value) => return Ok(*value),
        Rule::Key { key } => key,
    };
    let name = config.text(key)?.ok_or_else(|| config.missing(key))?;
    names.iter().find(|(known, _)| *known == name).map(|(_, value)| *value).ok_or_else(|| {
        let known: Vec<String> = names.iter().map(|(n, _)| format!("\"{n}\"")).collect();
        config.bad(key, &format!("one of {}", known.join(", ")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::Architecture;
    use serde_json::json;

    fn deepseek() -> Value {
        json!({
            "model_type": "deepseek_v3", "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 4,
            "intermediate_size": 32, "vocab_size": 50, "max_position_embeddings": 64, "kv_lora_rank": 8,
            "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "moe_intermediate_size": 8,
            "n_routed_experts": 12, "num_experts_per_tok": 3, "n_shared_experts": 1, "first_k_dense_replace": 1,
            "moe_layer_freq": 1, "n_group": 4, "topk_group": 2, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
            "norm_topk_prob": true, "routed_scaling_factor": 2.5
        })
    }

    fn moe(change: &[(&str, Value)]) -> Result<Option<Moe>, String> {
        let mut config = deepseek();
        for (key, value) in change {
            let map = config.as_object_mut().unwrap();
            map.remove(*key);
            if !value.is_null() {
                map.insert((*key).to_owned(), value.clone());
            }
        }
        Architecture::from_config(&config).map(|a| a.moe).map_err(|e| e.to_string())
    }

    #[test]
    fn routing_is_what_the_config_says() {
        let v3 = moe(&[]).unwrap().unwrap();
        let groups = ExpertGroups { count: 4, kept: 2, score: GroupScore::BestTwo };
        assert_eq!((v3.scoring, v3.groups, v3.choice_bias), (Scoring::Sigmoid, Some(groups), true));
        assert_eq!((v3.shared_width, v3.scale, v3.sparse), (Some(8), 2.5, vec![false, true, true, true]));
        // What transformers' class assumes where a config is silent.
        let silent =
            moe(&[("topk_method", Value::Null), ("scoring_func", Value::Null), ("norm_topk_prob", Value::Null)]);
        assert_eq!(silent.unwrap().unwrap(), moe(&[]).unwrap().unwrap());
        let v2 = [("model_type", json!("deepseek_v2")), ("scoring_func", json!("softmax"))];
        let limited = [&v2[..], &[("topk_method", json!("group_limited_greedy"))]].concat();
        let limited = moe(&limited).unwrap().unwrap();
        assert_eq!(limited.groups.unwrap().score, GroupScore::Best);
        assert!(!limited.choice_bias && limited.scoring == Scoring::Softmax);
        let greedy = moe(&[&v2[..], &[("topk_method", json!("greedy"))]].concat()).unwrap().unwrap();
        assert_eq!(greedy.groups, None);
        // All groups kept is no limit.
        assert_eq!(moe(&[("topk_group", json!(4))]).unwrap().unwrap().groups, None);
        let every = moe(&[("moe_layer_freq", json!(2)), ("first_k_dense_replace", json!(0))]).unwrap().unwrap();
        assert_eq!(every.sparse, [true, false, true, false]);
    }

    #[test]
    fn what_no_router_can_do_is_named() {
        for (change, expected) in [
            (("n_group", json!(5)), "`n_group` is 5, expected a divisor of n_routed_experts (12)"),
            (("n_group", json!(12)), "each group has 2 experts"),
            (("n_group", Value::from("x")), "`n_group`"),
            (("topk_group", json!(5)), "`topk_group` is 5, expected at most n_group (4)"),
            (("n_routed_experts", json!(1_048_576)), "expected at most 349525 in each of 3 layers"),
            (("num_experts_per_tok", json!(13)), "expected at most n_routed_experts (12)"),
            (("num_experts_per_tok", json!(7)), "expected at most 6, the experts of 2 groups of 3"),
            (("topk_method", json!("best")), "\"greedy\", \"group_limited_greedy\", \"noaux_tc\""),
            (("scoring_func", json!("relu")), "\"softmax\", \"sigmoid\""),
            (("moe_layer_freq", json!(0)), "`moe_layer_freq` is 0"),
            (("moe_layer_freq", json!(1.5)), "a whole number"),
            (("num_nextn_predict_layers", json!(-1)), "a whole number"),
        ] {
            let error = moe(std::slice::from_ref(&change)).unwrap_err();
            assert!(error.contains(expected), "{change:?}: {error}");
        }
    }
}
