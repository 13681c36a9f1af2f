//! Where virtual tokens lie among the vocabulary's: nearest tokens, norms, and how far each moved.

use crate::checkpoint::TextTokenizer;
use crate::ops::gpu;
use crate::{Error, Result};
use candle_core::{D, DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Vocabulary tokens named for a virtual one.
const NEAREST: usize = 3;

/// Rows of the vocabulary that are worked on at a time, in f32: 2,048 of 4,096 values are 34 MB, while the whole matrix of a
/// Granite 8b would be 1.6 GB.
const ROWS: usize = 2048;

/// A token of the vocabulary with its text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VocabularyToken {
    /// Its id.
    pub id: u32,
    /// Its text; none without a tokenizer.
    pub text: Option<String>,
}

/// A token of the vocabulary near a virtual one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Neighbour {
    /// The token.
    #[serde(flatten)]
    pub token: VocabularyToken,
    /// Cosine of the angle between the two embeddings.
    #[serde(with = "crate::number")]
    pub cosine: f64,
}

/// Mean, least and greatest L2 norm of some rows.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Norms {
    /// Mean.
    #[serde(with = "crate::number")]
    pub mean: f64,
    /// Least.
    #[serde(with = "crate::number")]
    pub min: f64,
    /// Greatest.
    #[serde(with = "crate::number")]
    pub max: f64,
}

/// A virtual token at one time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NearestPlace {
    /// L2 norm.
    #[serde(with = "crate::number")]
    pub norm: f64,
    /// The vocabulary's nearest, best first.
    pub nearest: Vec<Neighbour>,
}

/// A virtual token before and after tuning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VirtualToken {
    /// Before the first step.
    pub before: NearestPlace,
    /// As it was kept.
    pub after: NearestPlace,
    /// L2 distance between the two.
    #[serde(with = "crate::number")]
    pub moved: f64,
}

/// All virtual tokens of a run: `tokens.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PromptTokens {
    /// Norms of the vocabulary's embeddings.
    pub vocabulary: Norms,
    /// The virtual tokens in their order.
    pub tokens: Vec<VirtualToken>,
}

/// The embeddings of a vocabulary.
pub struct Vocabulary<'a> {
    /// [V, C], as the model holds it.
    embedding: Tensor,
    /// L2 norm of each row, f32 [V] on the CPU.
    norms: Tensor,
    tokenizer: Option<&'a TextTokenizer>,
}

/// A token's text with its white space made visible.
pub fn visible(text: &str) -> String {
    text.replace(' ', "·").replace('\n', "⏎").replace('\t', "⇥")
}

impl VocabularyToken {
    /// The token of this id.
    pub fn new(id: u32, tokenizer: Option<&TextTokenizer>) -> Self {
        Self { id, text: tokenizer.and_then(|t| t.token_text(id)) }
    }

    /// Its text with white space made visible, else its id.
    pub fn visible(&self) -> String {
        self.text.as_deref().map_or_else(|| format!("#{}", self.id), visible)
    }
}

impl Norms {
    /// Of each row of f32 [n, C].
    pub fn of(rows: &Tensor) -> Result<Self> {
        Ok(Self::summary(row_norms(rows)?.into_iter()))
    }

    fn summary(norms: impl ExactSizeIterator<Item = f64> + Clone) -> Self {
        let count = norms.len().max(1) as f64;
        Self {
            mean: norms.clone().sum::<f64>() / count,
            min: norms.clone().fold(f64::INFINITY, f64::min),
            max: norms.fold(0.0, f64::max),
        }
    }
}

/// L2 norm of each row of f32 [n, C], in f64: the squares of a prompt that a huge learning rate has thrown far off are too
/// large for f32.
pub fn row_norms(rows: &Tensor) -> Result<Vec<f64>> {
    Ok(norms(&rows.to_device(&Device::Cpu)?.to_dtype(DType::F64)?)?.to_vec1()?)
}

/// L2 norm of each row of [n, C], in its dtype.
fn norms(rows: &Tensor) -> Result<Tensor> {
    Ok(rows.sqr()?.sum(D::Minus1)?.sqrt()?)
}

impl<'a> Vocabulary<'a> {
    /// Of an embedding matrix [V, C], as it is before Granite's multiplier; tokens have names if there is a
    /// tokenizer.
    pub fn new(embedding: &Tensor, tokenizer: Option<&'a TextTokenizer>) -> Result<Self> {
        let norms: Vec<Tensor> = parts(embedding)
            .map(|part| norms(&wide(&embedding.narrow(0, part.start, part.len())?)?))
            .collect::<Result<_>>()?;
        let norms = if norms.is_empty() {
            Tensor::zeros(0, DType::F32, &Device::Cpu)?
        } else {
            Tensor::cat(&norms, 0)?
        };
        Ok(Self { norms, embedding: embedding.clone(), tokenizer })
    }

