//! The key that requests must have, and the tokens that clients of Cloud Pak get for it.

use crate::calendar;
use crate::serve::api_error::ApiError;
use axum::http::{HeaderMap, StatusCode, header};
use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use ring::hmac;
use serde::{Deserialize, Serialize};
use std::time::{Duration, SystemTime};
use subtle::ConstantTimeEq;

/// Most bytes of a key or token. Both are compared as if they had this length.
const MAX_KEY_BYTES: usize = 512;
/// How long a token is valid.
const LIFETIME: Duration = Duration::from_secs(12 * 3600);

/// Headers that contain only the key, as clients of Azure and of Anthropic send them.
const KEY_HEADERS: [&str; 2] = ["api-key", "x-api-key"];

/// Checks whether a client may use the server.
pub(crate) struct Auth {
    key: Option<String>,
    /// Signs tokens. It depends on the key, so that another key makes the tokens of this one invalid.
    signer: hmac::Key,
}

/// Which of watsonx's two products a client expects. They differ in the addresses of files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Product {
    /// IBM Cloud: addresses of files are complete URLs.
    Cloud,
    /// Cloud Pak for Data: addresses of files are paths.
    CloudPak,
}

/// The payload of a token.
#[derive(Serialize, Deserialize)]
struct Claims {
    sub: String,
    product: Product,
    /// Seconds since 1970.
    iat: u64,
    /// Seconds since 1970.
    exp: u64,
}

impl Auth {
    /// Tokens are signed with `secret`; a server with the same secret and key accepts them.
    ///
    /// # Errors
    /// Returns an error if no request could have the key.
    pub fn new(key: Option<String>, secret: &[u8; 32]) -> crate::Result<Self> {
        if let Some(key) = &key {
            let printable = key.bytes().all(|byte| byte.is_ascii_graphic());
            if key.is_empty() || key.len() > MAX_KEY_BYTES || !printable {
                return Err(crate::Error::Invalid(format!(
                    "the API key: expected 1 to {MAX_KEY_BYTES} printable ASCII characters without spaces, found {} bytes",
                    key.len()
                )));
            }
        }
        let secret = hmac::Key::new(hmac::HMAC_SHA256, secret);
        let derived = hmac::sign(&secret, key.as_deref().unwrap_or_default().as_bytes());
        Ok(Self { key, signer: hmac::Key::new(hmac::HMAC_SHA256, derived.as_ref()) })
    }

