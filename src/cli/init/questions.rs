//! Questions on a terminal, each with a proposal.

use gneiss::Error;
use gneiss::config::Task;
use std::io::{BufRead, Write};

/// Where answers come from and questions go.
type Terminal<'a> = (&'a mut dyn BufRead, &'a mut dyn Write);

/// Asks on a terminal; without one every answer is the proposal.
pub(super) struct Questions<'a>(Option<Terminal<'a>>);

impl<'a> Questions<'a> {
    pub fn new(terminal: Option<Terminal<'a>>) -> Self {
        Self(terminal)
    }

    /// The value of a flag, or the answer to a question; an empty answer is the proposal.
    pub fn answer(&mut self, question: &str, flag: Option<&str>, proposal: &str) -> anyhow::Result<String> {
        if let Some(value) = flag {
            return Ok(value.to_owned());
        }
        let answer = self.ask(&format!("{question} [{proposal}]: "))?;
        Ok(answer.filter(|answer| !answer.is_empty()).unwrap_or_else(|| proposal.to_owned()))
    }

    /// As [`Self::answer`], of a text in which `\n` stands for a line break.
    pub fn text(&mut self, question: &str, flag: Option<&str>, proposal: &str) -> anyhow::Result<String> {
        let answer = self.answer(question, flag, &proposal.replace('\n', "\\n"))?;
        Ok(answer.replace("\\n", "\n"))
    }

    /// An answer without a proposal; `missing` is the error if there is no terminal or no answer.
    pub fn required(&mut self, question: &str, missing: &str) -> anyhow::Result<String> {
        let answer = self.ask(&format!("{question}: "))?.filter(|answer| !answer.is_empty());
        answer.ok_or_else(|| Error::Invalid(missing.into()).into())
    }

    /// Classification or generation.
    pub fn choose(&mut self, question: &str, proposal: Task) -> anyhow::Result<Task> {
        loop {
            let answer = self.answer(
                &format!("{question}, classification or generation"),
                None,
                &proposal.to_string(),
            )?;
            match answer.as_str() {
                "classification" => return Ok(Task::Classification),
                "generation" => return Ok(Task::Generation),
                _ => continue,
            }
        }
    }

    /// The line that the user types, without spaces around it; `None` without a terminal or at its end.
    fn ask(&mut self, question: &str) -> anyhow::Result<Option<String>> {
        let Some((input, output)) = &mut self.0 else { return Ok(None) };
        write!(output, "{question}")?;
        output.flush()?;
        let mut line = String::new();
        Ok((input.read_line(&mut line)? > 0).then(|| line.trim().to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_answers_are_the_proposals() {
        let (mut input, mut output) = (&b"\n mine \nsay\\n{{input}}\nboth\ngeneration\n"[..], Vec::new());
        let mut questions = Questions::new(Some((&mut input, &mut output)));
        assert_eq!(questions.answer("model", None, "small").unwrap(), "small");
        assert_eq!(questions.answer("name", None, "dogs").unwrap(), "mine");
        assert_eq!(questions.answer("name", Some("flag"), "dogs").unwrap(), "flag");
        assert_eq!(questions.text("verbalizer", None, "a\nb").unwrap(), "say\n{{input}}");
        assert_eq!(questions.choose("task", Task::Classification).unwrap(), Task::Generation);
        // The end of the input.
        assert_eq!(questions.text("init text", None, "a\nb").unwrap(), "a\nb");
        assert!(questions.required("file", "no file").unwrap_err().to_string().contains("no file"));
        let output = String::from_utf8(output).unwrap();
        assert!(output.starts_with("model [small]: name [dogs]: verbalizer [a\\nb]: task, "), "{output}");
    }

    #[test]
    fn without_a_terminal_nothing_is_asked() {
        let mut questions = Questions::new(None);
        assert_eq!(questions.answer("model", None, "small").unwrap(), "small");
        assert!(questions.required("file", "no file").is_err());
    }
}
