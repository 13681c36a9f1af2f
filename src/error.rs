//! The library's one error type. Every message names the file, line or key, what was expected, what
//! was found and, where there is one, a hint.

use std::fmt;
use std::path::{Path, PathBuf};

/// Result of every fallible function of this library.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong, from reading a file to the last step of a run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A configuration has problems; all of them are listed.
    #[error("{origin}: {}", Listed(problems, 0))]
    Config {
        /// File, or the command-line option, that the configuration came from.
        origin: String,
        /// One entry a problem: key, what was expected, what was found, hint.
        problems: Vec<String>,
    },
    /// A dataset has malformed rows; they are reported together, up to a limit.
    #[error("{}: {}", path.display(), Listed(problems, *more))]
    Data {
        /// The dataset file.
        path: PathBuf,
        /// One entry a bad row: line, field, what was expected and found.
        problems: Vec<String>,
        /// Bad rows beyond those listed.
        more: usize,
    },
    /// A checkpoint or adapter file is not what it has to be.
    #[error("{}: {problem}", path.display())]
    Checkpoint {
        /// The file or folder.
        path: PathBuf,
        /// Key or tensor, what was expected, what was found, hint.
        problem: String,
    },
    /// A checkpoint is of a kind that gneiss does not tune.
    #[error("{}: {what} is not supported; {hint}", path.display())]
    Unsupported {
        /// The checkpoint.
        path: PathBuf,
        /// What is not supported, by its name.
        what: String,
        /// What to do instead.
        hint: String,
    },
    /// A checkpoint could not be had from the hub.
    #[error("hub: {repo}: {problem}\n  hint: {hint}")]
    Hub {
        /// `org/name@revision`.
        repo: String,
        /// What happened.
        problem: String,
        /// What to do about it.
        hint: String,
    },
    /// The tokenizer could not be read or failed on a text.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// An operation was given tensors that do not fit together.
    #[error("{op}: expected {expected}, found {found}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// Shape, dtype or device that was expected.
        expected: String,
        /// What it was given.
        found: String,
    },
    /// Training produced a value that is not finite.
    #[error("step {step}: {what} is {value}; {hint}")]
    NotFinite {
        /// Optimizer step, counted from 1.
        step: usize,
        /// The quantity.
        what: &'static str,
        /// Its value.
        value: f64,
        /// What was kept and what to try.
        hint: String,
    },
    /// A device has too little memory for a single sequence, all blocks but one recomputed.
    #[error(
        "{problem}\n  this was a single sequence with every block recomputed; hint: model.dtype = \"bf16\" halves \
         f32 weights, and a lower data.max_input_tokens or prompt.num_virtual_tokens, a smaller model or ending other \
         programs on the device make room"
    )]
    OutOfMemory {
        /// What the device said.
        problem: String,
    },
    /// The device or its library failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// Anything else that is the caller's to mend.
    #[error("{0}")]
    Invalid(String),
}

impl Error {
    /// An I/O error that names its path.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Self::Io { path, source }
    }

    /// The tokenizer's error with the key, option or label whose text it is about; another error as it is.
    pub fn in_text(self, name: &str) -> Self {
        match self {
            Self::Tokenizer(problem) => Self::Tokenizer(format!("{name}: {problem}")),
            other => other,
        }
    }

    /// Whether the user's input caused this (exit code 2), rather than a failure (exit code 1).
    pub fn is_bad_input(&self) -> bool {
        match self {
            Self::Io { source, .. } => source.kind() == std::io::ErrorKind::NotFound,
            Self::Hub { .. } | Self::NotFinite { .. } | Self::OutOfMemory { .. } => false,
            Self::Candle(_) | Self::Shape { .. } => false,
            _ => true,
        }
    }
}

/// Problems, one a line where there are several.
struct Listed<'a>(&'a [String], usize);

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(problems, more) = self;
        if let ([only], 0) = (problems, more) {
            return f.write_str(only);
        }
        write!(f, "{} problems", problems.len() + more)?;
        for problem in *problems {
            write!(f, "\n  {problem}")?;
        }
        if *more > 0 {
            write!(f, "\n  and {more} more")?;
        }
        Ok(())
    }
}
