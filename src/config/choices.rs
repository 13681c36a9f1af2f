//! The values that a configuration key chooses among.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// An enum whose variants have one name each, the same in TOML, in messages and on the command line.
macro_rules! choices {
    ($(#[$about:meta])* $choice:ident { $($(#[$doc:meta])* $variant:ident = $name:literal,)+ }) => {
        $(#[$about])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum $choice {
            $($(#[$doc])* #[serde(rename = $name)] $variant,)+
        }

        impl $choice {
            /// All values.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The value's name in a configuration.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)+
                }
            }
        }

        impl fmt::Display for $choice {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.name())
            }
        }

        impl FromStr for $choice {
            type Err = Error;

            /// Returns [`Error::Invalid`] with all names if `name` is none of them.
            fn from_str(name: &str) -> Result<Self> {
                Self::ALL.iter().copied().find(|value| value.name() == name).ok_or_else(|| {
                    let names: Vec<_> = Self::ALL.iter().map(|value| value.name()).collect();
                    Error::Invalid(format!("expected {}, found {name:?}", one_of(&names)))
                })
            }
        }
    };
}

/// `a`, `b` or `c`.
fn one_of(names: &[&str]) -> String {
    match names {
        [] => String::new(),
        [only] => (*only).to_string(),
        [first @ .., last] => format!("{} or {last}", first.join(", ")),
    }
}

choices! {
    /// The number format that the model's weights are computed in.
    DtypeChoice {
        /// bf16 on a GPU and on a CPU that has instructions for it (AVX512-BF16, AMX), f32 on another CPU.
        Auto = "auto",
        /// 32-bit floats.
        F32 = "f32",
        /// bfloat16.
        Bf16 = "bf16",
        /// IEEE half precision.
        F16 = "f16",
    }
}

choices! {
    /// What a soft prompt puts in front of every input.
    PromptKind {
        /// Embeddings of virtual tokens (prompt tuning).
        Embeddings = "embeddings",
        /// Keys and values of virtual tokens in every attention layer (prefix tuning).
        Prefix = "prefix",
    }
}

choices! {
    /// How the rows of a soft prompt are made of its trainable values.
    Reparameterization {
        /// The rows are the trainable values.
        None = "none",
        /// A row is a trainable row plus the output of a small network that all rows share (Residual Prompt Tuning).
        Residual = "residual",
        /// The rows are the output of PEFT's encoder: that of P-tuning for embeddings, `prefix_projection` for a prefix.
        Mlp = "mlp",
    }
}

choices! {
    /// Where the virtual tokens stand.
    PromptPosition {
        /// Before everything, the beginning-of-text token included, as in PEFT.
        Start = "start",
        /// After the text that the verbalizer has before `{{input}}`, such as a system turn or an instruction. PEFT has no such
        /// position: gneiss alone reads the adapter, and `gneiss export --bake` makes a checkpoint for other engines.
        AfterHead = "after_head",
    }
}

choices! {
    /// The start of the soft prompt's rows.
    InitMethod {
        /// The embeddings of the init text's tokens, tiled or cut to the number of virtual tokens.
        Text = "text",
        /// The embeddings of tokens drawn from the vocabulary.
        Vocab = "vocab",
        /// Random numbers. They are unlike any token's embedding and learn worse.
        Random = "random",
        /// The rows of an existing adapter.
        File = "file",
    }
}

choices! {
    /// What the outputs of a dataset are.
    Task {
        /// One of a few labels; the likelihood of each whole label is scored.
        Classification = "classification",
        /// Free text.
        Generation = "generation",
    }
}

choices! {
    /// The learning rate after its linear warm-up.
    Schedule {
        /// Linear decay to 0.
        Linear = "linear",
        /// Cosine decay to 0.
        Cosine = "cosine",
        /// It stays constant.
        Constant = "constant",
    }
}

choices! {
    /// Which prompt of a run is saved as its adapter.
    Keep {
        /// The prompt with the lowest validation loss.
        Best = "best",
        /// The prompt after the last step.
        Last = "last",
    }
}

choices! {
    /// What happens if the loss or the gradient of a step is not finite.
    OnNotFinite {
        /// The run ends; the last good prompt is saved.
        Stop = "stop",
        /// The step is skipped and counted; the prompt stays as it was.
        Skip = "skip",
    }
}

choices! {
    /// How the values of a sweep's trials are chosen.
    SweepMethod {
        /// All combinations of the values.
        Grid = "grid",
        /// Values drawn at random, `sweep.trials` times.
        Random = "random",
    }
}

choices! {
    /// What the trials of a sweep are compared by.
    SweepMetric {
        /// The loss on the validation file, nats per target token; lower is better.
        ValidationLoss = "validation_loss",
        /// In a classification the share of validation rows whose expected label is the likeliest; higher is better.
        ValidationAccuracy = "validation_accuracy",
    }
}
