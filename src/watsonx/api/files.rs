//! The content of data assets. Requests for it have no key: their addresses are signed, for one file, for one direction and
//! for a short time.

use super::{QueryMap, Shared, assets, blocking, details};
use crate::serve::api_error::ApiError;
use crate::serve::state::AppState;
use crate::watsonx::records::Asset;
use crate::watsonx::service::Service;
use crate::{Error, Result, calendar};
use axum::Extension;
use axum::body::{Body, Bytes};
use axum::extract::{Path, Query, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use flate2::read::MultiGzDecoder;
use http_body_util::BodyExt;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tempfile::NamedTempFile;
use tokio_stream::wrappers::ReceiverStream;

/// The file of the content in a data asset's folder.
pub const CONTENT: &str = "content";
/// How long an address can be used.
const ADDRESS_LIFETIME: Duration = Duration::from_secs(600);
/// Bytes at the start of a form within which the head of its part ends.
const MAX_PART_HEAD: u64 = 16 << 10;
/// Most characters of a form's boundary (RFC 2046).
const MAX_BOUNDARY: usize = 70;
/// How a gzip file begins.
const GZIP: &[u8] = b"\x1F\x8B";
/// Bytes that are sent at a time.
const PIECE: usize = 64 << 10;

/// What an address permits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileAccess {
    /// `PUT`.
    Upload,
    /// `GET`.
    Download,
}

fn signed_text(right: FileAccess, attachment: &str, expires: u64) -> String {
    format!("{right:?} {attachment} {expires}")
}

/// The address of an attachment's content, for the client of a request with `headers`.
pub fn signed(state: &AppState, headers: &HeaderMap, right: FileAccess, attachment: &str) -> String {
    let expires = calendar::seconds(SystemTime::now() + ADDRESS_LIFETIME);
    let signature = state.auth.sign(&signed_text(right, attachment, expires));
    let path = format!("{}{attachment}?expires={expires}&signature={signature}", super::FILES);
    details::address(path, state.auth.product(headers), &state.origin(headers).unwrap_or_default())
}

/// Checks an address, and returns the data asset of its attachment.
fn permitted(
    state: &AppState,
    service: &Service,
    right: FileAccess,
    attachment: &str,
    query: &std::collections::HashMap<String, String>,
) -> std::result::Result<Asset, ApiError> {
    let refused = |problem: &str| ApiError::new(StatusCode::FORBIDDEN, "invalid_signature", problem);
    let expires = query.get("expires").and_then(|text| text.parse::<u64>().ok());
    let (Some(expires), Some(signature)) = (expires, query.get("signature")) else {
        return Err(refused("expected an address of a file as this server gives it, found no signature"));
    };
    if !state.auth.has_signed(&signed_text(right, attachment, expires), signature) {
        return Err(refused("the signature of this address is not this server's"));
    }
    if expires <= calendar::seconds(SystemTime::now()) {
        return Err(refused("this address is too old; ask for the attachment again"));
    }
    let is_its = |asset: &Asset| asset.attachment.as_ref().is_some_and(|found| found.id == attachment);
    service.store.list(is_its).into_iter().next().ok_or_else(|| {
        ApiError::new(StatusCode::NOT_FOUND, "not_found", format!("there is no attachment `{attachment}`"))
    })
}

pub async fn upload(
    State(state): State<Arc<AppState>>,
    Extension(service): Shared,
    Path(attachment): Path<String>,
    Query(query): QueryMap,
    request: Request,
) -> super::HandlerResult {
    let asset = permitted(&state, &service, FileAccess::Upload, &attachment, &query)?;
    let (parts, body) = request.into_parts();
    let boundary = boundary(&parts.headers)?;
    let folder = service.store.folder::<Asset>(&asset.id);
    let _place = service.uploads.acquire().await;
    let bytes = |asset: &Asset| asset.attachment.as_ref().and_then(|attachment| attachment.bytes);
    let stored = service.store.sum(|asset| bytes(asset).unwrap_or(0));
    let room = service.options.max_store_bytes.saturating_sub(stored);
    let most = service.options.max_asset_bytes.min(room);
    let received = receive(body, folder.clone(), most, state.options.body_seconds).await?;
    let id = attachment.clone();
    let bytes = blocking(move || {
        let content = match boundary {
            Some(boundary) => part(received, &boundary, &folder)?,
            None => received,
        };
        content.as_file().sync_all().map_err(Error::io(&folder))?;
        let bytes = content.as_file().metadata().map_err(Error::io(&folder))?.len();
        if bytes > most {
            return Err(too_large(most));
        }
        content.persist(folder.join(CONTENT)).map_err(|error| Error::io(&folder)(error.error))?;
        crate::files::sync_folder(&folder).map_err(Error::io(&folder))?;
        Ok::<_, ApiError>(bytes)
    })
    .await?;
    assets::change(service.clone(), asset.id, move |asset| match &mut asset.attachment {
        Some(found) if found.id == id && !found.complete => {
            found.bytes = Some(bytes);
            Ok(())
        }
        _ => Err(ApiError::new(StatusCode::CONFLICT, "conflict", "the data asset has its content already")),
    })
    .await?;
    Ok((StatusCode::CREATED, axum::Json(serde_json::json!({}))).into_response())
}

