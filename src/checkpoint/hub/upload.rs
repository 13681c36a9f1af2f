//! Uploads to the hub: a repository is created if it does not exist, large files go to its storage, and one commit adds all
//! files. A repeated upload sends no content that the storage has already.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use ureq::Agent;

use super::HubOptions;
use crate::{Error, Result};

/// Bytes of a file by which the hub decides how it stores it.
const SAMPLE: usize = 512;
const JSON: &str = "application/json";
const LFS: &str = "application/vnd.git-lfs+json";

/// A file of an upload.
#[derive(Debug, Clone)]
pub struct UploadFile {
    /// Its path in the repository.
    pub path: String,
    /// Its bytes.
    pub content: Vec<u8>,
}

/// What is uploaded, and to which repository.
#[derive(Debug, Clone)]
pub struct Upload {
    /// `org/name`.
    pub repo: String,
    /// Whether a new repository is private; one that exists stays as it is.
    pub is_private: bool,
    /// The commit's message.
    pub summary: String,
    /// The files.
    pub files: Vec<UploadFile>,
}

/// An answer of the hub.
struct HubReply {
    status: u16,
    body: Value,
}

/// The requests of one upload.
struct Uploader<'a> {
    upload: &'a Upload,
    options: &'a HubOptions,
    token: &'a str,
    agent: Agent,
}

impl Upload {
    /// Creates the repository if necessary and commits the files; returns the page of the repository.
    ///
    /// # Errors
    /// Returns [`Error::Hub`] without a token, if the hub can't be reached, or if it refuses a request.
    pub fn run(&self, options: &HubOptions) -> Result<String> {
        let error = |problem: &str, hint: &str| Error::Hub {
            repo: self.repo.clone(),
            problem: problem.into(),
            hint: hint.into(),
        };
        if options.offline {
            return Err(error("HF_HUB_OFFLINE is set, and an upload needs the hub", "unset it"));
        }
        let token = options.token.as_deref().ok_or_else(|| {
            error("an upload needs a token with write access", "set HF_TOKEN, or run `hf auth login`")
        })?;
        let uploader = Uploader { upload: self, options, token, agent: options.agent().build().into() };
        uploader.create()?;
        uploader.commit()?;
        Ok(format!("{}/{}", options.endpoint, self.repo))
    }
}

