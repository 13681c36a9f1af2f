//! The settings of requests to the hub.

use std::path::PathBuf;
use std::time::Duration;
use std::{fmt, fs};

use ureq::Agent;
use ureq::config::ConfigBuilder;
use ureq::typestate::AgentScope;

const LONGEST_PAUSE: Duration = Duration::from_secs(30);
const ENDPOINT: &str = "https://huggingface.co";

/// The settings of requests to the hub, and the folder for its files.
#[derive(Clone)]
pub struct HubOptions {
    /// Folder of the cache; `None` if no home folder is known.
    pub cache: Option<PathBuf>,
    /// URL of the hub, without a slash at its end.
    pub endpoint: String,
    /// Access token, for gated and private repositories.
    pub token: Option<String>,
    /// Whether only the cache is used.
    pub offline: bool,
    /// Number of attempts at a request, and at a download as long as no attempt makes progress; 5.
    pub attempts: u32,
    /// Pause after the first failed attempt, doubled after each further one; 1 s.
    pub pause: Duration,
    /// Longest wait for a connection or for the next bytes; 30 s.
    pub timeout: Duration,
    /// Whether downloads are shown on stderr; true.
    pub progress: bool,
}

/// Without the token, so that logs do not contain it.
impl fmt::Debug for HubOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubOptions")
            .field("cache", &self.cache)
            .field("endpoint", &self.endpoint)
            .field("token", &self.token.as_ref().map(|_| "..."))
            .field("offline", &self.offline)
            .field("attempts", &self.attempts)
            .field("pause", &self.pause)
            .field("timeout", &self.timeout)
            .field("progress", &self.progress)
            .finish()
    }
}

impl HubOptions {
    /// The settings of an agent for requests to the hub: an answer with an error's status is an answer.
    pub(super) fn agent(&self) -> ConfigBuilder<AgentScope> {
        let timeout = Some(self.timeout);
        Agent::config_builder()
            .http_status_as_error(false)
            .timeout_resolve(timeout)
            .timeout_connect(timeout)
            .timeout_recv_response(timeout)
            .timeout_per_read(timeout)
            .timeout_per_write(timeout)
            .user_agent(concat!("gneiss/", env!("CARGO_PKG_VERSION")))
    }

    /// The options by the environment: `HF_HOME` (default: `huggingface` in `XDG_CACHE_HOME`, or in `.cache` of the
    /// home folder), `HF_HUB_CACHE` (default: `hub` in `HF_HOME`), `HF_TOKEN` (default: the content of the file
    /// `HF_TOKEN_PATH`, which is `token` in `HF_HOME` by default), `HF_ENDPOINT`, `HF_HUB_OFFLINE` (1, true, yes or
    /// on).
    #[must_use]
    pub fn from_env() -> Self {
        Self::from_vars(|name| match name {
            "HOME" => std::env::home_dir()?.into_os_string().into_string().ok(),
            _ => std::env::var(name).ok(),
        })
    }

    /// As [`from_env`](Self::from_env), from variables that `var` returns; `HOME` is the home folder. An empty variable
    /// counts as unset.
    #[must_use]
    pub fn from_vars(var: impl Fn(&str) -> Option<String>) -> Self {
        let var = |name: &str| var(name).map(|value| value.trim().to_string()).filter(|v| !v.is_empty());
        let path = |name: &str| var(name).map(PathBuf::from);
        let caches = path("XDG_CACHE_HOME").or_else(|| path("HOME").map(|home| home.join(".cache")));
        let home = path("HF_HOME").or_else(|| caches.map(|caches| caches.join("huggingface")));
        let token_file = path("HF_TOKEN_PATH").or_else(|| home.as_ref().map(|home| home.join("token")));
        // A missing token file is the common case, not an error.
        let token_in_file = || fs::read_to_string(token_file?).ok();
        let token = var("HF_TOKEN").or_else(token_in_file).map(|token| token.trim().to_string());
        let offline = var("HF_HUB_OFFLINE").is_some_and(|value| {
            ["1", "true", "yes", "on"].iter().any(|yes| value.eq_ignore_ascii_case(yes))
        });
        Self {
            cache: path("HF_HUB_CACHE").or_else(|| home.map(|home| home.join("hub"))),
            endpoint: var("HF_ENDPOINT")
                .map_or_else(|| ENDPOINT.to_string(), |url| url.trim_end_matches('/').to_string()),
            token: token.filter(|token| !token.is_empty()),
            offline,
            attempts: 5,
            pause: Duration::from_secs(1),
            timeout: Duration::from_secs(30),
            progress: true,
        }
    }

    /// Waits after the `failed`th failure in a row.
    pub(super) fn pause(&self, failed: u32) {
        let pause = self.pause.saturating_mul(2u32.saturating_pow(failed - 1));
        std::thread::sleep(pause.min(LONGEST_PAUSE));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(vars: &[(&str, &str)]) -> HubOptions {
        HubOptions::from_vars(|name| vars.iter().find(|(key, _)| *key == name).map(|(_, v)| v.to_string()))
    }

    #[test]
    fn environment() {
        let plain = options(&[("HOME", "/home/x"), ("HF_ENDPOINT", "")]);
        assert_eq!(plain.cache, Some("/home/x/.cache/huggingface/hub".into()));
        assert_eq!(plain.endpoint, ENDPOINT);
        assert_eq!((plain.token, plain.offline), (None, false));

        let xdg = options(&[("HOME", "/home/x"), ("XDG_CACHE_HOME", "/c")]);
        assert_eq!(xdg.cache, Some("/c/huggingface/hub".into()));
        assert_eq!(options(&[("HOME", "/x"), ("HF_HOME", "/hf")]).cache, Some("/hf/hub".into()));
        assert_eq!(options(&[("HF_HUB_CACHE", "/hub"), ("HF_HOME", "/hf")]).cache, Some("/hub".into()));
        assert_eq!(options(&[]).cache, None);
        assert_eq!(options(&[("HF_ENDPOINT", "http://mirror:1/")]).endpoint, "http://mirror:1");
        for (value, offline) in [("1", true), ("TRUE", true), ("Yes", true), ("on", true), ("0", false)] {
            assert_eq!(options(&[("HF_HUB_OFFLINE", value)]).offline, offline, "{value}");
        }
    }

    #[test]
    fn token_comes_from_the_variable_or_the_file() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().to_str().unwrap();
        assert_eq!(options(&[("HF_HOME", path)]).token, None);
        fs::write(home.path().join("token"), "hf_file\n").unwrap();
        let filed = options(&[("HF_HOME", path)]);
        assert_eq!(filed.token.as_deref(), Some("hf_file"));
        assert!(!format!("{filed:?}").contains("hf_file"));
        let set = options(&[("HF_HOME", path), ("HF_TOKEN", " hf_set ")]);
        assert_eq!(set.token.as_deref(), Some("hf_set"));
    }
}
