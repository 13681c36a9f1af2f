//! A server under way.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};

/// A process that serves; it is killed if a test fails before it has ended.
pub struct ServerProcess {
    child: Child,
    /// Where it listens.
    pub url: String,
}

impl ServerProcess {
    /// Starts a command of gneiss that serves, and waits until it says where it listens.
    #[track_caller]
    pub fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let Some(url) = line.trim().strip_prefix("listening on ") else {
            let mut said = String::new();
            child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
            panic!("{line}{said}");
        };
        Self { url: url.to_owned(), child }
    }

    /// The process's id.
    pub fn pid(&self) -> String {
        self.child.id().to_string()
    }

    /// Asks it to end, as an operator would; what it said on stderr.
    #[track_caller]
    pub fn end(mut self) -> String {
        let pid = libc::pid_t::try_from(self.child.id()).unwrap();
        // SAFETY: a signal to a child that has not been waited for.
        assert_eq!(unsafe { libc::kill(pid, libc::SIGTERM) }, 0);
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}: {said}");
        said
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        // One that has ended is gone, which is no failure.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