impl Uploader<'_> {
    fn create(&self) -> Result<()> {
        let Upload { repo, is_private, .. } = self.upload;
        let (organization, name) = repo.split_once('/').unwrap_or(("", repo));
        let body =
            json!({ "type": "model", "organization": organization, "name": name, "private": is_private });
        let reply = self.post("/api/repos/create", JSON, body.to_string().as_bytes())?;
        // 409: it exists.
        if reply.status == 409 { Ok(()) } else { self.expect(reply, "creating the repository").map(drop) }
    }

    /// Uploads the large files and adds all of them in one commit.
    fn commit(&self) -> Result<()> {
        let Upload { repo, files, summary, .. } = self.upload;
        let large = self.large()?;
        let mut lines = vec![json!({ "key": "header", "value": { "summary": summary, "description": "" } })];
        for (file, is_large) in files.iter().zip(large) {
            let path = &file.path;
            lines.push(if is_large {
                let oid = self.store(file)?;
                let value = json!({ "path": path, "algo": "sha256", "oid": oid, "size": file.content.len() });
                json!({ "key": "lfsFile", "value": value })
            } else {
                let content = STANDARD.encode(&file.content);
                json!({ "key": "file", "value": { "path": path, "content": content, "encoding": "base64" } })
            });
        }
        let body: String = lines.iter().map(|line| format!("{line}\n")).collect();
        let url = format!("/api/models/{repo}/commit/main");
        let reply = self.post(&url, "application/x-ndjson", body.as_bytes())?;
        self.expect(reply, "the commit").map(drop)
    }

    /// Whether the hub keeps each file in its storage for large files.
    fn large(&self) -> Result<Vec<bool>> {
        let files = self.upload.files.iter().map(|file| {
            let sample = STANDARD.encode(&file.content[..file.content.len().min(SAMPLE)]);
            json!({ "path": file.path, "size": file.content.len(), "sample": sample })
        });
        let body = json!({ "files": files.collect::<Vec<_>>() });
        let url = format!("/api/models/{}/preupload/main", self.upload.repo);
        let reply = self.expect(self.post(&url, JSON, body.to_string().as_bytes())?, "the list of files")?;
        let answers = reply["files"].as_array().cloned().unwrap_or_default();
        let mode = |file: &UploadFile| answers.iter().find(|answer| answer["path"] == file.path.as_str());
        let modes = self.upload.files.iter().map(|file| {
            let mode = mode(file).and_then(|answer| answer["uploadMode"].as_str());
            mode.map(|mode| mode == "lfs").ok_or_else(|| {
                self.error(format!("the list of files: expected an upload mode for {}", file.path), CHECK)
            })
        });
        modes.collect()
    }

    /// Uploads a file to the storage unless it is there; returns its SHA-256.
    fn store(&self, file: &UploadFile) -> Result<String> {
        let oid: String = Sha256::digest(&file.content).iter().map(|byte| format!("{byte:02x}")).collect();
        let object = json!({ "oid": oid, "size": file.content.len() });
        let body = json!({
            "operation": "upload", "transfers": ["basic"], "hash_algo": "sha256", "ref": { "name": "main" },
            "objects": [object],
        });
        let url = format!("/{}.git/info/lfs/objects/batch", self.upload.repo);
        let reply = self.expect(self.post(&url, LFS, body.to_string().as_bytes())?, &file.path)?;
        let answer = &reply["objects"][0];
        if let Some(problem) = answer["error"]["message"].as_str() {
            return Err(self.error(format!("{}: {problem}", file.path), CHECK));
        }
        let actions = &answer["actions"];
        if let Some(href) = actions["upload"]["href"].as_str() {
            let reply = self.send("PUT", href, &actions["upload"]["header"], &file.content)?;
            self.expect(reply, &file.path)?;
        }
        if let Some(href) = actions["verify"]["href"].as_str() {
            let reply =
                self.send("POST", href, &json!({ "content-type": LFS }), object.to_string().as_bytes())?;
            self.expect(reply, &file.path)?;
        }
        Ok(oid)
    }

    fn post(&self, path: &str, content_type: &str, body: &[u8]) -> Result<HubReply> {
        let headers = json!({ "content-type": content_type, "accept": content_type });
        self.send("POST", &format!("{}{path}", self.options.endpoint), &headers, body)
    }

    /// Sends a request; again if the connection fails or the server has an error of its own. The token goes to the hub only.
    fn send(&self, method: &str, url: &str, headers: &Value, body: &[u8]) -> Result<HubReply> {
        let mut failed = 0;
        loop {
            let mut request = if method == "PUT" { self.agent.put(url) } else { self.agent.post(url) };
            for (name, value) in headers.as_object().into_iter().flatten() {
                request = request.header(name, value.as_str().unwrap_or_default());
            }
            if url.starts_with(&format!("{}/", self.options.endpoint)) {
                request = request.header("authorization", format!("Bearer {}", self.token));
            }
            let problem = match request.send(body) {
                Ok(mut response) => {
                    let status = response.status().as_u16();
                    let text = response.body_mut().read_to_string().unwrap_or_default();
                    if status < 500 && status != 429 {
                        let body = serde_json::from_str(&text).unwrap_or(Value::String(text));
                        return Ok(HubReply { status, body });
                    }
                    format!("the hub answered {status}")
                }
                Err(error) => error.to_string(),
            };
            failed += 1;
            if failed >= self.options.attempts {
                let hint = "try again later: files that are stored are not sent again";
                return Err(self.error(format!("{problem}, {failed} times"), hint));
            }
            self.options.pause(failed);
        }
    }

    /// The body of a good answer.
    fn expect(&self, reply: HubReply, what: &str) -> Result<Value> {
        if reply.status < 300 {
            return Ok(reply.body);
        }
        let said = reply.body["error"].as_str().or(reply.body.as_str()).unwrap_or_default().trim();
        let hint = match reply.status {
            401 | 403 => "check that the token has write access to this organisation",
            404 => "check the spelling of ORG/NAME",
            _ => CHECK,
        };
        Err(self.error(format!("{what}: the hub answered {} {said}", reply.status), hint))
    }

    fn error(&self, problem: String, hint: &str) -> Error {
        Error::Hub { repo: self.upload.repo.clone(), problem, hint: hint.into() }
    }
}

const CHECK: &str = "check HF_ENDPOINT, and the settings of the repository on the hub";
