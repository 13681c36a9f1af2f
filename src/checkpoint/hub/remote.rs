//! Requests to the hub: information about a file, redirects, and the meaning of errors.

use std::io::ErrorKind;

use ureq::http::{HeaderMap, Response, StatusCode, Uri, header};
use ureq::{Agent, Body};

use super::HubOptions;
use crate::layout::model_folder::CONFIG;
use crate::{Error, Result};

const MAX_REDIRECTS: usize = 10;
/// The hub's headers; for a large file it answers with a redirect that has the first two.
const LINKED_ETAG: &str = "x-linked-etag";
const LINKED_SIZE: &str = "x-linked-size";
const COMMIT: &str = "x-repo-commit";
const ERROR_CODE: &str = "x-error-code";

/// A repository on the hub.
pub(super) struct Remote {
    /// `org/name@revision`, for messages.
    pub name: String,
    repo: String,
    /// The settings of requests.
    pub options: HubOptions,
    agent: Agent,
}

/// The hub's information about a file.
#[derive(Debug)]
pub(super) struct Head {
    /// Commit that the revision stands for.
    pub commit: String,
    /// Name of the content, which is valid as a file name.
    pub etag: String,
    /// Length in bytes, if the hub states it.
    pub size: Option<u64>,
}

/// The hub's answer about a file.
#[derive(Debug)]
pub(super) enum FileLookup {
    /// The file exists.
    File(Head),
    /// The revision has no such file; `certain` if the hub stated that as the reason.
    Absent { certain: bool },
}

/// The failure of a request or a download.
pub(super) enum RequestFailure {
    /// Another attempt may succeed.
    Passing(String),
    /// No connection could be made. In the middle of a download the network may come back; before it, the machine has
    /// no network, and waiting does not help.
    Unreachable(String),
    /// Another attempt would fail as well.
    Final(Error),
}

impl From<Error> for RequestFailure {
    fn from(error: Error) -> Self {
        Self::Final(error)
    }
}

/// Result of one attempt.
pub(super) type HubAttempt<T> = std::result::Result<T, RequestFailure>;

/// An answer, after redirects.
pub(super) struct HubAnswer {
    /// The last answer.
    pub response: Response<Body>,
    /// Whether the last answer came from the hub itself and not from a storage host.
    at_hub: bool,
    /// Headers of the hub's own answers, the last one first.
    hops: Vec<HeaderMap>,
}

impl HubAnswer {
    /// Status of the last answer.
    pub(super) fn status(&self) -> StatusCode {
        self.response.status()
    }

    /// A header of the last answer.
    pub(super) fn own(&self, name: &str) -> Option<&str> {
        text(self.response.headers(), name)
    }

    /// A header of the hub's own answers.
    fn get(&self, name: &str) -> Option<&str> {
        self.hops.iter().find_map(|headers| text(headers, name))
    }
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

impl Remote {
    /// `name` is `org/name@revision`, `repo` is `org/name`.
    pub(super) fn new(name: &str, repo: &str, options: &HubOptions) -> Self {
        let agent = options
            .agent()
            // Redirects are followed by this module: their headers are needed, and the token must go to the hub only.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .build();
        Self { name: name.to_string(), repo: repo.to_string(), options: options.clone(), agent: agent.into() }
    }

    /// The hub's URL of a file. `revision` must be URL-encoded.
    pub(super) fn url(&self, revision: &str, file: &str) -> String {
        format!("{}/{}/resolve/{revision}/{file}", self.options.endpoint, self.repo)
    }

    /// Requests a file's commit, etag and size. `revision` must be URL-encoded.
    pub(super) fn look_up(&self, revision: &str, file: &str) -> Result<FileLookup> {
        let url = self.url(revision, file);
        let mut failed = 0;
        loop {
            let why = match self.look_up_once(&url, file) {
                Ok(lookup) => return Ok(lookup),
                Err(RequestFailure::Final(error)) => return Err(error),
                Err(RequestFailure::Unreachable(problem)) => {
                    return Err(self.error(
                        problem,
                        "check the network; with HF_HUB_OFFLINE=1 only the cache is used, and a local \
                         folder works too",
                    ));
                }
                Err(RequestFailure::Passing(why)) => why,
            };
            failed += 1;
            if failed >= self.options.attempts {
                return Err(self.error(
                    format!("{file}: {why}, {failed} times"),
                    "try again later; with HF_HUB_OFFLINE=1 only the cache is used",
                ));
            }
            self.options.pause(failed);
        }
    }

