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

            /// [`Error::Invalid`] with all names where `name` is none of them.
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
    /// What the soft prompt's rows are before the first step.
    InitMethod {
        /// The embeddings of the init text's tokens, tiled or cut to the number of virtual tokens.
        Text = "text",
        /// The embeddings of tokens drawn from the vocabulary.
        Vocab = "vocab",
        /// Random numbers; they start off the embeddings' manifold and learn worse.
        Random = "random",
        /// The rows of an adapter.
        File = "file",
    }
}

choices! {
    /// What the outputs of a dataset are.
    Task {
        /// One of a few labels, each scored as a whole.
        Classification = "classification",
        /// Free text.
        Generation = "generation",
    }
}

choices! {
    /// How the learning rate goes on after its linear warm-up.
    Schedule {
        /// It falls to 0 in a straight line.
        Linear = "linear",
        /// It falls to 0 along half a cosine.
        Cosine = "cosine",
        /// It stays.
        Constant = "constant",
    }
}

choices! {
    /// Which prompt of a run becomes its adapter.
    Keep {
        /// The one with the lowest validation loss.
        Best = "best",
        /// The one after the last step.
        Last = "last",
    }
}

choices! {
    /// What a step does whose loss or gradient is not finite.
    OnNotFinite {
        /// It ends the run; the last good prompt is saved.
        Stop = "stop",
        /// It leaves the prompt as it was and is counted.
        Skip = "skip",
    }
}
