//! The folder of adapters that `gneiss serve` follows.

use gneiss::serve::client::Client;
use gneiss::serve::watch::{AdapterFolder, FolderChange};
use std::time::Duration;

/// Time between two updates from the folder of adapters.
const INTERVAL: Duration = Duration::from_secs(1);

/// Loads what a folder contains, and follows its changes until the process ends.
pub(super) fn watch_folder(mut folder: AdapterFolder, client: Client) {
    let mut update = move || {
        match folder.update(&client) {
            Ok(changes) => changes.iter().for_each(report),
            Err(error) => super::warn(format_args!("{error}; what is loaded stays")),
        }
        client.is_serving()
    };
    update();
    std::thread::spawn(move || {
        loop {
            std::thread::sleep(INTERVAL);
            if !update() {
                return;
            }
        }
    });
}

fn report(change: &FolderChange) {
    match change {
        FolderChange::Loaded(name) => status!("loaded     {name}"),
        FolderChange::Unloaded(name) => status!("unloaded   {name}"),
        FolderChange::Failed { name, problem } => super::warn(format_args!("{name}: {problem}")),
    }
}