/// The boundary of a form with one part, as Cloud Pak's clients send it; `None` if the body is the content.
fn boundary(headers: &HeaderMap) -> std::result::Result<Option<Vec<u8>>, ApiError> {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if !kind.to_ascii_lowercase().starts_with("multipart/") {
        return Ok(None);
    }
    let parameters = kind.split(';').map(str::trim);
    let boundary = parameters.filter_map(|parameter| parameter.strip_prefix("boundary=")).next();
    match boundary.map(|boundary| boundary.trim_matches('"')) {
        Some(boundary) if (1..=MAX_BOUNDARY).contains(&boundary.len()) => Ok(Some(boundary.into())),
        _ => {
            let problem = format!("expected multipart/form-data with a boundary, found {kind:?}");
            Err(ApiError::new(StatusCode::BAD_REQUEST, "invalid_form", problem))
        }
    }
}

/// Writes a body to a file in `folder`. A piece of it may take `seconds`, and the whole as long as an address is valid.
async fn receive(
    mut body: Body,
    folder: PathBuf,
    most: u64,
    seconds: f64,
) -> std::result::Result<NamedTempFile, ApiError> {
    let mut file = tempfile::Builder::new()
        .prefix(".upload")
        .tempfile_in(&folder)
        .map_err(|error| ApiError::from(Error::io(&folder)(error)))?;
    let mut total = 0u64;
    let (limit, end) = (Duration::from_secs_f64(seconds), Instant::now() + ADDRESS_LIFETIME);
    loop {
        let limit = limit.min(end.saturating_duration_since(Instant::now()));
        let frame = tokio::time::timeout(limit, body.frame()).await;
        let Ok(frame) = frame else {
            let message = format!("expected more of the content within {seconds} s");
            return Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, "request_timeout", message));
        };
        let Some(frame) = frame else { return Ok(file) };
        let frame = frame.map_err(|error| ApiError::malformed(format!("reading the content: {error}")))?;
        let Ok(data) = frame.into_data() else { continue };
        total += data.len() as u64;
        if total > most.saturating_add(MAX_PART_HEAD) {
            return Err(too_large(most));
        }
        file.write_all(&data).map_err(|error| ApiError::from(Error::io(&folder)(error)))?;
    }
}

fn too_large(most: u64) -> ApiError {
    let message = format!("expected at most {most} bytes, for which this server has room, found more");
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "request_too_large", message)
}

/// The content of a form's only part.
fn part(
    mut form: NamedTempFile,
    boundary: &[u8],
    folder: &std::path::Path,
) -> std::result::Result<NamedTempFile, ApiError> {
    let read = (|| {
        let length = form.as_file().metadata()?.len();
        let mut head = Vec::new();
        form.seek(SeekFrom::Start(0))?;
        Read::by_ref(&mut form).take(MAX_PART_HEAD).read_to_end(&mut head)?;
        let mut tail = Vec::new();
        let tail_start = length.saturating_sub(MAX_BOUNDARY as u64 + 16);
        form.seek(SeekFrom::Start(tail_start))?;
        form.read_to_end(&mut tail)?;
        let Some((start, end)) = part_bounds(&head, &tail, tail_start, boundary) else { return Ok(None) };
        let mut content = tempfile::Builder::new().prefix(".content").tempfile_in(folder)?;
        form.seek(SeekFrom::Start(start))?;
        std::io::copy(&mut Read::by_ref(&mut form).take(end - start), &mut content)?;
        Ok(Some(content))
    })();
    let content = read.map_err(|error| ApiError::from(Error::io(folder)(error)))?;
    content.ok_or_else(|| {
        let message =
            "expected a form with one part, ended by its boundary, found another or an incomplete one";
        ApiError::new(StatusCode::BAD_REQUEST, "invalid_form", message)
    })
}

/// First byte of the part's content and the byte after it. `tail` is the end of the form, from byte `tail_start`.
fn part_bounds(head: &[u8], tail: &[u8], tail_start: u64, boundary: &[u8]) -> Option<(u64, u64)> {
    let position =
        |text: &[u8], pattern: &[u8]| text.windows(pattern.len()).position(|window| window == pattern);
    let opening = [b"--", boundary, b"\r\n"].concat();
    let head = head.strip_prefix(&opening[..])?;
    let start = opening.len() + position(head, b"\r\n\r\n")? + 4;
    let closing = [b"\r\n--", boundary, b"--"].concat();
    let last = tail.windows(closing.len()).rposition(|window| window == closing)?;
    let end = tail_start + last as u64;
    (end >= start as u64).then_some((start as u64, end))
}

