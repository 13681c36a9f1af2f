//! The examples of a data asset, whatever the format of its content is. The page scores prompts on them; IBM's SDK does not ask
//! for them.

use super::{HandlerResult, QueryMap, Shared, blocking, files, json_answer};
use crate::config::DataOptions;
use crate::data::{Dataset, Record};
use crate::serve::api_error::ApiError;
use crate::watsonx::records::Asset;
use crate::watsonx::service::Service;
use crate::{Error, Result};
use axum::Extension;
use axum::extract::{Path, Query};
use axum::http::StatusCode;
use serde_json::{Value, json};

/// Most examples of an answer.
const MAX_EXAMPLES: usize = 10_000;
/// Most bytes of their texts.
const MAX_TEXT_BYTES: usize = 16 << 20;

/// All examples; with `task=classification` the outputs are in the form in which labels are trained and scored.
pub async fn list(
    Extension(service): Shared,
    Path(id): Path<String>,
    Query(query): QueryMap,
) -> HandlerResult {
    let asset: Asset = service.find(&id)?;
    let labels = match query.get("task").map(String::as_str) {
        Some("classification") => true,
        None | Some("generation") => false,
        Some(other) => {
            let problem = format!("expected \"classification\" or \"generation\", found {other:?}");
            return Err(ApiError::invalid("task", problem));
        }
    };
    if asset.attachment.as_ref().and_then(|attachment| attachment.bytes).is_none() {
        let message = format!("the data asset {:?} has no content yet", asset.name);
        return Err(ApiError::new(StatusCode::NOT_FOUND, "no_content", message));
    }
    let place = service.readings.clone().acquire_owned().await;
    let examples = blocking(move || {
        // Kept until the data is read, even if the client has gone meanwhile.
        let _place = place;
        read(&service, &asset, labels)
    })
    .await?;
    Ok(json_answer(StatusCode::OK, json!({"total_count": examples.len(), "examples": examples})))
}

fn read(service: &Service, asset: &Asset, labels: bool) -> Result<Vec<Value>> {
    let dataset = dataset(service, asset, labels).map_err(|error| match error {
        Error::Data { problems, more, .. } => Error::Data { path: (&asset.name).into(), problems, more },
        other => other,
    })?;
    check_sizes(&asset.name, &dataset.records)?;
    let example = |record: &Record| json!({"input": record.input, "output": record.output});
    Ok(dataset.records.iter().map(example).collect())
}

/// Refuses more than the page can score.
fn check_sizes(name: &str, records: &[Record]) -> Result<()> {
    let bytes: usize = records.iter().map(|record| record.input.len() + record.output.len()).sum();
    for (what, most, found) in
        [("examples", MAX_EXAMPLES, records.len()), ("bytes of their texts", MAX_TEXT_BYTES, bytes)]
    {
        if found > most {
            let problem = format!("{name}: expected at most {most} {what}, found {found}");
            return Err(Error::Invalid(format!("{problem}; hint: upload a part of them")));
        }
    }
    Ok(())
}

fn dataset(service: &Service, asset: &Asset, labels: bool) -> Result<Dataset> {
    let (name, _) = files::dataset(service, &asset.id)?;
    let fields = DataOptions::default();
    let content = service.store.folder::<Asset>(&asset.id).join(files::CONTENT);
    let mut dataset = Dataset::read_as(&content, name.as_ref(), &fields.input, &fields.output)?;
    if labels {
        dataset.normalize_labels()?;
    }
    Ok(dataset)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_texts_of_examples_are_limited() {
        let record = |input: usize| Record { input: "x".repeat(input), output: "1".into(), line: 1 };
        let refused = |records: &[Record]| check_sizes("rows", records).map_err(|error| error.to_string());
        assert_eq!(refused(&vec![record(1); MAX_EXAMPLES]), Ok(()));
        assert_eq!(refused(&[record(MAX_TEXT_BYTES - 1)]), Ok(()));
        let many = refused(&vec![record(1); MAX_EXAMPLES + 1]).unwrap_err();
        assert!(many.starts_with("rows: expected at most 10000 examples, found 10001"), "{many}");
        let long = refused(&[record(MAX_TEXT_BYTES)]).unwrap_err();
        assert!(
            long.starts_with("rows: expected at most 16777216 bytes of their texts, found 16777217"),
            "{long}"
        );
    }
}