    /// Accepts a request that has the key, or a token that was issued for it, as `Authorization: Bearer KEY` or in one
    /// of [`KEY_HEADERS`].
    ///
    /// # Errors
    /// Returns 401 for every other request.
    pub fn check(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        let Some(key) = &self.key else { return Ok(()) };
        let passes = |given: &[u8]| is_equal(key.as_bytes(), given) || self.claims(given).is_some();
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

    /// The payload of a valid token.
    fn claims(&self, token: &[u8]) -> Option<Claims> {
        let token = std::str::from_utf8(token).ok().filter(|token| token.len() <= MAX_KEY_BYTES)?;
        let (signed, signature) = token.rsplit_once('.')?;
        let signature = BASE64_URL_SAFE_NO_PAD.decode(signature).ok()?;
        hmac::verify(&self.signer, signed.as_bytes(), &signature).ok()?;
        let payload = BASE64_URL_SAFE_NO_PAD.decode(signed.split_once('.')?.1).ok()?;
        let claims: Claims = serde_json::from_slice(&payload).ok()?;
        (claims.exp > calendar::seconds(SystemTime::now())).then_some(claims)
    }

    /// The product that the client of a request with `headers` expects: that of its token.
    pub fn product(&self, headers: &HeaderMap) -> Product {
        let bearers = headers.get_all(header::AUTHORIZATION).iter();
        let mut claims = bearers.filter_map(|value| self.claims(bearer(value.as_bytes())?));
        claims.next().map_or(Product::CloudPak, |claims| claims.product)
    }

    /// A token for a client that knows the key: a JWT, whose `exp` clients read.
    ///
    /// # Errors
    /// Returns 401 if the key is wrong.
    pub fn authorize(&self, given: &str, product: Product) -> Result<String, ApiError> {
        if let Some(key) = &self.key
            && !is_equal(key.as_bytes(), given.as_bytes())
        {
            return Err(unauthorized("expected this server's key as `password` or `api_key`"));
        }
        self.token(product, SystemTime::now())
    }

    fn token(&self, product: Product, since: SystemTime) -> Result<String, ApiError> {
        let (iat, exp) = (calendar::seconds(since), calendar::seconds(since + LIFETIME));
        let claims = Claims { sub: "gneiss".into(), product, iat, exp };
        let payload = serde_json::to_vec(&claims).map_err(|error| ApiError::internal(error.to_string()))?;
        let [header, payload] = [&br#"{"alg":"HS256","typ":"JWT"}"#[..], &payload]
            .map(|part| BASE64_URL_SAFE_NO_PAD.encode(part));
        let signed = format!("{header}.{payload}");
        let signature = BASE64_URL_SAFE_NO_PAD.encode(hmac::sign(&self.signer, signed.as_bytes()));
        Ok(format!("{signed}.{signature}"))
    }

    /// A signature of `text`, for an address that has its own permission.
    pub fn sign(&self, text: &str) -> String {
        BASE64_URL_SAFE_NO_PAD.encode(hmac::sign(&self.signer, format!("file {text}").as_bytes()))
    }

    /// Whether `signature` is that of `text`, in a time that does not depend on the position of the difference.
    pub fn has_signed(&self, text: &str, signature: &str) -> bool {
        let Ok(signature) = BASE64_URL_SAFE_NO_PAD.decode(signature) else { return false };
        hmac::verify(&self.signer, format!("file {text}").as_bytes(), &signature).is_ok()
    }
}

/// The part after the scheme `Bearer`.
fn bearer(value: &[u8]) -> Option<&[u8]> {
    let scheme = value.get(..7).is_some_and(|scheme| scheme.eq_ignore_ascii_case(b"Bearer "));
    scheme.then(|| value[7..].trim_ascii())
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

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;

    fn auth(key: &str) -> Auth {
        Auth::new(Some(key.into()), &[7; 32]).unwrap()
    }

    fn with(value: &str) -> HeaderMap {
        HeaderMap::from_iter([(header::AUTHORIZATION, HeaderValue::from_str(value).unwrap())])
    }

    #[test]
    fn key_and_its_tokens_are_accepted() {
        let auth = auth("secret-key");
        assert!(auth.check(&with("Bearer secret-key")).is_ok());
        assert!(auth.check(&with("bearer secret-key")).is_ok());
        for wrong in
            ["Bearer secret-kez", "Bearer secret-key1", "Bearer secret", "secret-key", "Bearer ", "Basic x"]
        {
            assert_eq!(auth.check(&with(wrong)).unwrap_err().status, StatusCode::UNAUTHORIZED, "{wrong}");
        }
        assert!(auth.check(&HeaderMap::new()).is_err());
        assert!(auth.authorize("other", Product::CloudPak).is_err());
        let token = auth.authorize("secret-key", Product::CloudPak).unwrap();
        assert!(auth.check(&with(&format!("Bearer {token}"))).is_ok());
        assert_eq!(token.split('.').count(), 3);
    }

    #[test]
    fn key_headers_of_other_clients_are_accepted() {
        let auth = auth("secret-key");
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
        let token = auth.authorize("secret-key", Product::Cloud).unwrap();
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
    fn old_and_changed_tokens_are_refused() {
        let key = auth("k");
        let since = |age| SystemTime::now() - age;
        let passes = |auth: &Auth, token: &str| auth.check(&with(&format!("Bearer {token}"))).is_ok();
        let token = key.token(Product::Cloud, since(LIFETIME - Duration::from_secs(60))).unwrap();
        assert!(passes(&key, &token));
        assert!(!passes(&key, &key.token(Product::Cloud, since(LIFETIME)).unwrap()));
        let (signed, signature) = token.rsplit_once('.').unwrap();
        let longer = key.token(Product::Cloud, since(Duration::ZERO)).unwrap();
        let payload = longer.rsplit_once('.').unwrap().0;
        for changed in [format!("{payload}.{signature}"), format!("{signed}."), signed.to_owned()] {
            assert!(!passes(&key, &changed), "{changed}");
        }
        assert!(!passes(&auth("l"), &token), "another key makes the tokens invalid");
        assert!(passes(&auth("k"), &token), "a server that was started again has the same secret");
        assert!(!passes(&Auth::new(Some("k".into()), &[8; 32]).unwrap(), &token));
    }

    #[test]
    fn product_is_that_of_the_token() {
        let auth = Auth::new(None, &[7; 32]).unwrap();
        for product in [Product::Cloud, Product::CloudPak] {
            let token = auth.authorize("any", product).unwrap();
            assert_eq!(auth.product(&with(&format!("Bearer {token}"))), product);
        }
        assert_eq!(auth.product(&with("Bearer mine")), Product::CloudPak);
        assert_eq!(auth.product(&HeaderMap::new()), Product::CloudPak);
    }

    #[test]
    fn signatures_are_of_one_text() {
        let (auth, other) = (auth("k"), auth("l"));
        let signature = auth.sign("put/a/1");
        assert!(auth.has_signed("put/a/1", &signature));
        for (text, signature) in
            [("get/a/1", signature.as_str()), ("put/a/1", ""), ("put/a/1", "!"), ("put/a/1", "AAAA")]
        {
            assert!(!auth.has_signed(text, signature), "{text} {signature}");
        }
        assert!(!other.has_signed("put/a/1", &signature));
    }

    #[test]
    fn keys_that_no_request_can_have_are_refused() {
        for key in ["", "a b", "a\n", "ä"] {
            assert!(Auth::new(Some(key.into()), &[7; 32]).is_err(), "{key:?}");
        }
        assert!(Auth::new(Some("x".repeat(MAX_KEY_BYTES + 1)), &[7; 32]).is_err());
    }
}
