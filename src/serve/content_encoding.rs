//! Compressed request bodies: `Content-Encoding` gzip and deflate (RFC 9110, section 8.4.1), decompressed up to a
//! limit.

use super::api_error::{ACCEPTED_ENCODINGS, ApiError};
use axum::http::{HeaderMap, StatusCode, header};
use flate2::bufread::{DeflateDecoder, MultiGzDecoder, ZlibDecoder};
use std::io::Read;

/// The first bytes of gzip data (RFC 1952).
pub(super) const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

/// How a body is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encoding {
    Gzip,
    Deflate,
}

/// The decompressed body.
///
/// # Errors
/// Returns 415 for another encoding, 413 for more than `most` decompressed bytes, and 400 for data that do not have
/// their encoding.
pub(super) fn decompress(headers: &HeaderMap, body: Vec<u8>, most: usize) -> Result<Vec<u8>, ApiError> {
    let Some(encoding) = encoding(headers)? else { return Ok(body) };
    let mut unread = &body[..];
    let decompressed = match encoding {
        Encoding::Gzip => read(MultiGzDecoder::new(unread), most),
        Encoding::Deflate if is_zlib(unread) => {
            let decompressed = read(ZlibDecoder::new(&mut unread), most);
            check_end(decompressed, unread, most)
        }
        // Some clients send deflate without the zlib format that the name stands for.
        Encoding::Deflate => {
            let decompressed = read(DeflateDecoder::new(&mut unread), most);
            check_end(decompressed, unread, most)
        }
    };
    let decompressed = decompressed.map_err(|error| {
        let name = if encoding == Encoding::Gzip { "gzip" } else { "deflate" };
        let found = if body.is_empty() { "an empty body".to_owned() } else { error.to_string() };
        ApiError::malformed(format!("expected a body in {name}, as `content-encoding` says, found {found}"))
    })?;
    if decompressed.len() > most {
        return Err(too_large(most));
    }
    Ok(decompressed)
}

/// Reads at most one byte more than `most`, which shows that there are more.
fn read(decoder: impl Read, most: usize) -> std::io::Result<Vec<u8>> {
    let mut decompressed = Vec::new();
    decoder.take(most as u64 + 1).read_to_end(&mut decompressed)?;
    Ok(decompressed)
}

/// Refuses bytes after the end of the compressed data. If there are more than `most` bytes, the end was not reached.
fn check_end(decompressed: std::io::Result<Vec<u8>>, unread: &[u8], most: usize) -> std::io::Result<Vec<u8>> {
    let decompressed = decompressed?;
    if unread.is_empty() || decompressed.len() > most {
        Ok(decompressed)
    } else {
        Err(std::io::Error::other("bytes after its end"))
    }
}

fn too_large(most: usize) -> ApiError {
    let message = format!("expected a body of at most {most} bytes once it is unpacked, found a larger one");
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "request_too_large", message)
}

/// Whether data begin as the zlib format requires (RFC 1950, section 2.2).
fn is_zlib(data: &[u8]) -> bool {
    data.len() >= 2 && data[0] & 0x0f == 8 && u16::from_be_bytes([data[0], data[1]]).is_multiple_of(31)
}

/// The encoding that the header names besides `identity`, if any.
fn encoding(headers: &HeaderMap) -> Result<Option<Encoding>, ApiError> {
    let mut encoding = None;
    for value in headers.get_all(header::CONTENT_ENCODING) {
        let named = String::from_utf8_lossy(value.as_bytes());
        for name in named.split(',').map(|name| name.trim().to_ascii_lowercase()) {
            let named_encoding = match name.as_str() {
                "" | "identity" => continue,
                "gzip" | "x-gzip" => Encoding::Gzip,
                "deflate" => Encoding::Deflate,
                _ => return Err(unsupported(&named)),
            };
            if encoding.replace(named_encoding).is_some() {
                return Err(unsupported(&named));
            }
        }
    }
    Ok(encoding)
}

