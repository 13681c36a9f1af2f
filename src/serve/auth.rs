//! The key that requests must have, and the tokens that clients of Cloud Pak get for it.

use crate::calendar;
use crate::serve::api_error::ApiError;
use axum::http::{HeaderMap, StatusCode, header};
use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};
use subtle::ConstantTimeEq;

/// Most bytes of a key or token. Both are compared as if they had this length.
const MAX_KEY_BYTES: usize = 512;
/// How long a token is valid.
const LIFETIME: Duration = Duration::from_secs(12 * 3600);

/// Headers that contain only the key, as clients of Azure and of Anthropic send them.
const KEY_HEADERS: [&str; 2] = ["api-key", "x-api-key"];

/// Checks whether a client may use the server.
pub(super) struct Auth {
    key: Option<String>,
    /// Valid tokens, the newest last. There are never more than three, because a new one is made only when half of the
    /// last one's lifetime has passed.
    tokens: Mutex<Vec<IssuedToken>>,
}

struct IssuedToken {
    token: String,
    since: SystemTime,
}

impl Auth {
    /// # Errors
    /// Returns an error if no request could have the key.
    pub fn new(key: Option<String>) -> crate::Result<Self> {
        if let Some(key) = &key {
            let printable = key.bytes().all(|byte| byte.is_ascii_graphic());
            if key.is_empty() || key.len() > MAX_KEY_BYTES || !printable {
                return Err(crate::Error::Invalid(format!(
                    "the API key: expected 1 to {MAX_KEY_BYTES} printable ASCII characters without spaces, found {} bytes",
                    key.len()
                )));
            }
        }
        Ok(Self { key, tokens: Mutex::new(Vec::new()) })
    }

    /// Accepts a request that has the key, or a token that was issued for it, as `Authorization: Bearer KEY` or in one
    /// of [`KEY_HEADERS`].
    ///
    /// # Errors
    /// Returns 401 for every other request.
    pub fn check(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        let Some(key) = &self.key else { return Ok(()) };
        let passes = |given: &[u8]| is_equal(key.as_bytes(), given) || self.is_issued(given);
        let bearers =
            headers.get_all(header::AUTHORIZATION).iter().filter_map(|value| bearer(value.as_bytes()));
        let keys = KEY_HEADERS.iter().flat_map(|name| headers.get_all(*name)).map(|value| value.as_bytes());
        // A client may also send a key for another server.
        let (mut has_key, mut passed) = (false, false);
        for given in bearers.chain(keys).filter(|given| !given.is_empty()) {
            has_key = true;
            passed |= passes(given);
        }
        match (passed, has_key, headers.contains_key(header::AUTHORIZATION)) {
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

    fn is_issued(&self, given: &[u8]) -> bool {
        let tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        let is_valid = |issued: &&IssuedToken| age(issued) < LIFETIME;
        // Every token is compared, so that the time reveals nothing.
        tokens
            .iter()
            .filter(is_valid)
            .fold(false, |is_issued, issued| is_equal(issued.token.as_bytes(), given) | is_issued)
    }

    /// A token for a client that knows the key, in the form of a JWT, whose `exp` clients read.
    ///
    /// # Errors
    /// Returns 401 if the key is wrong.
    pub fn authorize(&self, given: &str) -> Result<String, ApiError> {
        if let Some(key) = &self.key
            && !is_equal(key.as_bytes(), given.as_bytes())
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

/// The part after the scheme `Bearer`.
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

/// Whether two texts are equal, in a time that does not depend on the position of the difference.
fn is_equal(expected: &[u8], given: &[u8]) -> bool {
    if expected.len() > MAX_KEY_BYTES || given.len() > MAX_KEY_BYTES {
        return false;
    }
    let padded = |bytes: &[u8]| {
        let mut padded = [0; MAX_KEY_BYTES];
        padded[..bytes.len()].copy_from_slice(bytes);
        padded
    };
    let lengths = (expected.len() as u64).ct_eq(&(given.len() as u64));
    (padded(expected).ct_eq(&padded(given)) & lengths).into()
}

/// Header, payload and 32 random bytes. The last part is no signature: the server keeps the tokens that it has issued.
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
    fn key_and_its_tokens_are_accepted() {
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
    fn key_headers_of_other_clients_are_accepted() {
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
    fn old_token_is_refused() {
        let auth = Auth::new(Some("k".into())).unwrap();
        let token = auth.authorize("k").unwrap();
        auth.tokens.lock().unwrap()[0].since -= LIFETIME;
        assert!(auth.check(&with(&format!("Bearer {token}"))).is_err());
        assert_ne!(auth.authorize("k").unwrap(), token);
        assert_eq!(auth.tokens.lock().unwrap().len(), 1);
    }

    #[test]
    fn keys_that_no_request_can_have_are_refused() {
        for key in ["", "a b", "a\n", "ä"] {
            assert!(Auth::new(Some(key.into())).is_err(), "{key:?}");
        }
        assert!(Auth::new(Some("x".repeat(MAX_KEY_BYTES + 1))).is_err());
    }
}
