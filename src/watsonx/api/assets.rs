//! Data assets: create, list, describe, delete. Their content is in [`super::files`].

use super::{
    HandlerResult, QueryMap, Shared, blocking, checked_text, details, examples, files, is_in, json_answer,
    place_of,
};
use crate::serve::api_error::ApiError;
use crate::serve::body::describe;
use crate::serve::params::Fields;
use crate::serve::state::AppState;
use crate::watsonx::records::{Asset, Attachment, Moment, StoredModel, Training, new_id};
use crate::watsonx::service::Service;
use axum::extract::{Path, Query, Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::IntoResponse;
use axum::routing::{get, post};
use axum::{Extension, Router};
use serde_json::{Map, Value, json};
use std::sync::Arc;

pub fn routes() -> Router<Arc<AppState>> {
    Router::new()
        .route("/v2/assets", post(create))
        .route("/v2/assets/{id}", get(describe_asset).delete(delete))
        .route("/v2/asset_types/{kind}/search", post(search))
        .route("/v2/assets/{id}/examples", get(examples::list))
        .route("/v2/assets/{id}/attachments", post(attach))
        .route("/v2/assets/{id}/attachments/{attachment}", get(attachment))
        .route("/v2/assets/{id}/attachments/{attachment}/complete", post(complete))
        .route("/v2/asset_files/data_asset/{attachment}", get(files::download).put(files::upload))
}

async fn create(
    State(state): State<Arc<AppState>>,
    Extension(service): Shared,
    Query(query): QueryMap,
    request: Request,
) -> HandlerResult {
    let body = state.read(request).await?;
    let fields = Fields::new(&body.object);
    let expected = "an object with `name`";
    let metadata =
        fields.object("metadata", "metadata.")?.ok_or_else(|| ApiError::missing("metadata", expected))?;
    if let Some(kind) = metadata.string("asset_type")?.filter(|kind| *kind != "data_asset") {
        let problem = format!("expected \"data_asset\", found {kind:?}; this server has no other assets");
        return Err(ApiError::invalid("metadata.asset_type", problem));
    }
    let name = metadata.string("name")?.ok_or_else(|| ApiError::missing("metadata.name", "a text"))?;
    let entity = match fields.get("entity") {
        Some(Value::Object(entity)) => entity.clone(),
        None => Map::new(),
        Some(other) => {
            return Err(ApiError::invalid(
                "entity",
                format!("expected an object, found {}", describe(other)),
            ));
        }
    };
    service.check_room::<Asset>()?;
    let asset = Asset {
        id: new_id(),
        name: checked_text("metadata.name", name)?,
        description: checked_text(
            "metadata.description",
            metadata.string("description")?.unwrap_or_default(),
        )?,
        place: place_of(&query)?,
        entity,
        created: Moment::now(),
        attachment: None,
    };
    let answer = details::asset(&asset);
    blocking(move || service.store.create(asset, |_| Ok(()))).await?;
    Ok(json_answer(StatusCode::CREATED, answer))
}

async fn describe_asset(Extension(service): Shared, Path(id): Path<String>) -> HandlerResult {
    Ok(json_answer(StatusCode::OK, details::asset(&service.find(&id)?)))
}

/// All data assets; a query that asks for some of them is not understood, and refused.
async fn search(
    State(state): State<Arc<AppState>>,
    Extension(service): Shared,
    Path(kind): Path<String>,
    Query(query): QueryMap,
    request: Request,
) -> HandlerResult {
    let body = state.read(request).await?;
    let wanted = Fields::new(&body.object).string("query")?.unwrap_or("*:*");
    if wanted != "*:*" {
        return Err(ApiError::invalid(
            "query",
            format!("expected \"*:*\", which finds all, found {wanted:?}"),
        ));
    }
    let found: Vec<Value> = match kind.as_str() {
        "data_asset" | "asset" => service
            .store
            .list(|asset: &Asset| is_in(&asset.place, &query))
            .iter()
            .map(details::asset)
            .collect(),
        _ => Vec::new(),
    };
    Ok(json_answer(StatusCode::OK, json!({"total_rows": found.len(), "results": found})))
}

/// Removes a data asset or a stored model. The SDK also removes the experiment of a training, which is nothing here.
async fn delete(Extension(service): Shared, Path(id): Path<String>) -> HandlerResult {
    if service.store.get::<Asset>(&id).is_some() {
        blocking(move || service.store.remove::<Asset>(&id)).await?;
    } else if service.store.get::<StoredModel>(&id).is_some() {
        super::models::remove(service, id).await?;
    } else if !service.store.any(|training: &Training| training.experiment == id)
        && !service.was_experiment(&id)
    {
        return Err(ApiError::new(StatusCode::NOT_FOUND, "not_found", format!("there is no asset `{id}`")));
    }
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn attach(
    State(state): State<Arc<AppState>>,
    Extension(service): Shared,
    Path(id): Path<String>,
    headers: HeaderMap,
    request: Request,
) -> HandlerResult {
    let body = state.read(request).await?;
    let fields = Fields::new(&body.object);
    let attachment = Attachment {
        id: new_id(),
        name: checked_text("name", fields.string("name")?.unwrap_or_default())?,
        mime: checked_text("mime", fields.string("mime")?.unwrap_or_default())?,
        bytes: None,
        complete: false,
    };
    let url = files::signed(&state, &headers, files::FileAccess::Upload, &attachment.id);
    let answer = json!({"attachment_id": attachment.id, "asset_type": "data_asset", "name": attachment.name, "url1": url});
    change(service, id, move |asset| {
        if asset.attachment.as_ref().is_some_and(|attachment| attachment.complete) {
            let message =
                format!("the data asset `{}` has its content already; create another one", asset.id);
            return Err(ApiError::new(StatusCode::CONFLICT, "conflict", message));
        }
        asset.attachment = Some(attachment);
        Ok(())
    })
    .await?;
    Ok(json_answer(StatusCode::CREATED, answer))
}

async fn attachment(
    State(state): State<Arc<AppState>>,
    Extension(service): Shared,
    Path((id, attachment)): Path<(String, String)>,
    headers: HeaderMap,
) -> HandlerResult {
    let asset: Asset = service.find(&id)?;
    let found =
        asset.attachment.filter(|found| found.id == attachment).ok_or_else(|| no_attachment(&attachment))?;
    let url = files::signed(&state, &headers, files::FileAccess::Download, &found.id);
    let answer = json!({"attachment_id": found.id, "asset_type": "data_asset", "name": found.name, "mime": found.mime,
                        "size": found.bytes, "transfer_complete": found.complete, "url": url});
    Ok(json_answer(StatusCode::OK, answer))
}

async fn complete(
    Extension(service): Shared,
    Path((id, attachment)): Path<(String, String)>,
) -> HandlerResult {
    let name = change(service, id, {
        let attachment = attachment.clone();
        move |asset| match &mut asset.attachment {
            Some(found) if found.id == attachment && found.bytes.is_some() => {
                found.complete = true;
                Ok(found.name.clone())
            }
            Some(found) if found.id == attachment => {
                let message = "expected the content to be uploaded before it is complete, found none";
                Err(ApiError::new(StatusCode::BAD_REQUEST, "no_content", message))
            }
            _ => Err(no_attachment(&attachment)),
        }
    })
    .await?;
    Ok(json_answer(
        StatusCode::OK,
        json!({"attachment_id": attachment, "asset_type": "data_asset", "name": name}),
    ))
}

fn no_attachment(id: &str) -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, "not_found", format!("there is no attachment `{id}`"))
}

/// Changes a data asset.
pub async fn change<R: Send + 'static>(
    service: Arc<Service>,
    id: String,
    change: impl FnOnce(&mut Asset) -> Result<R, ApiError> + Send + 'static,
) -> Result<R, ApiError> {
    service.find::<Asset>(&id)?;
    let changed = blocking(move || service.store.update(&id, change)).await?;
    changed.ok_or_else(|| ApiError::new(StatusCode::NOT_FOUND, "not_found", "the data asset was deleted"))
}
