//! Rotary settings of a GGUF file, read as in llama.cpp (`llama-model.cpp`, `llama-context.cpp`, `rope_yarn` of ggml).

use super::Keys;
use crate::checkpoint::config::unsupported;
use crate::checkpoint::typed::TypedKeys;
use crate::ops::rope::{Llama3Scaling, LongRopeScaling, Rope, RopeScaling, YarnScaling};
use crate::{Error, Result};

/// Values of the tensors of the rotary scaling, [D / 2].
pub(in crate::checkpoint::gguf) struct RopeTensors {
    /// `rope_freqs.weight`.
    pub freqs: Option<Vec<f32>>,
    /// `rope_factors_short.weight`.
    pub short: Option<Vec<f32>>,
    /// `rope_factors_long.weight`.
    pub long: Option<Vec<f32>>,
}

/// Reads the rotary settings; `None` if positions are not embedded.
pub(super) fn read(keys: &Keys<'_>, head_dim: usize, tensors: &RopeTensors) -> Result<Option<Rope>> {
    // llama.cpp keeps Granite's switch between rotary and no position embedding in this key.
    let switch = keys.metadata.boolean(&keys.key("rope.scaling.finetuned"))?;
    if keys.arch.starts_with("granite") && switch == Some(false) {
        return Ok(None);
    }
    let theta = keys.number("rope.freq_base")?.unwrap_or(10_000.0);
    let reader = GgufRopeReader { keys, theta, head_dim, tensors };
    Ok(Some(Rope { theta, scaling: reader.scaling()? }))
}

struct GgufRopeReader<'a> {
    keys: &'a Keys<'a>,
    theta: f64,
    head_dim: usize,
    tensors: &'a RopeTensors,
}

