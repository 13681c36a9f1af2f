//! Rotary position embedding of a checkpoint: base, scaling, and the frequencies that follow from them (transformers
//! `modeling_rope_utils.py`).
//!
//! ```text
//! default    f[i] = theta^(-2i/D)                                             i < D/2
//! linear     f[i] / factor
//! dynamic    f[i] up to max_position_embeddings, which gneiss does not exceed
//! llama3     long wavelengths: f[i] / factor; short ones: f[i]; those between: interpolated
//! yarn       f[i] / factor from dimension `high` on, f[i] up to `low`, interpolated between
//! longrope   f[i] / short_factor[i], or f[i] / long_factor[i] in a sequence of more than
//!            original_max_position_embeddings positions
//! ```
//!
//! Yarn and longrope multiply cosines and sines by an attention factor.

use serde_json::{Value, json};
use std::f64::consts::PI;

/// Rotary position embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the frequencies, `rope_theta`.
    pub theta: f64,
    /// How the frequencies are scaled.
    pub scaling: RopeScaling,
}

/// How rotary frequencies are scaled, by transformers' `rope_type`.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// `default`: they are not scaled.
    Default,
    /// `linear`: all are divided by `factor`.
    Linear {
        /// Divides the frequencies.
        factor: f64,
    },
    /// `dynamic`: as `default` up to `max_position_embeddings`; in longer sequences the base grows with the length.
    Dynamic {
        /// How fast the base grows.
        factor: f64,
        /// Positions up to which nothing changes.
        max_position_embeddings: usize,
    },
    /// `llama3`.
    Llama3(Llama3Scaling),
    /// `yarn`.
    Yarn(YarnScaling),
    /// `longrope`.
    LongRope(LongRopeScaling),
}

/// `rope_type = "llama3"`: low frequencies are divided by `factor`, high ones are not changed, those between are interpolated
/// (transformers `_compute_llama3_parameters`).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Llama3Scaling {
    /// Divides the frequencies whose wavelength is long.
    pub factor: f64,
    /// Wavelengths over `original_max_position_embeddings / low_freq_factor` are long.
    pub low_freq_factor: f64,
    /// Wavelengths under `original_max_position_embeddings / high_freq_factor` are short.
    pub high_freq_factor: f64,
    /// Context length of the pretraining.
    pub original_max_position_embeddings: usize,
}

/// `rope_type = "yarn"` (Peng et al., 2023, arXiv:2309.00071; transformers `_compute_yarn_parameters`).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct YarnScaling {
    /// Divides the low frequencies.
    pub factor: f64,
    /// Multiplies cosines and sines.
    pub attention_factor: f64,
    /// Frequencies with more rotations than this over the original context are not changed.
    pub beta_fast: f64,
    /// Frequencies with fewer rotations than this over the original context are divided by `factor`.
    pub beta_slow: f64,
    /// Context length of the pretraining.
    pub original_max_position_embeddings: usize,
    /// Whether the bounds of the range of dimensions between the two are rounded outwards to integers.
    pub truncate: bool,
}

/// `rope_type = "longrope"` (Ding et al., 2024, arXiv:2402.13753; transformers `_compute_longrope_parameters`).
#[derive(Debug, Clone, PartialEq)]
pub struct LongRopeScaling {
    /// Divides the frequencies of sequences of up to `original_max_position_embeddings` positions, [D/2].
    pub short_factor: Vec<f64>,
    /// Divides those of longer sequences, [D/2].
    pub long_factor: Vec<f64>,
    /// Multiplies cosines and sines.
    pub attention_factor: f64,
    /// Context length of the pretraining.
    pub original_max_position_embeddings: usize,
}

impl Rope {
    /// Without scaling.
    pub fn new(theta: f64) -> Self {
        Self { theta, scaling: RopeScaling::Default }
    }

    /// Angles of position 1, [D/2], for heads of size `head_dim`; if `long` is set, those of sequences longer than
    /// [`Rope::long_above`].
    pub fn frequencies(&self, head_dim: usize, long: bool) -> Vec<f64> {
        let divisors = self.divisors(head_dim, long);
        self.unscaled(head_dim).zip(divisors).map(|(frequency, divisor)| frequency / divisor).collect()
    }

    /// The divisors of the frequencies, [D/2].
    pub fn divisors(&self, head_dim: usize, long: bool) -> Vec<f64> {
        let half = head_dim / 2;
        match &self.scaling {
            RopeScaling::Default | RopeScaling::Dynamic { .. } => vec![1.0; half],
            RopeScaling::Linear { factor } => vec![*factor; half],
            RopeScaling::Llama3(scaling) => self.unscaled(head_dim).map(|f| scaling.divisor(f)).collect(),
            RopeScaling::Yarn(scaling) => scaling.divisors(self.theta, head_dim),
            RopeScaling::LongRope(scaling) if long => scaling.long_factor.clone(),
            RopeScaling::LongRope(scaling) => scaling.short_factor.clone(),
        }
    }

