//! All that it takes to go on with a run: `checkpoint.safetensors`.
//!
//! ```text
//! prompt  m  v     f32 [P, W]   the prompt's trainable values and AdamW's two moments
//! best             f32 [P, W]   the trainable values of the lowest validation loss, if there is one
//! initial          f32 [P, W]   the prefix before the first step; its first rows are the frozen ones
//! metadata "gneiss"             JSON: Position, PromptLayout, the rows a pass may have, algorithms of products on CUDA
//! ```
//!
//! A prompt with frozen rows has fewer trainable ones, and that of a reparameterization is a vector ([`PromptLayout`]).
//!
//! The order of an epoch's examples depends on the seed and the epoch's number alone, so its number and the steps done
//! in it are the whole state of the data; the schedule depends on the steps.

use super::prompt_run::RunExamples;
use crate::batch::Example;
use crate::config::{PromptKind, TrainOptions};
use crate::files::write_atomically;
use crate::ops::gpu::products::ProductChoices;
use crate::prompt::{Prefix, Prompt, PromptLayout};
use crate::{Error, Result};
use candle_core::safetensors::Load;
use candle_core::{DType, Device, Shape, Tensor};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use safetensors::{Dtype, SafeTensors, serialize};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::path::Path;
use std::time::Instant;

/// Key of the metadata that holds [`Position`] and the limits.
const KEY: &str = "gneiss";
/// Version of the file; another one is refused.
const VERSION: u32 = 1;

/// Epochs and steps of training that a prompt has had, and its losses.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct RunMark {
    /// Whole epochs.
    pub epoch: usize,
    /// Optimizer steps.
    pub step: usize,
    /// Mean training loss of its last epoch; `None` if that has not ended.
    #[serde(default, with = "crate::number::optional")]
    pub train_loss: Option<f64>,
    /// Its validation loss; `None` if it was not taken.
    #[serde(default, with = "crate::number::optional")]
    pub validation_loss: Option<f64>,
}

/// Where in its course a run is.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Position {
    /// Optimizer steps done.
    pub step: usize,
    /// Steps left out because a value was not finite.
    pub skipped: usize,
    /// The epoch under way, or the last one that ended; 0 before the first.
    pub epoch: usize,
    /// Whether that epoch is under way.
    pub open: bool,
    /// Steps of it that were taken or left out.
    pub steps_of_epoch: usize,
    /// Sum of the negative log-likelihoods of its target tokens, nats.
    #[serde(with = "crate::number")]
    pub nll: f64,
    /// Its target tokens so far.
    pub target_tokens: usize,
    /// Wall time of the run when it began, seconds.
    #[serde(with = "crate::number")]
    pub epoch_began: f64,
    /// Wall time of the run, seconds.
    #[serde(with = "crate::number")]
    pub elapsed: f64,
    /// The last epoch that ended.
    pub last: RunMark,
    /// The epoch of the lowest validation loss.
    pub best: Option<RunMark>,
}

impl Position {
    /// Steps that were taken or left out.
    pub fn attempts(&self) -> usize {
        self.step + self.skipped
    }

    /// The next epoch begins, unless one is under way.
    pub(super) fn begin_epoch(&mut self, elapsed: f64) {
        if !self.open {
            self.epoch += 1;
            (self.open, self.steps_of_epoch, self.epoch_began) = (true, 0, elapsed);
            (self.nll, self.target_tokens) = (0.0, 0);
        }
    }

    pub(super) fn end_epoch(&mut self, mark: RunMark, elapsed: f64) {
        (self.open, self.last, self.elapsed) = (false, mark, elapsed);
    }
}

/// Indices of `examples` training examples in the order of an epoch, which is counted from 1; it depends on the
/// seed and the epoch alone.
pub fn epoch_order(examples: usize, options: &TrainOptions, epoch: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..examples).collect();
    if options.shuffle {
        let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
        rng.set_stream(epoch as u64);
        order.shuffle(&mut rng);
    }
    order
}

/// Wall time over all parts of a run.
pub(super) struct Clock {
    /// Seconds of the parts before this one.
    before: f64,
    started: Instant,
}

impl Clock {
    pub(super) fn new(before: f64) -> Self {
        Self { before, started: Instant::now() }
    }

    pub(super) fn seconds(&self) -> f64 {
        self.before + self.started.elapsed().as_secs_f64()
    }
}