    fn look_up_once(&self, url: &str, file: &str) -> HubAttempt<FileLookup> {
        let answer = self.request(true, url, 0)?;
        let status = answer.status();
        if status == StatusCode::NOT_FOUND {
            let code = answer.get(ERROR_CODE);
            // Some servers state no reason. Then the first requested file shows whether the revision exists.
            if code == Some("EntryNotFound") || (code.is_none() && file != CONFIG) {
                return Ok(FileLookup::Absent { certain: code.is_some() });
            }
        }
        if !status.is_success() && !status.is_redirection() {
            return Err(self.refused(&answer, file));
        }
        let missing = |what: &str| {
            RequestFailure::Final(self.error(
                format!("{file}: the answer has no usable {what}"),
                "check HF_ENDPOINT: it has to be a hub or a mirror of one",
            ))
        };
        let commit = answer.get(COMMIT).filter(|commit| is_file_name(commit));
        let etag = answer.get(LINKED_ETAG).or_else(|| answer.own("etag"));
        let etag = etag.map(|etag| etag.trim_start_matches("W/").trim_matches('"'));
        let own_length = || answer.own("content-length").filter(|_| status.is_success());
        Ok(FileLookup::File(Head {
            commit: commit.ok_or_else(|| missing(COMMIT))?.to_string(),
            etag: etag.filter(|etag| is_file_name(etag)).ok_or_else(|| missing("etag"))?.to_string(),
            size: answer.get(LINKED_SIZE).or_else(own_length).and_then(|size| size.parse().ok()),
        }))
    }

    /// Sends a request, from byte `from` on, and follows redirects. A request for the headers alone (`head`) does not
    /// follow a redirect to a storage host, whose answer does not matter.
    pub(super) fn request(&self, head: bool, url: &str, from: u64) -> HubAttempt<HubAnswer> {
        let hub = origin(url);
        let mut url = url.to_string();
        let mut hops = Vec::new();
        for _ in 0..=MAX_REDIRECTS {
            let at_hub = origin(&url) == hub;
            let mut request = if head { self.agent.head(&url) } else { self.agent.get(&url) };
            // A compressed answer would have another length and another etag.
            request = request.header(header::ACCEPT_ENCODING, "identity");
            if from > 0 {
                request = request.header(header::RANGE, format!("bytes={from}-"));
            }
            if let Some(token) = self.options.token.as_ref().filter(|_| at_hub) {
                request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
            }
            let response = request.call().map_err(|error| self.not_reached(&url, &error))?;
            if at_hub {
                hops.insert(0, response.headers().clone());
            }
            let location =
                text(response.headers(), "location").filter(|_| response.status().is_redirection());
            let next = location.map(|location| join(&url, location));
            match next {
                Some(next) if !head || origin(&next) == hub => url = next,
                _ => return Ok(HubAnswer { response, at_hub, hops }),
            }
        }
        Err(RequestFailure::Final(
            self.error(
                format!("more than {MAX_REDIRECTS} redirects, the last to {url}"),
                "check HF_ENDPOINT",
            ),
        ))
    }

    /// The meaning of a failed connection.
    fn not_reached(&self, url: &str, error: &ureq::Error) -> RequestFailure {
        let Some((_, host, _)) = origin(url) else {
            let problem = format!("`{url}` is no URL: {error}");
            return RequestFailure::Final(self.error(problem, "check HF_ENDPOINT, expected https://HOST"));
        };
        let unreachable = match error {
            ureq::Error::Io(error) => {
                use ErrorKind::{AddrNotAvailable, ConnectionRefused, HostUnreachable, NetworkUnreachable};
                [ConnectionRefused, AddrNotAvailable, HostUnreachable, NetworkUnreachable]
                    .contains(&error.kind())
            }
            ureq::Error::Timeout(ureq::Timeout::Connect | ureq::Timeout::Resolve) => true,
            ureq::Error::Timeout(_) => false,
            ureq::Error::Protocol(_) => false,
            // Names, proxies, certificates, headers: another attempt would fail in the same way.
            _ => true,
        };
        if !unreachable {
            return RequestFailure::Passing(format!("{host}: {error}"));
        }
        RequestFailure::Unreachable(format!("no connection to {host}: {error}"))
    }

