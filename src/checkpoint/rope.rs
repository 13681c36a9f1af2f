//! Rotary settings of a `config.json`, in the form of any version of transformers: `rope_parameters` of version 5, or
//! `rope_scaling` with a separate `rope_theta`.

use crate::Result;
use crate::checkpoint::config::unsupported;
use crate::checkpoint::json::{JsonObject, describe};
use crate::checkpoint::typed::TypedKeys;
use crate::ops::rope::{Llama3Scaling, LongRopeScaling, Rope, RopeScaling, YarnScaling};
use serde_json::Value;

/// The settings outside the rotary keys on which the rotary settings depend.
pub(super) struct Context {
    /// Size of a head, D.
    pub head_dim: usize,
    /// `max_position_embeddings`.
    pub max_position_embeddings: usize,
}

/// Reads the rotary settings.
///
/// # Errors
/// Returns an error with a scaling that gneiss does not know, or with a key that is missing or does not fit.
pub(super) fn from_json(json: &JsonObject, context: &Context) -> Result<Rope> {
    // As in transformers: `rope_scaling` counts if it is not empty.
    let filled = |object: &JsonObject| object.entries().next().is_some();
    let nested = match json.object("rope_scaling")?.filter(filled) {
        Some(scaling) => Some(scaling),
        None => json.object("rope_parameters")?.filter(filled),
    };
    // A number may be inside or outside the nested object; the one inside counts.
    let number = |key| match &nested {
        Some(object) if object.get(key).is_some() => object.number(key),
        _ => json.number(key),
    };
    let theta = number("rope_theta")?.unwrap_or(10_000.0);
    if let Some(fraction) = number("partial_rotary_factor")?
        && fraction != 1.0
    {
        return Err(unsupported(json.path(), format!("a partial rotary embedding ({fraction})")));
    }
    let Some(nested) = nested else { return Ok(Rope::new(theta)) };
    if let Some((key, _)) = nested.entries().find(|(_, value)| value.is_object()) {
        return Err(unsupported(json.path(), format!("a rotary embedding by layer type (`{key}`)")));
    }
    let reader = RopeReader { json, nested: &nested, context };
    Ok(Rope { theta, scaling: reader.scaling()? })
}

struct RopeReader<'a> {
    json: &'a JsonObject,
    /// `rope_scaling` or `rope_parameters`.
    nested: &'a JsonObject,
    context: &'a Context,
}

