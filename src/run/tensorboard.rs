//! Event files for TensorBoard: scalars in TFRecord framing.
//!
//! ```text
//! u64 length   u32 crc(length)   event   u32 crc(event)        little endian, CRC-32C, masked
//! event        protobuf Event: wall_time 1 f64, step 2 i64, file_version 3 string, summary 5, session_log 7
//! summary      protobuf Summary: value 1 { tag 1 string, simple_value 2 f32 }
//! ```
//!
//! (`tensorflow/core/util/event.proto`, `tensorflow/core/lib/io/record_writer.h`.) `tests/run/main.rs` reads the
//! files with the `tensorboard` package. The only crate for them has had no release for years.

use crate::tune::{EpochRecord, StepRecord};
use crate::{Error, Result};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// An event file that a run writes.
pub struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// Creates a file in `folder`; readers merge all event files of a folder. With `step` > 0, for a resumed run, it
    /// makes them discard the events after that step in earlier files.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if the file can't be written.
    pub fn create(folder: &Path, step: usize) -> Result<Self> {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let name = format!("events.out.tfevents.{:010}.{:09}.gneiss", since.as_secs(), since.subsec_nanos());
        let path = folder.join(name);
        let file = File::create_new(&path).map_err(Error::io(&path))?;
        let mut events = Self { path, file };
        events.event(0, &bytes(3, b"brain.Event:2"))?;
        if step > 0 {
            // SessionLog { status: START }.
            events.event(step + 1, &bytes(7, &[field(1, 0), vec![1]].concat()))?;
        }
        Ok(events)
    }

    /// Adds a step's loss, learning rate, gradient norm and throughput.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if the file can't be written.
    pub fn step(&mut self, record: &StepRecord) -> Result<()> {
        let scalars = [
            ("train/loss", record.loss),
            ("train/learning_rate", record.learning_rate),
            ("train/grad_norm", record.grad_norm),
            ("train/examples_per_second", record.examples as f64 / record.seconds),
        ];
        // A step that is too short for the clock has no throughput.
        let known = |(_, value): &&(&str, f64)| value.is_finite() || record.seconds > 0.0;
        let scalars: Vec<_> = scalars.iter().filter(known).copied().collect();
        self.scalars(record.step, &scalars)
    }

    /// Adds an epoch's losses at its last step.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if the file can't be written.
    pub fn epoch(&mut self, record: &EpochRecord) -> Result<()> {
        let scalars =
            [("epoch/train_loss", record.train_loss), ("epoch/validation_loss", record.validation_loss)];
        let there: Vec<_> = scalars.iter().filter_map(|(tag, value)| Some((*tag, (*value)?))).collect();
        self.scalars(record.step, &there)
    }

    fn scalars(&mut self, step: usize, scalars: &[(&str, f64)]) -> Result<()> {
        let value = |(tag, value): &(&str, f64)| {
            let simple = [field(2, 5), (*value as f32).to_le_bytes().to_vec()].concat();
            bytes(1, &[bytes(1, tag.as_bytes()), simple].concat())
        };
        let summary: Vec<u8> = scalars.iter().flat_map(value).collect();
        self.event(step, &bytes(5, &summary))
    }

    /// Appends an event in one write, so that a reader never sees half of one.
    fn event(&mut self, step: usize, what: &[u8]) -> Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let time = [field(1, 1), now.to_le_bytes().to_vec()].concat();
        let event = [time, field(2, 0), varint(step as u64), what.to_vec()].concat();
        let length = (event.len() as u64).to_le_bytes();
        let record = [&length[..], &masked(&length), &event, &masked(&event)].concat();
        self.file.write_all(&record).map_err(Error::io(&self.path))
    }
}

/// A field's number and wire type: 0 varint, 1 eight bytes, 2 bytes with their length, 5 four bytes.
fn field(number: u8, wire: u8) -> Vec<u8> {
    vec![number << 3 | wire]
}

fn bytes(number: u8, content: &[u8]) -> Vec<u8> {
    [field(number, 2), varint(content.len() as u64), content.to_vec()].concat()
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

/// The checksum as TFRecord stores it: rotated and shifted, so that checksums of checksums stay useful.
fn masked(data: &[u8]) -> [u8; 4] {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}
