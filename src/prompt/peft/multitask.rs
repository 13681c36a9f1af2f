//! Prompts of several tasks in one adapter (multitask prompt tuning, Wang et al., 2023, arXiv:2303.02861).

use super::AdapterConfig;
use super::weights::PROMPT;
use crate::layout::adapter_folder::CONFIG;
use candle_core::Tensor;

/// Left factors of all tasks, [T, P, r].
pub(super) const COLUMNS: &str = "prefix_task_cols";
/// Right factors of all tasks, [T, r, C].
pub(super) const ROWS: &str = "prefix_task_rows";

/// The task whose prompt is read: `task`, or the only one.
///
/// # Errors
/// Says that the adapter has no tasks, that a task is needed, or which there are.
pub(super) fn chosen_task(config: &AdapterConfig, task: Option<usize>) -> Result<usize, String> {
    let Some(tasks) = config.tasks() else {
        return match task {
            None => Ok(0),
            Some(task) => Err(format!(
                "expected an adapter without a task, as a {} adapter holds one prompt, found task {task}; hint: leave out \
                 :{task}",
                config.peft_type
            )),
        };
    };
    let last = tasks - 1;
    match task {
        Some(task) if task < tasks => Ok(task),
        Some(task) => Err(format!("expected a task from 0 to {last} of the adapter's {tasks}, found {task}")),
        None if tasks == 1 => Ok(0),
        None => Err(format!(
            "expected a task, as the adapter holds the prompts of {tasks} tasks, found none; hint: name one from 0 to \
             {last} after a colon, such as DIR:0"
        )),
    }
}

/// Which of the tensors of a multitask adapter has another shape than `config` says.
pub(super) fn check(config: &AdapterConfig, tensors: &[Tensor]) -> Result<(), String> {
    let (p, c) = (config.num_virtual_tokens, config.token_dim);
    let (t, r) = (config.tasks().unwrap_or(1), config.num_ranks.unwrap_or(1));
    let expected = [(PROMPT, vec![p, c]), (COLUMNS, vec![t, p, r]), (ROWS, vec![t, r, c])];
    for (tensor, (name, shape)) in tensors.iter().zip(expected) {
        if tensor.dims() != shape {
            return Err(format!(
                "{name}: expected shape {shape:?}, as num_virtual_tokens, token_dim, num_tasks and num_ranks of \
                 {CONFIG} say, found {:?}",
                tensor.dims()
            ));
        }
    }
    Ok(())
}

/// The prompt of a task, [P, C]: `shared * (columns[task] @ rows[task])`, where `*` is elementwise and `tensors` are
/// `shared`, `columns` and `rows`; the only tensor if the adapter holds one prompt.
pub(super) fn prompt_of_task(tensors: &[Tensor], task: usize) -> candle_core::Result<Tensor> {
    match tensors {
        [shared, columns, rows] => shared * columns.get(task)?.matmul(&rows.get(task)?)?,
        _ => Ok(tensors[0].clone()),
    }
}
