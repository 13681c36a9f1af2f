//! The id of a repository on the hub: `org/name`, with a revision or without.

use crate::{Error, Result};

/// Revision of a hub id without a revision.
const DEFAULT_REVISION: &str = "main";

/// Parses `org/name[@revision]`; `kind` names the expected thing in errors.
///
/// # Errors
/// Returns [`Error::Invalid`] if it is none.
pub(super) fn hub_id(kind: &str, model: &str) -> Result<(String, String)> {
    let invalid = |problem: String| Error::Invalid(format!("{kind} `{model}`: {problem}"));
    if let Some((_, rest)) = model.split_once("://") {
        let id: Vec<&str> = rest.split('/').skip(1).take(2).collect();
        let hint = if id.len() == 2 { format!(": `{}`", id.join("/")) } else { String::new() };
        return Err(invalid(format!("expected a hub id, found a URL; give its org/name alone{hint}")));
    }
    let (repo, revision) = match model.split_once('@') {
        Some((repo, revision)) => (repo, revision),
        None => (model, DEFAULT_REVISION),
    };
    let Some((org, name)) = repo.split_once('/') else {
        return Err(invalid(
            "no such file or folder, and a hub id is org/name or org/name@revision, \
             such as ibm-granite/granite-4.1-3b"
                .to_string(),
        ));
    };
    for (what, part) in [("organisation", org), ("name", name)] {
        if !is_id_part(part) {
            return Err(invalid(format!(
                "no such folder, and `{part}` can't be the {what} of a hub id: {ID_PART}"
            )));
        }
    }
    if !is_revision(revision) {
        return Err(invalid(format!(
            "`{revision}` can't be a revision: expected a branch, a tag or a commit, such as \
             {DEFAULT_REVISION}"
        )));
    }
    Ok((repo.to_string(), revision.to_string()))
}

/// Checks the id of a repository, `org/name` without a revision; `what` is the flag that names it.
///
/// # Errors
/// Returns [`Error::Invalid`] if it is none.
pub fn check_repository(what: &str, id: &str) -> Result<()> {
    let parts: Vec<&str> = id.split('/').collect();
    if let [organisation, name] = parts[..]
        && is_id_part(organisation)
        && is_id_part(name)
    {
        return Ok(());
    }
    Err(Error::Invalid(format!("{what} {id}: expected ORG/NAME, each part of it: {ID_PART}")))
}

/// The hub's rule for both parts of a repository id, as [`is_id_part`] checks it.
const ID_PART: &str =
    "expected letters, digits, `-`, `_` and `.`, with no `-` or `.` at its ends and no `--` or `..`";

fn is_id_part(part: &str) -> bool {
    !part.is_empty()
        && part.len() <= 96
        && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
        && !part.starts_with(['-', '.'])
        && !part.ends_with(['-', '.'])
        && !part.contains("--")
        && !part.contains("..")
}

/// A revision becomes a path below the cache's `refs`, so no part of it may lead out of there.
fn is_revision(revision: &str) -> bool {
    revision.split('/').all(|part| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repositories_have_two_parts_by_the_hub_s_rule() {
        for id in ["me/dogs", "ibm-granite/granite-4.1-3b", "a/b_c"] {
            check_repository("--push", id).unwrap();
        }
        for id in ["dogs", "a/b/c", "a/", "-a/b", "a--b/c", "a/b..c", "a/b.", "a/b@main", "a/b c", "./b", ""]
        {
            let error = check_repository("--push", id).expect_err(id);
            assert!(error.is_bad_input(), "{error}");
            let text = error.to_string();
            assert!(text.contains("--push") && text.contains("expected ORG/NAME"), "{text}");
        }
    }
}