/// A run between two steps. Tensors are f32, on the CPU if they were read from a file.
#[derive(Debug, Clone)]
pub struct State {
    /// The prompt.
    pub prompt: Prompt,
    /// AdamW's first moment, of the shape of the prompt's trainable values.
    pub m: Tensor,
    /// AdamW's second moment.
    pub v: Tensor,
    /// The prefix before the first step.
    pub initial: Prefix,
    /// The trainable values of `position.best`.
    pub best: Option<Tensor>,
    /// Where it is.
    pub position: Position,
    /// Rows of a pass: other ones give sums of another order, so other last digits.
    pub max_rows: usize,
    /// Algorithms of its matrix products, if the device's library offers several; `None` otherwise. Other ones give
    /// sums of another order.
    pub products: Option<ProductChoices>,
    /// [`fingerprint`] of the examples.
    pub examples: String,
    /// Ranks that computed it: another number gives sums of another order.
    pub ranks: usize,
}

#[derive(Serialize, Deserialize)]
struct Metadata {
    version: u32,
    position: Position,
    /// `None`: a plain prompt of embeddings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    layout: Option<PromptLayout>,
    /// Tokens before the virtual tokens; none if these stand at the start.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    before: Vec<u32>,
    max_rows: usize,
    /// Files of a version before it have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    products: Option<ProductChoices>,
    examples: String,
    /// `None`: one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ranks: Option<usize>,
}

/// Tells one set of examples from another: their numbers and a checksum (CRC-32C) of their token ids in order.
pub fn fingerprint(examples: RunExamples) -> String {
    let RunExamples { train, validation, teacher } = examples;
    let own = checksum(train.iter().chain(validation));
    let of_teacher = teacher.map(|teacher| format!(", teacher {:08x}", checksum(teacher.all())));
    let (training, of_teacher) = (train.len(), of_teacher.unwrap_or_default());
    format!("{training} training, {} validation, {own:08x}{of_teacher}", validation.len())
}

fn checksum<'a>(examples: impl Iterator<Item = &'a Example>) -> u32 {
    let mut sum = 0;
    for example in examples {
        for ids in [&example.input, &example.target] {
            sum = crc32c::crc32c_append(sum, &(ids.len() as u32).to_le_bytes());
            for id in ids {
                sum = crc32c::crc32c_append(sum, &id.to_le_bytes());
            }
        }
    }
    sum
}

impl State {
    /// Writes the file in full or not at all.
    ///
    /// # Errors
    /// [`Error::Io`]; the device's.
    pub fn write(&self, path: &Path) -> Result<()> {
        let metadata = Metadata {
            version: VERSION,
            position: self.position.clone(),
            layout: Some(*self.prompt.layout()).filter(|layout| !layout.is_plain_embeddings()),
            before: self.prompt.before().to_vec(),
            max_rows: self.max_rows,
            products: self.products.clone(),
            examples: self.examples.clone(),
            ranks: Some(self.ranks).filter(|ranks| *ranks > 1),
        };
        let failed = |text: String| Error::io(path)(std::io::Error::other(text));
        let metadata = serde_json::to_string(&metadata).map_err(|e| failed(e.to_string()))?;
        let named = [
            ("prompt", self.prompt.values()),
            ("m", &self.m),
            ("v", &self.v),
            ("initial", self.initial.values()),
        ];
        let named = named.into_iter().chain(self.best.as_ref().map(|best| ("best", best)));
        let on_cpu =
            |(name, tensor): (_, &Tensor)| Ok((name, tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?));
        let tensors = named.map(on_cpu).collect::<Result<Vec<_>>>()?;
        let metadata = HashMap::from([(KEY.to_owned(), metadata)]);
        let file = serialize(tensors, Some(metadata)).map_err(|e| failed(e.to_string()))?;
        write_atomically(path, |out| out.write_all(&file))
    }

    /// Reads a file that [`State::write`] wrote.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if the file can't be read, [`Error::Checkpoint`] if it is malformed or of another version.
    pub fn read(path: &Path) -> Result<Self> {
        let file = std::fs::read(path).map_err(Error::io(path))?;
        Self::decode(&file).map_err(|problem| Error::Checkpoint { path: path.to_path_buf(), problem })
    }