    fn unscaled(&self, head_dim: usize) -> impl Iterator<Item = f64> + use<> {
        let theta = self.theta;
        (0..head_dim / 2).map(move |i| theta.powf(-2.0 * i as f64 / head_dim as f64))
    }

    /// The factor of cosines and sines.
    pub fn attention_factor(&self) -> f64 {
        match &self.scaling {
            RopeScaling::Yarn(scaling) => scaling.attention_factor,
            RopeScaling::LongRope(scaling) => scaling.attention_factor,
            _ => 1.0,
        }
    }

    /// Number of positions above which a sequence is rotated by other frequencies, from its first position on.
    pub fn long_above(&self) -> Option<usize> {
        match &self.scaling {
            RopeScaling::LongRope(scaling) if scaling.short_factor != scaling.long_factor => {
                Some(scaling.original_max_position_embeddings)
            }
            _ => None,
        }
    }

    /// The most positions of a sequence, if its frequencies would change with every further position.
    pub fn most_positions(&self) -> Option<usize> {
        match &self.scaling {
            RopeScaling::Dynamic { max_position_embeddings, .. } => Some(*max_position_embeddings),
            _ => None,
        }
    }

    /// transformers' `rope_type`, and the factor if the scaling has one.
    pub fn kind(&self) -> (&'static str, Option<f64>) {
        match &self.scaling {
            RopeScaling::Default => ("default", None),
            RopeScaling::Linear { factor } => ("linear", Some(*factor)),
            RopeScaling::Dynamic { factor, .. } => ("dynamic", Some(*factor)),
            RopeScaling::Llama3(scaling) => ("llama3", Some(scaling.factor)),
            RopeScaling::Yarn(scaling) => ("yarn", Some(scaling.factor)),
            RopeScaling::LongRope(_) => ("longrope", None),
        }
    }

    /// `rope_scaling` of a `config.json`; null without scaling.
    pub(crate) fn scaling_json(&self) -> Value {
        match &self.scaling {
            RopeScaling::Default => Value::Null,
            RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
            RopeScaling::Dynamic { factor, .. } => json!({"rope_type": "dynamic", "factor": factor}),
            RopeScaling::Llama3(scaling) => json!({
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position_embeddings,
            }),
            RopeScaling::Yarn(scaling) => json!({
                "rope_type": "yarn",
                "factor": scaling.factor,
                "attention_factor": scaling.attention_factor,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "original_max_position_embeddings": scaling.original_max_position_embeddings,
                "truncate": scaling.truncate,
            }),
            RopeScaling::LongRope(scaling) => json!({
                "rope_type": "longrope",
                "short_factor": scaling.short_factor,
                "long_factor": scaling.long_factor,
                "attention_factor": scaling.attention_factor,
                "original_max_position_embeddings": scaling.original_max_position_embeddings,
            }),
        }
    }
}

impl Llama3Scaling {
    /// The divisor of a frequency.
    fn divisor(&self, frequency: f64) -> f64 {
        let rotations = self.original_max_position_embeddings as f64 * frequency / (2.0 * PI);
        let (low, high) = (self.low_freq_factor, self.high_freq_factor);
        let smooth = ((rotations - low) / (high - low)).clamp(0.0, 1.0);
        1.0 / ((1.0 - smooth) / self.factor + smooth)
    }
}

impl YarnScaling {
    /// The attention factor that follows from the scaling factor: `0.1 ln(factor) + 1`.
    pub(crate) fn default_attention_factor(factor: f64) -> f64 {
        Self::mscale(factor, 1.0)
    }

    /// transformers' `get_mscale`.
    pub(crate) fn mscale(factor: f64, mscale: f64) -> f64 {
        if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
    }

    fn divisors(&self, theta: f64, head_dim: usize) -> Vec<f64> {
        let d = head_dim as f64;
        // The dimension with so many rotations over the original context.
        let dimension = |rotations: f64| {
            d * (self.original_max_position_embeddings as f64 / (rotations * 2.0 * PI)).ln()
                / (2.0 * theta.ln())
        };
        let (mut low, mut high) = (dimension(self.beta_fast), dimension(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(d - 1.0));
        if low == high {
            high += 0.001;
        }
        let interpolated = |i: usize| ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
        (0..head_dim / 2).map(|i| 1.0 / (interpolated(i) / self.factor + 1.0 - interpolated(i))).collect()
    }
}