    /// The meaning of an error status.
    pub(super) fn refused(&self, answer: &HubAnswer, file: &str) -> RequestFailure {
        let status = answer.status();
        if !answer.at_hub {
            // Links to storage expire; the next attempt gets a new one from the hub.
            return RequestFailure::Passing(format!("the storage host answered {status}"));
        }
        let code = answer.get(ERROR_CODE);
        let page = format!("{}/{}", self.options.endpoint, self.repo);
        let with_token = self.options.token.is_some();
        let (problem, hint) = match (status.as_u16(), code) {
            (408 | 429 | 500.., _) => return RequestFailure::Passing(format!("the hub answered {status}")),
            // Without a token the hub does not say which private repositories exist.
            (404, _) | (401, Some("RepoNotFound")) => (
                match code {
                    Some("RevisionNotFound") => format!("the repository has no such revision ({status})"),
                    Some("RepoNotFound") => format!("no such repository, or a private one ({status})"),
                    _ => format!("no such repository or revision ({status})"),
                },
                "check the spelling; if it is private, set HF_TOKEN; no local folder has this name either"
                    .to_string(),
            ),
            (401 | 403, _) if with_token => (
                format!("HF_TOKEN, or the token file, gives no access ({status})"),
                format!(
                    "accept the licence on {page} with the account of the token, or set another HF_TOKEN"
                ),
            ),
            (401 | 403, _) => (
                format!("it needs a token ({status})"),
                format!("accept the licence on {page} and set HF_TOKEN to a token of that account"),
            ),
            _ => (format!("{file}: the hub answered {status}"), "check HF_ENDPOINT".to_string()),
        };
        RequestFailure::Final(self.error(problem, hint))
    }

    /// An error about this repository.
    pub(super) fn error(&self, problem: String, hint: impl Into<String>) -> Error {
        Error::Hub { repo: self.name.clone(), problem, hint: hint.into() }
    }
}

/// Whether a name from a server can be used in the cache.
fn is_file_name(name: &str) -> bool {
    (1..=128).contains(&name.len())
        && !name.starts_with('.')
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
}

/// Scheme, host and port of a URL.
fn origin(url: &str) -> Option<(String, String, u16)> {
    let uri: Uri = url.parse().ok()?;
    let scheme = uri.scheme_str()?.to_ascii_lowercase();
    let port = uri.port_u16().unwrap_or(if scheme == "https" { 443 } else { 80 });
    Some((scheme, uri.host()?.to_ascii_lowercase(), port))
}

/// The URL of a `Location` header, relative to `url`.
fn join(url: &str, location: &str) -> String {
    if location.contains("://") && !location.starts_with('/') {
        return location.to_string();
    }
    let start = url.find("://").map_or(0, |at| at + 3);
    if location.starts_with("//") {
        return format!("{}{}", &url[..start - 2], location);
    }
    let path = url[start..].find('/').map_or(url.len(), |at| start + at);
    if location.starts_with('/') {
        return format!("{}{location}", &url[..path]);
    }
    let folder = url[path..].split('?').next().and_then(|path| path.rfind('/')).map_or(path, |at| path + at);
    format!("{}/{location}", &url[..folder])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_are_joined() {
        let url = "https://hub:1/a/b/resolve/main/x?q=/1";
        for (location, expected) in [
            ("/api/x?y", "https://hub:1/api/x?y"),
            ("https://cdn/x", "https://cdn/x"),
            ("//cdn/x", "https://cdn/x"),
            ("z", "https://hub:1/a/b/resolve/main/z"),
            ("/x?to=http://y", "https://hub:1/x?to=http://y"),
        ] {
            assert_eq!(join(url, location), expected);
        }
        assert_eq!(join("http://hub", "/x"), "http://hub/x");
        assert_eq!(origin("HTTPS://Hub/x"), origin("https://hub:443/y"));
        assert_ne!(origin("http://hub:1"), origin("http://hub:2"));
    }

    #[test]
    fn names_of_a_server_stay_in_the_cache() {
        for good in ["0123abc", "a-b_c.d", "5f-1"] {
            assert!(is_file_name(good), "{good}");
        }
        for bad in ["", ".", "..", ".x", "a/b", "../x", "a\\b", "a b", "a:b"] {
            assert!(!is_file_name(bad), "{bad}");
        }
    }
}
