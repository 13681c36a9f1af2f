//! An error of a request. Each API has its own form of it ([`super::api`]).

use super::client::SubmitError;
use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::Value;

/// Seconds after which a client that was refused may try again.
const RETRY_AFTER: u64 = 1;

/// Values of `Content-Encoding` that clients may send, as the header `Accept-Encoding` of an error lists them.
pub(super) const ACCEPTED_ENCODINGS: &str = "gzip, deflate";

/// Why a request gets no answer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ApiError {
    pub status: StatusCode,
    /// A code for programs.
    pub code: &'static str,
    /// A message for people, with the expected value and the actual one.
    pub message: String,
    /// The field of the request that it is about.
    pub param: Option<String>,
}

impl ApiError {
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into(), param: None }
    }

    /// An invalid value of the request. The message names the key.
    pub fn invalid(key: impl Into<String>, problem: impl std::fmt::Display) -> Self {
        let key = key.into();
        let message = format!("`{key}`: {problem}");
        Self { param: Some(key), ..Self::new(StatusCode::BAD_REQUEST, "invalid_value", message) }
    }

    /// A missing key.
    pub fn missing(key: impl Into<String>, expected: &str) -> Self {
        let key = key.into();
        let message = format!("`{key}`: expected {expected}, found no such key");
        Self { param: Some(key), ..Self::new(StatusCode::BAD_REQUEST, "missing_required_parameter", message) }
    }

    /// A field that this server does not support.
    pub fn unsupported(key: impl Into<String>, problem: &str) -> Self {
        Self { code: "unsupported_parameter", ..Self::invalid(key, problem) }
    }

    /// A body that is not a JSON object.
    pub fn malformed(problem: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_json", problem)
    }

    pub fn model_not_found(name: &str, models: &[String]) -> Self {
        let message = format!("the model `{name}` does not exist; this server has {}", models.join(", "));
        Self { param: Some("model".into()), ..Self::new(StatusCode::NOT_FOUND, "model_not_found", message) }
    }

    /// The text, or text and answer together, are longer than a sequence may be.
    pub fn too_long(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "context_length_exceeded", message)
    }

    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    /// The device has too little memory for this request now.
    pub fn no_memory(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "out_of_memory", message)
    }

    pub fn ending() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "shutting_down", SubmitError::Ending.to_string())
    }

    /// The error with the names that another API has for the keys.
    pub fn renamed(mut self, names: &[(&str, &str)]) -> Self {
        for (from, to) in names {
            self.message = self.message.replace(&format!("`{from}"), &format!("`{to}"));
            self.param = self.param.map(|param| match param.strip_prefix(from) {
                Some(rest) if rest.is_empty() || rest.starts_with(['.', '[']) => format!("{to}{rest}"),
                _ => param,
            });
        }
        self
    }

    /// The response: the error's status and headers with `body`, which has the form of an API.
    pub fn with_body(&self, body: Value) -> Response {
        let mut response = (self.status, axum::Json(body)).into_response();
        let headers = response.headers_mut();
        match self.status {
            StatusCode::TOO_MANY_REQUESTS => {
                headers.insert(header::RETRY_AFTER, RETRY_AFTER.into());
            }
            StatusCode::UNAUTHORIZED => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            StatusCode::UNSUPPORTED_MEDIA_TYPE => {
                headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static(ACCEPTED_ENCODINGS));
            }
            // The remaining body is not read.
            StatusCode::REQUEST_TIMEOUT | StatusCode::PAYLOAD_TOO_LARGE | StatusCode::SERVICE_UNAVAILABLE => {
                headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            _ => {}
        }
        response
    }
}

impl IntoResponse for ApiError {
    /// A response without a body. [`super::router`] adds the body in the form of the request's API.
    fn into_response(self) -> Response {
        let mut response = Response::new(Body::empty());
        *response.status_mut() = self.status;
        response.extensions_mut().insert(self);
        response
    }
}

impl From<SubmitError> for ApiError {
    fn from(refused: SubmitError) -> Self {
        let message = refused.to_string();
        match refused {
            SubmitError::Busy { .. } => Self::new(StatusCode::TOO_MANY_REQUESTS, "queue_full", message),
            SubmitError::TooLong { .. } => Self::too_long(message),
            SubmitError::Invalid(_) => Self::new(StatusCode::BAD_REQUEST, "invalid_value", message),
            SubmitError::Gone(_) => Self::new(StatusCode::NOT_FOUND, "model_not_found", message),
            SubmitError::Ending => Self::ending(),
        }
    }
}

impl From<crate::Error> for ApiError {
    fn from(error: crate::Error) -> Self {
        if crate::device::is_out_of_memory(&error) {
            Self::no_memory(error.to_string())
        } else if error.is_bad_input() {
            Self::new(StatusCode::BAD_REQUEST, "invalid_value", error.to_string())
        } else {
            Self::internal(error.to_string())
        }
    }
}
