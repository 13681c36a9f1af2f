//! Records as watsonx writes them.

use super::system;
use crate::serve::auth::Product;
use crate::watsonx::metrics;
use crate::watsonx::records::{
    Asset, Deployment, Moment, ProjectOrSpace, StoredModel, Training, TrainingState,
};
use crate::watsonx::service::{Loading, Service};
use crate::watsonx::tuner::RUN;
use serde_json::{Map, Value, json};

/// The type of a stored model.
pub const MODEL_TYPE: &str = "prompt_tune_1.0";
const SOFTWARE: &str = "watsonx-textgen-fm-1.0";

/// `value` with the place's ids.
fn with_place(mut value: Value, place: &ProjectOrSpace) -> Value {
    for (key, id) in [("project_id", &place.project_id), ("space_id", &place.space_id)] {
        if let Some(id) = id {
            value[key] = id.clone().into();
        }
    }
    value
}

pub fn asset(asset: &Asset) -> Value {
    let created = asset.created.text();
    let bytes = asset.attachment.as_ref().and_then(|attachment| attachment.bytes).unwrap_or(0);
    let metadata = json!({
        "asset_id": asset.id,
        "name": asset.name,
        "description": asset.description,
        "asset_type": "data_asset",
        "origin_country": "us",
        "asset_category": "USER",
        "created_at": created,
        "size": bytes,
        "usage": {"last_updated_at": created},
    });
    let mut value = json!({
        "metadata": with_place(metadata, &asset.place),
        "entity": asset.entity,
        "href": format!("/v2/assets/{}", asset.id),
        "asset_id": asset.id,
    });
    if let Some(attachment) = &asset.attachment {
        value["attachments"] = json!([{"id": attachment.id, "name": attachment.name, "mime": attachment.mime,
                                       "asset_type": "data_asset"}]);
    }
    value
}

/// The address of a file: a path for Cloud Pak's clients, a URL for those of IBM Cloud.
pub fn address(path: String, product: Product, origin: &str) -> String {
    match product {
        Product::Cloud => format!("{origin}{path}"),
        Product::CloudPak => path,
    }
}

/// A training. `with_metrics`: also one entry for each step so far.
pub fn training(service: &Service, training: &Training, with_metrics: bool) -> Value {
    let named = json!({"name": training.name, "description": training.description, "tags": training.tags});
    let mut metadata = with_place(named.clone(), &training.place);
    metadata["id"] = training.id.clone().into();
    metadata["created_at"] = training.created.text().into();
    metadata["modified_at"] = training.modified.text().into();
    let mut entity = with_place(named, &training.place);
    entity["auto_update_model"] = training.auto_update_model.into();
    entity["prompt_tuning"] = training.prompt_tuning.clone().into();
    entity["training_data_references"] = training.training_data_references.clone();
    entity["results_reference"] = results(training);
    entity["status"] = status(service, training, with_metrics);
    if training.state == TrainingState::Completed && training.auto_update_model {
        entity["model_id"] = training.model.clone().into();
    }
    let mut value = json!({"metadata": metadata, "entity": entity});
    let mut warnings: Vec<String> =
        service.stand_in(&training.local_model, training.base_model()).into_iter().collect();
    warnings.extend(training.warnings.iter().cloned());
    if let Some(system) = system(&warnings) {
        value["system"] = system;
    }
    value
}

fn status(service: &Service, training: &Training, with_metrics: bool) -> Value {
    let mut status = Map::new();
    status.insert("state".into(), training.state.word().into());
    for (key, moment) in [("running_at", training.started), ("completed_at", training.ended)] {
        if let Some(moment) = moment {
            status.insert(key.into(), moment.text().into());
        }
    }
    if let Some(failure) = &training.failure {
        let trace = training.id.replace('-', "");
        status.insert("message".into(), json!({"level": "error", "text": failure}));
        status.insert(
            "failure".into(),
            json!({"errors": [{"code": "training_failed", "message": failure}], "trace": trace}),
        );
    } else if with_metrics && let Some(started) = training.started {
        status.insert("metrics".into(), steps(service, training, started).into());
    }
    status.into()
}