    /// Norms of all embeddings.
    pub fn norms(&self) -> Result<Norms> {
        Ok(Norms::summary(self.norms.to_vec1::<f32>()?.into_iter().map(f64::from)))
    }

    /// Embeddings of `ids`, f32 [n, C].
    ///
    /// # Errors
    /// An id beyond the vocabulary.
    pub fn rows(&self, ids: &[u32]) -> Result<Tensor> {
        let vocabulary = self.embedding.dims()[0];
        if let Some(id) = ids.iter().find(|id| **id as usize >= vocabulary) {
            let problem = format!("expected ids under the vocabulary's {vocabulary}, found {id}");
            return Err(Error::Tokenizer(problem));
        }
        wide(&self.embedding.index_select(&gpu::upload(ids, self.embedding.device())?, 0)?)
    }

    /// Each row of `prompt`, f32 [P, C] on the CPU, with its norm and the vocabulary's nearest tokens by cosine
    /// similarity.
    ///
    /// # Errors
    /// Another width than the vocabulary's.
    pub fn place(&self, prompt: &Tensor) -> Result<Vec<NearestPlace>> {
        // A row of zeros has no direction and is nearest to none.
        let length = |norms: &Tensor| norms.clamp(f32::MIN_POSITIVE, f32::MAX);
        let norms = row_norms(prompt)?;
        let lengths: Vec<f64> = norms.iter().map(|norm| norm.max(f64::from(f32::MIN_POSITIVE))).collect();
        let lengths = Tensor::from_vec(lengths, (norms.len(), 1), &Device::Cpu)?;
        let unit = prompt.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.broadcast_div(&lengths)?;
        let unit = unit.to_dtype(DType::F32)?;
        let mut nearest = vec![Vec::new(); prompt.dims()[0]];
        for part in parts(&self.embedding) {
            let rows = wide(&self.embedding.narrow(0, part.start, part.len())?)?;
            let lengths = length(&self.norms.narrow(0, part.start, part.len())?)?;
            let cosines = unit.matmul(&rows.t()?)?.broadcast_div(&lengths)?;
            for (nearest, cosines) in nearest.iter_mut().zip(cosines.to_vec2::<f32>()?) {
                keep_largest(nearest, part.start, &cosines);
            }
        }
        let neighbour = |(id, cosine): (usize, f32)| Neighbour {
            token: VocabularyToken::new(id as u32, self.tokenizer),
            cosine: f64::from(cosine),
        };
        let place = |(norm, nearest): (f64, Vec<_>)| NearestPlace {
            norm,
            nearest: nearest.into_iter().map(neighbour).collect(),
        };
        Ok(norms.into_iter().zip(nearest).map(place).collect())
    }

    /// A prompt before and after tuning, both f32 [P, C] on the CPU.
    ///
    /// # Errors
    /// Shapes that differ, or another width than the vocabulary's.
    pub fn compare(&self, before: &Tensor, after: &Tensor) -> Result<PromptTokens> {
        let moved = row_norms(&(after.to_dtype(DType::F64)? - before.to_dtype(DType::F64)?)?)?;
        let pairs = self.place(before)?.into_iter().zip(self.place(after)?);
        let token = |((before, after), moved)| VirtualToken { before, after, moved };
        Ok(PromptTokens { vocabulary: self.norms()?, tokens: pairs.zip(moved).map(token).collect() })
    }
}

/// The rows of a matrix, a part at a time.
fn parts(matrix: &Tensor) -> impl Iterator<Item = Range<usize>> {
    let rows = matrix.dims()[0];
    (0..rows).step_by(ROWS).map(move |first| first..(first + ROWS).min(rows))
}

/// `rows` in f32 on the CPU.
fn wide(rows: &Tensor) -> Result<Tensor> {
    Ok(rows.to_device(&Device::Cpu)?.to_dtype(DType::F32)?)
}

/// Adds `values`, the first of which is number `first`, to the [`NEAREST`] largest, which are (number, value), largest
/// first.
fn keep_largest(best: &mut Vec<(usize, f32)>, first: usize, values: &[f32]) {
    for (i, value) in values.iter().enumerate() {
        let at = best.iter().position(|(_, b)| value > b).unwrap_or(best.len());
        if at < NEAREST {
            best.insert(at, (first + i, *value));
            best.truncate(NEAREST);
        }
    }
}
