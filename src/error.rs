//! The library's only error type. Every message names the file, line or key, the expected value, the found value and,
//! if there is one, a hint.

use std::fmt;
use std::path::{Path, PathBuf};

/// Result of every fallible function of this library. All return the errors of the device and the libraries beneath;
/// an `# Errors` section says what else is one.
pub type Result<T> = std::result::Result<T, Error>;

/// Any error, from reading a file to the last step of a run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The operating system's error.
        source: std::io::Error,
    },
    /// Another program writes a folder.
    #[error(
        "{}: expected a folder that no other program writes, found one that {} writes; hint: wait until it ends, or take \
         another folder (--set name=NAME for a run)",
        path.display(), Writer(*process)
    )]
    InUse {
        /// The folder.
        path: PathBuf,
        /// Number of the process that writes it, if that is known.
        process: Option<u32>,
    },
    /// A configuration has problems; all of them are listed.
    #[error("{origin}: {}", Listed(problems, 0))]
    Config {
        /// File or command-line option with the configuration.
        origin: String,
        /// One entry for each problem: key, expected, found, hint.
        problems: Vec<String>,
    },
    /// A dataset has malformed rows; they are reported together, up to a limit.
    #[error("{}: {}", path.display(), Listed(problems, *more))]
    Data {
        /// The dataset file.
        path: PathBuf,
        /// One entry for each bad row: line, field, expected, found.
        problems: Vec<String>,
        /// Bad rows beyond those listed.
        more: usize,
    },
    /// A checkpoint or adapter file is malformed.
    #[error("{}: {problem}", path.display())]
    Checkpoint {
        /// The file or folder.
        path: PathBuf,
        /// Key or tensor, expected, found, hint.
        problem: String,
    },
    /// A checkpoint is of a kind that gneiss does not tune.
    #[error("{}: {what} is not supported; {hint}", path.display())]
    Unsupported {
        /// The checkpoint.
        path: PathBuf,
        /// The name of the unsupported part.
        what: String,
        /// A hint.
        hint: String,
    },
    /// A checkpoint could not be downloaded from the hub.
    #[error("hub: {repo}: {problem}\n  hint: {hint}")]
    Hub {
        /// `org/name@revision`.
        repo: String,
        /// The problem.
        problem: String,
        /// A hint.
        hint: String,
    },
    /// The tokenizer could not be read or failed on a text.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// An operation got tensors that do not fit together.
    #[error("{op}: expected {expected}, found {found}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// Expected shape, dtype or device.
        expected: String,
        /// Found shape, dtype or device.
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
        /// The prompt that was kept, and a hint.
        hint: String,
    },
    /// A device has too little memory for a single sequence with all layers but one recomputed.
    #[error(
        "{problem}\n  this was a single sequence with every layer recomputed; hint: model.dtype = \"bf16\" halves \
         f32 weights, and a lower data.max_input_tokens or prompt.num_virtual_tokens, a smaller model or ending other \
         programs on the device make room"
    )]
    OutOfMemory {
        /// The device's message.
        problem: String,
    },
    /// Ranks of one run differ, or one of them failed; every rank has this error.
    #[error("{problem}")]
    Ranks {
        /// The ranks, and what is wrong with them.
        problem: String,
        /// Whether the user's input caused it.
        is_bad_input: bool,
    },
    /// The device or its library failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// Any other error in the caller's input.
    #[error("{0}")]
    Invalid(String),
}

impl Error {
    /// An I/O error that names its path.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Self::Io { path, source }
    }

    /// An error of an operation that got tensors that do not fit together.
    pub(crate) fn shape(op: &'static str, expected: impl Into<String>, found: impl Into<String>) -> Self {
        Self::Shape { op, expected: expected.into(), found: found.into() }
    }

    /// Adds the name of the key, option or label to a tokenizer error; other errors stay as they are.
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
            Self::Ranks { is_bad_input, .. } => *is_bad_input,
            Self::Candle(_) | Self::Shape { .. } => false,
            _ => true,
        }
    }
}

/// The process of a number, or another one.
struct Writer(Option<u32>);

impl fmt::Display for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(process) => write!(f, "process {process}"),
            None => f.write_str("another process"),
        }
    }
}

/// Problems, one per line if there are several.
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