impl RopeReader<'_> {
    fn scaling(&self) -> Result<RopeScaling> {
        let kind = match self.nested.string("rope_type")? {
            Some(kind) => kind,
            None => self.nested.string("type")?.unwrap_or("default"),
        };
        Ok(match kind {
            "default" => RopeScaling::Default,
            "linear" => RopeScaling::Linear { factor: self.required("factor", kind)? },
            "dynamic" => RopeScaling::Dynamic {
                factor: self.required("factor", kind)?,
                max_position_embeddings: self.context.max_position_embeddings,
            },
            "llama3" => RopeScaling::Llama3(self.llama3()?),
            "yarn" => RopeScaling::Yarn(self.yarn()?),
            "longrope" => RopeScaling::LongRope(self.longrope()?),
            other => return Err(unsupported(self.json.path(), format!("rotary scaling `{other}`"))),
        })
    }

    /// A finite number over 0.
    fn positive(&self, key: &str) -> Result<Option<f64>> {
        match self.nested.number(key)? {
            Some(value) if !(value.is_finite() && value > 0.0) => {
                Err(self.nested.error(key, "a finite number over 0", &value.to_string()))
            }
            value => Ok(value),
        }
    }

    fn required(&self, key: &str, kind: &str) -> Result<f64> {
        let missing = || self.nested.missing(key, &format!("a number, for `rope_type` `{kind}`"));
        self.positive(key)?.ok_or_else(missing)
    }

    /// Context length of the pretraining. In transformers the key outside the nested object has priority.
    fn original(&self) -> Result<usize> {
        let key = "original_max_position_embeddings";
        Ok(match self.json.size(key)? {
            Some(original) => original,
            None => self.nested.size(key)?.unwrap_or(self.context.max_position_embeddings),
        })
    }

    /// The ratio of the context length to that of the pretraining.
    fn ratio(&self, original: usize) -> f64 {
        self.context.max_position_embeddings as f64 / original as f64
    }

    fn llama3(&self) -> Result<Llama3Scaling> {
        let scaling = Llama3Scaling {
            factor: self.required("factor", "llama3")?,
            low_freq_factor: self.required("low_freq_factor", "llama3")?,
            high_freq_factor: self.required("high_freq_factor", "llama3")?,
            original_max_position_embeddings: self.original()?,
        };
        if scaling.high_freq_factor <= scaling.low_freq_factor {
            let expected = format!("more than `low_freq_factor` ({})", scaling.low_freq_factor);
            let found = scaling.high_freq_factor.to_string();
            return Err(self.nested.error("high_freq_factor", &expected, &found));
        }
        Ok(scaling)
    }

    fn yarn(&self) -> Result<YarnScaling> {
        let original = self.original()?;
        // transformers refuses a configuration without the key, and uses the ratio if it is null.
        let factor = match self.nested.entries().any(|(key, value)| key == "factor" && value.is_null()) {
            true => self.ratio(original),
            false => self.required("factor", "yarn")?,
        };
        // In transformers 0 means the same as no value.
        let weight =
            |key: &str| Ok::<_, crate::Error>(self.nested.number(key)?.filter(|value| *value != 0.0));
        let attention_factor = match (self.positive("attention_factor")?, weight("mscale")?) {
            (Some(factor), _) => factor,
            (None, mscale) => match (mscale, weight("mscale_all_dim")?) {
                (Some(mscale), Some(all)) => {
                    YarnScaling::mscale(factor, mscale) / YarnScaling::mscale(factor, all)
                }
                _ => YarnScaling::default_attention_factor(factor),
            },
        };
        let scaling = YarnScaling {
            factor,
            attention_factor,
            beta_fast: weight("beta_fast")?.unwrap_or(32.0),
            beta_slow: weight("beta_slow")?.unwrap_or(1.0),
            original_max_position_embeddings: original,
            truncate: self.nested.boolean("truncate")?.unwrap_or(true),
        };
        for (key, value) in [("beta_fast", scaling.beta_fast), ("beta_slow", scaling.beta_slow)] {
            if !(value.is_finite() && value > 0.0) {
                return Err(self.nested.error(key, "a finite number over 0", &value.to_string()));
            }
        }
        Ok(scaling)
    }

    fn longrope(&self) -> Result<LongRopeScaling> {
        let original = self.original()?;
        let factor = self.positive("factor")?.unwrap_or_else(|| self.ratio(original));
        let inferred = || match factor <= 1.0 {
            true => 1.0,
            false => (1.0 + factor.ln() / (original as f64).ln()).sqrt(),
        };
        Ok(LongRopeScaling {
            short_factor: self.factors("short_factor")?,
            long_factor: self.factors("long_factor")?,
            attention_factor: self.positive("attention_factor")?.unwrap_or_else(inferred),
            original_max_position_embeddings: original,
        })
    }

    /// A divisor for each frequency.
    fn factors(&self, key: &str) -> Result<Vec<f64>> {
        let half = self.context.head_dim / 2;
        let expected = format!("a list of {half} numbers over 0, one for each rotary frequency");
        let Some(list) = self.nested.list(key)? else { return Err(self.nested.missing(key, &expected)) };
        if list.len() != half {
            return Err(self.nested.error(key, &expected, &format!("a list of {}", list.len())));
        }
        let factor = |value: &Value| value.as_f64().filter(|factor| factor.is_finite() && *factor > 0.0);
        list.iter()
            .map(|value| factor(value).ok_or_else(|| self.nested.error(key, &expected, &describe(value))))
            .collect()
    }
}
