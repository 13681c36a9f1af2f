//! Paths that clients get wrong. Additional slashes make no difference; for other unknown paths the error names the
//! right one.

/// The paths that a hint may name, except those of one model or deployment.
const KNOWN: [&str; 9] = [
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/v1/classify", "/v1/tasks",
    "/ml/v1/text/generation", "/ml/v1/text/chat", "/ml/v1/text/tokenization",
];

/// Endings by which a path of OpenAI's API is recognised, whatever precedes them: no `/v1`, two of it, or the prefix of
/// a gateway.
const OPENAI: [&str; 4] = ["/chat/completions", "/completions", "/responses", "/models"];

/// Paths of other servers' APIs, with the corresponding paths of this server.
const ELSEWHERE: [(&str, &str); 10] = [
    ("/api/chat", "/v1/chat/completions"),
    ("/api/generate", "/v1/completions"),
    ("/api/tags", "/v1/models"),
    ("/v1/messages", "/v1/chat/completions"),
    ("/generate", "/v1/completions"),
    ("/generate_stream", "/v1/completions"),
    ("/completion", "/v1/completions"),
    ("/tokenize", "/ml/v1/text/tokenization"),
    ("/classify", "/v1/classify"),
    ("/version", "/ml/wml_services/v2/version"),
];

/// Length of the longest path that is compared with the known ones.
const MAX_COMPARED_BYTES: usize = 200;
/// Least similarity of a known path that is suggested.
const MIN_SIMILARITY: f64 = 0.7;

/// The path with single slashes, none at its end, and without needless percent-encoding.
pub(super) fn cleaned(path: &str) -> String {
    let mut clean = String::with_capacity(path.len());
    for segment in path.split('/').filter(|segment| !segment.is_empty()) {
        clean.push('/');
        clean.push_str(&unreserved(segment));
    }
    if clean.is_empty() { "/".to_owned() } else { clean }
}

/// The segment with letters, digits and `-._~` decoded (RFC 3986, section 2.3).
fn unreserved(segment: &str) -> String {
    let mut pieces = segment.split('%');
    let mut text = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        let byte = piece.get(..2).and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match byte {
            Some(byte) if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) => {
                text.push(char::from(byte));
                text.push_str(&piece[2..]);
            }
            _ => {
                text.push('%');
                text.push_str(piece);
            }
        }
    }
    text
}

/// The hint for an unknown path; `origin` is the server's address as the client wrote it.
pub(super) fn hint(path: &str, origin: Option<&str>) -> String {
    let written = cleaned(&path.replace("%2F", "/").replace("%2f", "/"));
    let clean = written.to_ascii_lowercase();
    if let Some((_, right)) = ELSEWHERE.iter().find(|(known, _)| clean == *known) {
        return format!("; this server has {right} for that");
    }
    if let Some(end) = OPENAI.iter().find(|end| clean.ends_with(*end)) {
        let base = origin.map(|origin| format!(", here {origin}/v1")).unwrap_or_default();
        return format!("; did you mean /v1{end}? The base URL of OpenAI's clients ends in /v1{base}");
    }
    if let Some(index) = clean.find("/deployments/")
        && clean[index..].contains("/text/")
    {
        return format!("; did you mean /ml/v1{}?", &written[index..]);
    }
    if clean.len() > MAX_COMPARED_BYTES {
        return String::new();
    }
    let near = |known: &&str| strsim::normalized_levenshtein(known, &clean);
    let nearest = KNOWN.iter().map(|known| (near(known), known)).max_by(|(a, _), (b, _)| a.total_cmp(b));
    match nearest {
        Some((similarity, known)) if similarity >= MIN_SIMILARITY => format!("; did you mean {known}?"),
        _ => format!("; this server has {}", KNOWN.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::testing::Fake;

    #[test]
    fn cleaned_removes_slashes_and_needless_encodings() {
        for (path, expected) in [
            ("/", "/"),
            ("//", "/"),
            ("/v1/models", "/v1/models"),
            ("//v1//chat/completions///", "/v1/chat/completions"),
            ("/v1/%63ompletions/", "/v1/completions"),
            ("/v1/models/a%2Fb%20c%", "/v1/models/a%2Fb%20c%"),
            ("/v1/%C3%a9", "/v1/%C3%a9"),
        ] {
            assert_eq!(cleaned(path), expected);
        }
    }

    #[test]
    fn hint_names_the_right_path() {
        for (path, words) in [
            ("/chat/completions", "did you mean /v1/chat/completions?"),
            ("/completions", "did you mean /v1/completions?"),
            ("/models", "ends in /v1, here http://h:1/v1"),
            ("/v1/v1/chat/completions", "did you mean /v1/chat/completions?"),
            ("/api/v1/chat/completions", "did you mean /v1/chat/completions?"),
            ("/openai/deployments/m/chat/completions", "did you mean /v1/chat/completions?"),
            ("/v1/engines/m/completions", "did you mean /v1/completions?"),
            ("/V1/Chat/Completions", "did you mean /v1/chat/completions?"),
            ("/v1/chat%2Fcompletions", "did you mean /v1/chat/completions?"),
            ("/v1/chat/completion", "did you mean /v1/chat/completions?"),
            ("/v1/complete", "did you mean /v1/completions?"),
            ("/api/chat", "/v1/chat/completions for that"),
            ("/v1/messages", "/v1/chat/completions for that"),
            ("/completion", "/v1/completions for that"),
            ("/v1/deployments/Dogs/text/generation", "did you mean /ml/v1/deployments/Dogs/text/generation?"),
            ("/ml/v1/text/generations", "did you mean /ml/v1/text/generation?"),
            ("/v1/embeddings", "this server has /v1/chat/completions, "),
        ] {
            let hint = hint(path, Some("http://h:1"));
            assert!(hint.contains(words), "{path}: {words} is not in {hint}");
        }
    }

    #[tokio::test]
    async fn every_path_that_a_hint_names_is_there() {
        let fake = Fake::saying("");
        for path in KNOWN.iter().chain(ELSEWHERE.iter().map(|(_, right)| right)) {
            assert_ne!(fake.get(path).await.status, 404, "{path}");
        }
    }
}