impl GgufRopeReader<'_> {
    fn refuse<T>(&self, what: String) -> Result<T> {
        Err(unsupported(self.keys.metadata.path(), what))
    }

    fn scaling(&self) -> Result<RopeScaling> {
        let kind = self.keys.metadata.string(&self.keys.key("rope.scaling.type"))?.unwrap_or("linear");
        let factors = [self.keys.number("rope.scaling.factor")?, self.keys.number("rope.scale_linear")?];
        // As in llama.cpp: a factor without a type is linear; a factor of 0 or 1, or type `none`, scales nothing.
        let factor = factors.into_iter().flatten().find(|factor| *factor != 0.0 && *factor != 1.0);
        if let Some(bad) = factor.filter(|factor| !(factor.is_finite() && *factor > 0.0)) {
            let key = self.keys.key("rope.scaling.factor");
            return Err(self.keys.metadata.error(&key, "a finite number over 0", &bad.to_string()));
        }
        if kind != "longrope" && (self.tensors.short.is_some() || self.tensors.long.is_some()) {
            return self.refuse(format!("`rope_factors_long.weight` with rotary scaling `{kind}`"));
        }
        let freqs = match &self.tensors.freqs {
            Some(factors) => self.llama3(factors)?,
            None => None,
        };
        if let (Some(_), "yarn" | "longrope", _) | (Some(_), "linear", Some(_)) = (freqs, kind, factor) {
            return self.refuse(format!("`rope_freqs.weight` with rotary scaling `{kind}`"));
        }
        match (kind, factor) {
            ("none", _) | ("linear", None) => {
                self.only_without(kind, &["attn_factor"])?;
                Ok(freqs.map_or(RopeScaling::Default, RopeScaling::Llama3))
            }
            ("linear", Some(factor)) => {
                self.only_without(kind, &["attn_factor"])?;
                Ok(RopeScaling::Linear { factor })
            }
            ("yarn", factor) => Ok(RopeScaling::Yarn(self.yarn(factor.unwrap_or(1.0))?)),
            ("longrope", Some(factor)) => {
                self.refuse(format!("rotary scaling `longrope` (factor {factor} in addition to its lists)"))
            }
            ("longrope", None) => Ok(RopeScaling::LongRope(self.longrope()?)),
            (other, _) => self.refuse(format!("rotary scaling `{other}`")),
        }
    }

    /// Refuses keys of the scaling with other values than 1.
    fn only_without(&self, kind: &str, names: &[&str]) -> Result<()> {
        for name in names {
            let name = format!("rope.scaling.{name}");
            if let Some(value) = self.keys.number(&name)?.filter(|value| *value != 1.0) {
                return self
                    .refuse(format!("`{}` {value} with rotary scaling `{kind}`", self.keys.key(&name)));
            }
        }
        Ok(())
    }

    fn original(&self) -> Result<usize> {
        match self.keys.count("rope.scaling.original_context_length")? {
            Some(original @ 1..) => Ok(original),
            _ => self.keys.size("context_length"),
        }
    }

    fn positive(&self, name: &str, default: f64) -> Result<f64> {
        match self.keys.number(name)? {
            Some(value) if !(value.is_finite() && value > 0.0) => {
                let key = self.keys.key(name);
                Err(self.keys.metadata.error(&key, "a finite number over 0", &value.to_string()))
            }
            value => Ok(value.unwrap_or(default)),
        }
    }

    fn yarn(&self, factor: f64) -> Result<YarnScaling> {
        self.only_without("yarn", &["yarn_ext_factor", "yarn_attn_factor"])?;
        if let Some(multiplier) = self.keys.number("rope.scaling.yarn_log_multiplier")?.filter(|m| *m != 0.0)
        {
            let key = self.keys.key("rope.scaling.yarn_log_multiplier");
            return self.refuse(format!("`{key}` {multiplier}"));
        }
        let own = YarnScaling::default_attention_factor(factor);
        Ok(YarnScaling {
            factor,
            attention_factor: own * self.positive("rope.scaling.attn_factor", 1.0)?,
            beta_fast: self.positive("rope.scaling.yarn_beta_fast", 32.0)?,
            beta_slow: self.positive("rope.scaling.yarn_beta_slow", 1.0)?,
            original_max_position_embeddings: self.original()?,
            truncate: true,
        })
    }

    fn longrope(&self) -> Result<LongRopeScaling> {
        Ok(LongRopeScaling {
            short_factor: self.factors("rope_factors_short.weight", self.tensors.short.as_deref())?,
            long_factor: self.factors("rope_factors_long.weight", self.tensors.long.as_deref())?,
            attention_factor: self.positive("rope.scaling.attn_factor", 1.0)?,
            original_max_position_embeddings: self.original()?,
        })
    }

    fn factors(&self, name: &str, found: Option<&[f32]>) -> Result<Vec<f64>> {
        let half = self.head_dim / 2;
        let problem = match found {
            Some(factors) if factors.len() != half => format!("{} values", factors.len()),
            Some(factors) if factors.iter().any(|f| !(f.is_finite() && *f > 0.0)) => "others".to_string(),
            Some(factors) => return Ok(factors.iter().map(|factor| f64::from(*factor)).collect()),
            None => "no such tensor".to_string(),
        };
        let problem =
            format!("tensor `{name}`: expected {half} numbers over 0, for longrope, found {problem}");
        Err(Error::Checkpoint { path: self.keys.metadata.path().to_path_buf(), problem })
    }

    /// Finds the Llama 3 scaling with the divisors of `rope_freqs.weight`, by which llama.cpp divides the frequencies.
    /// Divisors of 1 mean no scaling.
    ///
    /// All of Meta's configurations have `low_freq_factor` 1, `high_freq_factor` 4 and 8192 original positions; the
    /// scaling factor is the largest divisor. Other divisors are refused.
    fn llama3(&self, factors: &[f32]) -> Result<Option<Llama3Scaling>> {
        if factors.iter().all(|factor| *factor == 1.0) {
            return Ok(None);
        }
        let scaling = Llama3Scaling {
            factor: f64::from(factors.iter().copied().fold(1.0, f32::max)),
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        };
        let rope = Rope { theta: self.theta, scaling: RopeScaling::Llama3(scaling) };
        let expected = rope.divisors(self.head_dim, false);
        let fits = factors.len() == expected.len()
            && factors
                .iter()
                .zip(expected)
                .all(|(found, expected)| (f64::from(*found) - expected).abs() <= 1e-3 * expected);
        if !fits {
            return self.refuse(format!(
                "`rope_freqs.weight` that is no Llama 3 scaling ({} factors)",
                factors.len()
            ));
        }
        Ok(Some(scaling))
    }
}