    fn decode(file: &[u8]) -> std::result::Result<Self, String> {
        let not = |what: &str, error: &dyn std::fmt::Display| format!("expected {what}: {error}");
        let (_, header) = SafeTensors::read_metadata(file).map_err(|e| not("a safetensors file", &e))?;
        let text = header.metadata().as_ref().and_then(|metadata| metadata.get(KEY));
        let text = text.ok_or_else(|| format!("expected metadata `{KEY}`, found none"))?;
        let Version { version } = serde_json::from_str(text).map_err(|e| not("a version", &e))?;
        if version != VERSION {
            return Err(format!(
                "expected version {VERSION} of the file, found {version}; go on with the gneiss that wrote it"
            ));
        }
        let Metadata { position, layout, before, max_rows, products, examples, ranks, .. } =
            serde_json::from_str(text).map_err(|e| not("a run's position", &e))?;
        let tensors = SafeTensors::deserialize(file).map_err(|e| not("a safetensors file", &e))?;
        let values = tensor(&tensors, "prompt")?;
        let layout = match (layout, values.dims()) {
            (Some(layout), _) => layout,
            (None, [rows, width]) => PromptLayout::plain(PromptKind::Embeddings, (*rows, *width)),
            (None, found) => return Err(format!("prompt: expected F32 [P, C], found {found:?}")),
        };
        layout.check()?;
        let get = |name: &str, expected: Shape| {
            let found = tensor(&tensors, name)?;
            if *found.shape() == expected {
                return Ok(found);
            }
            Err(format!("{name}: expected the prompt's shape {expected:?}, found {:?}", found.shape()))
        };
        let of_values = |name| get(name, layout.values_shape());
        let best = position.best.as_ref().map(|_| of_values("best")).transpose()?;
        let (values, m, v) = (of_values("prompt")?, of_values("m")?, of_values("v")?);
        let rows = get("initial", (layout.num_virtual_tokens, layout.width).into())?;
        let initial = Prefix::new(layout.kind, rows).after(&before).map_err(|error| error.to_string())?;
        let prompt = Prompt::from_values(layout, values, &initial).map_err(|error| error.to_string())?;
        let ranks = ranks.unwrap_or(1);
        Ok(Self { m, v, initial, best, prompt, position, max_rows, products, examples, ranks })
    }
}

#[derive(Deserialize)]
struct Version {
    version: u32,
}

fn tensor(tensors: &SafeTensors, name: &str) -> std::result::Result<Tensor, String> {
    let view = tensors.tensor(name).map_err(|error| format!("{name}: {error}"))?;
    if view.dtype() != Dtype::F32 {
        return Err(format!("{name}: expected F32, found {:?} {:?}", view.dtype(), view.shape()));
    }
    view.load(&Device::Cpu).map_err(|error| format!("{name}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::gpu::products::{ProductChoice, ProductClass, ProductDtype};

    fn state(products: Option<ProductChoices>) -> State {
        let rows = |value: f32| Tensor::full(value, (2, 3), &Device::Cpu).expect("a tensor");
        State {
            prompt: Prompt::embeddings(&rows(1.0)).expect("a prompt"),
            m: rows(2.0),
            v: rows(3.0),
            initial: Prefix::Embeddings(rows(4.0)),
            best: None,
            position: Position { step: 7, ..Position::default() },
            max_rows: 100,
            products,
            examples: "5 training".into(),
            ranks: 1,
        }
    }

    fn written(state: &State) -> (Vec<u8>, State) {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("checkpoint.safetensors");
        state.write(&path).expect("a file");
        (std::fs::read(&path).expect("the file"), State::read(&path).expect("the state"))
    }

    #[test]
    fn choices_of_products_come_back() {
        let class = ProductClass {
            rows: 8192,
            n: 4096,
            k: 12800,
            transposed: true,
            element: ProductDtype::Bf16,
            bias: false,
            add: true,
            alignment: 256,
        };
        let choices = vec![
            ProductChoice { class, algorithm: Some([u64::MAX, 0, 1, 2, 3, 4, 5, 6]) },
            ProductChoice { class: ProductClass { rows: 512, ..class }, algorithm: None },
        ];
        let products = Some(ProductChoices { library: "NVIDIA H100, cuBLASLt 130100".into(), choices });
        assert_eq!(written(&state(products.clone())).1.products, products);
    }

    #[test]
    fn tokens_before_the_prompt_come_back() {
        let mut state = state(None);
        assert!(written(&state).1.prompt.before().is_empty());
        state.prompt = state.prompt.after(&[5, 8]).expect("embeddings");
        let (_, read) = written(&state);
        assert_eq!((read.prompt.before(), read.initial.before()), (&[5, 8][..], &[5, 8][..]));
    }

    /// A state without choices is a file as those before there were choices.
    #[test]
    fn a_state_without_choices_is_read() {
        let (file, read) = written(&state(None));
        assert!(!file.windows(8).any(|part| part == b"products"), "no key of it");
        assert!(!file.windows(6).any(|part| part == b"layout"), "nor of a plain prompt");
        assert_eq!((read.products, read.max_rows, read.position.step), (None, 100, 7));
    }
}
