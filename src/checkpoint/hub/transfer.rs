//! Downloads that continue after a broken connection.
//!
//! `hf-hub` 0.5 has its own download, which can't be used: it appends the bytes of an answer without checking that the
//! range was honoured, never compares lengths, never recovers from a part that is complete but not renamed, waits for a
//! silent server without limit, and sends the token to the target of a redirect. So only its cache layout is used:
//!
//! * A file is written to a part whose name contains the file's etag, each byte at its own offset. So a part is always
//!   a beginning of the file, even if two processes write it at once.
//! * An interrupted download continues from the part's length, or from the start if the server does not honour a range.
//! * A part is renamed to the file only when it has the length that the hub stated.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::Path;

use indicatif::{HumanBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};
use ureq::http::StatusCode;

use super::remote::{HubAnswer, HubAttempt, Remote, RequestFailure};
use crate::{Error, Result};

/// A file of the hub during its download.
pub(super) struct Download<'a> {
    /// The repository.
    pub remote: &'a Remote,
    /// Its commit.
    pub commit: &'a str,
    /// Name of the file in it.
    pub file: &'a str,
    /// Length in bytes, if the hub stated it.
    pub size: Option<u64>,
    /// The path for the bytes; the name must change with the content.
    pub part: &'a Path,
}

impl Download<'_> {
    /// Completes the part, starting from the bytes that are there.
    ///
    /// # Errors
    /// Returns [`Error::Hub`] if several attempts in a row brought no new byte; the part stays.
    pub(super) fn run(&self) -> Result<()> {
        let Self { file, part, remote, .. } = *self;
        let url = remote.url(self.commit, file);
        let bar = self.bar();
        let mut best = length(part)?;
        let mut failed = 0;
        loop {
            let why = match self.attempt(&url, &bar) {
                Ok(()) => break,
                Err(RequestFailure::Final(error)) => return Err(error),
                Err(RequestFailure::Passing(why) | RequestFailure::Unreachable(why)) => why,
            };
            let have = length(part)?;
            if have > best {
                (best, failed) = (have, 0);
            }
            failed += 1;
            if failed >= remote.options.attempts {
                bar.abandon();
                let of = self.size.map_or_else(|| "an unknown number of".to_string(), |n| n.to_string());
                return Err(remote.error(
                    format!("{file}: the download broke off at {have} of {of} bytes: {why}"),
                    "check the network and run the command again; what is there is not downloaded again",
                ));
            }
            remote.options.pause(failed);
        }
        bar.finish();
        Ok(())
    }

    /// One request for the missing bytes.
    fn attempt(&self, url: &str, bar: &ProgressBar) -> HubAttempt<()> {
        let Self { part, remote, .. } = *self;
        if let Some(size) = self.size
            && length(part)? > size
        {
            remove(part)?;
        }
        // Not truncated: the part is a beginning of the same content.
        let mut out = OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(false)
            .open(part)
            .map_err(Error::io(part))?;
        let have = length(part)?;
        if self.size == Some(have) {
            return Ok(out.sync_all().map_err(Error::io(part))?);
        }
        let answer = remote.request(false, url, have)?;
        if answer.status() == StatusCode::RANGE_NOT_SATISFIABLE {
            remove(part)?;
            return Err(RequestFailure::Passing(format!("the hub does not go on from byte {have}")));
        }
        if !answer.status().is_success() {
            return Err(remote.refused(&answer, self.file));
        }
        let (start, total) = extent(&answer)
            .filter(|(start, _)| *start == 0 || *start == have)
            .ok_or_else(|| RequestFailure::Passing(format!("the hub sent another range than {have}-")))?;
        let total = self.total(total)?;
        bar.set_length(total);
        out.seek(SeekFrom::Start(start)).map_err(Error::io(part))?;
        self.copy(answer.response.into_body().into_reader(), &mut out, start..total, bar)?;
        Ok(out.sync_all().map_err(Error::io(part))?)
    }

    /// Length of the complete file, by the hub's information and by the answer with the bytes.
    fn total(&self, stated: Option<u64>) -> Result<u64> {
        let Self { file, remote, .. } = self;
        match (self.size, stated) {
            (Some(size), Some(stated)) if size != stated => Err(remote.error(
                format!("{file}: the hub says {size} bytes and sends a file of {stated}"),
                "try again later, or another HF_ENDPOINT",
            )),
            (None, None) => Err(remote.error(
                format!("{file}: the hub does not say how long the file is"),
                "try another HF_ENDPOINT, or download the files by hand to a folder",
            )),
            (Some(total), _) | (None, Some(total)) => Ok(total),
        }
    }

    /// Writes a body that must contain the bytes `range` of the file.
    fn copy(
        &self,
        mut body: impl Read,
        out: &mut File,
        range: Range<u64>,
        bar: &ProgressBar,
    ) -> HubAttempt<()> {
        let mut buffer = vec![0; 256 * 1024];
        let mut at = range.start;
        loop {
            bar.set_position(at);
            let read = match body.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(RequestFailure::Passing(error.to_string())),
            };
            at += read as u64;
            if at > range.end {
                // The body is not the requested file, so none of it is kept.
                remove(self.part)?;
                return Err(RequestFailure::Passing(format!("more than {} bytes came", range.end)));
            }
            out.write_all(&buffer[..read]).map_err(Error::io(self.part))?;
        }
        if at < range.end {
            return Err(RequestFailure::Passing("the connection was closed".to_string()));
        }
        Ok(())
    }

    /// A bar on a terminal, otherwise one line.
    fn bar(&self) -> ProgressBar {
        let Self { file, size, remote, .. } = self;
        if !remote.options.progress {
            return ProgressBar::hidden();
        }
        let bar = ProgressBar::with_draw_target(*size, ProgressDrawTarget::stderr());
        if bar.is_hidden() {
            let size = size.map_or_else(String::new, |size| format!(" ({})", HumanBytes(size)));
            eprintln!("downloading {file}{size} of {}", remote.name);
            return bar;
        }
        let template = "{msg} [{wide_bar}] {bytes}/{total_bytes} {bytes_per_sec} {eta}";
        let style = ProgressStyle::with_template(template).expect("the template is a valid constant");
        bar.with_style(style).with_message(file.to_string())
    }
}

/// First byte of the body, and length of the complete file if the answer states it; `None` for a partial answer without
/// its start.
fn extent(answer: &HubAnswer) -> Option<(u64, Option<u64>)> {
    if answer.status() != StatusCode::PARTIAL_CONTENT {
        return Some((0, answer.own("content-length").and_then(|length| length.parse().ok())));
    }
    let (range, total) = answer.own("content-range")?.strip_prefix("bytes ")?.split_once('/')?;
    Some((range.split_once('-')?.0.parse().ok()?, total.parse().ok()))
}

/// Length of a file in bytes; 0 if there is none.
fn length(path: &Path) -> Result<u64> {
    match fs::metadata(path) {
        Ok(metadata) => Ok(metadata.len()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(0),
        Err(error) => Err(Error::io(path)(error)),
    }
}

/// Removes a part by its name, so that another process that writes it keeps its open file.
fn remove(part: &Path) -> Result<()> {
    match fs::remove_file(part) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io(part)(error)),
        _ => Ok(()),
    }
}
