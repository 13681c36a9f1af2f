//! What the documentation tells of and the program is to get. As soon as it has it, the entry has to go.

use super::commands::Help;

/// Configuration keys.
pub const KEYS: [&str; 3] = ["train.early_stopping", "train.checkpoint_steps", "train.tensorboard"];
/// Subcommands.
pub const COMMANDS: [&str; 2] = ["report", "tutorial"];
/// Flags of subcommands.
pub const FLAGS: [(&str, &str); 3] = [("tune", "--resume"), ("tune", "--find-lr"), ("eval", "--out")];

#[test]
fn what_has_come_is_no_longer_pending() {
    let defaults = super::defaults();
    let keys = KEYS.iter().filter(|key| super::reference::lookup(&defaults, key).is_some());
    let commands = COMMANDS.iter().filter(|name| Help::commands().iter().any(|there| there == *name));
    let flags = FLAGS.iter().filter(|(command, flag)| Help::of(command).has(flag)).map(|(_, flag)| flag);
    let come: Vec<_> = keys.chain(commands).chain(flags).collect();
    assert!(come.is_empty(), "tests/docs/pending.rs: delete {come:?}, the program has them");
}
