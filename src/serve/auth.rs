//! The key that requests have to show, and the tokens that Cloud Pak clients get for it.

use crate::calendar;
use crate::serve::api_error::ApiError;
use axum::http::{HeaderMap, StatusCode, header};
use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};
use subtle::ConstantTimeEq;

/// Longest key or token in bytes; both are compared as if they had this length.
const LONGEST: usize = 512;
/// How long a token is taken.
const LIFETIME: Duration = Duration::from_secs(12 * 3600);

/// Headers that hold the key and nothing else, as clients of Azure and of Anthropic have them.
const KEY_HEADERS: [&str; 2] = ["api-key", "x-api-key"];

/// Who may ask.
pub(super) struct Auth {
    key: Option<String>,
    /// Tokens that are taken, the newest last. There are never more than three: a new one is made when the last has
    /// half of its lifetime behind it.
    tokens: Mutex<Vec<IssuedToken>>,
}

struct IssuedToken {
    token: String,
    since: SystemTime,
}

impl Auth {
    /// # Errors
    /// A key that no request could show.
    pub fn new(key: Option<String>) -> crate::Result<Self> {
        if let Some(key) = &key {
            let printable = key.bytes().all(|byte| byte.is_ascii_graphic());
            if key.is_empty() || key.len() > LONGEST || !printable {
                return Err(crate::Error::Invalid(format!(
                    "the API key: expected 1 to {LONGEST} printable ASCII characters without spaces, found {} bytes",
                    key.len()
                )));
            }
        }
        Ok(Self { key, tokens: Mutex::new(Vec::new()) })
    }

    /// Lets a request with the key, or with a token that was given for it, pass: as `Authorization: Bearer KEY`, or in
    /// one of [`KEY_HEADERS`].
    ///
    /// # Errors
    /// 401.
    pub fn check(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        let Some(key) = &self.key else { return Ok(()) };
        let passes = |given: &[u8]| same(key.as_bytes(), given) || self.knows(given);
        let bearers =
            headers.get_all(header::AUTHORIZATION).iter().filter_map(|value| bearer(value.as_bytes()));
        let keys = KEY_HEADERS.iter().flat_map(|name| headers.get_all(*name)).map(|value| value.as_bytes());
        // A client may show a key of its own for another server beside this one's.
        let (mut found, mut passed) = (false, false);
        for given in bearers.chain(keys).filter(|given| !given.is_empty()) {
            found = true;
            passed |= passes(given);
        }
        match (passed, found, headers.contains_key(header::AUTHORIZATION)) {
            (true, ..) => Ok(()),
            (false, true, _) => Err(unauthorized("the key that the request shows is not this server's")),
            (false, false, true) => Err(unauthorized(
                "`Authorization`: expected `Bearer KEY` with this server's key, found another form",
            )),
            (false, false, false) => Err(unauthorized(
                "expected the header `Authorization: Bearer KEY` (or `api-key: KEY`, `x-api-key: KEY`) with this \
                 server's key, found none",
            )),
        }
    }

    fn knows(&self, given: &[u8]) -> bool {
        let tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        let alive = |issued: &&IssuedToken| age(issued) < LIFETIME;
        // Every token is looked at, so that the time tells nothing.
        tokens.iter().filter(alive).fold(false, |known, issued| same(issued.token.as_bytes(), given) | known)
    }

    /// A token for whoever knows the key, in the form of a JWT, whose `exp` clients read.
    ///
    /// # Errors
    /// 401 of another key.
    pub fn authorize(&self, given: &str) -> Result<String, ApiError> {
        if let Some(key) = &self.key
            && !same(key.as_bytes(), given.as_bytes())
        {
            return Err(unauthorized("expected this server's key as `password` or `api_key`"));
        }
        let mut tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        tokens.retain(|issued| age(issued) < LIFETIME);
        match tokens.last() {
            Some(issued) if age(issued) < LIFETIME / 2 => Ok(issued.token.clone()),
            _ => {
                let since = SystemTime::now();
                let token = token(since);
                tokens.push(IssuedToken { token: token.clone(), since });
                Ok(token)
            }
        }
    }
}

/// What follows the scheme `Bearer`.
fn bearer(value: &[u8]) -> Option<&[u8]> {
    let scheme = value.get(..7).is_some_and(|scheme| scheme.eq_ignore_ascii_case(b"Bearer "));
    scheme.then(|| value[7..].trim_ascii())
}

fn age(issued: &IssuedToken) -> Duration {
    issued.since.elapsed().unwrap_or_default()
}

fn unauthorized(message: &str) -> ApiError {
    ApiError::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message)
}

