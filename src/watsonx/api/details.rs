//! Records as watsonx writes them.

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

/// What is written of a training and of a deployment alike.
struct Described<'a> {
    id: &'a str,
    name: &'a str,
    description: &'a str,
    tags: &'a [String],
    place: &'a ProjectOrSpace,
    created: Moment,
    modified: Moment,
}

impl Described<'_> {
    /// The start of `entity`.
    fn entity(&self) -> Value {
        let named = json!({"name": self.name, "description": self.description, "tags": self.tags});
        with_place(named, self.place)
    }

    fn metadata(&self) -> Value {
        let mut metadata = self.entity();
        metadata["id"] = self.id.into();
        metadata["created_at"] = self.created.text().into();
        metadata["modified_at"] = self.modified.text().into();
        metadata
    }
}

/// Why the training or deployment `id` failed.
fn failure(code: &str, message: &str, id: &str) -> Value {
    json!({"errors": [{"code": code, "message": message}], "trace": id.replace('-', "")})
}

/// `value` with warnings, each of which IBM's SDK shows as a warning of Python. Without any there is no `system`, because the
/// SDK does not accept an empty list everywhere.
fn with_warnings(mut value: Value, warnings: &[String]) -> Value {
    if !warnings.is_empty() {
        let entry = |text: &String| json!({"message": text, "id": "gneiss", "more_info": ""});
        value["system"] = json!({"warnings": warnings.iter().map(entry).collect::<Vec<_>>()});
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
    let described = Described {
        id: &training.id,
        name: &training.name,
        description: &training.description,
        tags: &training.tags,
        place: &training.place,
        created: training.created,
        modified: training.modified,
    };
    let mut entity = described.entity();
    entity["auto_update_model"] = training.auto_update_model.into();
    entity["prompt_tuning"] = training.prompt_tuning.clone().into();
    entity["training_data_references"] = training.training_data_references.clone();
    entity["results_reference"] = results(training);
    entity["status"] = status(service, training, with_metrics);
    if training.state == TrainingState::Completed && training.auto_update_model {
        entity["model_id"] = training.model.clone().into();
    }
    let stand_in = service.stand_in(&training.local_model, training.base_model());
    let warnings: Vec<String> = stand_in.into_iter().chain(training.warnings.iter().cloned()).collect();
    with_warnings(json!({"metadata": described.metadata(), "entity": entity}), &warnings)
}

fn status(service: &Service, training: &Training, with_metrics: bool) -> Value {
    let mut status = Map::new();
    status.insert("state".into(), training.state.word().into());
    for (key, moment) in [("running_at", training.started), ("completed_at", training.ended)] {
        if let Some(moment) = moment {
            status.insert(key.into(), moment.text().into());
        }
    }
    if let Some(problem) = &training.failure {
        status.insert("message".into(), json!({"level": "error", "text": problem}));
        status.insert("failure".into(), failure("training_failed", problem, &training.id));
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
    let mut entity = json!({
        "type": MODEL_TYPE,
        "training_id": model.training,
        "content_import_state": "completed",
        "software_spec": {"id": SOFTWARE, "name": SOFTWARE},
        "foundation_model": {"model_id": model.base_model},
    });
    if !model.training_data_references.is_null() {
        entity["training_data_references"] = model.training_data_references.clone();
    }
    json!({"metadata": with_place(metadata, &model.place), "entity": entity})
}

/// A deployment of the server at `origin`.
pub fn deployment(service: &Service, deployment: &Deployment, origin: &str) -> Value {
    let described = Described {
        id: &deployment.id,
        name: &deployment.name,
        description: &deployment.description,
        tags: &deployment.tags,
        place: &deployment.place,
        created: deployment.created,
        modified: deployment.modified,
    };
    let mut entity = described.entity();
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
            json!({"state": "failed", "failure": failure("deployment_failed", &problem, &deployment.id)})
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
    let local = service.store.get(&deployment.model).map(|model: StoredModel| model.local_model);
    let stand_in = service.stand_in(&local.unwrap_or_default(), &deployment.base_model);
    let warnings: Vec<String> = stand_in.into_iter().collect();
    with_warnings(json!({"metadata": described.metadata(), "entity": entity}), &warnings)
}
