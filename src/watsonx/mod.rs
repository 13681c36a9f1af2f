//! watsonx's API for prompt tuning: data assets, trainings, models and deployments, so that IBM's SDK can tune a prompt on
//! one's own machine.
//!
//! ```text
//! store.rs, records.rs   the folder of everything that clients created
//! parameters.rs          the parameters of a training -> a configuration
//! tuner.rs               the thread that runs trainings, one at a time
//! metrics.rs             a run's records -> the metrics of a training
//! bases.rs               the local models, and the names that they answer to
//! service.rs             what all requests share; deployments that are loaded and unloaded
//! api/                   the routes
//! page.rs                the page to tune and deploy in a browser
//! ```
//!
//! The routes replace the fixed ones of `gneiss serve` ([`crate::serve::Platform`]); text generation is the same. A
//! training and the server use one copy of the frozen weights, and take turns on the device
//! ([`crate::serve::turns`]).

mod api;
mod bases;
mod metrics;
mod page;
mod parameters;
mod records;
mod service;
mod store;
mod tuner;

pub use bases::TunableModel;
pub use parameters::TuningProfile;
pub use service::{Service, ServiceOptions};
pub use store::Store;
pub use tuner::Tuner;
