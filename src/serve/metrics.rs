//! The server's metrics, in Prometheus' text format.

use super::worker::StepMetrics;
use prometheus_client::encoding::{EncodeLabelSet, text::encode};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use std::sync::Arc;
use std::time::Instant;

/// The labels of a request.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    api: &'static str,
    /// The name of a model of this server; empty if the request named none.
    model: String,
    status: u16,
}

/// The server's counters and histograms.
pub struct Metrics {
    registry: Registry,
    requests: Family<RequestLabels, Counter>,
    prompt_tokens: Counter,
    generated_tokens: Counter,
    queue: Gauge,
    models: Gauge,
    batch_sequences: Histogram,
    batch_rows: Histogram,
    step_seconds: Histogram,
    request_seconds: Histogram,
    first_token_seconds: Histogram,
}

impl Default for Metrics {
    fn default() -> Self {
        let sizes = || Histogram::new(exponential_buckets(1.0, 2.0, 13));
        let seconds = || Histogram::new(exponential_buckets(0.001, 2.0, 18));
        let mut metrics = Self {
            registry: Registry::with_prefix("gneiss"),
            requests: Family::default(),
            prompt_tokens: Counter::default(),
            generated_tokens: Counter::default(),
            queue: Gauge::default(),
            models: Gauge::default(),
            batch_sequences: sizes(),
            batch_rows: sizes(),
            step_seconds: seconds(),
            request_seconds: seconds(),
            first_token_seconds: seconds(),
        };
        metrics.register();
        metrics
    }
}

impl Metrics {
    fn register(&mut self) {
        let registry = &mut self.registry;
        registry.register("requests", "Requests answered", self.requests.clone());
        registry.register(
            "prompt_tokens",
            "Tokens of texts, virtual tokens included",
            self.prompt_tokens.clone(),
        );
        registry.register("generated_tokens", "Tokens generated", self.generated_tokens.clone());
        registry.register("queue", "Requests that wait for their first step", self.queue.clone());
        registry.register("models", "Models that requests may name", self.models.clone());
        registry.register("batch_sequences", "Sequences of a step", self.batch_sequences.clone());
        registry.register("batch_rows", "Token rows of a step", self.batch_rows.clone());
        registry.register("step_seconds", "Duration of a step", self.step_seconds.clone());
        registry.register(
            "request_seconds",
            "Duration of a sequence, from request to end",
            self.request_seconds.clone(),
        );
        let help = "From a sequence's request to its first token";
        registry.register("first_token_seconds", help, self.first_token_seconds.clone());
    }

    /// Counts a step of the worker.
    pub fn count_step(&self, step: StepMetrics) {
        self.batch_sequences.observe(step.sequences as f64);
        self.batch_rows.observe(step.rows as f64);
        self.step_seconds.observe(step.seconds);
        self.generated_tokens.inc_by(step.generated as u64);
        self.queue.set(gauge(step.waiting));
    }

    /// Counts an answer.
    pub(super) fn count_answer(&self, api: &'static str, model: &str, status: u16) {
        self.requests.get_or_create(&RequestLabels { api, model: model.to_owned(), status }).inc();
    }

    /// All metrics as text, with the current lengths of the queue and of the list of models.
    pub(super) fn text(&self, waiting: usize, models: usize) -> String {
        self.queue.set(gauge(waiting));
        self.models.set(gauge(models));
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

fn gauge(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// Measures one sequence, from its request until this is dropped.
pub(super) struct Meter {
    metrics: Arc<Metrics>,
    started: Instant,
    begun: bool,
}

impl Meter {
    pub fn new(metrics: &Arc<Metrics>, started: Instant) -> Self {
        Self { metrics: metrics.clone(), started, begun: false }
    }

    /// Counts the tokens of the prompt.
    pub fn count_prompt_tokens(&self, tokens: usize) {
        self.metrics.prompt_tokens.inc_by(tokens as u64);
    }

    /// Counts a token; the first one ends the time to the first token.
    pub fn count_token(&mut self) {
        if !std::mem::replace(&mut self.begun, true) {
            self.metrics.first_token_seconds.observe(self.started.elapsed().as_secs_f64());
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.metrics.request_seconds.observe(self.started.elapsed().as_secs_f64());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_and_answers_are_counted() {
        let metrics = Arc::new(Metrics::default());
        metrics.count_step(StepMetrics {
            sequences: 3,
            rows: 40,
            generated: 3,
            waiting: 2,
            seconds: 0.05,
            ..StepMetrics::default()
        });
        metrics.count_step(StepMetrics {
            sequences: 4,
            rows: 4,
            generated: 4,
            waiting: 0,
            seconds: 0.01,
            ..StepMetrics::default()
        });
        metrics.count_answer("openai", "base", 200);
        let mut meter = Meter::new(&metrics, Instant::now());
        meter.count_prompt_tokens(12);
        meter.count_token();
        meter.count_token();
        drop(meter);
        let text = metrics.text(5, 3);
        for line in [
            "gneiss_generated_tokens_total 7",
            "gneiss_prompt_tokens_total 12",
            "gneiss_batch_sequences_sum 7.0",
            "gneiss_batch_sequences_bucket{le=\"4.0\"} 2",
            "gneiss_batch_rows_count 2",
            "gneiss_step_seconds_count 2",
            "gneiss_queue 5",
            "gneiss_models 3",
            "gneiss_requests_total{api=\"openai\",model=\"base\",status=\"200\"} 1",
            "gneiss_request_seconds_count 1",
            "gneiss_first_token_seconds_count 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is missing in\n{text}");
        }
    }
}
