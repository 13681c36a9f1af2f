use super::*;
use crate::watsonx::records::{ProjectOrSpace, new_id};

fn model(id: &str, created: u64) -> StoredModel {
    StoredModel {
        id: id.to_owned(),
        name: "n".to_owned(),
        description: String::new(),
        place: ProjectOrSpace::default(),
        local_model: String::new(),
        training: "t".to_owned(),
        training_data_references: serde_json::Value::Null,
        base_model: "b".to_owned(),
        created: Moment(created),
    }
}

fn ids(store: &Store) -> Vec<String> {
    store.list(|_: &StoredModel| true).into_iter().map(|model| model.id).collect()
}

#[test]
fn records_are_there_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path()).unwrap();
    let secret = store.secret().unwrap();
    for (id, created) in [("a", 1), ("b", 3), ("c", 2)] {
        let fill = |into: &Path| std::fs::write(into.join("more"), id).map_err(Error::io(into));
        store.create(model(id, created), fill).unwrap();
    }
    let renamed = store.update("a", |model: &mut StoredModel| {
        model.name = "other".into();
        Ok::<_, Error>(7)
    });
    assert_eq!(renamed.unwrap(), Some(7));
    assert!(store.remove::<StoredModel>("c").unwrap());
    assert!(!store.remove::<StoredModel>("c").unwrap() && !store.remove::<Asset>("a").unwrap());
    assert_eq!(store.update("c", |_: &mut StoredModel| Ok::<_, Error>(())).unwrap(), None);
    let refused = Store::open(folder.path()).map(drop).unwrap_err();
    assert!(matches!(refused, Error::InUse { .. }), "{refused}");
    drop(store);
    let store = Store::open(folder.path()).unwrap();
    assert_eq!(ids(&store), ["b", "a"], "the newest first");
    assert_eq!(store.get::<StoredModel>("a").unwrap().name, "other");
    assert_eq!(std::fs::read_to_string(store.folder::<StoredModel>("a").join("more")).unwrap(), "a");
    assert_eq!(store.secret().unwrap(), secret);
}

#[test]
fn what_fails_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path()).unwrap();
    let failed = store.create(model("a", 1), |_| Err(Error::Invalid("on purpose".into())));
    assert_eq!(failed.unwrap_err().to_string(), "on purpose");
    assert!(ids(&store).is_empty());
    store.create(model("a", 1), |_| Ok(())).unwrap();
    let failed = store.update("a", |model: &mut StoredModel| {
        model.name = "x".into();
        Err::<(), _>(Error::Invalid("on purpose".into()))
    });
    assert!(failed.is_err());
    assert_eq!(store.get::<StoredModel>("a").unwrap().name, "n");
}

#[test]
fn unfinished_folders_are_removed_and_damaged_ones_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let models = folder.path().join("models");
    drop(Store::open(folder.path()).unwrap());
    for name in [".a", ".b.removed"] {
        std::fs::create_dir(models.join(name)).unwrap();
        std::fs::write(models.join(name).join("model.json"), "{").unwrap();
    }
    assert!(ids(&Store::open(folder.path()).unwrap()).is_empty());
    assert_eq!(std::fs::read_dir(&models).unwrap().count(), 0);
    std::fs::create_dir(models.join("c")).unwrap();
    let error = || Store::open(folder.path()).map(drop).unwrap_err().to_string();
    assert!(error().contains("expected the record of a model"), "{}", error());
    std::fs::write(models.join("c/.upload1"), "half").unwrap();
    std::fs::write(models.join("c/model.json"), serde_json::to_vec(&model("d", 1)).unwrap()).unwrap();
    assert!(error().contains("expected the id c, found d"), "{}", error());
    assert!(!models.join("c/.upload1").exists(), "an upload that a killed server did not finish");
}

#[test]
fn new_ids_are_uuids() {
    let (one, two) = (new_id(), new_id());
    assert_ne!(one, two);
    assert!(
        one.len() == 36 && one.chars().all(|c| c == '-' || c.is_ascii_hexdigit() && !c.is_ascii_uppercase())
    );
}