/// Whether two texts are the same, in a time that does not depend on where they differ.
fn same(expected: &[u8], given: &[u8]) -> bool {
    if expected.len() > LONGEST || given.len() > LONGEST {
        return false;
    }
    let padded = |bytes: &[u8]| {
        let mut padded = [0; LONGEST];
        padded[..bytes.len()].copy_from_slice(bytes);
        padded
    };
    let lengths = (expected.len() as u64).ct_eq(&(given.len() as u64));
    (padded(expected).ct_eq(&padded(given)) & lengths).into()
}

/// Header, payload and 32 random bytes. The last part signs nothing: the server knows the tokens that it gave.
fn token(since: SystemTime) -> String {
    let (issued, expires) = (calendar::seconds(since), calendar::seconds(since + LIFETIME));
    let payload = serde_json::json!({"sub": "gneiss", "iat": issued, "exp": expires}).to_string();
    let secret: [u8; 32] = rand::random();
    let parts: [&[u8]; 3] = [br#"{"alg":"none","typ":"JWT"}"#, payload.as_bytes(), &secret];
    parts.map(|part| BASE64_URL_SAFE_NO_PAD.encode(part)).join(".")
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    fn with(value: &str) -> HeaderMap {
        HeaderMap::from_iter([(header::AUTHORIZATION, HeaderValue::from_str(value).unwrap())])
    }

    #[test]
    fn the_key_and_tokens_given_for_it_pass() {
        let auth = Auth::new(Some("secret-key".into())).unwrap();
        assert!(auth.check(&with("Bearer secret-key")).is_ok());
        assert!(auth.check(&with("bearer secret-key")).is_ok());
        for wrong in
            ["Bearer secret-kez", "Bearer secret-key1", "Bearer secret", "secret-key", "Bearer ", "Basic x"]
        {
            assert_eq!(auth.check(&with(wrong)).unwrap_err().status, StatusCode::UNAUTHORIZED, "{wrong}");
        }
        assert!(auth.check(&HeaderMap::new()).is_err());
        assert!(auth.authorize("other").is_err());
        let token = auth.authorize("secret-key").unwrap();
        assert_eq!(auth.authorize("secret-key").unwrap(), token, "a fresh token is given again");
        assert!(auth.check(&with(&format!("Bearer {token}"))).is_ok());
        assert_eq!(token.split('.').count(), 3);
    }

    #[test]
    fn other_clients_headers_pass_too() {
        let auth = Auth::new(Some("secret-key".into())).unwrap();
        let check = |headers: &[(&'static str, &str)]| {
            let pairs = headers.iter().map(|(name, value)| {
                (axum::http::HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())
            });
            auth.check(&HeaderMap::from_iter(pairs)).map_err(|failure| failure.message)
        };
        assert_eq!(check(&[("api-key", "secret-key")]), Ok(()));
        assert_eq!(check(&[("x-api-key", "secret-key")]), Ok(()));
        assert_eq!(check(&[("authorization", "Bearer  secret-key")]), Ok(()));
        assert_eq!(check(&[("authorization", "Bearer none"), ("api-key", "secret-key")]), Ok(()));
        let token = auth.authorize("secret-key").unwrap();
        assert_eq!(check(&[("x-api-key", &token)]), Ok(()));
        for (headers, words) in [
            (&[("api-key", "secret")][..], "is not this server's"),
            (&[("x-api-key", "")], "found none"),
            (&[("authorization", "Bearer")], "another form"),
            (&[("authorization", "secret-key")], "another form"),
            (&[("authorization", "Basic c2VjcmV0LWtleQ==")], "another form"),
            (&[], "`x-api-key: KEY`"),
        ] {
            let message = check(headers).unwrap_err();
            assert!(message.contains(words), "{words} is not in {message}");
        }
    }

    #[test]
    fn an_old_token_is_not_taken() {
        let auth = Auth::new(Some("k".into())).unwrap();
        let token = auth.authorize("k").unwrap();
        auth.tokens.lock().unwrap()[0].since -= LIFETIME;
        assert!(auth.check(&with(&format!("Bearer {token}"))).is_err());
        assert_ne!(auth.authorize("k").unwrap(), token);
        assert_eq!(auth.tokens.lock().unwrap().len(), 1);
    }

    #[test]
    fn keys_that_no_request_can_show_are_refused() {
        for key in ["", "a b", "a\n", "ä"] {
            assert!(Auth::new(Some(key.into())).is_err(), "{key:?}");
        }
        assert!(Auth::new(Some("x".repeat(LONGEST + 1))).is_err());
    }
}