/// One entry for each step so far.
pub fn steps(service: &Service, training: &Training, started: Moment) -> Vec<Value> {
    let path = service.store.folder::<Training>(&training.id).join(RUN).join(crate::layout::METRICS);
    // Before the first step there is no such file.
    let steps = crate::run::read::steps_and_epochs(&path).map(|(steps, _)| steps).unwrap_or_default();
    metrics::entries(&steps, started)
}

/// The place for results, with the paths by which the SDK finds files of the run.
fn results(training: &Training) -> Value {
    let mut results = training.results_reference.clone();
    results.entry("connection").or_insert_with(|| json!({}));
    let location = results.entry("location").or_insert_with(|| json!({}));
    if let Some(location) = location.as_object_mut() {
        let path =
            location.get("path").and_then(Value::as_str).unwrap_or("wx_prompt_tune").trim_end_matches('/');
        let folder = format!("{path}/{}", training.id);
        let request = format!("{folder}/assets/wx_prompt_tune/{}/request.json", training.id);
        location.insert("training".into(), folder.clone().into());
        location.insert("training_status".into(), format!("{folder}/training-status.json").into());
        location.insert("model_request_path".into(), request.into());
        location.insert("assets_path".into(), format!("{folder}/assets").into());
    }
    results.into()
}

/// The request that stores a training's model, for a client that stores it by itself.
pub fn model_request(training: &Training) -> Value {
    let request = json!({
        "name": training.name,
        "type": MODEL_TYPE,
        "training_id": training.id,
        "software_spec": {"name": SOFTWARE},
        "foundation_model": {"model_id": training.base_model()},
    });
    with_place(request, &training.place)
}

pub fn model(model: &StoredModel) -> Value {
    let created = model.created.text();
    let metadata = json!({"id": model.id, "name": model.name, "description": model.description,
                          "created_at": created, "modified_at": created});
    json!({
        "metadata": with_place(metadata, &model.place),
        "entity": {
            "type": MODEL_TYPE,
            "training_id": model.training,
            "content_import_state": "completed",
            "software_spec": {"id": SOFTWARE, "name": SOFTWARE},
            "foundation_model": {"model_id": model.base_model},
        },
    })
}

/// A deployment of the server at `origin`.
pub fn deployment(service: &Service, deployment: &Deployment, origin: &str) -> Value {
    let named =
        json!({"name": deployment.name, "description": deployment.description, "tags": deployment.tags});
    let mut metadata = with_place(named.clone(), &deployment.place);
    metadata["id"] = deployment.id.clone().into();
    metadata["created_at"] = deployment.created.text().into();
    metadata["modified_at"] = deployment.modified.text().into();
    let mut entity = with_place(named, &deployment.place);
    entity["asset"] = json!({"id": deployment.model});
    entity["base_model_id"] = deployment.base_model.clone().into();
    entity["deployed_asset_type"] = "prompt_tune".into();
    entity["online"] = match &deployment.serving_name {
        Some(name) => json!({"parameters": {"serving_name": name}}),
        None => json!({}),
    };
    entity["status"] = match service.loading(&deployment.id) {
        Loading::Initializing => json!({"state": "initializing"}),
        Loading::Failed(problem) => {
            let errors = json!([{"code": "deployment_failed", "message": problem}]);
            json!({"state": "failed", "failure": {"errors": errors, "trace": deployment.id.replace('-', "")}})
        }
        Loading::Ready => {
            let names = std::iter::once(&deployment.id).chain(&deployment.serving_name);
            let url = |name: &String, kind: &str| format!("{origin}/ml/v1/deployments/{name}/text/{kind}");
            let inference: Vec<Value> = names
                .clone()
                .flat_map(|name| {
                    let stream = json!({"url": url(name, "generation_stream"), "sse": true});
                    [json!({"url": url(name, "generation")}), stream]
                })
                .collect();
            let serving: Vec<String> = names.map(|name| url(name, "generation")).collect();
            json!({"state": "ready", "serving_urls": serving, "inference": inference})
        }
    };
    let mut value = json!({"metadata": metadata, "entity": entity});
    let local = service.store.get(&deployment.model).map(|model: StoredModel| model.local_model);
    let stand_in = service.stand_in(&local.unwrap_or_default(), &deployment.base_model);
    let warnings: Vec<String> = stand_in.into_iter().collect();
    if let Some(system) = system(&warnings) {
        value["system"] = system;
    }
    value
}