fn unsupported(found: &str) -> ApiError {
    let message = format!(
        "`content-encoding`: expected one of {ACCEPTED_ENCODINGS}, or none for a body that is not packed, found {found}"
    );
    ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_encoding", message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;
    use flate2::Compression;
    use flate2::write::{DeflateEncoder, GzEncoder, ZlibEncoder};
    use std::io::Write;

    const TEXT: &[u8] = b"{\"model\": \"m\", \"prompt\": \"aaaaaaaaaaaaaaaa\"}";
    const MOST: usize = 100;

    fn with(encoding: &str) -> HeaderMap {
        HeaderMap::from_iter([(header::CONTENT_ENCODING, HeaderValue::from_str(encoding).unwrap())])
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut packed = GzEncoder::new(Vec::new(), Compression::best());
        packed.write_all(bytes).unwrap();
        packed.finish().unwrap()
    }

    fn zlib(bytes: &[u8]) -> Vec<u8> {
        let mut packed = ZlibEncoder::new(Vec::new(), Compression::best());
        packed.write_all(bytes).unwrap();
        packed.finish().unwrap()
    }

    fn raw_deflate(bytes: &[u8]) -> Vec<u8> {
        let mut packed = DeflateEncoder::new(Vec::new(), Compression::best());
        packed.write_all(bytes).unwrap();
        packed.finish().unwrap()
    }

    #[test]
    fn gzip_and_deflate_are_decompressed_under_all_names() {
        for (encoding, body) in [
            ("", TEXT.to_vec()),
            ("identity", TEXT.to_vec()),
            ("gzip", gzip(TEXT)),
            ("GZip", gzip(TEXT)),
            ("x-gzip", gzip(TEXT)),
            ("identity, gzip", gzip(TEXT)),
            // Members one after the other are one text (RFC 1952, section 2.2).
            ("gzip", [gzip(&TEXT[..7]), gzip(&TEXT[7..])].concat()),
            ("deflate", zlib(TEXT)),
            ("deflate", raw_deflate(TEXT)),
        ] {
            assert_eq!(decompress(&with(encoding), body, MOST).unwrap(), TEXT, "{encoding}");
        }
        assert_eq!(decompress(&HeaderMap::new(), TEXT.to_vec(), MOST).unwrap(), TEXT);
    }

    #[test]
    fn limit_applies_to_the_decompressed_size() {
        for (encoding, pack) in
            [("gzip", gzip as fn(&[u8]) -> Vec<u8>), ("deflate", zlib), ("deflate", raw_deflate)]
        {
            assert_eq!(decompress(&with(encoding), pack(&[b' '; MOST]), MOST).unwrap().len(), MOST);
            let bomb = pack(&vec![b' '; 10_000_000]);
            let error = decompress(&with(encoding), bomb, MOST).unwrap_err();
            assert_eq!(error.status, StatusCode::PAYLOAD_TOO_LARGE, "{encoding}");
            assert!(error.message.contains("100 bytes once it is unpacked"), "{}", error.message);
        }
    }

    #[test]
    fn body_without_its_encoding_is_rejected() {
        let cut = |mut bytes: Vec<u8>| {
            bytes.truncate(bytes.len() - 3);
            bytes
        };
        for (encoding, body, words) in [
            ("gzip", TEXT.to_vec(), "a body in gzip"),
            ("gzip", Vec::new(), "an empty body"),
            ("gzip", cut(gzip(TEXT)), "a body in gzip"),
            ("gzip", [gzip(TEXT), b"more".to_vec()].concat(), "a body in gzip"),
            ("deflate", cut(zlib(TEXT)), "a body in deflate"),
            ("deflate", [zlib(TEXT), b"more".to_vec()].concat(), "bytes after its end"),
            ("deflate", vec![0xff; 9], "a body in deflate"),
        ] {
            let error = decompress(&with(encoding), body, MOST).unwrap_err();
            assert_eq!((error.status, error.code), (StatusCode::BAD_REQUEST, "invalid_json"));
            assert!(error.message.contains(words), "{}", error.message);
        }
        for encoding in ["br", "zstd", "gzip, gzip", "compress", "gzip, br"] {
            let error = decompress(&with(encoding), gzip(TEXT), MOST).unwrap_err();
            assert_eq!(error.status, StatusCode::UNSUPPORTED_MEDIA_TYPE, "{encoding}");
            let found = format!("found {encoding}");
            assert!(error.message.contains("gzip, deflate") && error.message.ends_with(&found));
        }
    }
}
