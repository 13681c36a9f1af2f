//! The license of a repository, as the header of its model card states it.

use std::fs;

use super::{HubOptions, Snapshot};
use crate::layout::adapter_folder::CARD;
use crate::{Error, Result};

/// A license without an id of the hub is `other`, with a name and a link to its text.
const KEYS: [&str; 3] = ["license", "license_name", "license_link"];

/// A key of a model card's header that states the license, and its value.
pub type LicenseTag = (&'static str, String);

/// The license in the model card of a repository on the hub; empty if it has no card or the card states none.
///
/// # Errors
/// Returns [`Error::Hub`] if the hub does not deliver the card, [`Error::Io`] if the cache can't be written.
pub fn license(repo: &str, options: &HubOptions) -> Result<Vec<LicenseTag>> {
    let Some(snapshot) = Snapshot::open(repo, "main", CARD, options)? else { return Ok(Vec::new()) };
    let Some(path) = snapshot.find(CARD)? else { return Ok(Vec::new()) };
    let card = fs::read(&path).map_err(Error::io(&path))?;
    let page = format!("{}/{repo}/blob/main", options.endpoint);
    Ok(stated(&String::from_utf8_lossy(&card), &page))
}

/// The license of a card; a link to a file of the card's repository is completed with the address of its files.
fn stated(card: &str, files: &str) -> Vec<LicenseTag> {
    let card = card.replace("\r\n", "\n");
    let Some((header, _)) = card.strip_prefix("---\n").and_then(|text| text.split_once("\n---")) else {
        return Vec::new();
    };
    let value = |key: &str| {
        let mut values = header.lines().filter_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        let value = values.next()?.trim().trim_matches(['"', '\'']);
        // A list or a text of several lines is none of the hub's ids.
        (!value.is_empty() && !value.starts_with(['[', '|', '>', '&', '*'])).then(|| value.to_owned())
    };
    if value(KEYS[0]).is_none() {
        return Vec::new();
    }
    let complete = |key, value: String| match key {
        "license_link" if !value.contains("://") => format!("{files}/{value}"),
        _ => value,
    };
    KEYS.into_iter().filter_map(|key| Some((key, complete(key, value(key)?)))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn licenses_are_read_from_the_header_of_a_card() {
        let tags = |card: &str| stated(card, "https://hub/org/base/blob/main");
        let one = |id: &str| vec![("license", id.to_owned())];
        assert_eq!(tags("---\nlicense: apache-2.0\ntags:\n- x\n---\n# Base\n"), one("apache-2.0"));
        assert_eq!(tags("---\r\ntags: []\r\nlicense: \"mit\"\r\n---\r\n"), one("mit"));
        let other = "---\nlicense: other\nlicense_name: community\nlicense_link: LICENSE\n---\n";
        let link = ("license_link", "https://hub/org/base/blob/main/LICENSE".to_owned());
        assert_eq!(
            tags(other),
            [("license", "other".to_owned()), ("license_name", "community".to_owned()), link]
        );
        for none in [
            "# Base\nlicense: mit\n", "---\ntags:\n- x\n---\nlicense: mit\n", "---\nlicense:\n- mit\n---\n",
            "---\nlicense: [mit]\n---\n", "---\nlicense_link: LICENSE\n---\n", "",
        ] {
            assert_eq!(tags(none), [], "{none}");
        }
    }
}
