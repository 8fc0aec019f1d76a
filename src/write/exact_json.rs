//! Values in a journal: exactly what they were, to the last bit.
//!
//! JSON numbers do not promise that: a parser may be off by a last digit. Floats are therefore kept as their bits.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Number, Value};

/// Key of an object that stands for a float.
const BITS: &str = "f64";

/// A value with all floats spelled as bits. `None` for what JSON cannot hold.
pub fn freeze(value: &impl Serialize) -> Option<Value> {
    serde_json::to_value(value).ok().map(spell)
}

/// The value again. `None` where it is not one.
pub fn thaw<T: DeserializeOwned>(value: &Value) -> Option<T> {
    serde_json::from_value(read(value)?).ok()
}

fn spell(value: Value) -> Value {
    match value {
        Value::Number(n) if n.is_f64() => {
            let bits = format!("{:016x}", n.as_f64().unwrap_or_default().to_bits());
            Value::Object(Map::from_iter([(BITS.to_owned(), Value::String(bits))]))
        }
        Value::Array(list) => list.into_iter().map(spell).collect(),
        Value::Object(map) => map.into_iter().map(|(k, v)| (k, spell(v))).collect(),
        other => other,
    }
}

fn read(value: &Value) -> Option<Value> {
    Some(match value {
        Value::Object(map) => match map.get(BITS) {
            Some(bits) if map.len() == 1 => {
                let bits = u64::from_str_radix(bits.as_str()?, 16).ok()?;
                Value::Number(Number::from_f64(f64::from_bits(bits))?)
            }
            _ => Value::Object(map.iter().map(|(k, v)| Some((k.clone(), read(v)?))).collect::<Option<_>>()?),
        },
        Value::Array(list) => Value::Array(list.iter().map(read).collect::<Option<_>>()?),
        other => other.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_float_comes_back(bits in prop::collection::vec(any::<u64>(), 0..20)) {
            let values: Vec<f64> = bits.iter().map(|b| f64::from_bits(*b)).filter(|v| v.is_finite()).collect();
            let text = freeze(&values).expect("JSON").to_string();
            let back: Vec<f64> = thaw(&serde_json::from_str(&text).expect("JSON")).expect("floats");
            prop_assert_eq!(
                back.iter().map(|v| v.to_bits()).collect::<Vec<_>>(),
                values.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
            );
        }
    }

    #[test]
    fn what_is_no_value_is_none() {
        assert_eq!(thaw::<f64>(&serde_json::json!({ "f64": "zz" })), None);
        assert_eq!(thaw::<f64>(&serde_json::json!({ "f64": "7ff8000000000000" })), None);
        assert_eq!(thaw::<Vec<f64>>(&serde_json::json!({ "a": 1 })), None);
    }
}
