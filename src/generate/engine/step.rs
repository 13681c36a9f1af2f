//! One step: the next rows of every running request in one pass through the model.

use super::{Engine, RunningSequence, SequenceId, StepOutput};
use crate::generate::Event;
use crate::generate::choose::{TargetRows, choose};
use crate::model::Continuation;
use crate::{Error, Result};

/// The part of a sequence that is processed in a step.
struct SequencePart {
    /// Index in `running`.
    sequence: usize,
    tokens: Vec<u32>,
    targets: usize,
}

impl SequencePart {
    fn next<'a>(&'a self, running: &[RunningSequence]) -> Continuation<'a> {
        let RunningSequence { prefix, own, filled, .. } = &running[self.sequence];
        Continuation {
            tokens: &self.tokens,
            prefix: prefix.rows.clone(),
            first_position: prefix.first_position,
            own: own.clone(),
            filled: *filled,
            targets: self.targets,
        }
    }
}

impl Engine<'_> {
    /// Runs one step, with fewer rows if the device runs out of memory.
    pub(super) fn advance(&mut self, output: &mut StepOutput) -> Result<()> {
        self.end_overdue(&mut output.events);
        output.rows = self.admit(&mut output.events)?;
        if output.rows > 0 {
            self.deliver(&mut output.events);
        }
        loop {
            let parts = self.parts();
            let rows = parts.iter().map(|part| part.tokens.len()).sum::<usize>();
            if rows == 0 {
                return Ok(());
            }
            match self.run(&parts) {
                Ok(()) => {
                    self.step_rows.succeeded();
                    output.sequences = parts.len();
                    output.rows += rows;
                    self.deliver(&mut output.events);
                    return Ok(());
                }
                Err(error) if self.shortage.caused(&error) => {
                    if let Some(decoding) = &mut self.decoding {
                        decoding.stop(self.model)?;
                    }
                    if !self.cache.can_run_again() {
                        self.end_all(&parts, &error, output);
                    } else if self.step_rows.halve(rows) {
                        output.less_rows = Some(self.step_rows.current());
                    } else {
                        let index = parts[0].sequence;
                        output.events.push((self.running[index].id, Event::no_memory(&error)));
                        self.end(index);
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Ends the sequences of a pass that failed and can't be run again; later steps have fewer rows.
    fn end_all(&mut self, parts: &[SequencePart], error: &Error, output: &mut StepOutput) {
        let rows = parts.iter().map(|part| part.tokens.len()).sum();
        output.less_rows = self.step_rows.halve(rows).then(|| self.step_rows.current());
        let mut sequences: Vec<usize> = parts.iter().map(|part| part.sequence).collect();
        sequences.sort_unstable_by(|a, b| b.cmp(a));
        for index in sequences {
            output.events.push((self.running[index].id, Event::no_memory(error)));
            self.end(index);
        }
    }

    /// Runs `parts` through the model. If it fails before tokens are chosen, nothing is changed but the states of Mamba2
    /// layers.
    fn run(&mut self, parts: &[SequencePart]) -> Result<()> {
        let next: Vec<Continuation> = parts.iter().map(|part| part.next(&self.running)).collect();
        let step = match &mut self.decoding {
            Some(decoding) => decoding.run(self.model, (&self.no_prompts, &mut self.cache), &next)?,
            None => None,
        };
        let computed = match step {
            Some(logits) => TargetRows::Logits(logits),
            None => {
                let batch = self.cache.pack(&next)?;
                TargetRows::Hidden(self.model.infer(&batch, &self.no_prompts, &mut self.cache)?)
            }
        };
        self.choose(parts, &computed)?;
        for part in parts {
            self.running[part.sequence].filled += part.tokens.len();
        }
        Ok(())
    }

    /// Moves the sequences' events to `events`, and ends the sequences that are complete.
    fn deliver(&mut self, events: &mut Vec<(SequenceId, Event)>) {
        for sequence in &mut self.running {
            let id = sequence.id;
            events.extend(sequence.events.drain(..).map(|event| (id, event)));
        }
        for index in (0..self.running.len()).rev() {
            let ended = events.iter().any(|(id, event)| *id == self.running[index].id && event.is_last());
            if ended {
                self.end(index);
            }
        }
    }

    /// The next rows of each sequence: one token of each that generates, then as much text as the step has room for.
    /// Parts are sorted by their prefix, so that those with one prefix are adjacent.
    fn parts(&self) -> Vec<SequencePart> {
        let mut room = self.step_rows.current();
        let (mut texts, mut parts) = (Vec::new(), Vec::new());
        for (i, sequence) in self.running.iter().enumerate() {
            match sequence.generated.last() {
                Some(token) if room > 0 => {
                    parts.push(SequencePart { sequence: i, tokens: vec![*token], targets: 1 });
                    room -= 1;
                }
                Some(_) => {}
                None => texts.push(i),
            }
        }
        for i in texts {
            let sequence = &self.running[i];
            let text = sequence.text();
            let end = text.len().min(sequence.filled + room);
            if end > sequence.filled {
                let targets = end.saturating_sub(sequence.first_target().max(sequence.filled));
                let tokens = text[sequence.filled..end].to_vec();
                room -= tokens.len();
                parts.push(SequencePart { sequence: i, tokens, targets });
            }
        }
        parts.sort_by_key(|part| {
            let sequence = &self.running[part.sequence];
            (sequence.prefix.rows.start, sequence.own.start)
        });
        parts
    }

    /// Evaluates the logits of the target rows, of which `computed` holds one or more of each part.
    fn choose(&mut self, parts: &[SequencePart], computed: &TargetRows) -> Result<()> {
        let mut rows = Vec::new();
        for part in parts {
            let sequence = &self.running[part.sequence];
            let first = sequence.filled + part.tokens.len() - part.targets;
            rows.extend((first..first + part.targets).map(|row| (part.sequence, row)));
        }
        choose(self.model, computed, &rows, &mut self.running, &mut self.shortage)
    }
}