pub async fn download(
    State(state): State<Arc<AppState>>,
    Extension(service): Shared,
    Path(attachment): Path<String>,
    Query(query): QueryMap,
) -> super::HandlerResult {
    let asset = permitted(&state, &service, FileAccess::Download, &attachment, &query)?;
    let path = service.store.folder::<Asset>(&asset.id).join(CONTENT);
    let bytes = asset.attachment.and_then(|attachment| attachment.bytes);
    let Some(bytes) = bytes else {
        return Err(ApiError::new(StatusCode::NOT_FOUND, "no_content", "the attachment has no content yet"));
    };
    let file = blocking(move || File::open(&path).map_err(Error::io(&path))).await?;
    let headers = [
        (header::CONTENT_TYPE, "application/octet-stream".to_owned()),
        (header::CONTENT_LENGTH, bytes.to_string()),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff".to_owned()),
        (header::CONTENT_DISPOSITION, "attachment".to_owned()),
    ];
    Ok((headers, stream(file)).into_response())
}

/// The bytes of a file, read as fast as the client takes them.
fn stream(mut file: File) -> Response {
    let (sender, pieces) = tokio::sync::mpsc::channel::<std::io::Result<Bytes>>(2);
    tokio::task::spawn_blocking(move || {
        loop {
            let mut piece = vec![0; PIECE];
            let piece = match file.read(&mut piece) {
                Ok(0) => return,
                Ok(read) => {
                    piece.truncate(read);
                    Ok(Bytes::from(piece))
                }
                Err(error) => Err(error),
            };
            let failed = piece.is_err();
            // The client may have gone.
            if sender.blocking_send(piece).is_err() || failed {
                return;
            }
        }
    });
    Body::from_stream(ReceiverStream::new(pieces)).into_response()
}

/// The content of a data asset, and a name by which a reader of datasets knows its format.
///
/// # Errors
/// Returns an error if the file can't be read.
pub fn dataset(service: &Service, asset: &str) -> Result<(String, File)> {
    let path = service.store.folder::<Asset>(asset).join(CONTENT);
    let mut file = File::open(&path).map_err(Error::io(&path))?;
    let mut head = Vec::new();
    Read::by_ref(&mut file).take(4096).read_to_end(&mut head).map_err(Error::io(&path))?;
    file.seek(SeekFrom::Start(0)).map_err(Error::io(&path))?;
    if head.starts_with(GZIP) {
        check_unpacked(&file, service.options.max_asset_bytes)?;
        file.seek(SeekFrom::Start(0)).map_err(Error::io(&path))?;
    }
    Ok((format!("train.{}", extension(&head)), file))
}

/// Refuses a gzip file whose content is larger than a data asset may be: a few bytes can unpack to any size.
fn check_unpacked(file: &File, most: u64) -> Result<()> {
    let mut unpacked = MultiGzDecoder::new(file).take(most.saturating_add(1));
    match std::io::copy(&mut unpacked, &mut std::io::sink()) {
        Ok(bytes) if bytes > most => Err(Error::Invalid(format!(
            "expected at most {most} bytes after gzip's compression is undone, found more; hint: --max-asset-bytes"
        ))),
        // The reader of datasets stops at an error too, and says more about it.
        Ok(_) | Err(_) => Ok(()),
    }
}

/// The ending of a name for a file that begins with `head`. JSON Lines are found by the reader of JSON.
fn extension(head: &[u8]) -> &'static str {
    let text = head.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(head).trim_ascii_start();
    match text.first() {
        _ if head.starts_with(GZIP) => "gz",
        _ if head.starts_with(b"PAR1") => "parquet",
        Some(b'[' | b'{') => "json",
        _ => "csv",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn part_is_between_its_head_and_the_last_boundary() {
        let head = b"--b1\r\nContent-Disposition: form-data; name=\"file\"\r\nContent-Type: file\r\n\r\n";
        let bounds = |content: &[u8], end: &[u8]| {
            let form = [&head[..], content, end].concat();
            let start = form.len().saturating_sub(86);
            part_bounds(&form, &form[start..], start as u64, b"b1")
                .map(|(start, end)| form[start as usize..end as usize].to_vec())
        };
        for content in [&b""[..], b"[1]", b"a\r\n\r\nb", b"x\r\n--b1--y", &[7; 500]] {
            assert_eq!(bounds(content, b"\r\n--b1--\r\n").as_deref(), Some(content));
            assert_eq!(bounds(content, b"\r\n--b1--").as_deref(), Some(content));
        }
        assert_eq!(bounds(b"[1]", b"\r\n--b1\r\n"), None, "another part would follow");
        assert_eq!(bounds(b"[1]", b""), None, "cut off");
        assert_eq!(part_bounds(b"no form", b"no form", 0, b"b1"), None);
    }

    #[test]
    fn extension_is_that_of_the_content() {
        for (head, expected) in [
            (&b"[{\"input\": 1}]"[..], "json"),
            (b"\n {\"input\": 1}\n{", "json"),
            (b"\xEF\xBB\xBF[", "json"),
            (b"input,output\n", "csv"),
            (b"\x1F\x8B\x08", "gz"),
            (b"PAR1", "parquet"),
            (b"", "csv"),
        ] {
            assert_eq!(extension(head), expected);
        }
    }
}
